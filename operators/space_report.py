"""The report of one space: figures of its health, and what to draw of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from penstock.operators.indexing import Metric
from penstock.operators.lengths import normalize
from penstock.operators.moments import moments_of
from penstock.operators.space_health import K, SpaceHealth, k_occurrences, space_health

COSINE_PAIRS = 20_000  # random pairs of rows: a bin of 5 % then is right to 0.3 points
COSINE_BINS = 80  # of -1 to 1, the same for every space, so that two can be laid over each other
OCCURRENCE_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Histogram:
    """Shares of values, in bins from each edge to the next; the last bin has no upper edge where `open_ended`."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    open_ended: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SpaceReport:
    """Health, cosines of random pairs of different rows, and how often rows are among the K nearest of others."""

    health: SpaceHealth
    cosines: Histogram
    occurrences: Histogram

    def to_json(self) -> dict[str, Any]:
        return {
            "health": self.health.to_json(),
            "cosines": self.cosines.to_json(),
            "occurrences": self.occurrences.to_json(),
        }


def space_report(sample: np.ndarray, metric: Metric, seed: int) -> SpaceReport:
    """The report of a space by a sample of it, moments included: float32 (n, d), of more than K rows.

    Raises:
        ValueError: K rows or fewer, or one that is zero.
    """
    moments = moments_of(sample, sample.mean(axis=0, dtype=np.float64))
    counts = k_occurrences(sample, K, metric)
    health = space_health(moments, sample, metric, counts=counts)
    return SpaceReport(health, cosine_histogram(sample, seed), occurrence_histogram(counts))


def cosine_histogram(sample: np.ndarray, seed: int) -> Histogram:
    """Cosines of COSINE_PAIRS random pairs of different rows, of (n, d) with n of at least 2."""
    generator = np.random.default_rng(seed)
    left = generator.integers(0, len(sample), COSINE_PAIRS)
    right = (left + generator.integers(1, len(sample), COSINE_PAIRS)) % len(sample)
    unit = normalize(sample)
    cosines = np.einsum("nd,nd->n", unit[left], unit[right])
    counts, edges = np.histogram(np.clip(cosines, -1, 1), np.linspace(-1, 1, COSINE_BINS + 1))
    return Histogram(tuple(edges.round(6).tolist()), _shares(counts))


def occurrence_histogram(counts: np.ndarray) -> Histogram:
    """How often rows are among the nearest of others: int64 (n,)."""
    edges = np.array([*OCCURRENCE_EDGES, np.inf])
    return Histogram(tuple(map(float, OCCURRENCE_EDGES)), _shares(np.histogram(counts, edges)[0]), open_ended=True)


def _shares(counts: np.ndarray) -> tuple[float, ...]:
    shares: Sequence[float] = (counts / counts.sum()).round(6).tolist()
    return tuple(shares)
