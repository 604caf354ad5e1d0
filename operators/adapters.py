"""Adapters: fitted maps from one embedding space to another, so that vectors of two models can be compared in one.

A vector x of one space becomes g(x) of the other, made unit length where the other space is compared by cosine. Fitted
by `adapter_fitting`, kept as safetensors; Drift-Adapter (arXiv:2509.23471) compares these methods.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, assert_never

import numpy as np

from penstock.operators.indexing import MOST_SEED, Metric
from penstock.operators.tagged import name_of_kind, tagged_from_json, tagged_to_json
from penstock.operators.tensors import pack, unpack

KIND = "adapter"


@dataclass(frozen=True)
class Procrustes:
    """The best rotation (or reflection) between centred spaces, U V^T of the singular vectors of their cross covariance
    (Schönemann 1966); it keeps angles around the means.

    Between unequal dimensions U V^T has orthonormal rows or columns, whichever are fewer: into more dimensions it is
    the least squares optimum among such, into fewer it maximises the trace, which is not the same (a relaxation).
    """


@dataclass(frozen=True)
class Ridge:
    """The affine map with the least squared error plus `penalty` times the mean variance of a dimension times the
    squared size of the matrix."""

    penalty: float = 1e-2

    def __post_init__(self) -> None:
        _refuse_penalty("ridge", self.penalty)


@dataclass(frozen=True)
class WhitenedRidge:
    """For queries alone: Ridge between centred spaces, times the inverse of the target's covariance to `power`.

    Documents compared with such an image are weighed as if they had been whitened. With power 1 the inner product is,
    but for a number that is the same for all documents, the leading term of log p(y | x) / p(y) of vectors x and y that
    are jointly normal: what is common to all documents counts less than what sets one apart. Images do not lie where
    vectors of the target space do, and their similarities are not those of the old model: ranks are what they are for.

    Measured with 2,000 abstracts and their titles, recall at 10 of power 1 and penalty 0.3, Procrustes and Ridge: 0.81,
    0.67 and 0.28 from all-MiniLM-L6-v2 to its first 3 layers, 0.75, 0.65 and 0.59 from it to a static table.
    """

    penalty: float = 0.3
    power: float = 1.0

    def __post_init__(self) -> None:
        _refuse_penalty("whitened_ridge", self.penalty)
        if not 0 <= self.power <= 1:
            raise ValueError(f"power of whitened_ridge ({self.power}) must lie between 0, no whitening, and 1")


@dataclass(frozen=True)
class LowRank:
    """The best affine map of this rank: Ridge, projected on the leading principal components of what it predicts
    (reduced-rank regression, Izenman 1975)."""

    rank: int
    penalty: float = 1e-2

    def __post_init__(self) -> None:
        _refuse_size("rank of low_rank", self.rank)
        _refuse_penalty("low_rank", self.penalty)


@dataclass(frozen=True)
class ResidualMlp:
    """Ridge plus a network of one hidden layer that learns what Ridge misses; it begins as Ridge."""

    hidden: int = 256
    penalty: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        _refuse_size("hidden of residual_mlp", self.hidden)
        _refuse_penalty("residual_mlp", self.penalty)
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed of residual_mlp ({self.seed}) must lie in 0..{MOST_SEED}")


LinearMethod: TypeAlias = Procrustes | Ridge | WhitenedRidge | LowRank
Method: TypeAlias = LinearMethod | ResidualMlp
METHOD_TYPES: Mapping[str, type[Method]] = {
    "low_rank": LowRank,
    "procrustes": Procrustes,
    "residual_mlp": ResidualMlp,
    "ridge": Ridge,
    "whitened_ridge": WhitenedRidge,
}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A fitted map from one space to another. Threads may share it.

    Attributes:
        metric: what vectors of the target space are compared by; under cosine outputs are of unit length.
        arrays: float32, of the names and shapes of `array_shapes`.

    Raises:
        ValueError: other arrays.
    """

    method: Method
    metric: Metric
    input_dimension: int
    output_dimension: int
    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        expected = array_shapes(self.method, self.input_dimension, self.output_dimension)
        found = {name: array.shape for name, array in self.arrays.items()}
        if found != expected:
            raise ValueError(f"arrays of {type_of(self.method)} (shapes {found}) must have the shapes {expected}")
        for name, array in self.arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(
                    f"array {name} of {type_of(self.method)} ({array.dtype}) must hold finite float32 values; fit it "
                    "again"
                )

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Floating point (n, input_dimension) to float32 (n, output_dimension).

        The last bits of a row may depend on how many rows it is multiplied with.

        Raises:
            ValueError: another dimension, or under cosine a row that is not finite or whose image is zero.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.input_dimension:
            raise ValueError(
                f"vectors to adapt (shape {vectors.shape}) must be rows of the {self.input_dimension} dimensions of "
                "the space that the adapter was fitted from"
            )
        mapped = self._mapped(vectors.astype(np.float32, copy=False))
        return _unit(mapped) if self.metric is Metric.COSINE else mapped

    def to_bytes(self) -> bytes:
        """A safetensors file; equal adapters give equal bytes."""
        record = {
            "method": method_to_json(self.method),
            "metric": self.metric.value,
            "input_dimension": self.input_dimension,
            "output_dimension": self.output_dimension,
        }
        return pack(KIND, record, self.arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of to_bytes.

        Raises:
            ValueError: the bytes are damaged, or hold something else.
        """
        record, arrays = unpack(KIND, data)
        method, metric = method_from_json(record["method"]), Metric(record["metric"])
        return cls(method, metric, record["input_dimension"], record["output_dimension"], arrays)

    def content_hash(self) -> str:
        """sha256 of to_bytes in hexadecimal digits: what the adapter is."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def _mapped(self, rows: np.ndarray) -> np.ndarray:
        arrays = self.arrays
        match self.method:
            case Procrustes() | Ridge() | WhitenedRidge():
                mapped: np.ndarray = rows @ arrays["matrix"]
            case LowRank():
                mapped = rows @ arrays["down"] @ arrays["up"]
            case ResidualMlp():
                hidden = gelu(rows @ arrays["inner"] + arrays["inner_bias"])
                mapped = rows @ arrays["matrix"] + hidden @ arrays["outer"]
            case _:
                assert_never(self.method)
        mapped += arrays["bias"]
        return mapped


def type_of(method: Method) -> str:
    """The short name that a method has in files."""
    return name_of_kind(METHOD_TYPES, method)


def method_to_json(method: Method) -> dict[str, Any]:
    """A method as plain data: its parameters and its `type`."""
    return tagged_to_json(METHOD_TYPES, method)


def method_from_json(value: Mapping[str, Any]) -> Method:
    """The inverse of method_to_json; unknown types and parameters are errors."""
    return tagged_from_json(METHOD_TYPES, value, "an adapter")


def array_shapes(method: Method, input_dimension: int, output_dimension: int) -> dict[str, tuple[int, ...]]:
    """The arrays that a method is fitted to, by name.

    Raises:
        ValueError: a rank above the dimensions.
    """
    bias, matrix = (output_dimension,), (input_dimension, output_dimension)
    match method:
        case Procrustes() | Ridge() | WhitenedRidge():
            return {"matrix": matrix, "bias": bias}
        case LowRank(rank=rank):
            if rank > min(matrix):
                raise ValueError(
                    f"rank of low_rank ({rank}) must be at most the {min(matrix)} of the smaller space's dimensions"
                )
            return {"down": (input_dimension, rank), "up": (rank, output_dimension), "bias": bias}
        case ResidualMlp(hidden=hidden):
            inner = {"inner": (input_dimension, hidden), "inner_bias": (hidden,), "outer": (hidden, output_dimension)}
            return {"matrix": matrix, **inner, "bias": bias}
        case _:
            assert_never(method)


def gelu(values: np.ndarray) -> np.ndarray:
    """The Gaussian error linear unit in its tanh form, as torch has it (Hendrycks, Gimpel 2016, arXiv:1606.08415)."""
    inner: np.ndarray = values * values
    inner *= np.float32(0.044715 * 0.7978845608)
    inner += np.float32(0.7978845608)
    inner *= values
    np.tanh(inner, out=inner)
    inner += np.float32(1)
    inner *= values
    inner *= np.float32(0.5)
    return inner


def _unit(mapped: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in place; searching.normalize takes three times as long for one row."""
    lengths = np.sqrt(np.einsum("nd,nd->n", mapped, mapped))[:, None]
    usable = np.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        row = int(np.argmin(usable))
        raise ValueError(
            f"vector {row} (of length {lengths[row, 0]} in the target space) has no direction there; drop the row"
        )
    mapped /= lengths
    return mapped


def _refuse_penalty(name: str, penalty: float) -> None:
    if not 0 <= penalty < np.inf:
        raise ValueError(f"penalty of {name} ({penalty}) must be 0 or above, and finite; 0.01 is common")


def _refuse_size(subject: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{subject} ({size}) must be at least 1")
