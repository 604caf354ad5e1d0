"""Parquet and CSV: rows from columns that are checked before any row is read."""

import csv
import heapq
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from penstock.operators.documents import DocumentReader, SourcePart
from penstock.operators.metadata import fits, is_text
from penstock.operators.rows import BadRow, Reason, Row, UnusableFile
from penstock.operators.streams import BOM, CONTENT_ERRORS, READ_BYTES, WatchedStream, decoded, refuse_beyond

BATCH_ROWS = 1024  # of Parquet: one batch is all that is decoded beyond the cap
MIN_ROW_BYTES = 4  # of decoded Parquet: one string offset; a claim of more rows than the cap holds is a bomb
CSV_BLOCK_BYTES = 2**31 - 1  # pyarrow counts them in 32 bits
CSV_FIRST_ROW = 2  # pyarrow counts the rows that it skips from 1, the header included


# ---- columns to rows


def _needed_columns(reader: DocumentReader) -> list[str]:
    identity = () if reader.id is None else (reader.id,)
    return list(dict.fromkeys([*reader.text, *identity, *(column for column, _ in reader.keep)]))


def _refuse_unfit_columns(present: Sequence[str], needed: Sequence[str]) -> None:
    counts = Counter(present)
    if missing := [column for column in needed if counts[column] == 0]:
        detail = f"columns {', '.join(missing)} are missing; the file has {', '.join(present)}"
        raise UnusableFile(Reason.MISSING_COLUMN, detail)
    if repeated := [column for column in needed if counts[column] > 1]:
        raise UnusableFile(Reason.SCHEMA_MISMATCH, f"columns {', '.join(repeated)} appear more than once")


def _column_rows(
    reader: DocumentReader, values: Mapping[str, Sequence[object]], positions: Iterable[int]
) -> Iterator[Row]:
    texts = zip(*(values[column] for column in reader.text), strict=True)
    ids = itertools.repeat(None) if reader.id is None else values[reader.id]
    kept = zip(*(values[column] for column, _ in reader.keep), strict=True) if reader.keep else itertools.repeat(())
    return map(Row, positions, texts, ids, kept)


# ---- CSV


def csv_rows(reader: DocumentReader, part: SourcePart, watched: WatchedStream) -> Iterator[Row | BadRow]:
    """The rows of a CSV file with those that are malformed in their places; UnusableFile when columns do not fit."""
    data = decoded(part.path, watched, reader.max_bytes).read_all()
    needed = _needed_columns(reader)
    _refuse_unfit_columns(csv_header(data), needed)
    bad_rows: list[BadRow] = []
    table = _parse_csv(data, needed, bad_rows)
    types = dict(reader.keep)
    values = {name: _csv_values(table.column(name).to_pylist(), types.get(name)) for name in needed}
    skipped = {bad.position for bad in bad_rows}
    positions = (number for number in itertools.count() if number not in skipped)
    return heapq.merge(_column_rows(reader, values, positions), bad_rows, key=lambda row: row.position)


def csv_header(data: bytes) -> list[str]:
    """The column names; UnusableFile when there is no line."""
    head = io.StringIO(data[:READ_BYTES].removeprefix(BOM).decode(errors="replace"), newline="")
    header = next((names for names in csv.reader(head, strict=True) if names), None)
    if header is None:
        raise UnusableFile(Reason.UNREADABLE_FILE, "the file is empty, a header was expected")
    return header


def _parse_csv(data: bytes, columns: list[str], bad_rows: list[BadRow]) -> pa.Table:
    """The columns as bytes: every value is checked on its own, so one bad value costs one row."""

    def skip(row: pa_csv.InvalidRow) -> str:
        detail = f"the row has {row.actual_columns} fields, the header has {row.expected_columns}"
        bad_rows.append(BadRow(row.number - CSV_FIRST_ROW, Reason.INVALID_CSV_ROW, detail))
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


# ---- Parquet


def parquet_rows(reader: DocumentReader, part: SourcePart, watched: WatchedStream) -> Iterator[Row]:
    """The rows of the part's row groups; UnusableFile when columns do not fit or it decodes to more than the cap."""
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
            refuse_beyond(reader.max_bytes, decoded_bytes)
            yield from _batch_rows(reader, batch, position)
            position += batch.num_rows
        if position != end:
            detail = f"row group {group} ends at row {position}, its footer says {end}"
            raise UnusableFile(Reason.UNREADABLE_FILE, detail)


def row_group_runs(stream: BinaryIO, size_bytes: int, part_bytes: int) -> list[int]:
    """Boundaries of runs of row groups, [0, ..., number of row groups]; empty when the footer cannot be read.

    The file's size is spread over the row groups by their decoded size: the footer's compressed sizes are per column.
    """
    watched = WatchedStream(stream)
    try:
        metadata = pq.ParquetFile(pa.PythonFile(watched, mode="r")).metadata
    except CONTENT_ERRORS:
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


def _open_parquet(reader: DocumentReader, needed: Sequence[str], watched: WatchedStream) -> pq.ParquetFile:
    source = pa.PythonFile(watched, mode="r")
    footer = pq.ParquetFile(source)
    _refuse_unfit_columns(footer.schema_arrow.names, needed)
    types = {field.name: _value_type(field.type) for field in footer.schema_arrow}
    _refuse_unfit_types(reader, types)
    # Read as dictionaries, strings that repeat are not expanded before their decoded size is known.
    strings = [column for column in needed if is_text(types[column])]
    return pq.ParquetFile(source, metadata=footer.metadata, read_dictionary=strings, page_checksum_verification=True)


def _batch_rows(reader: DocumentReader, batch: pa.RecordBatch, position: int) -> Iterator[Row]:
    values = {name: _python_values(batch.column(name)) for name in batch.schema.names}
    return _column_rows(reader, values, range(position, position + batch.num_rows))


def _python_values(column: pa.Array) -> list[object]:
    """Strings as bytes (pyarrow does not check their UTF-8), times as ISO 8601 text, all else as it is."""
    value_type = _value_type(column.type)
    if is_text(value_type):
        values = column.cast(pa.large_binary()).to_pylist()
    elif pa.types.is_timestamp(value_type) or pa.types.is_date(value_type):
        values = column.cast(pa.string()).to_pylist()
    else:
        values = column.to_pylist()
    return list(values)


def _decoded_bytes(column: pa.Array) -> int:
    if not (pa.types.is_dictionary(column.type) and is_text(column.type.value_type)):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return int(pc.sum(lengths, min_count=0).as_py()) + MIN_ROW_BYTES * len(column)


def _refuse_large_groups(reader: DocumentReader, metadata: pq.FileMetaData, groups: range) -> None:
    """By what the footer claims, before anything is decoded."""
    if groups.stop > metadata.num_row_groups:
        detail = f"the part ends at row group {groups.stop}, the file has {metadata.num_row_groups}; it has changed"
        raise UnusableFile(Reason.UNREADABLE_FILE, detail)
    # Of all columns, read or not: asking pyarrow 26 for one column of a damaged footer can abort the process.
    claimed_bytes = 0
    for group in map(metadata.row_group, groups):
        claimed_bytes += group.total_byte_size
        refuse_beyond(reader.max_bytes, max(claimed_bytes, group.num_rows * MIN_ROW_BYTES))


def _refuse_unfit_types(reader: DocumentReader, types: Mapping[str, pa.DataType]) -> None:
    for column in reader.text:
        if not (is_text(types[column]) or pa.types.is_null(types[column])):
            raise UnusableFile(Reason.SCHEMA_MISMATCH, f"text column {column} is {types[column]}, not a string")
    for column, type_name in reader.keep:
        if not fits(types[column], type_name):
            detail = f"metadata column {column} is {types[column]}, which does not fit the declared {type_name}"
            raise UnusableFile(Reason.SCHEMA_MISMATCH, detail)
    if reader.id is not None and not _fits_id(types[reader.id]):
        detail = f"id column {reader.id} is {types[reader.id]}, not a string or an integer"
        raise UnusableFile(Reason.SCHEMA_MISMATCH, detail)


def _value_type(arrow_type: pa.DataType) -> pa.DataType:
    return arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type


def _fits_id(arrow_type: pa.DataType) -> bool:
    return is_text(arrow_type) or bool(pa.types.is_integer(arrow_type) or pa.types.is_null(arrow_type))
