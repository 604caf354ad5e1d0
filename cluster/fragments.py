"""Fragments at rest: Parquet with page checksums, one object per fragment; that it exists means that work is done."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.storage import Store

# Rows of a row group: about 6 MB of 384-dimensional float16 vectors, so that a shard's slice of a fragment reads little
# else.
ROW_GROUP_ROWS = 8192
# Of a value that rows are grouped by: a row group takes 1 KiB of the footer, which every reader parses.
LEAST_GROUP_ROWS = 256
# Components repeat so rarely that a dictionary of them only costs: 49,000 rows of 384 float16 take 37.3 MB and 0.47
# CPU-seconds to read with one, 33.5 MB and 0.08 with their high and low bytes apart.
VECTOR_ENCODING = "BYTE_STREAM_SPLIT"
RECEIPT_KEY = b"penstock.receipt"
HASH_COLUMN = "row_hash"


@dataclass(frozen=True)
class Receipt:
    """What became of a fragment's rows: rows_in = rows_out + the sum of dropped. Facts of content, not of the run, but
    for `encoded`: of embeddings, the vectors that an encoder made for this fragment, not taken over from another."""

    fragment: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int] = field(default_factory=dict)
    passages: int = 0
    tokens: int = 0
    truncated_tokens: int = 0
    encoded: int = 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> "Receipt":
        return Receipt(**json.loads(data))


@dataclass(frozen=True)
class Work:
    """What a run did for one fragment: the receipt, and what it cost this time; `worker` is JSON of the encoder's own
    figures."""

    receipt: Receipt
    encoded: int = 0
    reused: int = 0
    busy_s: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    encoded_tokens: int = 0
    padded_tokens: int = 0
    flops: float = 0.0
    budget_halvings: int = 0
    restarts: int = 0
    worker: str = ""


def write_fragment(
    store: Store, path: str, table: pa.Table, receipt: Receipt | None = None, group_by: str | None = None
) -> int:
    """Write a table as one object, in one atomic step; returns its size in bytes. Equal tables give equal bytes.

    A table that is sorted by the integer column `group_by` gets row groups of its own for each value that has many rows
    (group_ends), so that a reader of one value decompresses little else.
    """
    table = table.replace_schema_metadata({RECEIPT_KEY: receipt.to_json()} if receipt else {})
    sink = io.BytesIO()
    ends = group_ends(table.column(group_by).to_numpy()) if group_by else [table.num_rows]
    with pq.ParquetWriter(sink, table.schema, **write_options(table.schema)) as writer:
        for start, end in pairwise([0, *ends]):
            writer.write_table(table.slice(start, end - start), row_group_size=ROW_GROUP_ROWS)
    data = sink.getvalue()
    store.write(path, data)
    return len(data)


def group_ends(values: np.ndarray) -> list[int]:
    """Where row groups of rows with sorted values, int (n,), end: between two values, as soon as LEAST_GROUP_ROWS are
    reached."""
    ends, start = [], 0
    for change in (np.flatnonzero(np.diff(values)) + 1).tolist():
        if change - start >= LEAST_GROUP_ROWS:
            ends.append(change)
            start = change
    return [*ends, len(values)]


def write_options(schema: pa.Schema) -> dict[str, Any]:
    """How Parquet is written here: with page checksums, and vectors without dictionaries."""
    vectors = [field.name for field in schema if _is_vector(field.type)]
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        "store_schema": True,
        "use_dictionary": [name for name in schema.names if name not in vectors] if vectors else True,
        "column_encoding": {f"{name}.list.element": VECTOR_ENCODING for name in vectors} or None,
    }


def open_fragment(store: Store, path: str) -> pq.ParquetFile:
    """The Parquet file at `path`, verifying page checksums as it is read."""
    return pq.ParquetFile(store.open(path), page_checksum_verification=True, pre_buffer=True)


def read_fragment(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    with open_fragment(store, path) as file:
        return file.read(columns=list(columns) if columns is not None else None)


def vector_dimension(store: Store, path: str, column: str) -> int:
    """The components of the vectors in a column, read from the footer."""
    with open_fragment(store, path) as file:
        return int(file.schema_arrow.field(column).type.list_size)


def read_receipt(store: Store, path: str) -> Receipt:
    """The receipt in a fragment's footer, read without its rows."""
    with open_fragment(store, path) as file:
        return Receipt.from_json(file.schema_arrow.metadata[RECEIPT_KEY])


def read_hash_range(
    store: Store, path: str, first: int, last: int, columns: Sequence[str], by: str = HASH_COLUMN
) -> pa.Table:
    """The rows with first <= row_hash <= last of a fragment sorted by row_hash, or by another column of hashes, reading
    only their row groups."""
    wanted = [by, *(name for name in columns if name != by)]
    with open_fragment(store, path) as file:
        table = file.read_row_groups(_groups_within(file, by, first, last), columns=wanted)
    hashes = table.column(by).to_numpy()
    start = int(np.searchsorted(hashes, np.uint64(first), side="left"))
    stop = int(np.searchsorted(hashes, np.uint64(last), side="right"))
    return table.slice(start, stop - start)


def read_rows_with(store: Store, path: str, column: str, value: int) -> pa.Table:
    """The rows of a file whose integer column has a value, reading only row groups that may hold some."""
    with open_fragment(store, path) as file:
        table = file.read_row_groups(_groups_within(file, column, value, value)).replace_schema_metadata()
    return table.filter(pc.equal(table.column(column), value))


def stream_rows_with(
    store: Store, path: str, having: tuple[str, int], hashes: tuple[int, int], columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Columns of the rows of a file whose integer column has a value (column, value), and a row hash within a range
    (first, last), row group by row group, reading only row groups that may hold some. Tables have rows."""
    (column, value), (first, last) = having, hashes
    read = list(dict.fromkeys([*columns, column, HASH_COLUMN]))
    with open_fragment(store, path) as file:
        groups = set(_groups_within(file, column, value, value))
        for group in sorted(groups & set(_groups_within(file, HASH_COLUMN, first, last))):
            table = file.read_row_group(group, columns=read).replace_schema_metadata()
            own = table.column(HASH_COLUMN).to_numpy()
            chosen = (table.column(column).to_numpy() == value) & (own >= np.uint64(first)) & (own <= np.uint64(last))
            if chosen.any():
                yield table.filter(pa.array(chosen)).select(list(columns))


def _groups_within(file: pq.ParquetFile, column: str, first: int, last: int) -> list[int]:
    """The row groups that may hold values from first to last of an integer column."""
    position = file.schema.names.index(column)  # among the leaves, which are more than the fields
    return [
        group
        for group in range(file.metadata.num_row_groups)
        if _overlaps(file.metadata.row_group(group).column(position).statistics, first, last)
    ]


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed_size_list<float16|float32>[d] column without nulls as an array (N, d) of the same format, without copying
    when it is one chunk."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies a single chunk too
    flat: np.ndarray = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size)


def vector_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """An array (N, d) of float16 or float32 as a fixed_size_list column."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _is_vector(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _overlaps(statistics: pq.Statistics | None, first: int, last: int) -> bool:
    if statistics is None or not statistics.has_min_max:
        return True
    return bool(statistics.min <= last and statistics.max >= first)
