"""One source file, or a part of one, as documents and dead letters.

Bad content never raises: a bad row is a dead letter of its own, and a file that cannot be used as a whole is one dead
letter with position -1. What the stream itself raises (a store that does not answer) is passed on, so that the caller
can retry: it says nothing about the content.

Formats:
    parquet     read by row groups, page checksums verified where the file has them; position = row number in the file
    jsonl       one JSON object per line, also .gz and .zst; position = byte offset of the line in the decoded file
    csv         with a header, also .gz and .zst; position = row number
    text        one file is one document, its id the path
    docstrings  one Python source file is as many documents as it has docstrings; position = ordinal in the file

JSONL has no schema, so a JSON row with an absent or unfit value is refused on its own and the rest of the file is kept:
the outcome is then the same for any split into parts. A Parquet or CSV file whose columns do not fit is refused whole.
"""

import csv
import hashlib
import heapq
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import BinaryIO, Final, NamedTuple, Protocol, assert_never

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from penstock.operators.deadletters import DeadLetter, dead_letter_table
from penstock.operators.docstrings import find_docstrings, module_name
from penstock.operators.identity import FINGERPRINT_HEX_DIGITS, canonical_json

STAGE = "documents"
WHOLE_FILE = -1  # the position of a dead letter that stands for a file, not for a row of it
READ_BYTES = 1 << 20
BATCH_ROWS = 1024  # of Parquet: one batch is all that is decoded beyond the cap
MIN_ROW_BYTES = 4  # of decoded Parquet: one string offset; a claim of more rows than the cap holds is a bomb
CSV_BLOCK_BYTES = 2**31 - 1  # pyarrow counts them in 32 bits
CSV_FIRST_ROW = 2  # pyarrow counts the rows that it skips from 1, the header included
PROBE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
CODECS = {".gz": "gzip", ".zst": "zstd"}
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# Timestamps are kept to the microsecond, in UTC; one without a zone is taken as UTC.
KEEP_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}
RESERVED_COLUMNS = frozenset(
    ["document_id", "text", "source", "position", "passage_id", "ordinal", "start", "end", "tokens", "row_hash"]
    + ["text_hash", "normal_hash"]
)

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}  # as pyarrow.csv reads them

# What damaged content makes pyarrow raise. ArrowMemoryError: a damaged length field asks for more than there is.
_CONTENT_ERRORS = (
    pa.ArrowInvalid,
    pa.ArrowKeyError,
    pa.ArrowIndexError,
    pa.ArrowTypeError,
    pa.ArrowCapacityError,
    pa.ArrowMemoryError,
    pa.ArrowNotImplementedError,
    pa.ArrowSerializationError,
    OSError,
    EOFError,
    UnicodeError,
    csv.Error,
)


class SourceType(StrEnum):
    parquet = "parquet"
    jsonl = "jsonl"
    csv = "csv"
    text = "text"
    docstrings = "docstrings"


# The metadata columns of the formats that have no columns of their own.
_FIXED_COLUMNS = {SourceType.text: ("path",), SourceType.docstrings: ("module", "kind")}


class Reason(StrEnum):
    """Why a row, or a file (position -1), became a dead letter."""

    unreadable_file = "unreadable_file"
    missing_column = "missing_column"
    schema_mismatch = "schema_mismatch"
    file_too_large = "file_too_large"
    invalid_json = "invalid_json"
    not_an_object = "not_an_object"
    invalid_csv_row = "invalid_csv_row"
    text_not_a_string = "text_not_a_string"
    empty_text = "empty_text"
    invalid_utf8 = "invalid_utf8"
    invalid_unicode = "invalid_unicode"
    null_id = "null_id"
    invalid_metadata = "invalid_metadata"


@dataclass(frozen=True)
class DocumentReader:
    """How documents are read: what crosses to the worker.

    Attributes:
        text: text columns, joined by a newline, null and blank ones skipped. Unused for text and docstrings.
        id: id column. None: derived from the content of a row; text and docstrings use the path and the qualified name.
        keep: (metadata column, type name of KEEP_TYPES). Text files offer "path"; docstrings offer "module" and "kind".
        max_bytes: cap on the decoded bytes of a source part.
    """

    type: SourceType
    text: tuple[str, ...]
    id: str | None
    keep: tuple[tuple[str, str], ...]
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes <= 0:
            raise ValueError(f"max_bytes ({self.max_bytes}) must be positive; it caps what one source part decodes to")
        if self.type not in _FIXED_COLUMNS and not self.text:
            raise ValueError(f"text columns of a {self.type} source are empty; name at least one")
        for column, type_name in self.keep:
            self._check_kept(column, type_name)
        if repeated := [column for column, count in Counter(column for column, _ in self.keep).items() if count > 1]:
            raise ValueError(f"keep columns ({', '.join(repeated)}) are named twice; name each once")

    def _check_kept(self, column: str, type_name: str) -> None:
        if column in RESERVED_COLUMNS:
            raise ValueError(f"keep column ({column}) has a reserved name; rename it in the source or leave it out")
        if type_name not in KEEP_TYPES:
            raise ValueError(f"keep column {column} has type ({type_name}), known are {', '.join(KEEP_TYPES)}")
        offered = _FIXED_COLUMNS.get(self.type)
        if offered is not None and column not in offered:
            raise ValueError(f"keep column ({column}) does not exist: {self.type} offers {', '.join(offered)}")


@dataclass(frozen=True)
class SourcePart:
    """A file, by its path within the corpus, or a part of one; start and end None: the whole file.

    Parquet: the row groups [start, end). Plain JSONL: the lines whose first byte lies in [start, end).
    """

    path: str
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Documents:
    """What one source part became: `rows_in` = rows of `table` + rows of `dropped`. A refused file is one row in."""

    table: pa.Table
    dropped: pa.Table
    rows_in: int


def documents_schema(reader: DocumentReader) -> pa.Schema:
    """document_id, text, source, position, then the kept columns."""
    fields = [("document_id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("position", pa.int64())]
    return pa.schema(fields + [(column, KEEP_TYPES[type_name]) for column, type_name in reader.keep])


def read_documents(reader: DocumentReader, part: SourcePart, stream: BinaryIO, size_bytes: int) -> Documents:
    """Documents of one source part in source order, and a dead letter for each row that is none.

    Peak memory is a small multiple of the part's decoded size, which `reader.max_bytes` caps.

    Args:
        stream: the whole file, seekable, also when `part` is a part of it.
        size_bytes: size of the whole file.

    Raises:
        Exception: whatever `stream` raises. Content never raises.
    """
    watched = _WatchedStream(stream)
    builder = _DocumentBuilder(reader, part.path)
    try:
        for row in _rows(reader, part, watched, size_bytes):
            builder.add(row)
    except _UnusableFile as problem:
        return _refused(reader, part, problem)
    except _CONTENT_ERRORS as error:
        if watched.failure is not None:
            raise watched.failure from None
        return _refused(reader, part, _UnusableFile(Reason.unreadable_file, f"{type(error).__name__}: {error}"))
    return builder.documents()


def probe_columns(source_type: SourceType, path: str, stream: BinaryIO) -> dict[str, pa.DataType | None]:
    """Columns of a file from its footer, header or first object, with types where the format has them.

    Raises:
        ValueError: the file is not of that type.
    """
    watched = _WatchedStream(stream)
    try:
        return _probe(source_type, path, watched)
    except (*_CONTENT_ERRORS, _UnusableFile) as error:
        if watched.failure is not None:
            raise watched.failure from None
        raise ValueError(f"columns of {path} cannot be read as {source_type} ({error}); check the type") from error


def split_source(
    source_type: SourceType, path: str, size_bytes: int, stream: BinaryIO | None, part_bytes: int
) -> list[SourcePart]:
    """Parts of a file, the same for the same file and `part_bytes`: the unit of work that is redone when it changes.

    A larger Parquet file is cut into runs of row groups of about `part_bytes` of the file (one row group at least), a
    larger plain JSONL file into byte ranges. All else is one part, as is a Parquet file without a `stream` or without a
    readable footer: reading it then says why.
    """
    if part_bytes <= 0:
        raise ValueError(f"part_bytes ({part_bytes}) must be positive; it is the size of one unit of work")
    if size_bytes <= part_bytes:
        return [SourcePart(path)]
    match source_type:
        case SourceType.parquet if stream is not None:
            bounds = _row_group_runs(stream, size_bytes, part_bytes)
        case SourceType.jsonl if _codec(path) is None:
            bounds = [*range(0, size_bytes, part_bytes), size_bytes]
        case _:
            bounds = []
    if len(bounds) <= 2:
        return [SourcePart(path)]
    return [SourcePart(path, start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


# ---- rows to documents


class _UnusableFile(Exception):
    """The source part as a whole is a dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _RowRejected(Exception):
    """One row is a dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Absent:
    """The value of a key that a JSON object does not have."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT: Final = _Absent()


class _Row(NamedTuple):
    """Raw values of one row; strings as `str`, or as `bytes` where their UTF-8 is not checked yet."""

    position: int
    texts: Sequence[object]
    id: object
    kept: Sequence[object]


class _BadRow(NamedTuple):
    position: int
    reason: Reason
    detail: str


class _DocumentBuilder:
    def __init__(self, reader: DocumentReader, source: str) -> None:
        self._reader = reader
        self._source = source
        self._has_content_ids = reader.id is None and reader.type not in _FIXED_COLUMNS
        self._documents: list[tuple[object, ...]] = []
        self._dropped: list[DeadLetter] = []

    def add(self, row: _Row | _BadRow) -> None:
        if isinstance(row, _BadRow):
            self._dropped.append(DeadLetter(STAGE, self._source, row.position, row.reason, row.detail))
            return
        document_id = None
        try:
            document_id = None if self._has_content_ids else _document_id(row.id, self._reader.id)
            text = _document_text(row.texts, self._reader.text)
            kept = [_kept_value(raw, *column) for raw, column in zip(row.kept, self._reader.keep, strict=True)]
        except _RowRejected as problem:
            letter = DeadLetter(STAGE, self._source, row.position, problem.reason, str(problem), document_id)
            self._dropped.append(letter)
            return
        if document_id is None:
            document_id = self._content_id(text, kept)
        self._documents.append((document_id, text, self._source, row.position, *kept))

    def documents(self) -> Documents:
        schema = documents_schema(self._reader)
        columns = list(zip(*self._documents, strict=True)) if self._documents else [()] * len(schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        dropped = dead_letter_table(self._dropped)
        return Documents(pa.table(arrays, schema=schema), dropped, len(self._documents) + len(self._dropped))

    def _content_id(self, text: str, kept: Sequence[object]) -> str:
        names = [column for column, _ in self._reader.keep]
        content = {"text": text, "keep": {name: _as_text(value) for name, value in zip(names, kept, strict=True)}}
        return hashlib.blake2b(canonical_json(content), digest_size=FINGERPRINT_HEX_DIGITS // 2).hexdigest()


def _refused(reader: DocumentReader, part: SourcePart, problem: _UnusableFile) -> Documents:
    extent = "" if part.start is None else f" (part {part.start} to {part.end})"
    letter = DeadLetter(STAGE, part.path, WHOLE_FILE, problem.reason, f"{problem}{extent}")
    return Documents(documents_schema(reader).empty_table(), dead_letter_table([letter]), 1)


def _document_id(raw: object, column: str | None) -> str:
    match raw:
        case None | "" | b"":
            raise _RowRejected(Reason.null_id, f"id column {column} is null or empty")
        case bool():
            raise _RowRejected(Reason.schema_mismatch, f"id column {column} is a bool, not a string or integer")
        case int():
            return str(raw)
        case str() | bytes():
            return _unicode(raw, column or "id")
        case _Absent():
            raise _RowRejected(Reason.missing_column, f"id column {column} is absent")
        case _:
            kind = type(raw).__name__
            raise _RowRejected(Reason.schema_mismatch, f"id column {column} is a {kind}, not a string or integer")


def _document_text(raw_texts: Sequence[object], columns: Sequence[str]) -> str:
    if all(raw is _ABSENT for raw in raw_texts):
        raise _RowRejected(Reason.missing_column, f"text columns {', '.join(columns)} are absent")
    texts = []
    for number, raw in enumerate(raw_texts):
        column = columns[number] if number < len(columns) else "text"
        match raw:
            case None | _Absent():
                continue
            case str() | bytes():
                texts.append(_unicode(raw, column))
            case _:
                raise _RowRejected(Reason.text_not_a_string, f"text column {column} is a {type(raw).__name__}")
    texts = [text for text in texts if text and not text.isspace()]
    if not texts:
        raise _RowRejected(Reason.empty_text, "text is null, empty or whitespace only")
    return texts[0] if len(texts) == 1 else "\n".join(texts)


def _unicode(raw: str | bytes, column: str) -> str:
    try:
        if isinstance(raw, bytes):
            return raw.decode()
        if not raw.isascii():  # a flag of the string, not a scan
            raw.encode()
        return raw
    except UnicodeDecodeError as error:
        raise _RowRejected(Reason.invalid_utf8, f"column {column}: {error}") from error
    except UnicodeEncodeError as error:
        raise _RowRejected(Reason.invalid_unicode, f"column {column}: {error}") from error


# ---- kept values


def _kept_value(raw: object, column: str, type_name: str) -> object:
    """The raw value as a Python value of the declared type, or None. Refuses what does not fit."""
    if raw is None or raw is _ABSENT:
        return None
    value = _unicode(raw, column) if isinstance(raw, str | bytes) else raw
    try:
        return _parse_kept(value, type_name)
    except (ValueError, OverflowError, TypeError) as error:
        shown = repr(value)[:80]
        detail = f"column {column}, value {shown} is not of type {type_name}"
        raise _RowRejected(Reason.invalid_metadata, detail) from error


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


def _as_text(value: object) -> str | None:
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


# ---- files to rows


class _WatchedStream:
    """Remembers what the stream itself raised: that is no fault of the content, whatever pyarrow makes of it."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def read(self, size_bytes: int = -1) -> bytes:
        try:
            return self._stream.read(size_bytes)
        except Exception as error:
            self.failure = error
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._stream.seek(offset, whence)
        except Exception as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        """Leaves the stream open: it belongs to the caller."""


class _Readable(Protocol):
    def read(self, size_bytes: int, /) -> bytes: ...


class _CappedStream:
    """Decoded bytes, up to a cap: beyond it the file is refused, so a decompression bomb stops here."""

    def __init__(self, stream: _Readable, cap_bytes: int) -> None:
        self._stream = stream
        self._cap_bytes = cap_bytes
        self._decoded_bytes = 0

    def read(self, size_bytes: int, /) -> bytes:
        data = self._stream.read(size_bytes)
        self._decoded_bytes += len(data)
        _refuse_beyond(self._cap_bytes, self._decoded_bytes)
        return data

    def read_all(self) -> bytes:
        return b"".join(iter(lambda: self.read(READ_BYTES), b""))


def _refuse_beyond(cap_bytes: int, size_bytes: int) -> None:
    if size_bytes > cap_bytes:
        detail = f"decodes to {size_bytes} bytes or more, the cap is {cap_bytes}; raise it or split the file"
        raise _UnusableFile(Reason.file_too_large, detail)


def _codec(path: str) -> str | None:
    return next((codec for suffix, codec in CODECS.items() if path.endswith(suffix)), None)


def _decoded(path: str, watched: _WatchedStream, cap_bytes: int) -> _CappedStream:
    watched.seek(0)
    codec = _codec(path)
    if codec is None:
        return _CappedStream(watched, cap_bytes)
    return _CappedStream(pa.CompressedInputStream(pa.PythonFile(watched, mode="r"), codec), cap_bytes)


def _rows(
    reader: DocumentReader, part: SourcePart, watched: _WatchedStream, size_bytes: int
) -> Iterator[_Row | _BadRow]:
    if part.start is None and reader.type is not SourceType.parquet:
        _refuse_beyond(reader.max_bytes, size_bytes)
    match reader.type:
        case SourceType.parquet:
            return _parquet_rows(reader, part, watched)
        case SourceType.jsonl:
            return _jsonl_rows(reader, part, watched)
        case SourceType.csv:
            return _csv_rows(reader, part, watched)
        case SourceType.text:
            return _text_rows(reader, part, watched)
        case SourceType.docstrings:
            return _docstring_rows(reader, part, watched)
        case _:
            assert_never(reader.type)


def _text_rows(reader: DocumentReader, part: SourcePart, watched: _WatchedStream) -> Iterator[_Row]:
    text = _CappedStream(watched, reader.max_bytes).read_all().removeprefix(BOM)
    yield _Row(0, [text], part.path, [part.path for _ in reader.keep])


def _docstring_rows(reader: DocumentReader, part: SourcePart, watched: _WatchedStream) -> Iterator[_Row]:
    module = module_name(part.path)
    source = _CappedStream(watched, reader.max_bytes).read_all()
    try:
        docstrings = find_docstrings(source, module)
    except ValueError as error:
        raise _UnusableFile(Reason.unreadable_file, str(error)) from error
    for position, docstring in enumerate(docstrings):
        values = {"module": module, "kind": str(docstring.kind)}
        yield _Row(position, [docstring.text], docstring.name, [values[column] for column, _ in reader.keep])


# ---- JSONL


def _jsonl_rows(reader: DocumentReader, part: SourcePart, watched: _WatchedStream) -> Iterator[_Row | _BadRow]:
    for position, line in _jsonl_lines(reader, part, watched):
        if line.strip():
            yield _jsonl_row(reader, position, line)


def _jsonl_row(reader: DocumentReader, position: int, line: bytes) -> _Row | _BadRow:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _BadRow(position, Reason.invalid_utf8, str(error))
    except (ValueError, RecursionError) as error:
        return _BadRow(position, Reason.invalid_json, str(error))
    if not isinstance(value, dict):
        return _BadRow(position, Reason.not_an_object, f"the line holds a {type(value).__name__}")
    document_id = None if reader.id is None else value.get(reader.id, _ABSENT)
    texts = [value.get(column, _ABSENT) for column in reader.text]
    return _Row(position, texts, document_id, [value.get(column) for column, _ in reader.keep])


def _jsonl_lines(reader: DocumentReader, part: SourcePart, watched: _WatchedStream) -> Iterator[tuple[int, bytes]]:
    if part.start is None or part.end is None:
        yield from _lines(_decoded(part.path, watched, reader.max_bytes), 0)
        return
    start = _first_line_start(watched, part.start, part.end)
    if start is None:
        return
    watched.seek(start)
    cap_bytes = reader.max_bytes + READ_BYTES  # the last read may reach into the next part
    for position, line in _lines(_CappedStream(watched, cap_bytes), start):
        if position >= part.end:
            return
        yield position, line


def _first_line_start(watched: _WatchedStream, start: int, end: int) -> int | None:
    """Offset of the first line that begins in [start, end), None when a longer line spans it."""
    if start == 0:
        return 0
    watched.seek(start - 1)
    offset = start - 1
    while offset < end - 1:
        chunk = watched.read(min(READ_BYTES, end - 1 - offset))
        if not chunk:
            return None
        newline = chunk.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(chunk)
    return None


def _lines(stream: _CappedStream, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline and without the file's BOM) from a stream that stands at a line's start."""
    pieces: list[bytes] = []
    while chunk := stream.read(READ_BYTES):
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        for following in rest:
            line = b"".join(pieces)
            yield start, line.removeprefix(BOM) if start == 0 else line
            start += len(line) + 1
            pieces = [following]
    if last := b"".join(pieces):
        yield start, last.removeprefix(BOM) if start == 0 else last


# ---- CSV


def _csv_rows(reader: DocumentReader, part: SourcePart, watched: _WatchedStream) -> Iterator[_Row | _BadRow]:
    data = _decoded(part.path, watched, reader.max_bytes).read_all()
    needed = _needed_columns(reader)
    _refuse_unfit_columns(_csv_header(data), needed)
    bad_rows: list[_BadRow] = []
    table = _parse_csv(data, needed, bad_rows)
    types = dict(reader.keep)
    values = {name: _csv_values(table.column(name).to_pylist(), types.get(name)) for name in needed}
    skipped = {bad.position for bad in bad_rows}
    positions = (number for number in itertools.count() if number not in skipped)
    return heapq.merge(_column_rows(reader, values, positions), bad_rows, key=lambda row: row.position)


def _csv_header(data: bytes) -> list[str]:
    head = io.StringIO(data[:READ_BYTES].removeprefix(BOM).decode(errors="replace"), newline="")
    header = next((names for names in csv.reader(head, strict=True) if names), None)
    if header is None:
        raise _UnusableFile(Reason.unreadable_file, "the file is empty, a header was expected")
    return header


def _parse_csv(data: bytes, columns: list[str], bad_rows: list[_BadRow]) -> pa.Table:
    """The columns as bytes: every value is checked on its own, so one bad value costs one row."""

    def skip(row: pa_csv.InvalidRow) -> str:
        detail = f"the row has {row.actual_columns} fields, the header has {row.expected_columns}"
        bad_rows.append(_BadRow(row.number - CSV_FIRST_ROW, Reason.invalid_csv_row, detail))
        return "skip"

    block_bytes = min(max(len(data), READ_BYTES), CSV_BLOCK_BYTES)  # a row must not straddle two blocks
    return pa_csv.read_csv(
        pa.BufferReader(data),
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=block_bytes),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pa_csv.ConvertOptions(
            include_columns=columns,
            column_types={column: pa.large_binary() for column in columns},
            strings_can_be_null=False,
        ),
    )


def _csv_values(values: list[bytes], type_name: str | None) -> Sequence[object]:
    """An empty field of a typed metadata column is null: CSV has no other way to say it."""
    if type_name is None or type_name == "string":
        return values
    return [value or None for value in values]


# ---- columns to rows


def _needed_columns(reader: DocumentReader) -> list[str]:
    identity = () if reader.id is None else (reader.id,)
    return list(dict.fromkeys([*reader.text, *identity, *(column for column, _ in reader.keep)]))


def _refuse_unfit_columns(present: Sequence[str], needed: Sequence[str]) -> None:
    counts = Counter(present)
    if missing := [column for column in needed if counts[column] == 0]:
        detail = f"columns {', '.join(missing)} are missing; the file has {', '.join(present)}"
        raise _UnusableFile(Reason.missing_column, detail)
    if repeated := [column for column in needed if counts[column] > 1]:
        raise _UnusableFile(Reason.schema_mismatch, f"columns {', '.join(repeated)} appear more than once")


def _column_rows(
    reader: DocumentReader, values: Mapping[str, Sequence[object]], positions: Iterable[int]
) -> Iterator[_Row]:
    texts = zip(*(values[column] for column in reader.text), strict=True)
    ids = itertools.repeat(None) if reader.id is None else values[reader.id]
    kept = zip(*(values[column] for column, _ in reader.keep), strict=True) if reader.keep else itertools.repeat(())
    return map(_Row, positions, texts, ids, kept)


# ---- Parquet


def _parquet_rows(reader: DocumentReader, part: SourcePart, watched: _WatchedStream) -> Iterator[_Row]:
    needed = _needed_columns(reader)
    file = _open_parquet(reader, needed, watched)
    groups = range(part.start or 0, file.num_row_groups if part.end is None else part.end)
    _refuse_large_groups(reader, file.metadata, groups)
    position = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
    decoded_bytes = 0
    for group in groups:
        end = position + file.metadata.row_group(group).num_rows
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=needed, use_threads=False):
            decoded_bytes += sum(_decoded_bytes(column) for column in batch.columns)
            _refuse_beyond(reader.max_bytes, decoded_bytes)
            yield from _batch_rows(reader, batch, position)
            position += batch.num_rows
        if position != end:
            detail = f"row group {group} ends at row {position}, its footer says {end}"
            raise _UnusableFile(Reason.unreadable_file, detail)


def _open_parquet(reader: DocumentReader, needed: Sequence[str], watched: _WatchedStream) -> pq.ParquetFile:
    source = pa.PythonFile(watched, mode="r")
    footer = pq.ParquetFile(source)
    _refuse_unfit_columns(footer.schema_arrow.names, needed)
    types = {field.name: _value_type(field.type) for field in footer.schema_arrow}
    _refuse_unfit_types(reader, types)
    # Read as dictionaries, strings that repeat are not expanded before their decoded size is known.
    strings = [column for column in needed if _is_text(types[column])]
    return pq.ParquetFile(source, metadata=footer.metadata, read_dictionary=strings, page_checksum_verification=True)


def _batch_rows(reader: DocumentReader, batch: pa.RecordBatch, position: int) -> Iterator[_Row]:
    values = {name: _python_values(batch.column(name)) for name in batch.schema.names}
    return _column_rows(reader, values, range(position, position + batch.num_rows))


def _python_values(column: pa.Array) -> list[object]:
    """Strings as bytes (pyarrow does not check their UTF-8), times as ISO 8601 text, all else as it is."""
    value_type = _value_type(column.type)
    if _is_text(value_type):
        values = column.cast(pa.large_binary()).to_pylist()
    elif pa.types.is_timestamp(value_type) or pa.types.is_date(value_type):
        values = column.cast(pa.string()).to_pylist()
    else:
        values = column.to_pylist()
    return list(values)


def _decoded_bytes(column: pa.Array) -> int:
    if not (pa.types.is_dictionary(column.type) and _is_text(column.type.value_type)):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return int(pc.sum(lengths, min_count=0).as_py()) + MIN_ROW_BYTES * len(column)


def _refuse_large_groups(reader: DocumentReader, metadata: pq.FileMetaData, groups: range) -> None:
    """By what the footer claims, before anything is decoded."""
    if groups.stop > metadata.num_row_groups:
        detail = f"the part ends at row group {groups.stop}, the file has {metadata.num_row_groups}; it has changed"
        raise _UnusableFile(Reason.unreadable_file, detail)
    # Of all columns, read or not: asking pyarrow 26 for one column of a damaged footer can abort the process.
    claimed_bytes = 0
    for group in map(metadata.row_group, groups):
        claimed_bytes += group.total_byte_size
        _refuse_beyond(reader.max_bytes, max(claimed_bytes, group.num_rows * MIN_ROW_BYTES))


def _refuse_unfit_types(reader: DocumentReader, types: Mapping[str, pa.DataType]) -> None:
    for column in reader.text:
        if not (_is_text(types[column]) or pa.types.is_null(types[column])):
            raise _UnusableFile(Reason.schema_mismatch, f"text column {column} is {types[column]}, not a string")
    for column, type_name in reader.keep:
        if not _fits(types[column], type_name):
            detail = f"metadata column {column} is {types[column]}, which does not fit the declared {type_name}"
            raise _UnusableFile(Reason.schema_mismatch, detail)
    if reader.id is not None and not _fits_id(types[reader.id]):
        detail = f"id column {reader.id} is {types[reader.id]}, not a string or an integer"
        raise _UnusableFile(Reason.schema_mismatch, detail)


def _value_type(arrow_type: pa.DataType) -> pa.DataType:
    return arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type


def _is_text(arrow_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)
    )


def _fits_id(arrow_type: pa.DataType) -> bool:
    return _is_text(arrow_type) or bool(pa.types.is_integer(arrow_type) or pa.types.is_null(arrow_type))


def _fits(arrow_type: pa.DataType, type_name: str) -> bool:
    """Whether values of the Arrow type can be of the declared type; each value is still checked on its own."""
    is_number = pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) or pa.types.is_decimal(arrow_type)
    is_time = pa.types.is_timestamp(arrow_type) or pa.types.is_date(arrow_type)
    if _is_text(arrow_type) or pa.types.is_null(arrow_type):
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


def _row_group_runs(stream: BinaryIO, size_bytes: int, part_bytes: int) -> list[int]:
    """Boundaries of runs of row groups, [0, ..., number of row groups]; empty when the footer cannot be read.

    The file's size is spread over the row groups by their decoded size: the footer's compressed sizes are per column.
    """
    watched = _WatchedStream(stream)
    try:
        metadata = pq.ParquetFile(pa.PythonFile(watched, mode="r")).metadata
    except _CONTENT_ERRORS:
        if watched.failure is not None:
            raise watched.failure from None
        return []
    groups_bytes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    stored_share = size_bytes / max(1, sum(groups_bytes))
    bounds, run_bytes = [0], 0.0
    for number, group_bytes in enumerate(groups_bytes):
        if run_bytes > 0 and run_bytes + group_bytes * stored_share > part_bytes:
            bounds.append(number)
            run_bytes = 0.0
        run_bytes += group_bytes * stored_share
    return [*bounds, metadata.num_row_groups]


# ---- columns without rows


def _probe(source_type: SourceType, path: str, watched: _WatchedStream) -> dict[str, pa.DataType | None]:
    match source_type:
        case SourceType.parquet:
            schema = pq.ParquetFile(pa.PythonFile(watched, mode="r")).schema_arrow
            return {field.name: field.type for field in schema}
        case SourceType.csv:
            return dict.fromkeys(_csv_header(_decoded(path, watched, PROBE_BYTES).read(READ_BYTES)))
        case SourceType.jsonl:
            return dict.fromkeys(_first_object(_decoded(path, watched, PROBE_BYTES)))
        case SourceType.text | SourceType.docstrings:
            return dict.fromkeys(_FIXED_COLUMNS[source_type], pa.string())
        case _:
            assert_never(source_type)


def _first_object(stream: _CappedStream) -> dict[str, object]:
    for _, line in _lines(stream, 0):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}
