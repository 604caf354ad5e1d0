import math
import re
from collections.abc import Sequence
from fractions import Fraction

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators import clustering
from penstock.operators.clustering import (
    MOST_CELL_ROWS,
    MOST_COMPONENT,
    UNITS_PER_ONE,
    CellSums,
    ClusteringSpec,
    assignment_recall,
    build_quantizer,
    centroids_of,
    cluster_sample,
    gpus,
    has_settled,
    nearest_cells,
    on_gpus,
    updated_centroids,
)
from penstock.operators.searching import normalize

DIMENSION = 16
BLOBS = 12


def _spec(centroids: int = BLOBS, *, spherical: bool = True, **changes: float) -> ClusteringSpec:
    values = {"training_rows": 1_000, "seed": 7} | changes
    return ClusteringSpec(centroids, DIMENSION, spherical, **values)  # type: ignore[arg-type]


def _blobs(rows: int, seed: int = 0, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float16 (n, d) near BLOBS random directions, and the blob of each."""
    random = np.random.default_rng(seed)
    directions = normalize(np.random.default_rng(99).standard_normal((BLOBS, DIMENSION)))
    blob = random.integers(0, BLOBS, rows)
    spread = random.standard_normal((rows, DIMENSION)) * noise
    return normalize(directions[blob] + spread).astype(np.float16), blob


def _summed(spec: ClusteringSpec, centroids: np.ndarray, parts: Sequence[np.ndarray]) -> CellSums:
    quantizer = build_quantizer(centroids, spec.spherical)
    sums = CellSums.empty(spec)
    for part in parts:
        sums.add(part, *nearest_cells(quantizer, part))
    return sums


# ---- what a spec may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": 0}, "centroids (0) must be at least 1"),
        ({"sample_iterations": 0}, "sample_iterations (0) must be at least 1"),
        ({"iterations": -1}, "iterations (-1) must be at least 0"),
        ({"least_gain": math.nan}, "least_gain (nan) must be at least 0"),
        ({"seed": 2**31}, "seed (2147483648) must lie in 0..2147483647"),
        ({"training_rows": 11}, "training_rows (11) must be at least the 12 centroids; sample more"),
    ],
)
def test_values_outside_their_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _spec(**changes)  # type: ignore[arg-type]


# ---- sums


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_sums_are_the_same_for_any_cut_and_order(cuts: list[int], random: object, half: bool) -> None:
    generator = np.random.default_rng(3)
    vectors = generator.standard_normal((60, DIMENSION)).astype(np.float16 if half else np.float32)
    cells, distances = generator.integers(0, 5, 60), generator.random(60).astype(np.float32)
    spec = _spec(5)
    whole = CellSums.empty(spec)
    whole.add(vectors, cells, distances)
    bounds = [0, *sorted(cuts), 60]
    parts = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = CellSums.empty(spec)
    for part in parts:
        one = CellSums.empty(spec)
        one.add(vectors[part], cells[part], distances[part])
        merged.merge(one)
    assert np.array_equal(merged.sums, whole.sums) and np.array_equal(merged.rows, whole.rows)
    assert float(merged.objective) == pytest.approx(math.fsum(distances), abs=1e-12)


def test_sums_of_float16_are_exact() -> None:
    vectors = np.random.default_rng(4).standard_normal((500, DIMENSION)).astype(np.float16)
    vectors[0, 0], vectors[1, 0] = 2**-24, -MOST_COMPONENT  # the smallest that float16 holds, and the largest allowed
    cells = np.arange(500) % 3
    sums = CellSums.empty(_spec(3))
    sums.add(vectors, cells, np.zeros(500, np.float32))
    for cell in range(3):
        exact = [sum(map(Fraction, column)) for column in vectors[cells == cell].T.astype(float).tolist()]
        assert [Fraction(int(value), UNITS_PER_ONE) for value in sums.sums[cell]] == exact
    assert sums.rows.tolist() == [167, 167, 166]


@pytest.mark.parametrize("spherical", [True, False])
def test_an_iteration_is_that_of_lloyd(spherical: bool) -> None:
    spec, vectors = _spec(5, spherical=spherical), _blobs(400)[0]
    before = vectors[:5].astype(np.float32)
    sums = _summed(spec, before, np.array_split(vectors, 7))
    wide = vectors.astype(np.float64)
    near = wide @ before.T if spherical else -((wide[:, None] - before) ** 2).sum(axis=2)
    cells = near.argmax(axis=1)
    means = np.stack([wide[cells == cell].mean(axis=0) for cell in range(5)])
    if spherical:
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(updated_centroids(spec, sums, 1), means, atol=1e-6)
    assert float(sums.objective) == pytest.approx(abs(near.max(axis=1).sum()), rel=1e-5)


@pytest.mark.parametrize("spherical", [True, False])
def test_iterations_improve_the_objective_until_it_settles(spherical: bool) -> None:
    spec, vectors = _spec(BLOBS, spherical=spherical, least_gain=1e-6), _blobs(600)[0]
    centroids, objectives = vectors[:BLOBS].astype(np.float32), []
    for iteration in range(1, 40):
        sums = _summed(spec, centroids, [vectors])
        objectives.append(float(sums.objective))
        centroids = updated_centroids(spec, sums, iteration)
        if len(objectives) > 1 and has_settled(spec, *objectives[-2:]):
            break
    steps = np.diff(objectives) * (1 if spherical else -1)
    assert len(objectives) < 39 and (steps >= -1e-4).all()
    assert not has_settled(spec, 1.0, 1.1) and has_settled(spec, 1.1, 1.1)


def test_an_empty_cell_takes_half_of_another() -> None:
    spec, vectors = _spec(4, spherical=False), _blobs(300)[0]
    centroids = vectors[:4].astype(np.float32)
    centroids[2] = 50.0  # nearest to nobody
    sums = _summed(spec, centroids, [vectors])
    assert sums.rows[2] == 0
    found, again, other = (updated_centroids(spec, sums, iteration) for iteration in (1, 1, 2))
    assert np.array_equal(found, again) and other.shape == found.shape
    means = sums.sums / UNITS_PER_ONE / np.maximum(sums.rows, 1)[:, None]
    moved = np.flatnonzero(np.abs(found - means).max(axis=1) > 1e-6)
    assert len(moved) == 2 and 2 in moved
    donor = int(moved[moved != 2][0])
    np.testing.assert_allclose(found[[2, donor]], np.stack([means[donor]] * 2), rtol=2e-3)
    assert not np.array_equal(found[2], found[donor])


def test_a_cell_whose_rows_cancel_has_no_direction() -> None:
    vectors = np.zeros((4, DIMENSION), np.float32)
    vectors[:, 0] = [1, -1, 1, -1]
    sums = CellSums.empty(_spec(1))
    sums.add(vectors, np.zeros(4, np.int64), np.zeros(4, np.float32))
    assert not updated_centroids(_spec(1), sums, 1).any()


@pytest.mark.parametrize("value", [MOST_COMPONENT + 1, math.inf, math.nan])
def test_components_that_could_overflow_are_refused(value: float) -> None:
    vectors = np.ones((5, DIMENSION), np.float32)
    vectors[3, 2] = value
    message = f"vector 3 (largest component {np.float32(value)}) must have components within 4096"
    with pytest.raises(ValueError, match=re.escape(message)):
        CellSums.empty(_spec(1)).add(vectors, np.zeros(5, np.int64), np.zeros(5, np.float32))


def test_cells_that_could_overflow_are_refused() -> None:
    sums = CellSums.empty(_spec(2))
    sums.rows[1] = MOST_CELL_ROWS + 1
    with pytest.raises(ValueError, match=re.escape(f"cell 1 ({MOST_CELL_ROWS + 1} rows) must have at most")):
        updated_centroids(_spec(2), sums, 1)


def test_no_rows_add_nothing() -> None:
    sums = CellSums.empty(_spec(2))
    sums.add(np.empty((0, DIMENSION), np.float16), np.empty(0, np.int64), np.empty(0, np.float32))
    assert not sums.sums.any() and not sums.rows.any() and sums.objective == 0


# ---- the sample


@pytest.mark.parametrize("two_levels", [False, True])
@pytest.mark.parametrize("spherical", [True, False])
def test_a_sample_gives_the_clusters_it_was_made_of(
    spherical: bool, two_levels: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if two_levels:
        monkeypatch.setattr(clustering, "TWO_LEVEL_CENTROIDS", 2)
    spec = _spec(4 * BLOBS, spherical=spherical)
    vectors, blob = _blobs(1_000)
    centroids, again = cluster_sample(spec, vectors), cluster_sample(spec, vectors)
    assert centroids.shape == (4 * BLOBS, DIMENSION) and centroids.dtype == np.float32
    assert np.array_equal(centroids, again)
    assert not np.array_equal(centroids, cluster_sample(_spec(4 * BLOBS, spherical=spherical, seed=8), vectors))
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    cells = nearest_cells(build_quantizer(centroids, spherical), vectors)[0]
    purest = sum(np.bincount(blob[cells == cell]).max() for cell in np.unique(cells))
    assert purest / len(vectors) > 0.95
    assert capfd.readouterr() == ("", "")


def test_a_sample_is_cut_to_its_training_rows() -> None:
    vectors = _blobs(2_000)[0]
    spec = _spec(training_rows=500)
    assert np.array_equal(cluster_sample(spec, vectors), cluster_sample(spec, vectors[:500]))


def test_a_sample_too_small_is_refused() -> None:
    message = "sample (shape (11, 16)) must hold at least 12 rows of 16 components"
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster_sample(_spec(), _blobs(11)[0])


# ---- cells


@pytest.mark.parametrize("spherical", [True, False])
def test_a_graph_over_many_centroids_finds_nearly_all_cells(spherical: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    centroids, rows = (normalize(random.standard_normal((count, DIMENSION))) for count in (500, 1_000))
    exact = build_quantizer(centroids, spherical)
    assert assignment_recall(exact, rows) == 1.0
    monkeypatch.setattr(clustering, "HNSW_CENTROIDS", 500)
    graph, again = build_quantizer(centroids, spherical), build_quantizer(centroids, spherical)
    assert isinstance(graph, faiss.IndexHNSWFlat)
    assert np.array_equal(faiss.serialize_index(graph), faiss.serialize_index(again))
    assert np.array_equal(centroids_of(graph), centroids) and np.array_equal(centroids_of(exact), centroids)
    recall = assignment_recall(graph, rows)
    assert recall == np.mean(nearest_cells(graph, rows)[0] == nearest_cells(exact, rows)[0]) > 0.97


def test_a_row_that_is_no_number_is_named() -> None:
    vectors = np.ones((4, DIMENSION), np.float16)
    vectors[2, 5] = np.nan
    with pytest.raises(ValueError, match=re.escape("vector 2 (of 4) has no nearest centroid: it is not finite")):
        nearest_cells(build_quantizer(np.ones((3, DIMENSION), np.float32), False), vectors)


@pytest.mark.skipif(gpus() > 0, reason="needs a machine without GPU")
def test_without_a_gpu_the_cpu_is_used() -> None:
    quantizer = build_quantizer(np.ones((3, DIMENSION), np.float32), True)
    assert on_gpus(quantizer) is quantizer
