"""The rows of one part of a join: facts of all of them at once, and vectors of as many as fit.

A part is made of whole cells, which can be larger than memory. Its rows lie in the replicas of every fragment, by part
and row hash: facts are read once, row group by row group, and the vectors of a block of rows when the block is joined.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import stream_rows_with, vector_dimension, vectors_of
from penstock.cluster.storage import Store
from penstock.operators.equal_rows import first_equal
from penstock.operators.independent_set import random_keys
from penstock.operators.sharding import HASH_SPACE
from penstock.operators.similar_pairs import unit_rows

# Of a block that is held, the rest of what fits being blocks that pass by. Rows that pass are compared with one another
# each time: with a fifth of the rows this adds an eighth to the products, with a half it would be a half.
HELD_SHARE = 0.8
FIRST_SEED = 20_261_121
DIGESTS = ("digest_0", "digest_1")  # the digest of a row's unit vector, uint64 each
_FACTS = pa.schema([("row_hash", pa.uint64()), ("native", pa.bool_()), ("standing", pa.bool_()), ("cell", pa.int32())])


@dataclass(frozen=True, eq=False)
class PartRows:
    """Facts of rows, by number in the order of their hashes.

    Attributes:
        hashes: uint64 (n,).
        native: bool (n,), whether they are at home in the part, and no copies.
        standing: bool (n,), whether they were joined with each other before.
        cell: int32 (n,).
    """

    hashes: np.ndarray
    native: np.ndarray
    standing: np.ndarray
    cell: np.ndarray

    def of(self, chosen: np.ndarray) -> "PartRows":
        return PartRows(*(array[chosen] for array in (self.hashes, self.native, self.standing, self.cell)))


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a part.

    Attributes:
        numbers: int64 (m,), their numbers in the part, ascending.
        rows: their facts.
        vectors: float32 (m, d) of unit length.
    """

    numbers: np.ndarray
    rows: PartRows
    vectors: np.ndarray


class Part:
    """A part in the replicas that fragments have at `paths`. Memory: 70 bytes for each row, and a row group.

    Attributes:
        rows: of the part.
        first: int64 (n,), the number of the row that stands for all with the vector of each; of one that stood its
            own.
        dimension: of the vectors; 0 without rows.
    """

    def __init__(self, store: Store, paths: Sequence[str], part: int) -> None:
        self._store, self._paths, self._part = store, paths, part
        facts, digests = [_FACTS.empty_table()], [np.empty((0, 2), np.uint64)]
        for table in self._tables([*_FACTS.names, *DIGESTS], 0, HASH_SPACE - 1):
            facts.append(table.select(_FACTS.names))
            digests.append(np.stack([table.column(name).to_numpy() for name in DIGESTS], axis=1))
        self.dimension = vector_dimension(store, paths[0], "embedding") if len(facts) > 1 else 0
        self.rows, order = _in_order(pa.concat_tables(facts), part)
        self.first = _first(self.rows, np.concatenate(digests)[order])

    def block(self, numbers: np.ndarray) -> Block:
        """The rows of some numbers, int64 (m,), at least one, with their vectors."""
        numbers = np.sort(numbers)
        rows = self.rows.of(numbers)
        vectors = np.empty((len(numbers), self.dimension), np.float32)
        for table in self._tables(["row_hash", "embedding"], int(rows.hashes[0]), int(rows.hashes[-1])):
            hashes = table.column("row_hash").to_numpy()
            place = np.searchsorted(rows.hashes, hashes)
            here = rows.hashes[place] == hashes
            vectors[place[here]] = unit_rows(vectors_of(table.column("embedding"))[here])
        return Block(numbers, rows, vectors)

    def blocks(self, numbers: np.ndarray, most: int) -> Iterator[tuple[Block, Iterator[Block]]]:
        """What row_blocks gives, with vectors: each block is read when its turn comes."""
        for held, later in row_blocks(numbers, most):
            yield self.block(held), map(self.block, later)

    def _tables(self, columns: Sequence[str], first: int, last: int) -> Iterator[pa.Table]:
        """The rows of the part with hashes from first to last, row group by row group of each fragment."""
        for path in self._paths:
            yield from stream_rows_with(self._store, path, ("part", self._part), (first, last), columns)


def row_blocks(rows: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, Iterator[np.ndarray]]]:
    """Rows (n,) in blocks, each held while those behind it pass by, so that `most` (2 at least) are there at once:
    every two rows are in one block, or one is held when the other passes by. One block where all fit."""
    held = len(rows) if len(rows) <= most else max(1, int(most * HELD_SHARE))
    passing = max(1, most - held)
    for start in range(0, len(rows), max(1, held)):
        end = start + held
        yield rows[start:end], (rows[place : place + passing] for place in range(end, len(rows), passing))


def _in_order(facts: pa.Table, part: int) -> tuple[PartRows, np.ndarray]:
    """The rows by hash, and the place that each had before, int64 (n,)."""
    arrays = [facts.column(name).to_numpy() for name in _FACTS.names]
    order = np.argsort(arrays[0], kind="stable")
    rows = PartRows(*(array[order] for array in arrays))
    unique = len(np.unique(rows.hashes))
    if unique != len(order):
        raise ValueError(
            f"row hashes of part {part} ({len(order)} rows) must be unique, got {unique}: no pair could tell which row "
            "it is of; a fragment is named twice, or two ids have one hash and one must change"
        )
    return rows, order


def _first(rows: PartRows, digests: np.ndarray) -> np.ndarray:
    """Of equal rows that do not stand the first in a mixed order of hashes: the lowest ones would crowd the first of
    the buckets that pairs are dealt out to, which are ranges."""
    first, open_ = np.arange(len(rows.hashes)), np.flatnonzero(~rows.standing)
    order = np.argsort(random_keys(rows.hashes[open_], FIRST_SEED), kind="stable")
    first[open_[order]] = open_[order[first_equal(digests[open_[order]])]]
    return first
