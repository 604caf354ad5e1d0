"""Confidence intervals of means over queries: the percentile bootstrap (Efron 1979), queries drawn with replacement.

Two systems that answer the same queries are compared by the differences of each query, which is the paired bootstrap:
what makes a query hard for both cancels out.
"""

from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000  # the bounds of 1,000 queries' mean recall then vary by some hundredths of their distance


@dataclass(frozen=True)
class Interval:
    """An estimate between the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def mean_interval(values: np.ndarray, seed: int) -> Interval:
    """The mean of one value per query, floating point (q,); give differences of two systems to compare these.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    return ratio_interval(values, np.ones(len(values)), seed)


def ratio_interval(values: np.ndarray, reference: np.ndarray, seed: int) -> Interval:
    """mean(values) / mean(reference) of the same queries, both floating point (q,), drawn together.

    Raises:
        ValueError: no values, other lengths, a value that is not finite, or a reference whose mean is not positive.
    """
    checked = _checked(values, "values"), _checked(reference, "reference")
    if len(values) != len(reference):
        raise ValueError(
            f"values ({len(values)}) must be as many as the reference ({len(reference)}), for each query one"
        )
    both = np.stack(checked, axis=1)
    if both[:, 1].mean() <= 0:
        raise ValueError(
            f"reference ({len(reference)} queries, mean {both[:, 1].mean():.4g}) must have a mean above 0 to be a "
            "share of; give queries that the reference answers"
        )
    generator = np.random.default_rng(seed)
    drawn = np.array([both[generator.integers(0, len(both), len(both))].mean(axis=0) for _ in range(RESAMPLES)])
    shares = np.divide(drawn[:, 0], drawn[:, 1], out=np.full(RESAMPLES, np.inf), where=drawn[:, 1] > 0)
    low, high = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest")
    return Interval(float(both[:, 0].mean() / both[:, 1].mean()), float(low), float(high))


def _checked(values: np.ndarray, subject: str) -> np.ndarray:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{subject} (shape {values.shape}) must be one figure for each of at least one query")
    finite = np.isfinite(values)
    if not finite.all():
        query = int(np.argmin(finite))
        raise ValueError(f"{subject} of query {query} ({values[query]}) must be finite; leave the query out")
    return values.astype(np.float64)
