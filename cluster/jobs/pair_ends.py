"""Pairs → pairs by row: each from both of its rows, sorted by the bucket of the row, beside the file they come from.

Who decides on the rows of a bucket then reads its own pairs of each file and not all of them. They depend on the pairs
and the number of buckets alone, so that every threshold reads the same ones.

A bucket is a range of row hashes: all that is stored by row hash has its rows in one place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import read_fragment, read_rows_with, write_fragment
from penstock.cluster.jobs.similarity import LEFT, RIGHT, SIMILARITY
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.sharding import shard_of, shard_range

END_SCHEMA = pa.schema(
    [("bucket", pa.int32()), ("row", pa.uint64()), ("neighbour", pa.uint64()), (SIMILARITY, pa.float32())]
)


class Sides(StrEnum):
    """From which of its rows a pair is wanted: of links from the first of equal rows to the others from one of them."""

    BOTH = "both"
    FIRST = "first"
    OTHER = "other"


_DIRECTIONS = {Sides.BOTH: ((LEFT, RIGHT), (RIGHT, LEFT)), Sides.FIRST: ((LEFT, RIGHT),), Sides.OTHER: ((RIGHT, LEFT),)}


@dataclass(frozen=True)
class EndsTask:
    """A file of pairs."""

    root: str
    path: str
    buckets: int
    sides: Sides = Sides.BOTH


def bucket_of(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket int64 (n,) of row hashes uint64 (n,)."""
    return shard_of(hashes, buckets)


def bucket_range(bucket: int, buckets: int) -> tuple[int, int]:
    """The first and the last row hash of a bucket."""
    return shard_range(bucket, buckets)


def write_ends(task: EndsTask) -> int:
    """Write the ends (END_SCHEMA) of the pairs of a file, if that is not done; returns their number. Memory: 150 bytes
    for each pair of the file."""
    store, path = connect(task.root), _path(task.path, task.buckets, task.sides)
    if store.info(path) is not None:
        return 0
    pairs = read_fragment(store, task.path)
    directions = _DIRECTIONS[task.sides]
    row, neighbour = (np.concatenate([pairs.column(names[side]).to_numpy() for names in directions]) for side in (0, 1))
    similarity = np.tile(pairs.column(SIMILARITY).to_numpy(), len(directions))
    bucket = bucket_of(row, task.buckets).astype(np.int32)
    order = np.argsort(bucket, kind="stable")
    columns = [pa.array(column[order]) for column in (bucket, row, neighbour, similarity)]
    write_fragment(store, path, pa.table(columns, schema=END_SCHEMA))
    return len(row)


def read_ends(
    store: Store, files: Iterable[str], buckets: int, bucket: int, similarity: float, sides: Sides = Sides.BOTH
) -> pa.Table:
    """The ends (END_SCHEMA) of a bucket's rows in some files of pairs that reach a similarity."""
    parts = [END_SCHEMA.empty_table()]
    for path in files:
        table = read_rows_with(store, _path(path, buckets, sides), "bucket", bucket)
        parts.append(table.filter(pa.array(table.column(SIMILARITY).to_numpy() >= np.float32(similarity))))
    return pa.concat_tables(parts)


def _path(pairs: str, buckets: int, sides: Sides) -> str:
    folder, _, name = pairs.rpartition("/")
    kind = "others" if sides is Sides.OTHER else "ends"
    return f"{folder}/{kind}-{buckets:05d}-{name}"
