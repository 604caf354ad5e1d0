"""Kept metadata values: the types that can be declared, and what of a source fits them."""

import json
import re
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa

from penstock.operators.rows import ABSENT, Reason, RowRejected, unicode_text

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# Timestamps are kept to the microsecond, in UTC; one without a zone is taken as UTC.
KEEP_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}  # as pyarrow.csv reads them


def kept_value(raw: object, column: str, type_name: str) -> object:
    """The raw value as a Python value of the declared type, or None. Refuses what does not fit."""
    if raw is None or raw is ABSENT:
        return None
    value = unicode_text(raw, column) if isinstance(raw, str | bytes) else raw
    try:
        return _parse_kept(value, type_name)
    except (ValueError, OverflowError, TypeError) as error:
        shown = repr(value)[:80]
        detail = f"column {column}, value {shown} is not of type {type_name}"
        raise RowRejected(Reason.INVALID_METADATA, detail) from error


def text_of_kept(value: object) -> str | None:
    """A kept value as it enters a content-derived id: the same text from every format."""
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case datetime():
            return value.isoformat()
        case _:
            return repr(value)


def fits(arrow_type: pa.DataType, type_name: str) -> bool:
    """Whether values of the Arrow type can be of the declared type; each value is still checked on its own."""
    is_number = pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) or pa.types.is_decimal(arrow_type)
    is_time = pa.types.is_timestamp(arrow_type) or pa.types.is_date(arrow_type)
    if is_text(arrow_type) or pa.types.is_null(arrow_type):
        return True
    match type_name:
        case "string":
            return bool(is_number or is_time or pa.types.is_boolean(arrow_type))
        case "int64" | "float64":
            return bool(is_number)
        case "bool":
            return bool(pa.types.is_boolean(arrow_type))
        case _:
            return bool(is_time)


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether values are strings, of any width."""
    return bool(
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)
    )


def _parse_kept(value: object, type_name: str) -> object:
    match type_name:
        case "string":
            return _as_string(value)
        case "int64":
            return _as_int64(value)
        case "float64":
            return _as_float64(value)
        case "bool":
            return value if isinstance(value, bool) else _as_bool(value)
        case "timestamp":
            return _as_timestamp(value)
        case _:
            raise ValueError(f"type ({type_name}) is unknown; known are {', '.join(KEEP_TYPES)}")


def _as_string(value: object) -> str:
    if isinstance(value, str):
        return value
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)
    text.encode()  # a lone surrogate inside a nested value is a ValueError here
    return text


def _as_int64(value: object) -> int:
    match value:
        case bool():
            raise ValueError("a bool is not an integer")
        case int():
            number = value
        case float() | Decimal() if value == int(value):
            number = int(value)
        case str() if _INTEGER.fullmatch(value):
            number = int(value)
        case _:
            raise ValueError("not an integer")
    if not INT64_MIN <= number <= INT64_MAX:
        raise OverflowError("beyond 64 bits")
    return number


def _as_float64(value: object) -> float:
    match value:
        case bool():
            raise ValueError("a bool is not a number")
        case int() | float() | Decimal():
            return float(value)
        case str() if "_" not in value:  # float() takes Python's digit separators, data formats do not
            return float(value)
        case _:
            raise ValueError("not a number")


def _as_bool(value: object) -> bool:
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise ValueError("not a bool")


def _as_timestamp(value: object) -> datetime:
    if not isinstance(value, str):
        raise ValueError("not an ISO 8601 timestamp")
    moment = datetime.fromisoformat(value)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
