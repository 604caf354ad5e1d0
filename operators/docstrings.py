"""Docstrings of Python source files as documents: read by `ast` alone, nothing is imported or executed."""

import ast
import difflib
import pkgutil
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

EVERY_PACKAGE = "*"
SOURCE_SUFFIXES = (".py", ".pyi")

# Statements that hold statements, and where. Definitions stand in statement bodies only, so expressions (nine tenths of
# the nodes of a typical file) are never visited.
_BODIES: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Module: ("body",),
    ast.ClassDef: ("body",),
    ast.FunctionDef: ("body",),
    ast.AsyncFunctionDef: ("body",),
    ast.If: ("body", "orelse"),
    ast.For: ("body", "orelse"),
    ast.AsyncFor: ("body", "orelse"),
    ast.While: ("body", "orelse"),
    ast.With: ("body",),
    ast.AsyncWith: ("body",),
    ast.Try: ("body", "handlers", "orelse", "finalbody"),
    ast.TryStar: ("body", "handlers", "orelse", "finalbody"),
    ast.ExceptHandler: ("body",),
    ast.Match: ("cases",),
    ast.match_case: ("body",),
}


class DocstringKind(StrEnum):
    MODULE = "module"
    CLASS = "class"
    FUNCTION = "function"


@dataclass(frozen=True)
class Docstring:
    """One docstring: the qualified name of what it describes, unique within its file, and its cleaned text."""

    name: str
    kind: DocstringKind
    text: str


def find_docstrings(source: bytes, module: str) -> list[Docstring]:
    """Docstrings of the module, its classes and its functions at any nesting, in source order, blank ones skipped.

    Text is cleaned as `inspect.cleandoc` does. A name that is documented again in the same file (the branches of an
    `if`, the parts of a property) gets "~2", "~3": a tilde cannot occur in a Python name.

    Raises:
        ValueError: the source does not parse.
    """
    seen: Counter[str] = Counter()
    docstrings = []
    for name, node in _definitions(_parse(source, module), module):
        text = ast.get_docstring(node)
        if text is None or not text.strip():
            continue
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}~{seen[name]}"
        docstrings.append(Docstring(unique, _kind(node), text))
    return docstrings


def extract_docstrings(source: bytes, module: str) -> list[tuple[str, str]]:
    """`find_docstrings` as (qualified name, text) pairs."""
    return [(docstring.name, docstring.text) for docstring in find_docstrings(source, module)]


def module_name(path: str) -> str:
    """Dotted name of the module at a relative path: "numpy/linalg/__init__.py" is "numpy.linalg"."""
    parts = path.split("/")
    for suffix in SOURCE_SUFFIXES:
        parts[-1] = parts[-1].removesuffix(suffix)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def package_folders(packages: Sequence[str]) -> dict[str, str]:
    """Where each top-level import name lies: its folder, or its file for a single-file module. Imports nothing.

    "*" alone stands for every package and module of the environment's site-packages that has Python source.

    Raises:
        ValueError: a name that is unknown, dotted, without Python source, or spread over several folders.
    """
    if list(packages) == [EVERY_PACKAGE]:
        return _installed_packages()
    return {package: _package_folder(package) for package in packages}


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _parse(source: bytes, module: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes of other people's code are not our user's concern
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # MemoryError: the parser's stack overflow
        raise ValueError(f"source of {module} does not parse as Python: {error or type(error).__name__}") from error


def _definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, _Definition]]:
    # An explicit stack: a chain of a thousand elif branches nests a thousand deep.
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prefix = f"{prefix}.{node.name}"
        if isinstance(node, _Definition):
            yield prefix, node
        children = [child for field in _BODIES[type(node)] for child in getattr(node, field)]
        pending.extend((prefix, child) for child in reversed(children) if type(child) in _BODIES)


def _kind(node: _Definition) -> DocstringKind:
    match node:
        case ast.Module():
            return DocstringKind.MODULE
        case ast.ClassDef():
            return DocstringKind.CLASS
        case _:
            return DocstringKind.FUNCTION


def _package_folder(package: str) -> str:
    if not package.isidentifier():
        raise ValueError(f"package ({package}) is not a top-level import name; name its first part only")
    try:
        spec = find_spec(package)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise ValueError(f"package ({package}) is not installed{_near(package)}; install it or correct the name")
    folder = _source_folder(spec)
    if folder is None:
        raise ValueError(f"package ({package}) has no Python source in one folder; leave it out")
    return folder


def _near(package: str) -> str:
    known = {module.name for module in pkgutil.iter_modules()}
    names = difflib.get_close_matches(package, sorted(known), n=3)
    return f"; near names: {', '.join(names)}" if names else ""


def _source_folder(spec: ModuleSpec) -> str | None:
    if spec.submodule_search_locations is not None:
        folders = list(spec.submodule_search_locations)
        return folders[0] if len(folders) == 1 else None
    return spec.origin if spec.origin is not None and spec.origin.endswith(SOURCE_SUFFIXES) else None


def _installed_packages() -> dict[str, str]:
    sites = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    specs = {module.name: PathFinder.find_spec(module.name, sites) for module in pkgutil.iter_modules(sites)}
    folders = {name: _source_folder(spec) for name, spec in sorted(specs.items()) if spec is not None}
    return {name: folder for name, folder in folders.items() if folder is not None}
