"""Fit the steps of a chain of transforms to moments: no second pass over the vectors, whatever their number."""

from collections.abc import Sequence
from typing import assert_never

import numpy as np

from penstock.operators.moments import Moments
from penstock.operators.transforms import (
    Centring,
    Chain,
    Fidelity,
    FittedStep,
    Normalization,
    Pca,
    Rotation,
    Side,
    Sphering,
    Step,
    Truncation,
    Whitening,
    output_dimension,
    type_of,
)


def fit_chain(
    steps: Sequence[Step], input_dimension: int, documents: Moments | None = None, queries: Moments | None = None
) -> Chain:
    """Fits steps one after the other, each to the moments of what those before it give; vectors are not needed.

    Deterministic for the same moments, library versions and number of BLAS threads. Cost: an eigendecomposition for
    each fitted step, about 10 d^3 operations.

    Args:
        documents: needed by all but Truncation, Normalization and Rotation.
        queries: needed by Sphering.

    Raises:
        ValueError: a step lacks moments it needs, comes behind Normalization, or does not fit the dimensions.
    """
    for subject, moments in (("documents", documents), ("queries", queries)):
        if moments is not None and moments.dimension != input_dimension:
            raise ValueError(
                f"moments of {subject} ({moments.dimension} dimensions) must have the {input_dimension} of the chain"
            )
    fitted: list[FittedStep] = []
    for position, step in enumerate(steps):
        fitted.append(fit_step(step, input_dimension, documents, queries))
        if any(_is_fitted(later) for later in steps[position + 1 :]):
            documents = _moments_after(fitted[-1], documents, Side.DOCUMENTS)
            queries = _moments_after(fitted[-1], queries, Side.QUERIES)
        input_dimension = fitted[-1].output_dimension
    return Chain(fitted[0].input_dimension if fitted else input_dimension, tuple(fitted))


def fit_step(step: Step, input_dimension: int, documents: Moments | None, queries: Moments | None) -> FittedStep:
    """One step, fitted to the moments of its inputs."""
    kept = output_dimension(step, input_dimension)
    arrays = _fitted_arrays(step, kept, input_dimension, documents, queries)
    return FittedStep(step, input_dimension, {name: array.astype(np.float32) for name, array in arrays.items()})


def similarity_loss(chain: Chain, documents: Moments, queries: Moments) -> float:
    """The mean squared error of restored inner products, over all pairs of a query and a document of these moments.

    Restored: with similarity_offsets. For projections without centring this is the objective of LeanVec,
    tr((I - A^T B)^T K_Q (I - A^T B) K_X). Compare it with the variance of similarities within a query,
    tr(K_Q cov_X), which is what ranks are made of.

    Raises:
        ValueError: the chain changes the similarity.
    """
    if chain.fidelity is Fidelity.CHANGED:
        raise ValueError(
            f"chain ({chain}) must keep or estimate the original similarity to have a loss, got one that changes it; "
            "measure its recall"
        )
    identity = np.eye(chain.input_dimension)
    forward, shift, query_map = identity, np.zeros(chain.input_dimension), identity
    offsets = np.zeros(chain.input_dimension)
    for fitted in chain.steps:
        if isinstance(fitted.step, Centring):
            offsets = offsets + query_map.T @ fitted.arrays["mean"]
        matrix, added = _affine_map(fitted, Side.DOCUMENTS)
        forward, shift = matrix @ forward, matrix @ shift + added
        query_map = _affine_map(fitted, Side.QUERIES)[0] @ query_map
    # The restored inner product is <q, A^T (B x + b) + o>, so the error is that of q with x - A^T B x - A^T b - o.
    missed = documents.mapped(identity - query_map.T @ forward, -(query_map.T @ shift) - offsets)
    return float(np.sum(queries.second_moment() * missed.second_moment()))


def _fitted_arrays(
    step: Step, kept: int, input_dimension: int, documents: Moments | None, queries: Moments | None
) -> dict[str, np.ndarray]:
    match step:
        case Truncation() | Normalization():
            return {}
        case Rotation(seed=seed):
            return {"matrix": _random_rotation(input_dimension, seed)}
        case Centring():
            return {"mean": _required(documents, step, Side.DOCUMENTS).mean()}
        case Pca():
            moments = _required(documents, step, Side.DOCUMENTS)
            return {"matrix": _leading_eigenvectors(moments.second_moment(), kept)[1].T}
        case Whitening():
            moments = _required(documents, step, Side.DOCUMENTS)
            return {"mean": moments.mean(), "matrix": _whitening(moments.covariance(), kept, step.eigenvalue_floor)}
        case Sphering():
            found = _required(documents, step, Side.DOCUMENTS).second_moment()
            asked = _required(queries, step, Side.QUERIES).second_moment()
            return _sphering(found, asked, kept, step.eigenvalue_floor)
        case _:
            assert_never(step)


def _whitening(covariance: np.ndarray, kept: int, floor: float) -> np.ndarray:
    values, vectors = _leading_eigenvectors(covariance, kept)
    scaled: np.ndarray = (vectors / np.sqrt(_raised(values, floor))).T
    return scaled


def _sphering(documents: np.ndarray, queries: np.ndarray, kept: int, floor: float) -> dict[str, np.ndarray]:
    values, vectors = _leading_eigenvectors(queries, len(queries))
    roots = np.sqrt(_raised(values, floor))
    root = (vectors * roots) @ vectors.T
    inverse = (vectors / roots) @ vectors.T
    leading = _leading_eigenvectors(root @ documents @ root, kept)[1]
    return {Side.DOCUMENTS.value: leading.T @ root, Side.QUERIES.value: leading.T @ inverse}


def _leading_eigenvectors(symmetric: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues (count,), descending, and their eigenvectors as columns (d, count).

    The largest component of each eigenvector is positive, as LAPACK leaves signs open.
    """
    values, vectors = np.linalg.eigh(symmetric)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    return values, vectors * np.where(largest < 0, -1.0, 1.0)


def _raised(values: np.ndarray, floor: float) -> np.ndarray:
    """Descending eigenvalues, none below `floor` of the largest."""
    if values[0] <= 0:
        raise ValueError(
            f"largest eigenvalue of the moments ({values[0]:.3g}) must be above 0: all vectors are equal or zero; give "
            "rows that differ"
        )
    raised: np.ndarray = np.maximum(values, floor * values[0])
    return raised


def _random_rotation(dimension: int, seed: int) -> np.ndarray:
    """A matrix of the uniform distribution over rotations and reflections (Mezzadri 2007, math-ph/0609050)."""
    orthogonal, triangle = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))
    rotation: np.ndarray = orthogonal * np.sign(np.diag(triangle))
    return rotation


def _is_fitted(step: Step) -> bool:
    return not isinstance(step, Truncation | Normalization | Rotation)


def _moments_after(fitted: FittedStep, moments: Moments | None, side: Side) -> Moments | None:
    """The moments of what a step gives."""
    if moments is None:
        return None
    matrix, added = _affine_map(fitted, side)
    return moments.mapped(matrix, added)


def _affine_map(fitted: FittedStep, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """The matrix M (m, d) and the vector s (m,) of the map M v + s, in float64."""
    mean, matrix = fitted.affine(side)
    wide = np.eye(fitted.input_dimension) if matrix is None else matrix.astype(np.float64)
    return wide, np.zeros(len(wide)) if mean is None else -(wide @ mean)


def _required(moments: Moments | None, step: Step, side: Side) -> Moments:
    if moments is None:
        raise ValueError(f"{type_of(step)} (no moments of {side}) is fitted to moments of {side}; give them")
    return moments
