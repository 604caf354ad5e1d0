from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from penstock.operators.evaluation import (
    MeasuredPoint,
    Neighbours,
    choose_operating_point,
    exact_neighbours,
    judged_recall_at_k,
    merge_neighbours,
    mrr_at_k,
    ndcg_at_k,
    operating_points,
    recall_at_k,
    without_ids,
)
from penstock.operators.indexing import (
    FAISS_FAMILIES,
    Codec,
    Family,
    IndexSpec,
    Metric,
    ShardBuilder,
    codecs_of,
    factory_string,
    open_index,
    train_index,
)
from penstock.operators.searching import SearchParameters, ShardSearcher, normalize

DIMENSION = 32
ROWS = 3000
VECTORS = normalize(np.random.default_rng(11).standard_normal((ROWS, DIMENSION)))
VECTORS[ROWS - 20 :] = VECTORS[:20]  # duplicates: the last rows repeat the first
IDS = np.array([f"row-{(row * 7919) % ROWS:05}" for row in range(ROWS)], dtype=object)
QUERIES = normalize(np.random.default_rng(12).standard_normal((50, DIMENSION)))
NOTHING: list[str | None] = [None] * len(QUERIES)


def _batches(rows: int, order: np.ndarray | None = None) -> Iterator[tuple[pa.Array, np.ndarray]]:
    order = np.arange(ROWS) if order is None else order
    for first in range(0, ROWS, rows):
        part = order[first : first + rows]
        yield pa.array(IDS[part]), VECTORS[part]


def _spec(family: Family, codec: Codec, nlist: int = 16) -> IndexSpec:
    pq_bytes = 8 if codec is Codec.PQFS else None
    factory = factory_string(family, codec, DIMENSION, hnsw_m=16, nlist=nlist, rabitq_bits=4, pq_bytes=pq_bytes)
    return IndexSpec(family, codec, Metric.COSINE, DIMENSION, factory, training_rows=ROWS, seed=7)


def _brute_force(queries: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
    near = np.einsum("qd,nd->qn", queries.astype(np.float64), VECTORS.astype(np.float64)).astype(np.float32)
    ranked = [sorted(range(ROWS), key=lambda row, line=line: (-line[row], IDS[row]))[:k] for line in near]
    return [[IDS[row] for row in rows] for rows in ranked], np.take_along_axis(near, np.array(ranked), axis=1)


def test_exact_neighbours_equal_sorting_everything_ties_by_id() -> None:
    queries = np.concatenate([QUERIES, VECTORS[:20]])
    ids, near = _brute_force(queries, 12)
    truth = exact_neighbours(queries, _batches(700), 12, Metric.COSINE, [None] * len(queries))
    assert truth.ids.tolist() == ids
    assert np.array_equal(truth.similarities, near)
    assert all(truth.similarities[50:, 0] == truth.similarities[50:, 1])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, ROWS), st.integers(0, 100), st.integers(1, 30))
def test_exact_neighbours_depend_on_neither_batches_nor_order(rows: int, seed: int, k: int) -> None:
    order = np.random.default_rng(seed).permutation(ROWS)
    whole, cut = (
        exact_neighbours(QUERIES[:5], batches, k, Metric.COSINE, [None] * 5)
        for batches in (_batches(ROWS), _batches(max(rows, 50), order))
    )
    assert np.array_equal(whole.ids, cut.ids)
    assert np.array_equal(whole.similarities, cut.similarities)


def test_parts_merge_to_the_whole() -> None:
    whole = exact_neighbours(QUERIES, _batches(500), 10, Metric.COSINE, NOTHING)
    parts = [exact_neighbours(QUERIES, [batch], 10, Metric.COSINE, NOTHING) for batch in _batches(500)]
    for merged in (merge_neighbours(parts, 10), merge_neighbours([merge_neighbours(parts[3:], 10), *parts[:3]], 10)):
        assert np.array_equal(merged.ids, whole.ids)
        assert np.array_equal(merged.similarities, whole.similarities)


def test_a_passage_is_not_its_own_neighbour() -> None:
    own = list(IDS[:50])
    excluded = exact_neighbours(VECTORS[:50], _batches(700), 5, Metric.COSINE, own)
    assert not any(row_id in found for row_id, found in zip(own, excluded.ids.tolist(), strict=True))
    with_self = exact_neighbours(VECTORS[:50], _batches(700), 6, Metric.COSINE, NOTHING)
    assert np.array_equal(without_ids(with_self, own, 5).ids, excluded.ids)


def test_fewer_rows_than_k_leave_places_unfilled() -> None:
    few = [(pa.array(IDS[:3]), VECTORS[:3].astype(np.float16)), (pa.array([], pa.string()), VECTORS[:0])]
    truth = exact_neighbours(QUERIES, few, 5, Metric.COSINE, [IDS[0], *NOTHING[1:]])
    assert [sum(row_id is not None for row_id in found) for found in truth.ids[:2].tolist()] == [2, 3]
    assert np.isnan(truth.similarities[:, 3:]).all()
    assert exact_neighbours(QUERIES[:0], few, 5, Metric.COSINE, []).ids.shape == (0, 5)
    assert np.isnan(recall_at_k(truth.ids, exact_neighbours(QUERIES, [], 5, Metric.COSINE, NOTHING), 5)).all()


def test_inner_product_keeps_lengths() -> None:
    lengths = np.linspace(0.1, 9, ROWS, dtype=np.float32)[:, None]
    truth = exact_neighbours(QUERIES, [(pa.array(IDS), VECTORS * lengths)], 4, Metric.INNER_PRODUCT, NOTHING)
    assert np.array_equal(truth.ids, IDS[np.argsort(-(QUERIES @ (VECTORS * lengths).T), axis=1)[:, :4]])


def test_recall_counts_true_neighbours() -> None:
    truth = Neighbours(np.array([["a", "b", "c", "d"]], dtype=object), np.array([[0.9, 0.8, 0.7, 0.6]], np.float32))
    found = np.array([["a", "x", "b", "d"]], dtype=object)
    assert recall_at_k(found, truth, 1).tolist() == [1.0]
    assert recall_at_k(found, truth, 2).tolist() == [0.5]
    assert recall_at_k(found, truth, 4).tolist() == [0.75]
    assert recall_at_k(found[:, :2], truth, 4).tolist() == [0.25]


def test_rows_tied_with_the_last_true_neighbour_count() -> None:
    truth = Neighbours(np.array([["a", "b", "c"]], dtype=object), np.array([[0.9, 0.8, 0.8]], np.float32))
    tied = np.array([["a", "c"]], dtype=object)
    assert recall_at_k(tied, truth, 2).tolist() == [1.0]
    narrow = Neighbours(truth.ids[:, :2], truth.similarities[:, :2])
    assert recall_at_k(tied, narrow, 2).tolist() == [0.5]
    assert recall_at_k(tied, narrow, 2, exact_similarities=np.array([[0.9, 0.8]], np.float32)).tolist() == [1.0]
    assert recall_at_k(tied, narrow, 2, exact_similarities=np.array([[0.9, 0.79]], np.float32)).tolist() == [0.5]


def test_recall_is_over_the_true_neighbours_there_are() -> None:
    truth = Neighbours(np.array([["a", None]], dtype=object), np.array([[0.9, np.nan]], np.float32))
    assert recall_at_k(np.array([["a", None]], dtype=object), truth, 2).tolist() == [1.0]
    assert recall_at_k(np.array([[None, None]], dtype=object), truth, 2).tolist() == [0.0]


@pytest.mark.parametrize(
    ("family", "codec"), [(family, codec) for family in FAISS_FAMILIES for codec in codecs_of(family, Metric.COSINE)]
)
def test_the_best_operating_point_reaches_the_recall_that_exactness_implies(
    family: Family, codec: Codec, tmp_path: Path
) -> None:
    spec = _spec(family, codec)
    builder = ShardBuilder(train_index(spec, VECTORS))
    builder.add(VECTORS)
    builder.write(tmp_path / "shard.faiss")
    searcher = ShardSearcher(open_index(tmp_path / "shard.faiss", family), pa.array(IDS), VECTORS, Metric.COSINE, 0)
    truth = exact_neighbours(QUERIES, _batches(1000), 20, Metric.COSINE, NOTHING)
    measured = []
    for point in operating_points(spec, ROWS, rerank=True):
        hits = searcher.search(QUERIES, 10, point)
        recall = float(recall_at_k(hits.ids, truth, 10, exact_similarities=hits.similarities).mean())
        measured.append(MeasuredPoint(point, recall, latency_ms=len(measured)))
    best = choose_operating_point(measured, 1.0).recall
    # Flat and IVF compare all rows: exact vectors give 1, and so do codes whose error is far below the gap between the
    # 10th and the 320th neighbour (scalar codes, 4-bit RaBitQ), as 320 candidates are compared exactly. PQ at one bit
    # per dimension, two in parts of 4 bits, errs by about that gap, so it keeps most. A pruned HNSW graph may cut off
    # single rows.
    bound = 0.8 if codec in (Codec.PQ, Codec.PQFS) else 0.99 if family is Family.HNSW else 1.0
    assert best >= bound
    by_knobs: dict[tuple[int | None, int | None], list[float]] = {}
    for point in measured:
        knobs = (point.parameters.ef_search, point.parameters.nprobe)
        by_knobs.setdefault(knobs, []).append(point.recall)
    if family is not Family.HNSW:  # more candidates move an HNSW search along other paths
        assert all(recalls == sorted(recalls) for recalls in by_knobs.values())


def test_ndcg_equals_sklearn_without_ties() -> None:
    generator = np.random.default_rng(1)
    documents = [f"d{number}" for number in range(30)]
    for _ in range(50):
        gains = generator.integers(0, 4, 30) * (generator.random(30) < 0.4)
        order = generator.permutation(30)
        position = np.empty(30)
        position[order] = np.arange(30)
        judged = {document: float(gain) for document, gain in zip(documents, gains, strict=True) if gain}
        found = ndcg_at_k([[documents[row] for row in order]], [judged], 10)[0]
        assert found == pytest.approx(ndcg_score([gains], [-position], k=10))


def test_ndcg_by_hand() -> None:
    judged = {"a": 2.0, "b": 1.0, "c": -1.0}
    ideal = 2 + 1 / np.log2(3)
    assert ndcg_at_k([["x", "a", "c", "b"]], [judged], 10)[0] == pytest.approx(
        (2 / np.log2(3) + 1 / np.log2(5)) / ideal
    )
    assert ndcg_at_k([["x", "a"]], [judged], 1)[0] == 0
    # The ideal is over all that is judged relevant, not over what was retrieved.
    assert ndcg_at_k([["b"]], [judged], 10)[0] == pytest.approx(1 / ideal)
    assert ndcg_at_k([["a"], []], [{}, judged], 10).tolist() == [0, 0]


def test_mrr_by_hand() -> None:
    judged = {"a": 1.0, "b": 2.0, "c": 0.0}
    rankings = [["a", "b"], ["c", "x", "b"], ["x"], []]
    assert mrr_at_k(rankings, [judged] * 4, 10).tolist() == [1, pytest.approx(1 / 3), 0, 0]
    assert mrr_at_k(rankings, [judged] * 4, 2).tolist() == [1, 0, 0, 0]


def test_judged_recall_by_hand() -> None:
    judged = {"a": 1.0, "b": 2.0, "c": 0.0}
    rankings = [["a", "b"], ["c", "x", "b"], ["x"], []]
    assert judged_recall_at_k(rankings, [judged] * 4, 10).tolist() == [1, 0.5, 0, 0]
    assert judged_recall_at_k(rankings, [judged] * 4, 1).tolist() == [1, 0, 0, 0]  # of one, as no more can be found
    assert judged_recall_at_k([["a"]], [{"a": 0.0}], 10).tolist() == [0]


def test_operating_points_come_cheapest_first_and_without_repeats() -> None:
    assert operating_points(_spec(Family.FLAT, Codec.NONE), ROWS, rerank=True) == [SearchParameters()]
    shortened = operating_points(_spec(Family.FLAT, Codec.NONE), ROWS, rerank=True, transformed=True)
    assert len({point.rerank_factor for point in shortened}) > 1
    flat = operating_points(_spec(Family.FLAT, Codec.SQ8), 10**6, rerank=True)
    assert [point.rerank_factor for point in flat] == [1, 2, 4, 8, 16, 32]
    ivf = operating_points(_spec(Family.IVF, Codec.NONE, nlist=50), 10**6, rerank=False)
    assert [point.nprobe for point in ivf] == [1, 2, 4, 8, 16, 32, 50]
    hnsw = operating_points(_spec(Family.HNSW, Codec.NONE), 10**6, rerank=False)
    assert [point.ef_search for point in hnsw] == [16, 32, 64, 128, 256, 512]
    assert [point.ef_search for point in operating_points(_spec(Family.HNSW, Codec.NONE), 40, rerank=False)] == [
        16,
        32,
        64,
    ]
    both = operating_points(_spec(Family.IVF, Codec.PQ, nlist=16), 10**6, rerank=True)
    assert len(both) == len(set(both)) == 5 * 6
    assert both[0] == SearchParameters(nprobe=1) and both[-1] == SearchParameters(nprobe=16, rerank_factor=32)
    assert [point.rerank_factor for point in operating_points(_spec(Family.FLAT, Codec.PQ), 30, rerank=True)] == [
        1,
        2,
        4,
    ]


def test_rows_are_as_cheap_as_their_codec() -> None:
    everything, reranked = SearchParameters(nprobe=16), SearchParameters(nprobe=1, rerank_factor=4)
    for codec, scan_comes_first in [(Codec.PQFS, True), (Codec.SQ8, False)]:
        points = operating_points(_spec(Family.IVF, codec), 10_000, rerank=True)
        assert (points.index(everything) < points.index(reranked)) == scan_comes_first


def test_the_cheapest_sufficient_operating_point_is_chosen() -> None:
    points = [
        MeasuredPoint(SearchParameters(ef_search=ef), recall, latency_ms)
        for ef, recall, latency_ms in [(16, 0.8, 1.0), (32, 0.96, 3.0), (64, 0.97, 2.0), (128, 0.97, 4.0)]
    ]
    assert choose_operating_point(points, 0.95) is points[1]
    assert choose_operating_point(points, 0.5) is points[0]
    assert choose_operating_point(points, 0.99) is points[2]


def test_errors_name_value_rule_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"exclude \(1 ids\) must name one id or None for each of 50 queries"):
        exact_neighbours(QUERIES, [], 5, Metric.COSINE, [None])
    with pytest.raises(ValueError, match=r"batch that begins with row-00000, vector 2 \(length 2\) must have length 1"):
        doubled = VECTORS[:4] * np.array([[1], [1], [2], [1]], np.float32)
        exact_neighbours(QUERIES, [(pa.array(IDS[:4]), doubled)], 5, Metric.COSINE, NOTHING)
    with pytest.raises(ValueError, match=r"ids \(3\) must be as many as the vectors \(4\)"):
        exact_neighbours(QUERIES, [(pa.array(IDS[:3]), VECTORS[:4])], 5, Metric.COSINE, NOTHING)
    with pytest.raises(ValueError, match=r"ranking 1 \(2 documents\) names a document twice"):
        ndcg_at_k([["a"], ["a", "a"]], [{}, {}], 10)
    with pytest.raises(ValueError, match=r"rankings \(1\) must be as many as the judged queries \(2\)"):
        mrr_at_k([["a"]], [{}, {}], 10)
    with pytest.raises(ValueError, match=r"measured points \(none\)"):
        choose_operating_point([], 0.9)
