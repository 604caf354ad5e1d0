"""Dataclasses of several kinds as plain data: their fields, and the name of their kind as `type`."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

T = TypeVar("T")


def tagged_to_json(kinds: Mapping[str, type[T]], value: T) -> dict[str, Any]:
    """A dataclass of one of the kinds, by name."""
    return {"type": name_of_kind(kinds, value), **asdict(value)}  # type: ignore[call-overload]


def tagged_from_json(kinds: Mapping[str, type[T]], value: Mapping[str, Any], what: str) -> T:
    """The inverse of tagged_to_json.

    Raises:
        ValueError: a type or parameter that `what` (as "a transform") does not have, or a value that it refuses.
    """
    name = value.get("type")
    kind = kinds.get(str(name))
    if kind is None:
        raise ValueError(f"type of {what} ({name}) is none of {', '.join(kinds)}")
    parameters = {key: item for key, item in value.items() if key != "type"}
    known = [parameter.name for parameter in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"parameter {unknown[0]} ({parameters[unknown[0]]}) of {name} is none of ({', '.join(known)})")
    return kind(**parameters)


def name_of_kind(kinds: Mapping[str, type[T]], value: T) -> str:
    """The name that the kind of a value has."""
    return next(name for name, kind in kinds.items() if kind is type(value))
