import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.ranking import (
    BLOCK_ROWS,
    RERANKED_ROWS,
    at_least_kth,
    exact_inner_products,
    exact_similarities,
    most_similar,
    most_similar_by,
    nearest_rows,
)
from penstock.operators.vector_store import ArrayVectors

DIMENSION = 13


def _vectors(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DIMENSION)).astype(np.float32)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), st.integers(0, 30))),
    st.integers(1, 6),
)
@settings(max_examples=300, deadline=None)
def test_most_similar_is_a_sort_by_similarity_and_id(pairs: list[tuple[int, float, int]], k: int) -> None:
    query_of = np.array([pair[0] for pair in pairs], np.int64)
    near = np.array([pair[1] for pair in pairs], np.float32)
    ids = np.array([f"id-{pair[2]}" for pair in pairs], object)
    chosen, ranks = most_similar(query_of, near, ids, k)
    expected = []
    for query in sorted(set(query_of.tolist())):
        places = sorted(np.flatnonzero(query_of == query).tolist(), key=lambda place: (-near[place], ids[place], place))
        expected += list(zip(places[:k], range(k), strict=False))
    assert list(zip(chosen.tolist(), ranks.tolist(), strict=True)) == expected


def test_ids_are_looked_up_only_where_they_decide() -> None:
    asked: list[int] = []

    def ids_at(positions: np.ndarray) -> np.ndarray:
        asked.extend(positions.tolist())
        return np.array([f"id-{9 - position}" for position in positions], object)

    query_of = np.array([0, 0, 0, 0, 1, 1, 1], np.int64)
    near = np.array([5, 3, 3, 1, 7, 2, 2], np.float32)  # query 1's tie lies beyond its first place
    chosen, _ = most_similar_by(query_of[:6], near[:6], ids_at, 1)
    assert (chosen.tolist(), asked) == ([0, 4], [])
    chosen, _ = most_similar_by(query_of, near, ids_at, 2)
    assert chosen.tolist() == [0, 2, 4, 6]
    assert sorted(asked) == [1, 2, 5, 6]


@pytest.mark.parametrize("columns", [1, 3, 100, RERANKED_ROWS + 5])
def test_exact_similarities_are_those_of_the_pairs_alone(columns: int) -> None:
    stored, queries = _vectors(500, 1), _vectors(40, 2)
    rows = np.random.default_rng(3).integers(-1, 500, (40, columns))
    near = exact_similarities(queries, rows, ArrayVectors(stored))
    assert near.dtype == np.float32
    products = exact_inner_products(queries[:, None].astype(np.float64), stored[rows].astype(np.float64))
    assert np.allclose(near, np.where(rows >= 0, products, -np.inf), atol=1e-5)
    for query, column in np.ndindex(rows.shape):
        one, alone = slice(query, query + 1), slice(column, column + 1)
        assert near[query, column] == exact_similarities(queries[one], rows[one, alone], ArrayVectors(stored))[0, 0]


def test_equal_vectors_get_equal_similarities_wherever_they_are() -> None:
    stored = np.repeat(_vectors(1, 1), 3000, axis=0)
    rows = np.random.default_rng(3).integers(0, 3000, (7, 301))
    near = exact_similarities(np.repeat(_vectors(1, 2), 7, axis=0), rows, ArrayVectors(stored))
    assert len(np.unique(near)) == 1


@pytest.mark.parametrize("rows", [0, 1, 7, BLOCK_ROWS + 3000])
@pytest.mark.parametrize("queries", [1, 33])
def test_nearest_rows_hold_the_k_nearest_and_their_equals(rows: int, queries: int) -> None:
    stored = _vectors(max(1, rows), 1)[np.arange(rows) % max(1, rows - rows // 50)]  # some rows twice
    asked = _vectors(queries, 2)
    allowed = np.flatnonzero(np.random.default_rng(5).random(rows) < 0.7)
    query_of, near, found = nearest_rows(asked, allowed, 10, ArrayVectors(stored))
    products = exact_similarities(asked, np.tile(allowed, (queries, 1)), ArrayVectors(stored))
    for query in range(queries):
        kth = np.sort(products[query])[::-1][:10].min(initial=np.inf)
        expected = set(allowed[products[query] >= kth].tolist())
        assert expected <= set(found[query_of == query].tolist())
    assert np.array_equal(near, products[query_of, np.searchsorted(allowed, found)])
    assert len(found) <= 3 * 10 * queries * 1.2


def test_at_least_kth_keeps_equals() -> None:
    near = np.array([[3, 1, 2, 2, -np.inf], [1, 1, 1, 1, 1]], np.float32)
    assert at_least_kth(near, 2).tolist() == [[True, False, True, True, False], [True] * 5]
    assert at_least_kth(near, 5).all() and at_least_kth(near, 9).all()
