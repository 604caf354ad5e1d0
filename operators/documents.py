"""Documents, the descriptor of how they are read, and what becomes of the rows of a source part."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from penstock.operators.deadletters import DeadLetter, dead_letter_table
from penstock.operators.identity import FINGERPRINT_HEX_DIGITS, canonical_json
from penstock.operators.metadata import KEEP_TYPES, kept_value, text_of_kept
from penstock.operators.rows import ABSENT, Absent, BadRow, Reason, Row, RowRejected, UnusableFile, unicode_text

STAGE = "documents"
WHOLE_FILE = -1  # the position of a dead letter that stands for a file, not for a row of it
RESERVED_COLUMNS = frozenset(
    ["document_id", "text", "source", "position", "passage_id", "ordinal", "start", "end", "tokens", "row_hash"]
    + ["text_hash", "normal_hash", "document_hash", "id", "similarity"]
)


class SourceType(StrEnum):
    PARQUET = "parquet"
    JSONL = "jsonl"
    CSV = "csv"
    TEXT = "text"
    DOCSTRINGS = "docstrings"


# The metadata columns of the formats that have no columns of their own.
FIXED_COLUMNS = {SourceType.TEXT: ("path",), SourceType.DOCSTRINGS: ("module", "kind")}


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
        if self.type not in FIXED_COLUMNS and not self.text:
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
        offered = FIXED_COLUMNS.get(self.type)
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


class DocumentBuilder:
    """Gathers the rows of one source part: each becomes a document or a dead letter."""

    def __init__(self, reader: DocumentReader, source: str) -> None:
        self._reader = reader
        self._source = source
        self._has_content_ids = reader.id is None and reader.type not in FIXED_COLUMNS
        self._documents: list[tuple[object, ...]] = []
        self._dropped: list[DeadLetter] = []

    def add(self, row: Row | BadRow) -> None:
        if isinstance(row, BadRow):
            self._dropped.append(DeadLetter(STAGE, self._source, row.position, row.reason, row.detail))
            return
        document_id = None
        try:
            document_id = None if self._has_content_ids else _document_id(row.id, self._reader.id)
            text = _document_text(row.texts, self._reader.text)
            kept = [kept_value(raw, *column) for raw, column in zip(row.kept, self._reader.keep, strict=True)]
        except RowRejected as problem:
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
        content = {"text": text, "keep": {name: text_of_kept(value) for name, value in zip(names, kept, strict=True)}}
        return hashlib.blake2b(canonical_json(content), digest_size=FINGERPRINT_HEX_DIGITS // 2).hexdigest()


def refused_file(reader: DocumentReader, part: SourcePart, problem: UnusableFile) -> Documents:
    """One dead letter for the source part as a whole."""
    extent = "" if part.start is None else f" (part {part.start} to {part.end})"
    letter = DeadLetter(STAGE, part.path, WHOLE_FILE, problem.reason, f"{problem}{extent}")
    return Documents(documents_schema(reader).empty_table(), dead_letter_table([letter]), 1)


def _document_id(raw: object, column: str | None) -> str:
    match raw:
        case None | "" | b"":
            raise RowRejected(Reason.NULL_ID, f"id column {column} is null or empty")
        case bool():
            raise RowRejected(Reason.SCHEMA_MISMATCH, f"id column {column} is a bool, not a string or integer")
        case int():
            return str(raw)
        case str() | bytes():
            return unicode_text(raw, column or "id")
        case Absent():
            raise RowRejected(Reason.MISSING_COLUMN, f"id column {column} is absent")
        case _:
            kind = type(raw).__name__
            raise RowRejected(Reason.SCHEMA_MISMATCH, f"id column {column} is a {kind}, not a string or integer")


def _document_text(raw_texts: Sequence[object], columns: Sequence[str]) -> str:
    if all(raw is ABSENT for raw in raw_texts):
        raise RowRejected(Reason.MISSING_COLUMN, f"text columns {', '.join(columns)} are absent")
    texts = []
    for number, raw in enumerate(raw_texts):
        column = columns[number] if number < len(columns) else "text"
        match raw:
            case None | Absent():
                continue
            case str() | bytes():
                texts.append(unicode_text(raw, column))
            case _:
                raise RowRejected(Reason.TEXT_NOT_A_STRING, f"text column {column} is a {type(raw).__name__}")
    texts = [text for text in texts if text and not text.isspace()]
    if not texts:
        raise RowRejected(Reason.EMPTY_TEXT, "text is null, empty or whitespace only")
    return texts[0] if len(texts) == 1 else "\n".join(texts)
