"""Read a pipeline file: strict YAML, environment variables in paths, `--set` overrides, and every problem at once."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from penstock.pipelines.config import (
    ENVIRONMENT_PATHS,
    DocstringDocuments,
    PipelineFile,
    TabularDocuments,
    TextDocuments,
)

MAX_FILE_BYTES = 262_144
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
Location = tuple[str | int, ...]
SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}
DOCUMENT_VARIANTS = {
    "parquet": TabularDocuments,
    "jsonl": TabularDocuments,
    "csv": TabularDocuments,
    "text": TextDocuments,
    "docstrings": DocstringDocuments,
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a pipeline file: where, what was got, the rule and the remedy in `message`."""

    file: str
    line: int
    location: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        subject = f"{self.location}: " if self.location else ""
        return f"{place}: {subject}{self.message}"


class PipelineFileInvalid(Exception):
    """A pipeline file with problems, all of them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Origin:
    """Where a pipeline was written: the file, and the line of each key; makes problems found later point there too."""

    file: str
    lines: Mapping[Location, int]

    def problem(self, location: str, message: str) -> Problem:
        where: Location = tuple(location.split("."))
        source = "--set" if self.lines.get(where) == 0 else self.file
        return Problem(source, _line(where, self.lines), location, message)


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> tuple[PipelineFile, Origin]:
    """The validated pipeline of the YAML file at `path`, with `key.key=value` overrides applied, and where it was written.

    Raises:
        PipelineFileInvalid: with every problem found, each with file, line, value, rule and remedy.
    """
    return parse_pipeline(_read_text(Path(path)), str(path), overrides)


def parse_pipeline(text: str, file: str = "<pipeline>", overrides: Sequence[str] = ()) -> tuple[PipelineFile, Origin]:
    """As load_pipeline, from the text itself."""
    content, lines = _parse_yaml(text, file)
    problems: list[Problem] = []
    for override in overrides:
        _apply_override(content, lines, override, problems)
    _expand_environment(content, (), file, lines, problems)
    try:
        pipeline = PipelineFile.model_validate(content)
    except ValidationError as error:
        problems += [_problem(dict(detail), content, file, lines) for detail in error.errors(include_url=False)]
    if problems:
        raise PipelineFileInvalid(problems)
    return pipeline, Origin(file, lines)


def _read_text(path: Path) -> str:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise PipelineFileInvalid(
            [Problem(str(path), 0, "", f"cannot be read ({error.strerror}); check the path")]
        ) from error
    if size_bytes > MAX_FILE_BYTES:
        rule = f"a pipeline file has at most {MAX_FILE_BYTES} bytes, got {size_bytes}; is this the right file?"
        raise PipelineFileInvalid([Problem(str(path), 0, "", rule)])
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise PipelineFileInvalid([Problem(str(path), 0, "", f"must be a UTF-8 text file: {error}")]) from error


def _parse_yaml(text: str, file: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """Plain data and the line of every key, from YAML without aliases, tags or duplicate keys."""
    try:
        node = _compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        reason = getattr(error, "problem", None) or str(error)
        raise PipelineFileInvalid([Problem(file, line, "", f"is not valid YAML: {reason}")]) from error
    lines: dict[Location, int] = {}
    problems: list[Problem] = []
    content = _construct(node, (), lines, file, problems) if node else None
    if not problems and not isinstance(content, dict):
        problems.append(Problem(file, 1, "", "must be a mapping of sections (name, root, documents, ...)"))
    if problems or not isinstance(content, dict):
        raise PipelineFileInvalid(problems)
    return content, lines


def _compose(text: str) -> Node | None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed; write the value out", problem_mark=event.start_mark
            )
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _construct(node: Node, where: Location, lines: dict[Location, int], file: str, problems: list[Problem]) -> Any:  # noqa: ANN401
    lines.setdefault(where, node.start_mark.line + 1)
    match node:
        case MappingNode():
            return _construct_mapping(node, where, lines, file, problems)
        case SequenceNode():
            return [_construct(item, (*where, i), lines, file, problems) for i, item in enumerate(node.value)]
        case ScalarNode() if node.tag in SCALAR_TAGS:
            value = yaml.SafeLoader("").construct_object(node)
            return value if isinstance(value, (str, int, float, bool, type(None))) else node.value
        case _:
            rule = f"tag {node.tag} is not allowed; use plain text, numbers, true/false, lists and mappings"
            problems.append(Problem(file, node.start_mark.line + 1, _dotted(where), rule))
            return None


def _construct_mapping(
    node: MappingNode, where: Location, lines: dict[Location, int], file: str, problems: list[Problem]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        if key in result:
            first = lines[(*where, key)]
            problems.append(
                Problem(file, line, _dotted((*where, key)), f"is there already (line {first}); keep one of them")
            )
            continue
        lines[(*where, key)] = line
        result[key] = _construct(value_node, (*where, key), lines, file, problems)
    return result


def _apply_override(
    content: dict[str, Any], lines: dict[Location, int], override: str, problems: list[Problem]
) -> None:
    key, separator, value = override.partition("=")
    path = key.split(".")
    if not separator or not all(path):
        problems.append(Problem("--set", 0, "", f"({override}) must read key.key=value, as in index.shards=4"))
        return
    try:
        parsed, _ = _parse_yaml(f"value: {value}", "--set")
    except PipelineFileInvalid as error:
        problems += [Problem("--set", 0, key, problem.message) for problem in error.problems]
        return
    target = content
    for part in path[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[path[-1]] = parsed["value"]
    lines[tuple(path)] = 0


def _expand_environment(
    value: Any,  # noqa: ANN401
    where: Location,
    file: str,
    lines: Mapping[Location, int],
    problems: list[Problem],
) -> Any:  # noqa: ANN401
    """Replace ${NAME} in root and paths, in place; anywhere else it is a problem."""
    match value:
        case dict():
            for key in value:
                value[key] = _expand_environment(value[key], (*where, key), file, lines, problems)
        case list():
            for position, item in enumerate(value):
                value[position] = _expand_environment(item, (*where, position), file, lines, problems)
        case str() if "${" in value:
            try:
                return _expand(value, where)
            except ValueError as error:
                problems.append(Problem(file, _line(where, lines), _dotted(where), str(error)))
    return value


def _expand(value: str, where: Location) -> str:
    if tuple(part for part in where if isinstance(part, str)) not in ENVIRONMENT_PATHS:
        allowed = ", ".join(_dotted(path) for path in ENVIRONMENT_PATHS)
        raise ValueError(f"({value}) environment variables are only allowed in {allowed}")
    missing = [name for name in VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise ValueError(f"({value}) environment variable {missing[0]} is not set; export it")
    return VARIABLE.sub(lambda match: os.environ[match.group(1)], value)


def _problem(detail: dict[str, Any], content: dict[str, Any], file: str, lines: Mapping[Location, int]) -> Problem:
    where = _written_location(detail, content)
    source = "--set" if lines.get(where) == 0 else file
    return Problem(source, _line(where, lines), _dotted(where), _message(detail, where, content))


def _message(detail: dict[str, Any], where: Location, content: dict[str, Any]) -> str:
    got = _value_at(content, where)
    match detail["type"]:
        case "extra_forbidden":
            known = _keys_at(where[:-1], content)
            near = difflib.get_close_matches(str(where[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
            return f"is not a key here; {hint}"
        case "missing":
            return "is required; add it"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "union_tag_not_found":
            return f"needs a type: one of {', '.join(DOCUMENT_VARIANTS)}"
        case _:
            rule = str(detail["msg"]).removeprefix("Input ").replace("should", "must")
            return f"({got!r}) {rule}"


def _written_location(detail: dict[str, Any], content: dict[str, Any]) -> Location:
    """The location as the file's author wrote it: without the names of union members that pydantic adds."""
    where: list[str | int] = []
    value: Any = content
    for part in detail["loc"]:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            where.append(part)
            value = value[part]
    if detail["type"] == "missing":
        where.append(detail["loc"][-1])
    return tuple(where)


def _keys_at(where: Location, content: dict[str, Any]) -> list[str]:
    """The keys that the pipeline file may have at a place."""
    model: Any = PipelineFile
    value: Any = content
    for part in where:
        value = value.get(part) if isinstance(value, dict) else None
        if part == "documents":
            kind = value.get("type") if isinstance(value, dict) else None
            model = DOCUMENT_VARIANTS.get(str(kind), TabularDocuments)
        else:
            model = _section_of(model, str(part))
    return list(model.model_fields) if model else []


def _section_of(model: Any, key: str) -> Any:  # noqa: ANN401
    field = model.model_fields.get(key) if model else None
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)


def _value_at(content: Any, where: Location) -> Any:  # noqa: ANN401
    for part in where:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _line(where: Location, lines: Mapping[Location, int]) -> int:
    """The line of a key, or of the nearest section that is written in the file."""
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 0)


def _dotted(where: Location) -> str:
    return ".".join(str(part) for part in where)
