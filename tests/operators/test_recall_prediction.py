import faiss
import numpy as np
import pytest
from scipy.stats import hypergeom

from penstock.operators.recall_prediction import recall_of_more_rows

DIMENSION = 32
K = 10


def _clustered(rows: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((200, DIMENSION))
    points = centres[random.integers(0, 200, rows)] + 0.7 * random.standard_normal((rows, DIMENSION))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def _nearest(queries: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :count]
    return found


def _recall(candidates: np.ndarray, neighbours: np.ndarray) -> float:
    shares = [np.isin(real[:K], found).mean() for found, real in zip(candidates, neighbours, strict=True)]
    return float(np.mean(shares))


@pytest.mark.parametrize(("codec", "factor"), [("SQ8", 1), ("SQ4", 2), ("PQ16x4", 8), ("PQ16x4", 32)])
def test_the_recall_of_four_times_as_many_rows(codec: str, factor: int) -> None:
    """What is predicted from a quarter of the rows is measured in all of them, or a little more is."""
    vectors, queries = _clustered(16_000, 2), _clustered(300, 3)
    index = faiss.index_factory(DIMENSION, codec, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:4000])
    index.add(vectors[:4000])
    small = index.search(queries, K * factor)[1]
    predicted = recall_of_more_rows(small, _nearest(queries, vectors[:4000], 20), K, K * factor, 4000, 16_000)
    index.add(vectors[4000:])
    measured = _recall(index.search(queries, K * factor)[1], _nearest(queries, vectors, K))
    assert measured >= 0.85
    assert measured - 0.06 <= predicted <= measured + 0.01


def test_exact_search_stays_exact_and_nothing_found_stays_nothing() -> None:
    neighbours = _nearest(_clustered(20, 3), _clustered(500, 2), 20)
    assert recall_of_more_rows(neighbours[:, :K], neighbours, K, K, 500, 50_000) == pytest.approx(1.0)
    assert recall_of_more_rows(np.full((20, K), -1), neighbours, K, K, 500, 50_000) == 0.0


def test_as_many_rows_as_the_sample_has_are_as_measured() -> None:
    neighbours = _nearest(_clustered(20, 3), _clustered(500, 2), 20)
    candidates = neighbours[:, ::2]  # ranks 1, 3, 5, 7, 9 among the ten nearest
    assert recall_of_more_rows(candidates, neighbours, K, K, 500, 500) == pytest.approx(0.5)


def test_one_neighbour_by_hand() -> None:
    """The sample's nearest row, third by its code, of which one of two is compared: a count of the urn."""
    neighbours, candidates = np.array([[7, 8]]), np.array([[1, 2, 7]])
    nearest, second = hypergeom.sf([0, 1], 100, 1, 50)
    assert second == 0
    among = hypergeom.sf(2, 100, 4, 50)
    assert recall_of_more_rows(candidates, neighbours, 1, 4, 50, 100) == pytest.approx(min(nearest, among) / nearest)


def test_queries_with_fewer_neighbours() -> None:
    neighbours = np.array([[3, 4, -2], [5, 6, 0]])
    assert recall_of_more_rows(neighbours, neighbours, 3, 3, 7, 7) == pytest.approx(1.0)
