"""What a join found of all pairs, and how similar these are."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from penstock.operators.similar_pairs import FILTER_MARGIN, Pairs, pair_similarities

BLOCK_ROWS = 4_096
CONFIDENCE = 0.95
BOOTSTRAPS = 2_000
BOOTSTRAP_SEED = 7


@dataclass(frozen=True)
class PairRecall:
    """The share of all similar pairs that a join found, measured on the pairs of sampled rows.

    Attributes:
        recall: 1 where there are no pairs at all.
        at_least: what the recall of all pairs is not below, with a confidence of 95 %.
        rows: sampled rows that have a pair; pairs: what they have, of which `found` were found.
    """

    recall: float
    at_least: float
    rows: int
    pairs: int
    found: int


def sample_truth(sample: np.ndarray, vectors: np.ndarray, floor: float) -> Pairs:
    """The pairs (row of the sample, row of `vectors`) with a similarity of at least `floor`, a row's own copy included:
    float32 (s, d) against float32 (n, d), both of unit length, in float32 and where near the floor in float64."""
    both = np.concatenate([sample, vectors])
    parts: list[Pairs] = []
    for first in range(0, len(vectors), BLOCK_ROWS):
        products = sample @ vectors[first : first + BLOCK_ROWS].T
        left, right = np.nonzero(products >= floor - max(FILTER_MARGIN.values()))
        right = right + first
        parts.append(Pairs(left, right, pair_similarities(both, left, right + len(sample))))
    pairs = Pairs.joined(parts)
    return pairs.where(pairs.similarity >= np.float32(floor))


def pair_recall(row: np.ndarray, found: np.ndarray) -> PairRecall:
    """The recall of a join from the true pairs of sampled rows.

    Pairs of one row are found or lost together, so rows and not pairs are drawn again for the bound (bootstrap over
    rows, percentile). Where all were found it is exact for rows that each lost or found all: 1 - 0.05^(1 / rows).

    Args:
        row: int64 (p,), the sampled row of each true pair; `found`, bool (p,), whether the join found it.
    """
    names, place = np.unique(row, return_inverse=True)
    pairs, hits = np.bincount(place, minlength=len(names)), np.bincount(place, found, len(names))
    if len(names) == 0:
        return PairRecall(1.0, 0.0, 0, 0, 0)
    recall = float(hits.sum() / pairs.sum())
    if found.all():
        at_least = (1 - CONFIDENCE) ** (1 / len(names))
    else:
        at_least = _bootstrap_bound(hits, pairs)
    return PairRecall(recall, at_least, len(names), int(pairs.sum()), int(hits.sum()))


def similarity_histogram(similarities: Iterable[np.ndarray], floor: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts int64 (bins,) of similarities in equal steps from `floor` to 1, and the edges float64 (bins + 1,); parts
    of any size, so that no process needs all pairs."""
    edges = np.linspace(floor, 1.0, bins + 1)
    counts = np.zeros(bins, np.int64)
    for part in similarities:
        counts += np.histogram(np.clip(part.astype(np.float64), floor, 1.0), edges)[0]
    return counts, edges


def _bootstrap_bound(hits: np.ndarray, pairs: np.ndarray) -> float:
    random = np.random.default_rng(BOOTSTRAP_SEED)
    recalls = np.empty(BOOTSTRAPS)
    for number in range(BOOTSTRAPS):
        drawn = random.integers(0, len(pairs), len(pairs))
        recalls[number] = hits[drawn].sum() / pairs[drawn].sum()
    return float(np.quantile(recalls, 1 - CONFIDENCE))
