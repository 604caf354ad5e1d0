"""Exact duplicates: documents with the same id, and passages with the same normalised text.

Both are joins on a hash over the whole corpus. They run bucket by bucket of the hash space, so that memory is bounded
by the bucket, and decide by content alone: how the corpus is cut into files and fragments never changes what is kept.
"""

from enum import StrEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class DuplicateIds(StrEnum):
    """What becomes of documents that share an id: stop, or keep the first or last by (source, position)."""

    ERROR = "error"
    FIRST = "first"
    LAST = "last"


def repeated(hashes: np.ndarray) -> np.ndarray:
    """The hashes that occur more than once in `hashes` (N,), sorted and unique. Memory: two copies of the input."""
    values, counts = np.unique(hashes, return_counts=True)
    return values[counts > 1]


def bucket_of(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """Bucket (N,) of each uint64 hash; independent of the contiguous ranges that place rows in shards."""
    return (hashes % np.uint64(buckets)).astype(np.int64)


def hash_prefix(column: pa.ChunkedArray) -> np.ndarray:
    """The first 8 bytes of a fixed_size_binary[16] column as uint64 (N,)."""
    if len(column) == 0:
        return np.empty(0, dtype=np.uint64)
    array = column.combine_chunks()
    raw = np.frombuffer(array.buffers()[1], dtype=np.uint64)
    return raw[array.offset * 2 : (array.offset + len(array)) * 2 : 2]


def losing_documents(candidates: pa.Table, policy: DuplicateIds) -> pa.Table:
    """The rows of `candidates` (document_id, source, position, ...) that lose to another with the same id.

    Several rows of one (source, position) are one document and never compete.
    """
    if policy is DuplicateIds.ERROR:
        raise ValueError("policy must be first or last here: with error, any duplicate id stops the run")
    direction = "ascending" if policy is DuplicateIds.FIRST else "descending"
    ordered = candidates.sort_by([("document_id", "ascending"), ("source", direction), ("position", direction)])
    keeper = ordered.select(["source", "position"]).take(pa.array(_first_of_group(ordered, "document_id")))
    same = [pc.equal(ordered.column(name), keeper.column(name)) for name in keeper.column_names]
    return ordered.filter(pc.invert(pc.and_(*same)))


def represented(candidates: pa.Table, key: str) -> pa.Table:
    """Rows of `candidates` that repeat the `key` of another row, with `represented_by` = the id of the row that stays.

    Of the rows with one key, the smallest (document_id, ordinal) stays. `candidates` needs passage_id, document_id,
    ordinal and key.
    """
    ordered = candidates.sort_by([(key, "ascending"), ("document_id", "ascending"), ("ordinal", "ascending")])
    first = _first_of_group(ordered, key)
    keeper = ordered.column("passage_id").take(pa.array(first))
    return ordered.append_column("represented_by", keeper).filter(pa.array(first != np.arange(len(first))))


def _first_of_group(ordered: pa.Table, key: str) -> np.ndarray:
    """For each row of a table sorted by `key`, the number of the first row with the same key: int64 (N,)."""
    starts = np.ones(ordered.num_rows, dtype=bool)
    column = ordered.column(key)
    if ordered.num_rows > 1:
        same = pc.equal(column.slice(1), column.slice(0, len(column) - 1))
        starts[1:] = ~same.to_numpy(zero_copy_only=False)
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
