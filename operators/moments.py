"""Means and second moments of vectors that are spread over many workers: small sums, merged in any order.

What is fitted from them (centring, PCA, whitening, projections of queries and documents) needs no second pass over the
vectors. Documents and queries are two spaces, each with moments of its own; those of rows [x, y] of two spaces side by
side hold the cross moments too.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from penstock.operators.tensors import pack, unpack

BLOCK_ROWS = 8_192  # rows widened to float64 at once: 64 MiB of 1,024 dimensions
KIND = "moments"


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over weighted rows, all float64, relative to a pilot that parts of one whole share.

    A pilot near the mean keeps the covariance from being the small difference of large sums (Chan, Golub, LeVeque 1983,
    "Algorithms for computing the sample variance").

    Attributes:
        pilot: (d,) what is subtracted from each row before it is summed.
        rows: rows summed, whatever their weights.
        weight: the sum of weights.
        first: (d,) the sum of w (x - pilot).
        second: (d, d) the sum of w (x - pilot)(x - pilot)^T.
    """

    pilot: np.ndarray
    rows: int
    weight: float
    first: np.ndarray
    second: np.ndarray

    def __post_init__(self) -> None:
        dimension = len(self.pilot)
        for name, shape in (("pilot", (dimension,)), ("first", (dimension,)), ("second", (dimension, dimension))):
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
                raise ValueError(
                    f"{name} of moments (shape {array.shape}, {array.dtype}) must be finite float64 of shape "
                    f"{shape}; sum the vectors again"
                )

    @classmethod
    def nothing(cls, pilot: np.ndarray) -> Self:
        """The moments of no rows, relative to `pilot` (d,)."""
        wide = np.asarray(pilot, dtype=np.float64)
        return cls(wide, 0, 0.0, np.zeros(len(wide)), np.zeros((len(wide), len(wide))))

    @property
    def dimension(self) -> int:
        return len(self.pilot)

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows; to the rounding of float64 the same in any order.

        Raises:
            ValueError: they are relative to different pilots.
        """
        if not np.array_equal(self.pilot, other.pilot):
            raise ValueError(
                f"moments to merge (of {self.rows} and {other.rows} rows) must have one pilot, got two that differ; "
                "sum all parts relative to the same one"
            )
        return Moments(
            self.pilot,
            self.rows + other.rows,
            self.weight + other.weight,
            self.first + other.first,
            self.second + other.second,
        )

    def mean(self) -> np.ndarray:
        """The weighted mean, float64 (d,)."""
        mean: np.ndarray = self.pilot + self._mean_offset()
        return mean

    def covariance(self) -> np.ndarray:
        """The weighted covariance E (x - mean)(x - mean)^T, divided by the weight and not by one less: (d, d)."""
        offset = self._mean_offset()
        covariance: np.ndarray = self.second / self.weight - np.outer(offset, offset)
        return covariance

    def second_moment(self) -> np.ndarray:
        """The weighted, uncentred second moment E x x^T, (d, d): what inner products are the better kept by."""
        mean = self.mean()
        moment: np.ndarray = self.covariance() + np.outer(mean, mean)
        return moment

    def mapped(self, matrix: np.ndarray, shift: np.ndarray) -> "Moments":
        """The moments of `matrix @ x + shift` of the same rows, for (m, d) and (m,): exact, without the rows."""
        return Moments(
            matrix @ self.pilot + shift,
            self.rows,
            self.weight,
            matrix @ self.first,
            matrix @ self.second @ matrix.T,
        )

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        arrays = {"pilot": self.pilot, "first": self.first, "second": self.second}
        return pack(KIND, {"rows": self.rows, "weight": self.weight}, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of to_bytes.

        Raises:
            ValueError: the bytes are damaged, or hold something else.
        """
        record, arrays = unpack(KIND, data)
        return cls(arrays["pilot"], record["rows"], record["weight"], arrays["first"], arrays["second"])

    def _mean_offset(self) -> np.ndarray:
        if self.weight <= 0:
            raise ValueError(
                f"moments ({self.rows} rows of weight {self.weight}) must be of at least one row of positive weight; "
                "give more rows"
            )
        offset: np.ndarray = self.first / self.weight
        return offset


def moments_of(vectors: np.ndarray, pilot: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """The moments of some rows. Cost: n d^2 multiplications in float64; memory: a block of rows and two matrices.

    Args:
        vectors: floating point (n, d).
        pilot: (d,), the same for all parts that are to be merged.
        weights: (n,), finite and not negative; None weighs each row 1. Frequencies make the moments those of traffic.

    Raises:
        ValueError: other shapes, or a row or weight that is not finite.
    """
    total = Moments.nothing(pilot)
    _refuse_shapes(vectors, total.dimension, weights)
    weighed = np.ones(len(vectors)) if weights is None else weights.astype(np.float64)
    first, second = total.first.copy(), total.second.copy()
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS].astype(np.float64) - total.pilot
        part = weighed[start : start + BLOCK_ROWS]
        _refuse_not_finite(block, start)
        first += part @ block
        block *= np.sqrt(part)[:, None]
        second += block.T @ block
    return Moments(total.pilot, len(vectors), float(weighed.sum()), first, second)


def _refuse_shapes(vectors: np.ndarray, dimension: int, weights: np.ndarray | None) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise ValueError(f"vectors (shape {vectors.shape}) must be rows of the pilot's {dimension} dimensions")
    if weights is None:
        return
    if weights.shape != (len(vectors),):
        raise ValueError(f"weights (shape {weights.shape}) must be one for each of {len(vectors)} vectors")
    usable = np.isfinite(weights) & (weights >= 0)
    if not usable.all():
        row = int(np.argmin(usable))
        raise ValueError(f"weight {row} ({weights[row]}) must be finite and not negative; drop the row or weigh it 0")


def _refuse_not_finite(block: np.ndarray, start: int) -> None:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise ValueError(f"vector {start + int(np.argmin(finite))} must be finite; drop the row")
