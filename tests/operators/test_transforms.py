"""Transforms: what each promises of similarities, against products of the original vectors in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.indexing import Metric
from penstock.operators.moments import Moments, moments_of
from penstock.operators.searching import normalize
from penstock.operators.tensors import pack
from penstock.operators.transform_fitting import fit_chain, similarity_loss
from penstock.operators.transforms import (
    STEP_TYPES,
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
    step_from_json,
    step_to_json,
)

DIMENSION = 24
SPECTRUM = 0.8 ** np.arange(DIMENSION)


def _space(seed: int, rows: int) -> np.ndarray:
    """Unit vectors with a mean of their own and a spectrum that falls along axes of their own."""
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.standard_normal((DIMENSION, DIMENSION)))[0]
    mean = 0.5 * generator.standard_normal(DIMENSION) / np.sqrt(DIMENSION)
    return normalize(generator.standard_normal((rows, DIMENSION)) * SPECTRUM @ axes + mean)


def _moments(vectors: np.ndarray) -> Moments:
    return moments_of(vectors, np.zeros(vectors.shape[1]))


DOCUMENTS, QUERIES = _space(1, 2000), _space(2, 300)
X, Q = _moments(DOCUMENTS), _moments(QUERIES)
TRUTH = QUERIES.astype(np.float64) @ DOCUMENTS.T.astype(np.float64)
ALL_STEPS: list[Step] = [
    Centring(),
    Centring(both_sides=True),
    Pca(),
    Pca(8),
    Whitening(),
    Whitening(8),
    Truncation(8),
    Normalization(),
    Sphering(DIMENSION),
    Sphering(8),
    Rotation(5),
]


def _fit(*steps: Step) -> Chain:
    return fit_chain(steps, DIMENSION, X, Q)


def _similarities(chain: Chain) -> np.ndarray:
    products: np.ndarray = chain.apply_queries(QUERIES).astype(np.float64) @ chain.apply_documents(DOCUMENTS).T
    return products


def _restored(chain: Chain) -> np.ndarray:
    restored: np.ndarray = _similarities(chain) + chain.similarity_offsets(QUERIES)[:, None]
    return restored


def _mean_squared_error(chain: Chain) -> float:
    return float(np.mean((_restored(chain) - TRUTH) ** 2))


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Centring()],
        [Pca()],
        [Rotation(3)],
        [Sphering(DIMENSION)],
        [Truncation(DIMENSION)],
        [Centring(), Pca(), Rotation(1)],
        [Rotation(1), Centring(), Sphering(DIMENSION)],
        [Pca(), Centring(), Sphering(DIMENSION), Centring()],
    ],
)
def test_exact_chains_restore_similarities_and_keep_ranks(steps: Sequence[Step]) -> None:
    chain = _fit(*steps)
    assert chain.fidelity is Fidelity.EXACT
    np.testing.assert_allclose(_restored(chain), TRUTH, atol=1e-5)
    gaps = np.diff(np.take_along_axis(TRUTH, np.argsort(-_similarities(chain), axis=1), axis=1), axis=1)
    assert gaps.max() < 1e-5  # no document comes before one that is more similar by more than rounding


@pytest.mark.parametrize("step", [Pca(8), Truncation(8), Sphering(8)])
@pytest.mark.parametrize("centred", [False, True])
def test_lossy_chains_estimate_similarities_with_the_loss_that_moments_foretell(step: Step, centred: bool) -> None:
    chain = _fit(*([Centring()] if centred else []), step)
    assert chain.fidelity is Fidelity.ESTIMATED
    assert _mean_squared_error(chain) == pytest.approx(similarity_loss(chain, X, Q), rel=1e-4)
    assert chain.apply_documents(DOCUMENTS).shape == (len(DOCUMENTS), 8)


def test_loss_of_any_affine_chain_is_the_one_measured() -> None:
    chain = _fit(Rotation(2), Pca(20), Centring(), Truncation(15), Sphering(10), Centring(), Rotation(4))
    assert chain.output_dimension == 10
    assert _mean_squared_error(chain) == pytest.approx(similarity_loss(chain, X, Q), rel=1e-4)
    assert similarity_loss(_fit(Rotation(1), Centring()), X, Q) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, DIMENSION), st.integers(2, 100), st.booleans())
def test_sphering_loses_no_more_than_pca(seed: int, kept: int, queries: int, centred: bool) -> None:
    """Whatever the rank of the sample; where eigenvalues are raised, up to the bound that its docstring states."""
    documents, asked = _moments(_space(seed, 200)), _moments(_space(seed + 1, queries))
    before = [Centring()] if centred else []
    pca = fit_chain([*before, Pca(kept)], DIMENSION, documents, asked)
    sphering = fit_chain([*before, Sphering(kept)], DIMENSION, documents, asked)
    energies = np.linalg.eigvalsh(documents.covariance() if centred else documents.second_moment())
    values = np.linalg.eigvalsh(asked.second_moment())
    floor = Sphering(kept).eigenvalue_floor * values[-1]
    allowance = floor * energies[: DIMENSION - kept].sum() if values[0] < floor else 0.0
    rounding = 1e-9  # matrices are float32
    assert similarity_loss(sphering, documents, asked) <= similarity_loss(pca, documents, asked) + allowance + rounding


def test_sphering_gains_where_queries_differ_from_documents() -> None:
    assert similarity_loss(_fit(Sphering(8)), X, Q) < 0.8 * similarity_loss(_fit(Pca(8)), X, Q)
    assert similarity_loss(_fit(Centring(), Sphering(8)), X, Q) <= similarity_loss(_fit(Sphering(8)), X, Q)


def test_sphering_of_queries_like_documents_is_pca() -> None:
    sphering, pca = (fit_chain([step], DIMENSION, X, X).steps[0].arrays for step in (Sphering(8), Pca(8)))
    np.testing.assert_allclose(
        sphering["queries"].T @ sphering["documents"], pca["matrix"].T @ pca["matrix"], atol=1e-4
    )


def test_sphering_to_all_dimensions_is_its_own_inverse() -> None:
    arrays = _fit(Sphering(DIMENSION)).steps[0].arrays
    np.testing.assert_allclose(arrays["queries"].T @ arrays["documents"], np.eye(DIMENSION), atol=1e-5)


def test_pca_keeps_the_most_energy_of_any_projection() -> None:
    kept = _fit(Pca(8)).apply_documents(DOCUMENTS)
    values = np.linalg.svd(DOCUMENTS.astype(np.float64), compute_uv=False)
    assert float((kept.astype(np.float64) ** 2).sum()) == pytest.approx(float((values[:8] ** 2).sum()), rel=1e-5)


def test_pca_behind_centring_has_the_variances_of_the_covariance() -> None:
    rows = _fit(Centring(), Pca(8)).apply_documents(DOCUMENTS).astype(np.float64)
    expected = np.linalg.eigvalsh(np.cov(DOCUMENTS.T.astype(np.float64), bias=True))[::-1][:8]
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(rows.T, bias=True), np.diag(expected), atol=1e-6)


@pytest.mark.parametrize("kept", [None, 8])
def test_whitened_documents_have_the_identity_for_covariance(kept: int | None) -> None:
    rows = _fit(Whitening(kept)).apply_documents(DOCUMENTS).astype(np.float64)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(rows.T, bias=True), np.eye(kept or DIMENSION), atol=1e-4)


def test_whitening_by_frequency_whitens_the_frequent() -> None:
    weights = np.random.default_rng(8).pareto(1.5, len(DOCUMENTS))
    chain = fit_chain([Whitening()], DIMENSION, moments_of(DOCUMENTS, np.zeros(DIMENSION), weights))
    rows = chain.apply_documents(DOCUMENTS)
    np.testing.assert_allclose(np.cov(rows.T, bias=True, aweights=weights), np.eye(DIMENSION), atol=1e-3)


def test_whitening_raises_what_hardly_varies() -> None:
    flat = DOCUMENTS.copy()
    flat[:, 0] = 0.5
    chain = fit_chain([Whitening(eigenvalue_floor=1e-4)], DIMENSION, _moments(flat))
    values = np.linalg.eigvalsh(np.cov(flat.T.astype(np.float64), bias=True))
    assert np.linalg.norm(chain.steps[0].arrays["matrix"], axis=1).max() == pytest.approx(
        1 / np.sqrt(1e-4 * values[-1]), rel=1e-5
    )


def test_truncation_twice_is_the_shorter_one() -> None:
    once, twice = (
        _fit(Truncation(6), Normalization()),
        _fit(Truncation(12), Normalization(), Truncation(6), Normalization()),
    )
    np.testing.assert_allclose(twice.apply_documents(DOCUMENTS), once.apply_documents(DOCUMENTS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(once.apply_queries(QUERIES), axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(_fit(Truncation(6)).apply_documents(DOCUMENTS), DOCUMENTS[:, :6])
    full = _fit(Truncation(DIMENSION), Normalization())
    np.testing.assert_allclose(full.apply_documents(DOCUMENTS), DOCUMENTS, atol=1e-6)


def test_rotation_is_orthogonal_and_follows_its_seed() -> None:
    first, again, other = (_fit(Rotation(seed)).steps[0].arrays["matrix"] for seed in (1, 1, 2))
    np.testing.assert_allclose(first @ first.T, np.eye(DIMENSION), atol=1e-5)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_centring_both_sides_keeps_distances() -> None:
    chain = _fit(Centring(both_sides=True))
    queries, documents = chain.apply_queries(QUERIES), chain.apply_documents(DOCUMENTS)
    found = np.linalg.norm(queries[:, None] - documents[None, :200], axis=2)
    np.testing.assert_allclose(found, np.linalg.norm(QUERIES[:, None] - DOCUMENTS[None, :200], axis=2), atol=1e-5)
    np.testing.assert_allclose(documents.mean(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "fidelity", "metric"),
    [
        ([], Fidelity.EXACT, Metric.COSINE),
        ([Pca(), Rotation(1)], Fidelity.EXACT, Metric.COSINE),
        ([Pca(8)], Fidelity.ESTIMATED, Metric.INNER_PRODUCT),
        ([Truncation(8)], Fidelity.ESTIMATED, Metric.INNER_PRODUCT),
        ([Truncation(8), Normalization(), Rotation(1)], Fidelity.CHANGED, Metric.COSINE),
        ([Centring(), Rotation(1)], Fidelity.EXACT, Metric.INNER_PRODUCT),
        ([Sphering(DIMENSION)], Fidelity.EXACT, Metric.INNER_PRODUCT),
        ([Whitening()], Fidelity.CHANGED, Metric.INNER_PRODUCT),
        ([Whitening(8), Normalization()], Fidelity.CHANGED, Metric.COSINE),
        ([Centring(both_sides=True), Normalization()], Fidelity.CHANGED, Metric.COSINE),
    ],
)
def test_metric_and_fidelity_after_a_chain(steps: Sequence[Step], fidelity: Fidelity, metric: Metric) -> None:
    chain = _fit(*steps)
    assert (chain.fidelity, chain.metric_after(Metric.COSINE)) == (fidelity, metric)
    assert chain.keeps_unit_length == (metric is Metric.COSINE)
    lengths = np.linalg.norm(np.concatenate([chain.apply_documents(DOCUMENTS), chain.apply_queries(QUERIES)]), axis=1)
    assert bool(np.allclose(lengths, 1, atol=1e-5)) == chain.keeps_unit_length


@pytest.mark.parametrize("step", ALL_STEPS)
def test_steps_keep_their_promises_of_shape_type_and_plain_data(step: Step) -> None:
    chain = _fit(step)
    for rows in (chain.apply_documents(DOCUMENTS.astype(np.float16)), chain.apply_queries(DOCUMENTS[:1])):
        assert rows.shape[1] == chain.output_dimension == output_dimension(step, DIMENSION)
        assert rows.dtype == np.float32 and rows.flags.c_contiguous
    assert chain.apply_documents(DOCUMENTS[:0]).shape == (0, chain.output_dimension)
    assert step_from_json(step_to_json(step)) == step
    assert step_to_json(step)["type"] in STEP_TYPES


def test_bytes_hold_the_whole_chain_and_depend_on_it_alone() -> None:
    steps = (Centring(), Rotation(1), Sphering(12), Whitening(10), Truncation(7), Normalization())
    chain = _fit(*steps)
    data = chain.to_bytes()
    again = Chain.from_bytes(data)
    assert again.to_bytes() == data == _fit(*steps).to_bytes()
    assert again.content_hash() == chain.content_hash() != _fit(*steps[:-1]).content_hash()
    assert [fitted.step for fitted in again.steps] == list(steps)
    np.testing.assert_array_equal(again.apply_documents(DOCUMENTS), chain.apply_documents(DOCUMENTS))
    np.testing.assert_array_equal(again.apply_queries(QUERIES), chain.apply_queries(QUERIES))
    assert Chain.from_bytes(Chain(5).to_bytes()).output_dimension == 5
    assert b"pickle" not in data


def test_a_chain_of_more_than_ten_steps_keeps_its_order() -> None:
    steps = [Rotation(seed) for seed in range(12)]
    chain = _fit(*steps)
    again = Chain.from_bytes(chain.to_bytes())
    np.testing.assert_array_equal(again.apply_documents(DOCUMENTS), chain.apply_documents(DOCUMENTS))


def test_damaged_and_foreign_bytes_are_refused() -> None:
    data = _fit(Pca(8)).to_bytes()
    with pytest.raises(ValueError, match=r"transforms \(50 bytes\) must be a safetensors file, got "):
        Chain.from_bytes(data[:50])
    with pytest.raises(ValueError, match=r"must be of kind transforms, version 1, got kind moments, version 1"):
        Chain.from_bytes(X.to_bytes())
    record = {"input_dimension": 4, "steps": [{"type": "pca", "dimension": 2}]}
    with pytest.raises(ValueError, match=r"arrays of pca \(shapes \{'matrix': \(3, 4\)\}\) must have the shapes"):
        Chain.from_bytes(pack("transforms", record, {"0.matrix": np.zeros((3, 4), np.float32)}))
    with pytest.raises(ValueError, match=r"array matrix of pca \(float64\) must hold finite float32 values"):
        Chain.from_bytes(pack("transforms", record, {"0.matrix": np.zeros((2, 4))}))


def test_errors_of_parameters_name_the_value_and_the_rule() -> None:
    with pytest.raises(ValueError, match=r"dimension of pca \(0\) must be at least 1"):
        Pca(0)
    with pytest.raises(ValueError, match=r"eigenvalue_floor of sphering \(1.5\) must lie between 0 and 1"):
        Sphering(3, 1.5)
    with pytest.raises(ValueError, match=r"seed of rotation \(-1\) must lie in 0"):
        Rotation(-1)
    with pytest.raises(ValueError, match=r"type of a transform \(warp\) is none of centring, normalization, pca"):
        step_from_json({"type": "warp"})
    with pytest.raises(ValueError, match=r"parameter size \(3\) of pca is none of \(dimension\)"):
        step_from_json({"type": "pca", "size": 3})


def test_errors_of_fitting_name_the_value_and_the_rule() -> None:
    with pytest.raises(ValueError, match=r"dimension of truncation \(25\) must be at most the 24 of its input"):
        _fit(Truncation(25))
    with pytest.raises(ValueError, match=r"sphering \(no moments of queries\) is fitted to moments of queries"):
        fit_chain([Sphering(8)], DIMENSION, X)
    with pytest.raises(ValueError, match=r"moments of documents \(24 dimensions\) must have the 12 of the chain"):
        fit_chain([Pca(8)], 12, X)
    with pytest.raises(ValueError, match="moments behind normalization do not follow"):
        _fit(Normalization(), Pca(8))
    with pytest.raises(ValueError, match=r"largest eigenvalue of the moments \(0\) must be above 0"):
        fit_chain([Whitening()], DIMENSION, _moments(np.zeros((5, DIMENSION))))
    with pytest.raises(ValueError, match=r"step 1 of the chain \(rotation of 24 dimensions\) must take the 8"):
        Chain(DIMENSION, (*_fit(Pca(8)).steps, *_fit(Rotation(1)).steps))


def test_errors_of_use_name_the_value_and_the_rule() -> None:
    with pytest.raises(ValueError, match=r"vectors to transform \(shape \(3, 5\)\) must be rows of the chain's 24"):
        _fit(Pca(8)).apply_queries(np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"chain \(whitening\) must keep or estimate .* to have it restored"):
        _fit(Whitening()).similarity_offsets(QUERIES)
    with pytest.raises(ValueError, match=r"chain \(pca, normalization\) must keep or estimate .* to have a loss"):
        similarity_loss(_fit(Pca(8), Normalization()), X, Q)
    with pytest.raises(ValueError, match=r"vector 0 \(length 0.0\) has no direction"):
        _fit(Truncation(2), Normalization()).apply_documents(np.eye(DIMENSION)[5:6])
    with pytest.raises(ValueError, match="moments behind normalization"):
        FittedStep(Normalization(), 3).affine(Side.QUERIES)
