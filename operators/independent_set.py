"""Which of similar rows stay: the greedy maximal independent set in the order in which rows are preferred.

A row stays unless an earlier one that stays is similar to it. So no two rows that stay are similar, and each that goes
has a similar row that stays. The set depends on the order and the pairs alone. It is found in parallel rounds: rows
without an earlier neighbour that may stay do stay, their later neighbours go, and so on (Blelloch, Fineman and Shun,
"Greedy sequential maximal independent set and matching are parallel on average", SPAA 2012). What a round needs of a
row are the states of its earlier neighbours: rows can be dealt out to processes that tell one another who is decided.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UNDECIDED, STAYS, GOES = 0, 1, 2
# Random orders need about log n rounds; a chain in the order of its links needs one for every other link, and from here
# on what is left is decided one by one.
MOST_ROUNDS = 32
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = 0x9E3779B97F4A7C15


class Keep(StrEnum):
    """Which of similar rows is preferred; rows that are equal in it go by their hash.

    LONGEST: the most tokens; FIRST: the first of its source; DENSEST: the most similar rows; RANDOM: a seeded hash;
    COLUMN: by a column, the smallest first or the largest.
    """

    LONGEST = "longest"
    FIRST = "first"
    DENSEST = "densest"
    RANDOM = "random"
    COLUMN = "column"


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The earlier neighbours of some rows among n, by number.

    Attributes:
        row, earlier: int64 (e,), rows and neighbours that are preferred to them.
        similarity: float32 (e,).
    """

    row: np.ndarray
    earlier: np.ndarray
    similarity: np.ndarray


def random_keys(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A seeded hash of each row hash, uint64 (n,) (the finalizer of splitmix64): an order that no row can choose."""
    mixed = hashes + np.uint64((seed + 1) * _STEP % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    result: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return result


def ranks(keys: pa.Array | np.ndarray, hashes: np.ndarray, descending: bool = False) -> np.ndarray:
    """The place int64 (n,) of each row in the order of its key, nulls last, and of equal keys by its uint64 hash.

    Raises:
        ValueError: two rows have the same hash, so that their order would depend on how they came.
    """
    if len(np.unique(hashes)) != len(hashes):
        raise ValueError(f"hashes ({len(hashes)} rows) must be unique to order rows, got {len(np.unique(hashes))}")
    direction = "descending" if descending else "ascending"
    table = pa.table({"key": keys, "hash": pa.array(hashes, pa.uint64())})
    order = pc.sort_indices(table, sort_keys=[("key", direction), ("hash", "ascending")]).to_numpy()
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order))
    return result


def settle(neighbours: Neighbours, rank: np.ndarray, states: np.ndarray, own: np.ndarray) -> None:
    """Decides in `states`, uint8 (n,), all that can be decided of the rows that are `own`, bool (n,).

    Other rows keep their states, and where undecided hold up their later neighbours. `neighbours` must name all earlier
    neighbours of the rows that are own. Time: proportional to the pairs of undecided rows, in each of a few rounds.
    """
    row, earlier = _undecided(neighbours.row, neighbours.earlier, states, own)
    for _ in range(MOST_ROUNDS):
        if not _round(row, earlier, states, own):
            return
        row, earlier = _undecided(row, earlier, states, own)
    _one_by_one(row, earlier, rank, states, own)


def representatives(neighbours: Neighbours, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows that go, ascending, with the most similar of their earlier neighbours that stay (of equal similarity the
    lowest number) and that similarity: int64 (g,), int64 (g,), float32 (g,)."""
    useful = (states[neighbours.row] == GOES) & (states[neighbours.earlier] == STAYS)
    row, earlier = neighbours.row[useful], neighbours.earlier[useful]
    similarity = neighbours.similarity[useful]
    order = np.lexsort((earlier, -similarity, row))
    first = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
    return row[first], earlier[first], similarity[first]


def component_labels(left: np.ndarray, right: np.ndarray, rows: int) -> np.ndarray:
    """The connected component int64 (n,) of each of n rows as the lowest number in it: a name for a group of rows that
    chains of pairs link, of which the ends need not be similar."""
    labels = np.arange(rows)
    while True:
        low = np.minimum(labels[left], labels[right])
        before = labels.copy()
        for ends in (left, right):
            np.minimum.at(labels, before[ends], low)
            np.minimum.at(labels, ends, low)
        labels = labels[labels]
        if np.array_equal(labels, before):
            return labels


def _undecided(
    row: np.ndarray, earlier: np.ndarray, states: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    open_ = own[row] & (states[row] == UNDECIDED) & (states[earlier] != GOES)
    return row[open_], earlier[open_]


def _round(row: np.ndarray, earlier: np.ndarray, states: np.ndarray, own: np.ndarray) -> bool:
    """One round over the open pairs; returns whether it decided any row, and another may decide more."""
    states[row[states[earlier] == STAYS]] = GOES
    held = np.zeros(len(states), bool)
    held[row] = True
    held[row[states[row] == GOES]] = False
    free = own & (states == UNDECIDED) & ~held
    states[free] = STAYS
    return bool(len(row) and (free.any() or (states[row] == GOES).any()))


def _one_by_one(row: np.ndarray, earlier: np.ndarray, rank: np.ndarray, states: np.ndarray, own: np.ndarray) -> None:
    """The rounds that are left, in the order of ranks."""
    _round(row, earlier, states, own)
    order = np.argsort(rank[row], kind="stable")
    row, earlier = row[order], earlier[order]
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    for start, end in zip(starts, np.append(starts, len(row))[1:], strict=True):  # none where no pair is open
        before = states[earlier[start:end]]
        if (before == STAYS).any():
            states[row[start]] = GOES
        elif (before == GOES).all():
            states[row[start]] = STAYS
