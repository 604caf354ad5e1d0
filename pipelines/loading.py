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

from penstock.cluster.storage import redact
from penstock.pipelines.config import (
    ENVIRONMENT_PATHS,
    DocstringDocuments,
    PipelineFile,
    TabularDocuments,
    TextDocuments,
)

MAX_FILE_BYTES = 262_144
MAX_DEPTH = 32  # the deepest key has 4; PyYAML recurses, and 100,000 open brackets took it 335 s
MAX_SHOWN_CHARACTERS = 200
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Before the first slash, or with a colon before the @: secret keys may hold slashes.
CREDENTIALS = re.compile(r"://(?:[^/@\s]*|[^/:@\s]*:[^@\s]*)@")
Location = tuple[str | int, ...]
YAML_TAG = "tag:yaml.org,2002:"
SCALAR_TAGS = {YAML_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp")}
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
        source, line = _place(tuple(location.split(".")), self.file, self.lines)
        return Problem(source, line, location, message)


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> tuple[PipelineFile, Origin]:
    """The validated pipeline of the YAML file at `path`, `key.key=value` overrides applied, and where it was written.

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
        problems += _invalid(error, content, file, lines)
    if problems:
        raise PipelineFileInvalid(problems)
    return pipeline, Origin(file, lines)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineFileInvalid([Problem(str(path), 0, "", f"cannot be read ({reason}); check the path")]) from error
    if len(content) > MAX_FILE_BYTES:
        rule = f"a pipeline file has at most {MAX_FILE_BYTES} bytes, got more; is this the right file?"
        raise PipelineFileInvalid([Problem(str(path), 0, "", rule)])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PipelineFileInvalid([Problem(str(path), line, "", f"must be a UTF-8 text file: {error}")]) from error


def _parse_yaml(text: str, file: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """Plain data and the line of every key, from YAML without aliases, tags or duplicate keys."""
    try:
        node = _compose(text, file)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"character U+{error.character:04X} is not allowed ({error.reason})"
        raise PipelineFileInvalid([Problem(file, line, "", f"is not valid YAML: {reason}")]) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise PipelineFileInvalid([Problem(file, line, "", f"is not valid YAML: {error.problem}")]) from error
    except (ValueError, OverflowError) as error:  # an escape beyond the last code point, as "\UFFFFFFFF"
        raise PipelineFileInvalid([Problem(file, 0, "", f"is not valid YAML: {error}")]) from error
    lines: dict[Location, int] = {}
    problems: list[Problem] = []
    content = _construct(node, (), lines, file, problems) if node else None
    if not problems and not isinstance(content, dict):
        problems.append(Problem(file, 1, "", "must be a mapping of sections (name, root, documents, ...)"))
    if problems or not isinstance(content, dict):
        raise PipelineFileInvalid(problems)
    return content, lines


def _compose(text: str, file: str) -> Node | None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if depth > MAX_DEPTH:
            rule = f"nests deeper than {MAX_DEPTH} levels; write it flatter"
            raise PipelineFileInvalid([Problem(file, line, "", rule)])
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            rule = "anchors and aliases are not allowed; write the value out"
            raise PipelineFileInvalid([Problem(file, line, "", rule)])
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _construct(node: Node, where: Location, lines: dict[Location, int], file: str, problems: list[Problem]) -> Any:  # noqa: ANN401
    lines.setdefault(where, node.start_mark.line + 1)
    match node:
        case MappingNode() if node.tag == YAML_TAG + "map":
            return _construct_mapping(node, where, lines, file, problems)
        case SequenceNode() if node.tag == YAML_TAG + "seq":
            return [_construct(item, (*where, i), lines, file, problems) for i, item in enumerate(node.value)]
        case ScalarNode() if node.tag in SCALAR_TAGS:
            return _construct_scalar(node, where, file, problems)
        case _:
            problems.append(_bad_tag(node, where, file))
            return None


def _construct_scalar(
    node: ScalarNode, where: Location, file: str, problems: list[Problem]
) -> str | int | float | None:
    """The value of a scalar; dates stay text. What looks like a number and is none (0b_, !!int x) is a problem."""
    kind = node.tag.removeprefix(YAML_TAG)
    if kind == "timestamp":
        return str(node.value)
    try:
        value: str | int | float | None = yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError):
        rule = f"({_shown(node.value)}) is no valid YAML {kind}; put it in quotes if it is text"
        problems.append(Problem(file, node.start_mark.line + 1, _dotted(where), rule))
        return None
    return value


def _construct_mapping(
    node: MappingNode, where: Location, lines: dict[Location, int], file: str, problems: list[Problem]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode) or key_node.tag not in SCALAR_TAGS:
            problems.append(_bad_tag(key_node, where, file))
            continue
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


def _bad_tag(node: Node, where: Location, file: str) -> Problem:
    rule = f"tag {node.tag} is not allowed here; use plain text keys, text, numbers, true/false, lists and mappings"
    return Problem(file, node.start_mark.line + 1, _dotted(where), rule)


def _apply_override(
    content: dict[str, Any], lines: dict[Location, int], override: str, problems: list[Problem]
) -> None:
    key, separator, value = override.partition("=")
    path = tuple(key.split("."))
    if not separator or not all(path):
        rule = f"({_shown(override)}) must read key.key=value, as in index.shards=4"
        problems.append(Problem("--set", 0, "", rule))
        return
    try:
        parsed, _ = _parse_yaml(f"value: {value}", "--set")
    except PipelineFileInvalid as error:
        problems += [Problem("--set", 0, key, problem.message) for problem in error.problems]
        return
    section = _section_at(content, path[:-1], lines)
    if section is None:
        rule = f"{_dotted(path[:-1])} has a value, not keys; set that value as a whole"
        problems.append(Problem("--set", 0, key, rule))
        return
    if len(parsed) > 1:
        problems.append(Problem("--set", 0, key, f"({_shown(value)}) must be one value; repeat --set for each key"))
        return
    section[path[-1]] = parsed["value"]
    for stale in [known for known in lines if known[: len(path)] == path]:
        del lines[stale]
    lines[path] = 0


def _section_at(content: dict[str, Any], path: tuple[str, ...], lines: dict[Location, int]) -> dict[str, Any] | None:
    """The mapping at `path`, made where nothing is yet; None where the path meets a value."""
    section = content
    for depth, part in enumerate(path, 1):
        if section.get(part) is None:
            section[part] = {}
            lines[path[:depth]] = 0
        section = section[part]
        if not isinstance(section, dict):
            return None
    return section


def _expand_environment(
    value: Any,  # noqa: ANN401
    where: Location,
    file: str,
    lines: Mapping[Location, int],
    problems: list[Problem],
) -> Any:  # noqa: ANN401
    """Replace ${NAME} in root and paths, in place; anywhere else it is a problem, as are passwords in URLs."""
    match value:
        case dict():
            for key in value:
                value[key] = _expand_environment(value[key], (*where, key), file, lines, problems)
        case list():
            for position, item in enumerate(value):
                value[position] = _expand_environment(item, (*where, position), file, lines, problems)
        case str():
            try:
                return _expand(value, where)
            except ValueError as error:
                problems.append(Problem(*_place(where, file, lines), _dotted(where), str(error)))
    return value


def _expand(value: str, where: Location) -> str:
    if "${" in value and tuple(part for part in where if isinstance(part, str)) not in ENVIRONMENT_PATHS:
        allowed = ", ".join(_dotted(path) for path in ENVIRONMENT_PATHS)
        raise ValueError(f"({_shown(value)}) environment variables are only allowed in {allowed}")
    if "${" in VARIABLE.sub("", value):
        raise ValueError(f"({_shown(value)}) a variable must read ${{NAME}}, a name of letters, digits and _")
    missing = [name for name in VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise ValueError(f"({_shown(value)}) environment variable {missing[0]} is not set; export it")
    expanded = VARIABLE.sub(lambda match: os.environ[match.group(1)], value)
    if CREDENTIALS.search(expanded):
        raise ValueError(
            f"({_shown(expanded)}) a URL must not hold a user or password, which would be recorded with the run; "
            "for S3, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return expanded


def _invalid(
    error: ValidationError, content: dict[str, Any], file: str, lines: Mapping[Location, int]
) -> list[Problem]:
    """One problem for each place: of a value that may have several forms, pydantic says why it is none of them."""
    messages: dict[Location, list[str]] = {}
    for detail in error.errors(include_url=False):
        where = _written_location(dict(detail), content)
        messages.setdefault(where, []).append(_message(dict(detail), where, content))
    problems = []
    above = {where[:depth] for where in messages for depth in range(len(where))}
    for where, found in messages.items():
        if where in above:
            continue  # another form came further, and says what is wrong inside
        message = " or ".join([found[0], *(rule.partition(") must ")[2] for rule in found[1:])])
        source, line = _place(_subject(where, message, lines), file, lines)
        problems.append(Problem(source, line, _dotted(where), message))
    return problems


def _message(detail: dict[str, Any], where: Location, content: dict[str, Any]) -> str:
    got = _shown(_value_at(content, where))
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
        case "union_tag_invalid":
            near = difflib.get_close_matches(str(_value_at(content, where)), DOCUMENT_VARIANTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"({got}) must be one of {', '.join(DOCUMENT_VARIANTS)}{hint}"
        case "tuple_type":
            return f"({got}) must be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"({got}) must be a mapping of keys to values"
        case _:
            rule = re.sub(r"^(Input|String|Tuple) (?=should)", "", str(detail["msg"])).replace("should", "must")
            return f"({got}) {rule}"


def _shown(value: object) -> str:
    """A value as messages show it: of limited length, without passwords in URLs and signatures of URLs."""
    text = redact(repr(value))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _written_location(detail: dict[str, Any], content: dict[str, Any]) -> Location:
    """The location as the file's author wrote it: without the names of union members that pydantic adds."""
    given = detail["loc"]
    if given[:1] == ("documents",):
        given = (given[0], *given[2:])  # the second is the variant's tag
    where: list[str | int] = []
    value: Any = content
    for part in given:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            where.append(part)
            value = value[part]
    if detail["type"] == "missing":
        where.append(given[-1])
    if detail["type"] == "union_tag_invalid":
        where.append("type")
    return tuple(where)


def _subject(where: Location, message: str, lines: Mapping[Location, int]) -> Location:
    """The key that a rule about a whole section begins with (`overlap (9) must ...`), if that key is in the file."""
    subject = (*where, *message.partition(" ")[0].split("."))
    return subject if subject in lines else where


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


def _place(where: Location, file: str, lines: Mapping[Location, int]) -> tuple[str, int]:
    """The file and line of a key, or of the nearest section above that is written; `--set` for what an override set."""
    while where and where not in lines:
        where = where[:-1]
    return ("--set", 0) if lines.get(where) == 0 else (file, lines.get(where, 0))


def _dotted(where: Location) -> str:
    return ".".join(str(part) for part in where)
