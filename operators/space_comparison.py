"""Two or more spaces side by side: do they have the same neighbours, and what becomes better and worse in answers?

No similarity of one space is compared with that of another: spaces are compared by ranks, by figures of answers, and by
relative representations, which express each vector by its cosines to the same anchor texts (Moschella et al. 2023,
arXiv:2209.15430).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from penstock.operators.confidence import Interval, mean_interval
from penstock.operators.evaluation import TIE_ROOM, exact_neighbours, recall_at_k
from penstock.operators.indexing import Metric
from penstock.operators.searching import normalize
from penstock.operators.space_health import nearest_others

K = 10
FEWEST_ANCHORS = 2


@dataclass(frozen=True)
class QualityChange:
    """A figure of quality of two systems over the same queries; `difference` is paired, after less before."""

    before: Interval
    after: Interval
    difference: Interval

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Flips:
    """Shares of queries that were right and became wrong, and the reverse; `negative_queries` numbers the former."""

    negative: Interval
    positive: Interval
    negative_queries: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Likeness:
    """How alike two spaces are by relative representations of the same rows.

    Attributes:
        mean_cosine: of the two representations of a row, each centred: 1 for spaces that differ by rotation and scale.
        matched: the share of rows whose own representation in the other space is the nearest of all rows'.
    """

    mean_cosine: float
    matched: float


def neighbour_agreement(
    truth: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], metric: Metric, k: int = K
) -> np.ndarray:
    """The share of the k nearest documents of each query in one space that are the k nearest in another: float64 (q,).

    Args:
        truth, found: queries (q, d) and documents (n, d), the same ones in both.
    """
    expected, got = (
        exact_neighbours(queries, [(_row_names(len(documents)), documents)], wanted, metric, [None] * len(queries))
        for (queries, documents), wanted in ((truth, k + TIE_ROOM), (found, k))
    )
    return recall_at_k(got.ids, expected, k)


def neighbour_overlap(one: np.ndarray, other: np.ndarray, metric: Metric, k: int = K) -> np.ndarray:
    """The share of the k nearest other rows that each row has in common in two spaces: (n, d1), (n, d2) to (n,).

    Raises:
        ValueError: not as many rows, or k or fewer.
    """
    _refuse_other_rows([one, other])
    pairs = zip(nearest_others(one, k, metric).tolist(), nearest_others(other, k, metric).tolist(), strict=True)
    return np.array([len(set(mine) & set(theirs)) / k for mine, theirs in pairs])


def relative_representations(vectors: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Cosines of each vector with each anchor, both less the anchors' mean: (n, d), (a, d) to float32 (n, a).

    The same for a space that is rotated, scaled or shifted. 300 to 1,000 anchors are usual.

    Raises:
        ValueError: fewer than two anchors, or a vector that equals their mean.
    """
    if anchors.ndim != 2 or len(anchors) < FEWEST_ANCHORS:
        raise ValueError(f"anchors (shape {anchors.shape}) must be at least {FEWEST_ANCHORS} rows")
    mean = anchors.mean(axis=0, dtype=np.float64)
    cosines: np.ndarray = normalize(vectors - mean) @ normalize(anchors - mean).T
    return cosines


def likeness(spaces: Sequence[np.ndarray], anchors: int) -> list[list[Likeness]]:
    """How alike each of several spaces is to each other: a symmetric table, but for `matched`.

    Args:
        spaces: the same n rows in each, (n, d_i). The first `anchors` rows are the anchors, the others are compared.

    Raises:
        ValueError: not as many rows, or no rows beside the anchors.
    """
    _refuse_other_rows(spaces)
    if not FEWEST_ANCHORS <= anchors < len(spaces[0]):
        raise ValueError(
            f"anchors ({anchors}) must be at least {FEWEST_ANCHORS} and fewer than the {len(spaces[0])} rows, which "
            "are compared by them"
        )
    relative = [relative_representations(space[anchors:], space[:anchors]) for space in spaces]
    centred = [normalize(rows - rows.mean(axis=0)) for rows in relative]
    return [[_likeness(one, other) for other in centred] for one in centred]


def quality_change(before: np.ndarray, after: np.ndarray, seed: int) -> QualityChange:
    """A figure for each of the same queries, float64 (q,), under two systems."""
    return QualityChange(
        mean_interval(before, seed), mean_interval(after, seed), mean_interval(_paired(after, before), seed)
    )


def flips(before: np.ndarray, after: np.ndarray, seed: int) -> Flips:
    """Which queries change sides: bool (q,), whether each was answered rightly under two systems."""
    change = _paired(after, before)
    negative, positive = (change < 0).astype(np.float64), (change > 0).astype(np.float64)
    numbers = tuple(int(query) for query in np.flatnonzero(negative))
    return Flips(mean_interval(negative, seed), mean_interval(positive, seed), numbers)


def _likeness(one: np.ndarray, other: np.ndarray) -> Likeness:
    cosines = one @ other.T
    own = np.diag(cosines)
    return Likeness(float(own.mean()), float(np.mean(own >= cosines.max(axis=1))))


def _paired(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    if after.shape != before.shape:
        raise ValueError(
            f"figures of two systems (shapes {before.shape} and {after.shape}) must be of the same queries"
        )
    difference: np.ndarray = after.astype(np.float64) - before
    return difference


def _refuse_other_rows(spaces: Sequence[np.ndarray]) -> None:
    counts = sorted({len(space) for space in spaces})
    if len(counts) != 1:
        raise ValueError(f"spaces to compare (of {counts} rows) must hold the same rows, and there must be some")


def _row_names(rows: int) -> pa.Array:
    return pa.array([str(row) for row in range(rows)])
