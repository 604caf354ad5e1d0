"""Funnel search of Matryoshka vectors: many candidates by a short prefix, few by the full vector.

For models trained so that prefixes are embeddings too (Kusupati et al. 2022, arXiv:2205.13147, "adaptive retrieval").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from penstock.operators.indexing import Metric
from penstock.operators.searching import exact_inner_products

# (rows int64 (n,), dimension) to the first `dimension` values of their vectors, float32 (n, dimension).
TakePrefixes = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class FunnelLevel:
    """Candidates are compared by their first `dimension` values, and the `kept` most similar go on."""

    dimension: int
    kept: int

    def __post_init__(self) -> None:
        for name, value in (("dimension", self.dimension), ("kept", self.kept)):
            if value < 1:
                raise ValueError(f"{name} of a funnel level ({value}) must be at least 1")


def halving_levels(shortest: int, dimension: int, k: int) -> tuple[FunnelLevel, ...]:
    """Levels that double dimensions from `shortest` to `dimension` and halve candidates down to `k`.

    Every level then costs about the same: 16 to 128 dimensions and k 10 give (16, 80), (32, 40), (64, 20), (128, 10).
    """
    if not 1 <= shortest <= dimension:
        raise ValueError(f"shortest prefix ({shortest}) must lie in 1..{dimension}, the dimensions of the vectors")
    dimensions = [shortest]
    while dimensions[-1] < dimension:
        dimensions.append(min(2 * dimensions[-1], dimension))
    last = len(dimensions) - 1
    return tuple(FunnelLevel(prefix, k * 2 ** (last - level)) for level, prefix in enumerate(dimensions))


def funnel(
    queries: np.ndarray,
    candidates: np.ndarray,
    take: TakePrefixes,
    levels: Sequence[FunnelLevel],
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar of each query's candidates, as levels of ever longer prefixes leave them.

    Under cosine prefixes are compared by their directions; the last level is the inner product of full vectors, which
    are of unit length. A level that keeps all its candidates changes nothing, so that with all rows as candidates and
    none dropped before the last level the search is exact.

    Args:
        queries: floating point (q, d).
        candidates: int64 (q, n) rows, each once for a query, -1 for none: every row, or those that a search by the
            first prefix found.
        take: looks up prefixes of stored vectors.
        levels: of ascending dimensions, the last the full d, and of descending numbers kept, the last k.

    Returns:
        Rows int64 (q, k), most similar first, equals by ascending row, -1 where there is none, and their similarities
        float32 (q, k), NaN where there is none. Memory: the prefixes of one query's candidates.
    """
    _refuse_levels(levels, queries)
    if candidates.ndim != 2 or len(candidates) != len(queries):
        raise ValueError(f"candidates (shape {candidates.shape}) must be one list for each of {len(queries)} queries")
    k = levels[-1].kept
    rows, near = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.nan, np.float32)
    for number, query in enumerate(queries.astype(np.float32, copy=False)):
        kept, similarities = candidates[number][candidates[number] >= 0].astype(np.int64), np.empty(0, np.float32)
        for level in levels:
            similarities = _similarities(query, kept, take, level.dimension, metric)
            best = np.lexsort((kept, -similarities))[: level.kept]
            kept, similarities = kept[best], similarities[best]
        rows[number, : len(kept)], near[number, : len(kept)] = kept, similarities
    return rows, near


def _similarities(
    query: np.ndarray, rows: np.ndarray, take: TakePrefixes, dimension: int, metric: Metric
) -> np.ndarray:
    """float32 (n,): inner products of prefixes, by the length of the rows' (the query's is the same for all)."""
    prefixes = take(rows, dimension)
    if prefixes.shape != (len(rows), dimension):
        raise ValueError(f"prefixes taken (shape {prefixes.shape}) must be {dimension} values of {len(rows)} rows")
    near = exact_inner_products(query[:dimension], prefixes)
    if metric is Metric.INNER_PRODUCT or dimension == len(query):
        return near
    lengths = np.linalg.norm(prefixes, axis=1)
    return near / np.where(lengths > 0, lengths, np.float32(1))


def _refuse_levels(levels: Sequence[FunnelLevel], queries: np.ndarray) -> None:
    dimensions, kept = [level.dimension for level in levels], [level.kept for level in levels]
    if not levels or queries.ndim != 2 or dimensions[-1] != queries.shape[1]:
        raise ValueError(
            f"last level of the funnel (dimensions {dimensions}) must compare full vectors, got queries of shape "
            f"{queries.shape}; end with their dimension"
        )
    if dimensions != sorted(set(dimensions)) or kept != sorted(kept, reverse=True):
        raise ValueError(
            f"levels of the funnel (dimensions {dimensions}, kept {kept}) must compare ever more dimensions of ever "
            "fewer rows"
        )
