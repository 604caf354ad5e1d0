import faiss
import numpy as np
import pytest

from penstock.operators.allowed_rows import search_allowed, search_every_code
from penstock.operators.search_parameters import SearchParameters
from penstock.operators.searching import normalize

DIMENSION, ROWS, LISTS = 16, 1500, 8
VECTORS = normalize(np.random.default_rng(3).standard_normal((ROWS, DIMENSION)))
QUERIES = normalize(np.random.default_rng(4).standard_normal((30, DIMENSION)))
INNER, L2 = faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
FLAT = ["Flat", "SQ8", "SQ4", "SQfp16", "PQ4x4", "PQ4x4fs", "RR16,RaBitQ", "RR16,RaBitQ4", "RR16,RaBitQfs"]
IVF = ["Flat", "SQ8", "PQ4x4", "PQ4x4fs", "RaBitQ", "RaBitQ4", "RaBitQfs", "RaBitQfs4"]
FACTORIES = (
    [(factory, INNER) for factory in FLAT]
    + [(f"IVF{LISTS},{code}", INNER) for code in IVF]
    + [(f"RR16,IVF{LISTS},RaBitQfs", INNER), (f"OPQ4,IVF{LISTS}_HNSW8,PQ4x4fs", INNER)]
    + [("HNSW8", INNER), ("HNSW8_SQ8", INNER), ("HNSW8_PQ4x4", L2), ("RR16,HNSW8_RaBitQ4", L2)]
)


def _index(factory: str, metric: int) -> faiss.Index:
    index = faiss.index_factory(DIMENSION, factory, metric)
    index.train(VECTORS)
    index.add(VECTORS)
    return index


def _mask(share: float) -> np.ndarray:
    return np.random.default_rng(9).random(ROWS) < share


@pytest.mark.parametrize(("factory", "metric"), FACTORIES)
def test_every_code_is_the_whole_ranking_without_other_rows(factory: str, metric: int) -> None:
    index = _index(factory, metric)
    whole_distances, whole = search_every_code(index, QUERIES, ROWS, np.ones(ROWS, bool))
    for share in (0.004, 0.1, 0.9):
        allowed = _mask(share)
        wanted = min(20, int(allowed.sum()))
        distances, rows = search_every_code(index, QUERIES, wanted, allowed)
        assert allowed[rows].all()
        for query in range(len(QUERIES)):
            kept = allowed[whole[query]] & (whole[query] >= 0)
            # Rows with equal codes may take each other's places, but their distances are the same.
            assert np.allclose(distances[query], whole_distances[query][kept][:wanted], atol=1e-5)
            assert len(set(rows[query].tolist())) == wanted


@pytest.mark.parametrize(("factory", "metric"), FACTORIES)
def test_only_allowed_rows_are_found(factory: str, metric: int) -> None:
    index = _index(factory, metric)
    knobs = {"IVF": SearchParameters(nprobe=LISTS), "HNSW": SearchParameters(ef_search=ROWS)}
    parameters = next((knobs[name] for name in knobs if name in factory.replace("_HNSW8,", ",")), SearchParameters())
    for share in (0.01, 0.5):
        allowed = _mask(share)
        _, rows = search_allowed(index, QUERIES, 10, parameters, allowed)
        _, expected = search_every_code(index, QUERIES, 10, allowed)
        assert allowed[rows[rows >= 0]].all()
        same = [len(set(one) & set(other)) / 10 for one, other in zip(rows.tolist(), expected.tolist(), strict=True)]
        assert np.mean(same) > 0.95


def test_fewer_allowed_rows_than_the_first_fetch_meets() -> None:
    """All allowed rows are the farthest ones, so the first fetch finds none of them."""
    index = _index("PQ4x4fs", INNER)
    query = QUERIES[:1]
    _, whole = index.search(query, ROWS)
    allowed = np.zeros(ROWS, bool)
    allowed[whole[0, -100:]] = True
    _, rows = search_allowed(index, query, 5, SearchParameters(), allowed)
    assert rows[0].tolist() == whole[0, -100:-95].tolist()
