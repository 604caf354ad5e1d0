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

from collections.abc import Iterator
from typing import BinaryIO, assert_never

import pyarrow as pa
import pyarrow.parquet as pq

from penstock.operators.docstrings import find_docstrings, module_name
from penstock.operators.documents import (
    FIXED_COLUMNS,
    DocumentBuilder,
    DocumentReader,
    Documents,
    SourcePart,
    SourceType,
    refused_file,
)
from penstock.operators.json_lines import first_object, jsonl_rows
from penstock.operators.rows import BadRow, Reason, Row, UnusableFile
from penstock.operators.streams import (
    BOM,
    CONTENT_ERRORS,
    READ_BYTES,
    CappedStream,
    WatchedStream,
    codec_of,
    decoded,
    refuse_beyond,
)
from penstock.operators.tabular import csv_header, csv_rows, parquet_rows, row_group_runs

PROBE_BYTES = 64 << 20


def read_documents(reader: DocumentReader, part: SourcePart, stream: BinaryIO, size_bytes: int) -> Documents:
    """Documents of one source part in source order, and a dead letter for each row that is none.

    Peak memory is a small multiple of the part's decoded size, which `reader.max_bytes` caps.

    Args:
        stream: the whole file, seekable, also when `part` is a part of it.
        size_bytes: size of the whole file.

    Raises:
        Exception: whatever `stream` raises. Content never raises.
    """
    watched = WatchedStream(stream)
    builder = DocumentBuilder(reader, part.path)
    try:
        for row in _rows(reader, part, watched, size_bytes):
            builder.add(row)
    except UnusableFile as problem:
        return refused_file(reader, part, problem)
    except CONTENT_ERRORS as error:
        if watched.failure is not None:
            raise watched.failure from None
        return refused_file(reader, part, UnusableFile(Reason.UNREADABLE_FILE, f"{type(error).__name__}: {error}"))
    return builder.documents()


def probe_columns(source_type: SourceType, path: str, stream: BinaryIO) -> dict[str, pa.DataType | None]:
    """Columns of a file from its footer, header or first object, with types where the format has them.

    Raises:
        ValueError: the file is not of that type.
    """
    watched = WatchedStream(stream)
    try:
        return _probe(source_type, path, watched)
    except (*CONTENT_ERRORS, UnusableFile) as error:
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
        case SourceType.PARQUET if stream is not None:
            bounds = row_group_runs(stream, size_bytes, part_bytes)
        case SourceType.JSONL if codec_of(path) is None:
            bounds = [*range(0, size_bytes, part_bytes), size_bytes]
        case _:
            bounds = []
    if len(bounds) <= 2:
        return [SourcePart(path)]
    return [SourcePart(path, start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def _rows(reader: DocumentReader, part: SourcePart, watched: WatchedStream, size_bytes: int) -> Iterator[Row | BadRow]:
    if part.start is None and reader.type is not SourceType.PARQUET:
        refuse_beyond(reader.max_bytes, size_bytes)
    match reader.type:
        case SourceType.PARQUET:
            return parquet_rows(reader, part, watched)
        case SourceType.JSONL:
            return jsonl_rows(reader, part, watched)
        case SourceType.CSV:
            return csv_rows(reader, part, watched)
        case SourceType.TEXT:
            return _text_rows(reader, part, watched)
        case SourceType.DOCSTRINGS:
            return _docstring_rows(reader, part, watched)
        case _:
            assert_never(reader.type)


def _text_rows(reader: DocumentReader, part: SourcePart, watched: WatchedStream) -> Iterator[Row]:
    text = CappedStream(watched, reader.max_bytes).read_all().removeprefix(BOM)
    yield Row(0, [text], part.path, [part.path for _ in reader.keep])


def _docstring_rows(reader: DocumentReader, part: SourcePart, watched: WatchedStream) -> Iterator[Row]:
    module = module_name(part.path)
    source = CappedStream(watched, reader.max_bytes).read_all()
    try:
        docstrings = find_docstrings(source, module)
    except ValueError as error:
        raise UnusableFile(Reason.UNREADABLE_FILE, str(error)) from error
    for position, docstring in enumerate(docstrings):
        values = {"module": module, "kind": str(docstring.kind)}
        yield Row(position, [docstring.text], docstring.name, [values[column] for column, _ in reader.keep])


def _probe(source_type: SourceType, path: str, watched: WatchedStream) -> dict[str, pa.DataType | None]:
    match source_type:
        case SourceType.PARQUET:
            schema = pq.ParquetFile(pa.PythonFile(watched, mode="r")).schema_arrow
            return {field.name: field.type for field in schema}
        case SourceType.CSV:
            return dict.fromkeys(csv_header(decoded(path, watched, PROBE_BYTES).read(READ_BYTES)))
        case SourceType.JSONL:
            return dict.fromkeys(first_object(decoded(path, watched, PROBE_BYTES)))
        case SourceType.TEXT | SourceType.DOCSTRINGS:
            return dict.fromkeys(FIXED_COLUMNS[source_type], pa.string())
        case _:
            assert_never(source_type)
