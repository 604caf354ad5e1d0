"""Which rows a search may find: conditions on metadata columns, and the mask of the rows that meet them all."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, TypeAlias, assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.operators.metadata import KEEP_TYPES, kept_value
from penstock.operators.rows import RowRejected

BOUNDS = {">=": "min", "<=": "max"}
UNFILTERED_COLUMNS = {"passage_id", "start", "end", "text"}  # of a shard's rows; they say where a passage lies
Scalar: TypeAlias = str | int | float | bool | datetime

_TYPE_NAMES = {arrow_type: name for name, arrow_type in KEEP_TYPES.items()}
_CONDITION = re.compile(r"\s*([^<>=!\s][^<>=!]*?)\s*(>=|<=|=)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class OneOf:
    """The value of the column is one of these; equality is a single one."""

    column: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Between:
    """The value of the column lies between two, both included; None leaves a side open."""

    column: str
    low: Scalar | None
    high: Scalar | None


Condition: TypeAlias = OneOf | Between


def conditions_of(where: Mapping[str, object]) -> tuple[Condition, ...]:
    """The conditions that a filter states, all of which a row must meet.

    Args:
        where: column → a value (equality), a list, tuple or set of values (one of them), or a mapping with `min`,
            `max` or both (a range, both ends included).

    Raises:
        ValueError: a condition of another form.
    """
    return tuple(_condition(column, wanted) for column, wanted in where.items())


def parse_where(texts: Sequence[str]) -> dict[str, Any]:
    """A filter from texts: `column=value`, `column=a,b` (one of several), `column>=value`, `column<=value`.

    Raises:
        ValueError: a text of another form, or two of them that say the same of one column.
    """
    where: dict[str, Any] = {}
    for text in texts:
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise ValueError(
                f"condition ({text}) must be column=value, column=value,value, column>=value or column<=value"
            )
        column, operator, value = found.groups()
        wanted = {BOUNDS[operator]: value} if operator in BOUNDS else value.split(",")
        where[column] = _both(column, where[column], wanted) if column in where else wanted
    return where


def bind(conditions: Sequence[Condition], schema: pa.Schema) -> tuple[Condition, ...]:
    """The conditions with each value in the type of its column, by the rules for kept columns.

    A text stands for a number, bool or timestamp that it spells.

    Raises:
        ValueError: no such column to filter by, or a value that does not fit its type.
    """
    return tuple(_bound(condition, schema) for condition in conditions)


def matching_rows(rows: pa.Table, conditions: Sequence[Condition]) -> np.ndarray:
    """bool (n,): which of n rows meet all conditions, after `bind`. A null meets none."""
    matching = np.ones(rows.num_rows, dtype=bool)
    for condition in conditions:
        matching &= _matches(rows.column(condition.column), condition)
    return matching


def _condition(column: str, wanted: object) -> Condition:
    match wanted:
        case Mapping():
            bounds = {name: bound for name, bound in wanted.items() if bound is not None}
            if not bounds or not set(bounds) <= set(BOUNDS.values()):
                raise ValueError(f"where: range of column {column} ({dict(wanted)}) must have `min`, `max` or both")
            return Between(column, bounds.get("min"), bounds.get("max"))
        case list() | tuple() | set() | frozenset():
            return OneOf(column, tuple(wanted))
        case _:
            return OneOf(column, (wanted,))  # type: ignore[arg-type]


def _bound(condition: Condition, schema: pa.Schema) -> Condition:
    columns = [name for name in schema.names if name not in UNFILTERED_COLUMNS]
    if condition.column not in columns:
        raise ValueError(
            f"where: column ({condition.column}) must be one that the index keeps: {', '.join(columns)}; to filter by "
            "another, add it to documents.keep and run again"
        )
    field = schema.field(condition.column)
    match condition:
        case OneOf(values=values):
            return replace(condition, values=tuple(_fitted(value, field) for value in values))
        case Between(low=low, high=high):
            low, high = (None if value is None else _fitted(value, field) for value in (low, high))
            return replace(condition, low=low, high=high)
        case _:
            assert_never(condition)


def _fitted(value: object, field: pa.Field) -> Scalar:
    """The value as the column's type has it."""
    type_name = _TYPE_NAMES[field.type]
    plain = value.item() if isinstance(value, np.generic) else value
    raw = plain.isoformat() if isinstance(plain, date) else plain
    if type_name != "string" or isinstance(raw, str):
        with suppress(RowRejected):
            fitted: Any = kept_value(raw, field.name, type_name)
            if fitted is not None:
                return fitted  # type: ignore[no-any-return]
    raise ValueError(
        f"where: value ({value!r}) for column {field.name} must be of its type {type_name}, got {type(value).__name__}"
    )


def _matches(column: pa.ChunkedArray, condition: Condition) -> np.ndarray:
    match condition:
        case OneOf(values=values):
            matches = pc.is_in(column, value_set=pa.array(values, column.type))
        case Between(low=low, high=high):
            matches = _within(column, low, high)
        case _:
            assert_never(condition)
    met: np.ndarray = matches.to_numpy()
    return met


def _within(column: pa.ChunkedArray, low: Scalar | None, high: Scalar | None) -> pa.ChunkedArray:
    sides = [
        compare(column, pa.scalar(bound, column.type))
        for compare, bound in ((pc.greater_equal, low), (pc.less_equal, high))
        if bound is not None
    ]
    within = pc.and_(*sides) if len(sides) == 2 else sides[0]
    return pc.fill_null(within, False)


def _both(column: str, first: object, second: object) -> dict[str, str]:
    """Two conditions on one column as one range."""
    if not isinstance(first, dict) or not isinstance(second, dict) or set(first) & set(second):
        raise ValueError(
            f"conditions on column {column} must be one, or a lower and an upper bound; give several values as "
            f"{column}=a,b"
        )
    return {**first, **second}
