"""Funnel search against exact search of full vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.funnel import FunnelLevel, funnel, halving_levels
from penstock.operators.indexing import Metric
from penstock.operators.searching import exact_inner_products, normalize
from penstock.operators.vector_store import ArrayVectors

DIMENSION, ROWS, K = 32, 400, 10
GENERATOR = np.random.default_rng(4)
FALLING = 0.9 ** np.arange(DIMENSION)  # early dimensions say most, as in vectors trained for prefixes
VECTORS = normalize(GENERATOR.standard_normal((ROWS, DIMENSION)) * FALLING)
VECTORS[-5:] = VECTORS[:5]  # equal rows
QUERIES = normalize(VECTORS[:20] + 0.1 * GENERATOR.standard_normal((20, DIMENSION)))
EVERY_ROW = np.tile(np.arange(ROWS), (len(QUERIES), 1))
METRICS = list(Metric)


def take(rows: np.ndarray, dimension: int) -> np.ndarray:
    return VECTORS[rows, :dimension]


def exact(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    near = np.stack([exact_inner_products(query, VECTORS) for query in queries])
    rows = np.stack([np.lexsort((np.arange(ROWS), -row))[:K] for row in near])
    return rows, np.take_along_axis(near, rows, axis=1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prefixes", [[], [4], [4, 8, 16]])
def test_with_all_rows_kept_it_is_exact_search(metric: Metric, prefixes: list[int]) -> None:
    levels = [*(FunnelLevel(prefix, ROWS) for prefix in prefixes), FunnelLevel(DIMENSION, K)]
    rows, near = funnel(QUERIES, EVERY_ROW, take, levels, metric)
    expected_rows, expected = exact(QUERIES)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(near, expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(METRICS), st.integers(2, 16), st.lists(st.integers(K, ROWS), min_size=2, max_size=5))
def test_recall_never_falls_with_more_candidates_and_similarities_are_exact(
    metric: Metric, prefix: int, kept: list[int]
) -> None:
    truth = exact(QUERIES)[0]
    recalls = []
    for count in sorted(kept):
        rows, near = funnel(QUERIES, EVERY_ROW, take, [FunnelLevel(prefix, count), FunnelLevel(DIMENSION, K)], metric)
        found = np.stack([exact_inner_products(query, VECTORS[row]) for query, row in zip(QUERIES, rows, strict=True)])
        np.testing.assert_array_equal(near, found)
        recalls.append(np.mean([len(set(row) & set(true)) for row, true in zip(rows, truth, strict=True)]) / K)
    assert recalls == sorted(recalls)


def test_prefixes_are_compared_by_direction_under_cosine_and_by_product_otherwise() -> None:
    vectors = np.array([[0.9, 0.0, 0.43589], [0.2, 0.1, 0.97468], [0.5, 0.4, 0.76811]], np.float32)
    query = np.array([[0.6, 0.3, 0.74162]], np.float32)
    first = {
        metric: funnel(
            query,
            np.arange(3)[None, :],
            lambda rows, dimension: vectors[rows, :dimension],
            [FunnelLevel(2, 1), FunnelLevel(3, 1)],
            metric,
        )[0].item()
        for metric in METRICS
    }
    assert first == {Metric.COSINE: 1, Metric.INNER_PRODUCT: 0}


def test_a_prefix_of_length_zero_comes_with_similarity_zero() -> None:
    vectors = np.array([[0, 0, 1], [0.6, 0, 0.8], [-0.6, 0, 0.8]], np.float32)
    rows, _ = funnel(
        np.array([[1, 0, 0]], np.float32),
        np.array([[0, 1, 2]]),
        lambda found, dimension: vectors[found, :dimension],
        [FunnelLevel(2, 2), FunnelLevel(3, 2)],
        Metric.COSINE,
    )
    assert rows.tolist() == [[1, 0]]


def test_candidates_may_be_few_or_none() -> None:
    candidates = np.array([[7, -1, 3], [-1, -1, -1]])
    rows, near = funnel(QUERIES[:2], candidates, take, halving_levels(8, DIMENSION, 4), Metric.COSINE)
    assert sorted(rows[0, :2].tolist()) == [3, 7]
    assert rows[0, 2:].tolist() == [-1, -1] and rows[1].tolist() == [-1] * 4
    assert np.isnan(near[0, 2:]).all() and np.isnan(near[1]).all() and not np.isnan(near[0, :2]).any()
    assert (rows.dtype, near.dtype) == (np.int64, np.float32)


def test_stored_vectors_can_be_looked_up() -> None:
    stored = ArrayVectors(VECTORS.astype(np.float16))
    levels = halving_levels(4, DIMENSION, K)
    rows, near = funnel(QUERIES, EVERY_ROW, lambda rows, m: stored.take(rows)[:, :m], levels, Metric.COSINE)
    expected = exact(QUERIES)[1]
    assert float(np.mean(near >= expected[:, -1:] - 1e-3)) > 0.9
    assert rows.shape == (len(QUERIES), K)


def test_levels_double_dimensions_and_halve_candidates() -> None:
    assert halving_levels(16, 128, 10) == (
        FunnelLevel(16, 80),
        FunnelLevel(32, 40),
        FunnelLevel(64, 20),
        FunnelLevel(128, 10),
    )
    assert halving_levels(100, 384, 5)[-1] == FunnelLevel(384, 5)
    assert halving_levels(8, 8, 3) == (FunnelLevel(8, 3),)


def test_errors_name_the_value_and_the_rule() -> None:
    last = FunnelLevel(DIMENSION, K)
    with pytest.raises(ValueError, match=r"kept of a funnel level \(0\) must be at least 1"):
        FunnelLevel(4, 0)
    with pytest.raises(ValueError, match=r"shortest prefix \(64\) must lie in 1..32"):
        halving_levels(64, 32, 5)
    with pytest.raises(ValueError, match=r"last level of the funnel \(dimensions \[8\]\) must compare full vectors"):
        funnel(QUERIES, EVERY_ROW, take, [FunnelLevel(8, 20)], Metric.COSINE)
    with pytest.raises(ValueError, match=r"levels of the funnel \(dimensions \[8, 32\], kept \[5, 10\]\) must compare"):
        funnel(QUERIES, EVERY_ROW, take, [FunnelLevel(8, 5), last], Metric.COSINE)
    with pytest.raises(ValueError, match=r"candidates \(shape \(3, 400\)\) must be one list for each of 20 queries"):
        funnel(QUERIES, EVERY_ROW[:3], take, [last], Metric.COSINE)
    with pytest.raises(ValueError, match=r"prefixes taken \(shape \(400, 32\)\) must be 8 values of 400 rows"):
        funnel(QUERIES, EVERY_ROW, lambda rows, _: VECTORS[rows], [FunnelLevel(8, 50), last], Metric.COSINE)
