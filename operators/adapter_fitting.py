"""Fit adapters to pairs: the vectors that two models give to the same texts.

The linear ones follow from the moments of rows [x, y] of both spaces side by side, which many workers can sum; only the
network needs the pairs themselves.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, assert_never

import numpy as np

from penstock.operators.adapters import (
    Adapter,
    LinearMethod,
    LowRank,
    Method,
    Procrustes,
    ResidualMlp,
    Ridge,
    WhitenedRidge,
    array_shapes,
)
from penstock.operators.indexing import Metric
from penstock.operators.moments import Moments, moments_of

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
BATCH_PAIRS = 256
MOST_EPOCHS = 60
PATIENCE = 4  # epochs without a lower loss of the held-out pairs
HELD_OUT = 10  # every tenth pair decides when to stop
# Unit vectors have components of d^-1/2: with weights of this size the hidden layer works where it bends.
INNER_SCALE = 2.0


@dataclass(frozen=True, eq=False)
class Pairs:
    """The same n texts in two spaces: floating point (n, d_source) and (n, d_target); weights (n,), None for all 1.

    Raises:
        ValueError: they are not as many, or none, or a vector is not finite.
    """

    source: np.ndarray
    target: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, vectors in (("source", self.source), ("target", self.target)):
            if vectors.ndim != 2 or len(vectors) == 0 or len(vectors) != len(self.source):
                raise ValueError(
                    f"{name} vectors of pairs (shape {vectors.shape}) must be rows, as many as there are source "
                    f"vectors (shape {self.source.shape}), and at least one"
                )

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: np.ndarray) -> "Pairs":
        """Some of the pairs."""
        return Pairs(self.source[rows], self.target[rows], None if self.weights is None else self.weights[rows])

    def shuffled(self, seed: int) -> "Pairs":
        """Each source vector with the target vector of another text, drawn at random: pairs that say nothing."""
        other = np.random.default_rng(seed).permutation(len(self))
        return Pairs(self.source, self.target[other], self.weights)

    def moments(self) -> Moments:
        """Those of rows [x, y], for fit_linear."""
        joined = self.side_by_side()
        return moments_of(joined, joined.mean(axis=0, dtype=np.float64), self.weights)

    def side_by_side(self) -> np.ndarray:
        """Rows [x, y], (n, d_source + d_target)."""
        return np.concatenate([self.source, self.target], axis=1)


def fit_adapter(method: Method, pairs: Pairs, metric: Metric) -> Adapter:
    """An adapter of the source's space to the target's; the same bytes for the same pairs, machine and thread count.

    Raises:
        ValueError: the source vectors are all equal, or a rank is above the dimensions.
    """
    if isinstance(method, ResidualMlp):
        return _fit_mlp(method, pairs, metric)
    return fit_linear(method, pairs.moments(), pairs.source.shape[1], metric)


def fit_linear(method: LinearMethod, moments: Moments, input_dimension: int, metric: Metric) -> Adapter:
    """An adapter from moments of rows [x, y], x of the first `input_dimension` columns; about 10 d^3 operations.

    Raises:
        ValueError: as fit_adapter.
    """
    output_dimension = moments.dimension - input_dimension
    array_shapes(method, input_dimension, output_dimension)  # refuses a rank before the work
    covariance = moments.covariance()
    source_mean, target_mean = np.split(moments.mean(), [input_dimension])
    own, cross = covariance[:input_dimension, :input_dimension], covariance[:input_dimension, input_dimension:]
    match method:
        case Procrustes():
            left, _, right = np.linalg.svd(cross, full_matrices=False)
            matrix = left @ right
            arrays = {"matrix": matrix}
        case Ridge(penalty=penalty):
            matrix = np.linalg.solve(_penalized(own, penalty), cross)
            arrays = {"matrix": matrix}
        case WhitenedRidge(penalty=penalty, power=power):
            theirs = _penalized(covariance[input_dimension:, input_dimension:], penalty)
            matrix = np.linalg.solve(_penalized(own, penalty), cross) @ _power(theirs, -power)
            arrays = {"matrix": matrix}
            target_mean = np.zeros(output_dimension)
        case LowRank(rank=rank, penalty=penalty):
            penalized = _penalized(own, penalty)
            full = np.linalg.solve(penalized, cross)
            leading = np.linalg.eigh(full.T @ penalized @ full)[1][:, ::-1][:, :rank]
            arrays = {"down": full @ leading, "up": leading.T}
            matrix = arrays["down"] @ arrays["up"]
        case _:
            assert_never(method)
    arrays["bias"] = target_mean - source_mean @ matrix
    return Adapter(method, metric, input_dimension, output_dimension, _narrow(arrays))


def _penalized(own: np.ndarray, penalty: float) -> np.ndarray:
    """A covariance with the penalty on its diagonal."""
    variance = float(np.trace(own)) / len(own)
    if variance <= 0:
        raise ValueError(
            f"vectors of pairs (mean variance {variance:.3g}) must differ to be mapped; give pairs of more texts"
        )
    # Without any penalty, directions that the sample lacks must still not make the system singular.
    penalized: np.ndarray = own + max(penalty, len(own) * np.finfo(np.float64).eps) * variance * np.eye(len(own))
    return penalized


def _power(symmetric: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    raised: np.ndarray = (vectors * values**exponent) @ vectors.T
    return raised


def _narrow(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}


# ---- the network


def _fit_mlp(method: ResidualMlp, pairs: Pairs, metric: Metric) -> Adapter:
    import torch

    held_out = np.arange(len(pairs)) % HELD_OUT == HELD_OUT - 1
    order = np.random.default_rng(method.seed).permutation(len(pairs))
    fitted, stopping = pairs.take(order[~held_out]), pairs.take(order[held_out] if held_out.any() else order)
    base = fit_linear(Ridge(method.penalty), fitted.moments(), pairs.source.shape[1], metric)
    generator = torch.Generator().manual_seed(method.seed)
    parameters = _first_parameters(method, base, generator)
    best = _train(parameters, _tensors(fitted), _tensors(stopping), metric, generator)
    return Adapter(method, metric, base.input_dimension, base.output_dimension, best)


def _first_parameters(method: ResidualMlp, base: Adapter, generator: "torch.Generator") -> "dict[str, torch.Tensor]":
    """Ridge and a random hidden layer whose output counts nothing yet."""
    import torch

    drawn = INNER_SCALE * torch.randn((base.input_dimension, method.hidden), generator=generator)
    parameters = {
        "matrix": torch.tensor(base.arrays["matrix"]),
        "bias": torch.tensor(base.arrays["bias"]),
        "inner": drawn,
        "inner_bias": torch.zeros(method.hidden),
        "outer": torch.zeros((method.hidden, base.output_dimension)),
    }
    return {name: tensor.requires_grad_() for name, tensor in parameters.items()}


class _Tensors(NamedTuple):
    """Pairs for torch, weights with a mean of 1."""

    source: "torch.Tensor"
    target: "torch.Tensor"
    weights: "torch.Tensor"

    def take(self, rows: "torch.Tensor") -> "_Tensors":
        return _Tensors(self.source[rows], self.target[rows], self.weights[rows])


def _tensors(pairs: Pairs) -> _Tensors:
    import torch

    weights = np.ones(len(pairs)) if pairs.weights is None else pairs.weights
    arrays = pairs.source, pairs.target, weights / weights.mean()
    return _Tensors(*(torch.tensor(array, dtype=torch.float32) for array in arrays))


def _train(
    parameters: "dict[str, torch.Tensor]",
    fitted: _Tensors,
    stopping: _Tensors,
    metric: Metric,
    generator: "torch.Generator",
) -> dict[str, np.ndarray]:
    """The parameters with the least loss of the pairs to stop by, those of the start among them."""
    import torch

    optimizer = torch.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    least, best, waited = _loss_without_gradient(parameters, stopping, metric), _copied(parameters), 0
    for _ in range(MOST_EPOCHS):
        for batch in torch.split(torch.randperm(len(fitted.source), generator=generator), BATCH_PAIRS):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(parameters, fitted.take(batch), metric))
            optimizer.step()
        loss = _loss_without_gradient(parameters, stopping, metric)
        waited += 1
        if loss < least:
            least, best, waited = loss, _copied(parameters), 0
        if waited == PATIENCE:
            break
    return best


def _loss_without_gradient(parameters: "dict[str, torch.Tensor]", pairs: _Tensors, metric: Metric) -> float:
    import torch

    with torch.no_grad():
        return float(_loss(parameters, pairs, metric))


def _loss(parameters: "dict[str, torch.Tensor]", pairs: _Tensors, metric: Metric) -> "torch.Tensor":
    """One less the cosine under cosine, else the squared error: the weighted mean over pairs."""
    from torch.nn.functional import cosine_similarity, gelu

    hidden = gelu(pairs.source @ parameters["inner"] + parameters["inner_bias"], approximate="tanh")
    mapped = pairs.source @ parameters["matrix"] + hidden @ parameters["outer"] + parameters["bias"]
    match metric:
        case Metric.COSINE:
            return (pairs.weights * (1 - cosine_similarity(mapped, pairs.target, dim=1))).mean()
        case Metric.INNER_PRODUCT:
            return (pairs.weights * ((mapped - pairs.target) ** 2).sum(dim=1)).mean()
        case _:
            assert_never(metric)


def _copied(parameters: "dict[str, torch.Tensor]") -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in parameters.items()}
