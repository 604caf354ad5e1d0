"""Rows of a source file before they are documents: raw values, and the reasons why a row or a file is refused."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple


class Reason(StrEnum):
    """Why a row, or a file (position -1), became a dead letter."""

    UNREADABLE_FILE = "unreadable_file"
    MISSING_COLUMN = "missing_column"
    SCHEMA_MISMATCH = "schema_mismatch"
    FILE_TOO_LARGE = "file_too_large"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    INVALID_CSV_ROW = "invalid_csv_row"
    TEXT_NOT_A_STRING = "text_not_a_string"
    EMPTY_TEXT = "empty_text"
    INVALID_UTF8 = "invalid_utf8"
    INVALID_UNICODE = "invalid_unicode"
    NULL_ID = "null_id"
    INVALID_METADATA = "invalid_metadata"


class UnusableFile(Exception):
    """The source part as a whole is a dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class RowRejected(Exception):
    """One row is a dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Absent:
    """The value of a key that a JSON object does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = Absent()


class Row(NamedTuple):
    """Raw values of one row; strings as `str`, or as `bytes` where their UTF-8 is not checked yet."""

    position: int
    texts: Sequence[object]
    id: object
    kept: Sequence[object]


class BadRow(NamedTuple):
    """A row whose raw values could not even be read."""

    position: int
    reason: Reason
    detail: str


def unicode_text(raw: str | bytes, column: str) -> str:
    """The raw value as text that UTF-8 can hold; RowRejected when there is none."""
    try:
        if isinstance(raw, bytes):
            return raw.decode()
        if not raw.isascii():  # a flag of the string, not a scan
            raw.encode()
        return raw
    except UnicodeDecodeError as error:
        raise RowRejected(Reason.INVALID_UTF8, f"column {column}: {error}") from error
    except UnicodeEncodeError as error:
        raise RowRejected(Reason.INVALID_UNICODE, f"column {column}: {error}") from error
