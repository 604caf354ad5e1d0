"""The health of an embedding space: how many directions it uses, how evenly, and which rows crowd the answers.

Spectra come from moments, which workers sum over all rows; neighbours and lengths from a sample. Compare figures of
equal dimension and about as many rows only: ranks, and hubs more so, depend on both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from penstock.operators.indexing import Metric, faiss_threads
from penstock.operators.moments import Moments

K = 10
HUB_OCCURRENCES = 2  # a hub is among the k nearest of at least so many times k rows (scikit-hubness)
RANK_SMOOTHING = 1e-7  # added to each share of the spectrum, as RankMe does
MOST_RANK_FALL = 0.10  # of the effective rank before
MOST_ANTIHUB_RISE = 0.05  # of all rows
MOST_COSINE_RISE = 0.05
MOST_SIZE_DIFFERENCE = 0.10  # between two samples that are compared


@dataclass(frozen=True)
class SpaceHealth:
    """Figures of one space.

    Attributes:
        effective_rank: RankMe (Garrido et al. 2023, arXiv:2210.02885), exp of the entropy of the singular values of the
            vectors, not centred; between 1 and the dimension.
        centred_rank: the same of centred vectors.
        isotropy: IsoScore (Rudman et al. 2022, arXiv:2108.07344) in closed form, (PR - 1) / (d - 1), with PR the
            participation ratio of the covariance's eigenvalues: 0 for one direction, 1 for a sphere.
        mean_cosine: of two different rows of the sample: 0 where directions are even, near 1 in a narrow cone.
        mean_norm, norm_spread: of the sample's lengths, the mean, and the standard deviation divided by it.
        hubness: skewness of k-occurrence, how often a row is among the k nearest of others (Radovanović et al. 2010).
        antihub_share: rows that are among the k nearest of none.
        hub_share: rows that are so for HUB_OCCURRENCES times k others or more.
        hub_occupancy: the share of all neighbour places that hubs take.
    """

    rows: int
    sample_rows: int
    dimension: int
    effective_rank: float
    centred_rank: float
    isotropy: float
    mean_cosine: float
    mean_norm: float
    norm_spread: float
    hubness: float
    antihub_share: float
    hub_share: float
    hub_occupancy: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DriftRule:
    """How much a figure may change, and how much it did: both in the figure's own unit, a rise above 0."""

    figure: str
    before: float
    after: float
    change: float
    most: float

    @property
    def alarm(self) -> bool:
        return self.change > self.most

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"alarm": self.alarm}


def space_health(
    moments: Moments, sample: np.ndarray, metric: Metric, k: int = K, counts: np.ndarray | None = None
) -> SpaceHealth:
    """The figures of a space. Cost: one eigendecomposition, and n^2 d for the neighbours within the sample.

    Args:
        moments: of all rows.
        sample: float32 (n, d), of more than k rows; 25,000 make figures that hardly vary.
        metric: what neighbours are compared by.
        counts: `k_occurrences` of the sample, where they are known.

    Raises:
        ValueError: a sample of k rows or fewer, of another dimension, or with a row that is zero.
    """
    if sample.ndim != 2 or sample.shape[1] != moments.dimension or len(sample) <= k:
        raise ValueError(
            f"sample (shape {sample.shape}) must be more than {k} rows of the moments' {moments.dimension} dimensions"
        )
    lengths = np.linalg.norm(sample.astype(np.float64), axis=1)
    if lengths.min() == 0:
        raise ValueError(f"row {int(lengths.argmin())} of the sample (length 0) has no direction; drop the row")
    counts = k_occurrences(sample, k, metric) if counts is None else counts
    hubs = counts >= HUB_OCCURRENCES * k
    return SpaceHealth(
        rows=moments.rows,
        sample_rows=len(sample),
        dimension=moments.dimension,
        effective_rank=_effective_rank(moments.second_moment()),
        centred_rank=_effective_rank(moments.covariance()),
        isotropy=_iso_score(moments.covariance()),
        mean_cosine=mean_cosine(sample),
        mean_norm=float(lengths.mean()),
        norm_spread=float(lengths.std() / lengths.mean()),
        hubness=_skewness(counts),
        antihub_share=float(np.mean(counts == 0)),
        hub_share=float(np.mean(hubs)),
        hub_occupancy=float(counts[hubs].sum() / counts.sum()),
    )


def k_occurrences(vectors: np.ndarray, k: int, metric: Metric) -> np.ndarray:
    """How many rows have each row among their k nearest others: int64 (n,), whose mean is k."""
    return np.bincount(nearest_others(vectors, k, metric).reshape(-1), minlength=len(vectors))


def nearest_others(vectors: np.ndarray, k: int, metric: Metric) -> np.ndarray:
    """The k most similar other rows of each row, best first: floating point (n, d) to int64 (n, k).

    Exact, on one thread; which of rows equally similar comes k-th is faiss' choice. Both metrics compare inner
    products; under cosine vectors are of unit length.

    Raises:
        ValueError: k rows or fewer.
    """
    if len(vectors) <= k:
        raise ValueError(f"vectors ({len(vectors)}) must be more than the {k} neighbours asked for")
    rows = _comparable(vectors, metric)
    with faiss_threads(1):
        found = faiss.knn(rows, rows, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    # The row itself is known by its number: equal rows may come before it, or crowd it out.
    others = found != np.arange(len(rows))[:, None]
    others[others.all(axis=1), k] = False
    nearest: np.ndarray = found[others].reshape(len(rows), k)
    return nearest


def mean_cosine(vectors: np.ndarray) -> float:
    """The mean cosine of two different rows, over all pairs: from the length of the sum of unit vectors."""
    wide = vectors.astype(np.float64)
    total = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).sum(axis=0)
    rows = len(vectors)
    return float((total @ total - rows) / (rows * (rows - 1)))


def drift(before: SpaceHealth, after: SpaceHealth) -> list[DriftRule]:
    """What changed for the worse between two versions of one space, and by how much it may.

    Raises:
        ValueError: they differ in dimension, or their samples in size by more than MOST_SIZE_DIFFERENCE.
    """
    sizes = sorted((before.sample_rows, after.sample_rows))
    if before.dimension != after.dimension or sizes[1] - sizes[0] > MOST_SIZE_DIFFERENCE * sizes[1]:
        raise ValueError(
            f"spaces to compare ({before.dimension} dimensions, {before.sample_rows} sampled rows, and "
            f"{after.dimension}, {after.sample_rows}) must be of one dimension and of samples alike in size; show "
            "their figures side by side"
        )
    rank_fall = 1 - after.effective_rank / before.effective_rank
    return [
        DriftRule("effective_rank", before.effective_rank, after.effective_rank, rank_fall, MOST_RANK_FALL),
        _rise("antihub_share", before, after, MOST_ANTIHUB_RISE),
        _rise("mean_cosine", before, after, MOST_COSINE_RISE),
    ]


def alarms(rules: Sequence[DriftRule]) -> list[DriftRule]:
    """The rules that are broken."""
    return [rule for rule in rules if rule.alarm]


def _rise(figure: str, before: SpaceHealth, after: SpaceHealth, most: float) -> DriftRule:
    was, became = getattr(before, figure), getattr(after, figure)
    return DriftRule(figure, was, became, became - was, most)


def _comparable(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    if metric is Metric.COSINE:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _effective_rank(moment: np.ndarray) -> float:
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(moment), 0))
    shares = roots / roots.sum() + RANK_SMOOTHING
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _iso_score(covariance: np.ndarray) -> float:
    if len(covariance) == 1:
        return 1.0
    participation = np.trace(covariance) ** 2 / np.sum(covariance**2)  # sums of eigenvalues and of their squares
    return float((participation - 1) / (len(covariance) - 1))


def _skewness(counts: np.ndarray) -> float:
    """The third standardized moment; 0 where all are equal."""
    deviations = counts - counts.mean()
    spread = np.sqrt(np.mean(deviations**2))
    return float(np.mean(deviations**3) / spread**3) if spread > 0 else 0.0
