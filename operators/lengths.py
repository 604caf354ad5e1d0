"""Vectors of unit length: how they are made, and refused where they are not."""

import numpy as np

from penstock.operators.indexing import Metric

UNIT_LENGTH_TOLERANCE = 1e-2  # float16 rounds each component by up to 2^-11, so lengths by less than 5e-4


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1: floating point (n, d) to float32 (n, d).

    Raises:
        ValueError: naming the first row that is zero or not finite.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        row = int(np.argmin(usable))
        raise ValueError(f"vector {row} (length {lengths[row, 0]}) has no direction; drop the row")
    unit: np.ndarray = (vectors / lengths).astype(np.float32)
    return unit


def refuse_unfit_lengths(vectors: np.ndarray, metric: Metric, subject: str) -> None:
    """Refuses vectors (n, d) that are not finite, or under cosine not of unit length."""
    lengths = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1)
    fit = np.isfinite(lengths)
    if metric is Metric.COSINE:
        fit &= np.abs(lengths - 1) <= UNIT_LENGTH_TOLERANCE
    if not fit.all():
        row = int(np.argmin(fit))
        rule = "length 1" if metric is Metric.COSINE else "a finite length"
        raise ValueError(f"{subject} {row} (length {lengths[row]:.6g}) must have {rule} for {metric}; normalize() it")
