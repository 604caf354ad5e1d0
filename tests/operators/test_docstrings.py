import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest

from penstock.operators.docstrings import (
    DocstringKind,
    extract_docstrings,
    find_docstrings,
    module_name,
    package_folders,
)

SOURCE = b'''"""Module text."""

class Outer:
    """Class text."""

    class Inner:
        """Inner text."""

        async def fetch(self):
            """Async text.

                indented
            """
            def helper():
                """Helper text."""

    @property
    def size(self):
        """Getter."""

    @size.setter
    def size(self, value):
        """Setter."""

    def bare(self): ...
    def blank(self):
        """   """

if True:
    def chosen():
        """First."""
elif False:
    def chosen():
        """Second."""
else:
    def chosen():
        """Third."""

try:
    def tried(): "In try."
except ValueError:
    def caught(): "In except."
else:
    def otherwise(): "In else."
finally:
    def at_last(): "In finally."

match 1:
    case 1:
        def matched(): "In match."
for _ in ():
    def looped(): "In for."
while False:
    def whiled(): "In while."
with open("x") as f:
    def within(): "In with."
'''


def test_docstrings_at_any_nesting_have_qualified_names_in_source_order() -> None:
    assert extract_docstrings(SOURCE, "pkg.mod") == [
        ("pkg.mod", "Module text."),
        ("pkg.mod.Outer", "Class text."),
        ("pkg.mod.Outer.Inner", "Inner text."),
        ("pkg.mod.Outer.Inner.fetch", "Async text.\n\nindented"),
        ("pkg.mod.Outer.Inner.fetch.helper", "Helper text."),
        ("pkg.mod.Outer.size", "Getter."),
        ("pkg.mod.Outer.size~2", "Setter."),
        ("pkg.mod.chosen", "First."),
        ("pkg.mod.chosen~2", "Second."),
        ("pkg.mod.chosen~3", "Third."),
        ("pkg.mod.tried", "In try."),
        ("pkg.mod.caught", "In except."),
        ("pkg.mod.otherwise", "In else."),
        ("pkg.mod.at_last", "In finally."),
        ("pkg.mod.matched", "In match."),
        ("pkg.mod.looped", "In for."),
        ("pkg.mod.whiled", "In while."),
        ("pkg.mod.within", "In with."),
    ]


def test_kinds() -> None:
    kinds = {docstring.name: docstring.kind for docstring in find_docstrings(SOURCE, "m")}
    assert kinds["m"] is DocstringKind.MODULE
    assert kinds["m.Outer.Inner"] is DocstringKind.CLASS
    assert kinds["m.Outer.Inner.fetch"] is DocstringKind.FUNCTION


def test_texts_equal_those_of_the_imported_module() -> None:
    import penstock.operators.identity as identity

    docstrings = dict(extract_docstrings(Path(identity.__file__).read_bytes(), identity.__name__))
    assert docstrings[identity.__name__] == inspect.getdoc(identity)
    assert docstrings[f"{identity.__name__}.canonical_json"] == inspect.getdoc(identity.canonical_json)


@pytest.mark.parametrize(
    "source",
    [b"def broken(:\n", b"x = 1\x00", b"\xff\xfe", b"(" * 5_000, b"-" * 200_000 + b"1", b"# coding: nonsense\n"],
    ids=["syntax", "nul", "encoding", "parentheses", "deep", "cookie"],
)
def test_source_that_does_not_parse_is_a_value_error_that_names_the_module(source: bytes) -> None:
    with pytest.raises(ValueError, match=r"source of pkg\.mod does not parse"):
        extract_docstrings(source, "pkg.mod")


def test_nothing_is_executed_and_warnings_stay_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_docstrings(b'raise SystemExit\ndef f():\n    "a \\d"\n1 is 1\n', "m") == [("m.f", "a \\d")]


def test_long_elif_chains_are_not_recursed() -> None:
    chain = "if x:\n    pass\n" + "elif x:\n    def f(): 'text'\n" * 150
    assert len(extract_docstrings(chain.encode(), "m")) == 150


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("numpy/linalg/_linalg.py", "numpy.linalg._linalg"),
        ("numpy/linalg/__init__.py", "numpy.linalg"),
        ("six.py", "six"),
        ("pkg/stub.pyi", "pkg.stub"),
    ],
)
def test_module_name(path: str, name: str) -> None:
    assert module_name(path) == name


def test_package_folders_finds_folders_and_single_files() -> None:
    folders = package_folders(["numpy", "this"])
    assert folders["numpy"] == str(Path(np.__file__).parent)
    assert folders["this"].endswith("this.py")


def test_star_means_all_of_site_packages() -> None:
    folders = package_folders(["*"])
    assert folders["numpy"] == str(Path(np.__file__).parent)
    assert {"pyarrow", "pytest", "hypothesis"} <= folders.keys()
    assert all(Path(folder).exists() for folder in folders.values())


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("numpyy", r"\(numpyy\) is not installed; near names: .*numpy"),
        ("numpy.linalg", r"\(numpy\.linalg\) is not a top-level import name"),
        ("sys", r"\(sys\) has no Python source"),
    ],
)
def test_unknown_packages_are_named(package: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        package_folders([package])
