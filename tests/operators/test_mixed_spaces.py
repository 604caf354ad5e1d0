"""Answers of a half-finished backfill, against one exact search in the new space."""

from collections.abc import Sequence

import faiss
import numpy as np
import pyarrow as pa
import pytest

from penstock.operators.adapter_fitting import Pairs, fit_adapter
from penstock.operators.adapters import Adapter, Procrustes, Ridge
from penstock.operators.bridging import mean_cosine
from penstock.operators.indexing import Metric
from penstock.operators.mixed_spaces import (
    AdaptedVectors,
    MixedSpaces,
    SpacedHits,
    compared_again,
    fuse_ranks,
    merge_within_space,
)
from penstock.operators.searching import Hits, SearchParameters, ShardSearcher, normalize
from penstock.operators.vector_store import ArrayVectors

D = 12
K = 10
DOCUMENTS = 400
GENERATOR = np.random.default_rng(1)
ROTATION = np.linalg.qr(GENERATOR.standard_normal((D, D)))[0]
NEW = normalize(GENERATOR.standard_normal((DOCUMENTS, D)) + 0.3)
OLD = normalize(NEW @ ROTATION)
QUERIES = normalize(GENERATOR.standard_normal((40, D)) + 0.3)
NAMES = [f"d{row:03}" for row in range(DOCUMENTS)]


def _adapter() -> Adapter:
    return fit_adapter(Procrustes(), Pairs(OLD, NEW), Metric.COSINE)


def _search(vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int, shard: int) -> Hits:
    index = faiss.IndexFlatIP(D)
    index.add(np.ascontiguousarray(vectors[rows]))
    searcher = ShardSearcher(index, pa.array([NAMES[row] for row in rows]), vectors[rows], Metric.COSINE, shard)
    return searcher.search(queries, k, SearchParameters())


def _truth() -> Hits:
    return _search(NEW, np.arange(DOCUMENTS), QUERIES, K, 0)


def _parts(done: np.ndarray, k: int) -> tuple[SpacedHits, SpacedHits, np.ndarray]:
    """Hits of the rows that are done, in the new space, and of the others by adapted queries, in the old one."""
    rest = np.setdiff1d(np.arange(DOCUMENTS), done)
    new = SpacedHits("new", _search(NEW, done, QUERIES, K, 0))
    old = SpacedHits("old", _search(OLD, rest, normalize(QUERIES @ ROTATION), k, 1))
    return new, old, rest


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_exact_adapter_makes_a_mixed_index_answer_as_the_new_one(share: float) -> None:
    done = np.sort(np.random.default_rng(2).permutation(DOCUMENTS)[: round(share * DOCUMENTS)])
    new, old, rest = _parts(done, K)
    adapted = {1: AdaptedVectors(ArrayVectors(OLD[rest]), _adapter())}
    merged = merge_within_space([new, compared_again(old, QUERIES, adapted, "new")], K)
    assert merged.space == "new"
    np.testing.assert_array_equal(merged.hits.ids, _truth().ids)
    np.testing.assert_allclose(merged.hits.similarities, _truth().similarities, atol=1e-5)
    done_names = np.array([NAMES[row] for row in done], dtype=object)
    from_new = merged.hits.shards == 0
    np.testing.assert_array_equal(merged.hits.ids[from_new], done_names[merged.hits.rows[from_new]])


def test_hits_that_are_compared_again_are_in_the_order_of_the_new_space() -> None:
    """Whatever the old space says: here it knows only the first dimensions."""
    rest = np.arange(DOCUMENTS)
    blurred = normalize(OLD * (np.arange(D) < 6))
    old = SpacedHits("old", _search(blurred, rest, normalize(QUERIES @ ROTATION * (np.arange(D) < 6)), DOCUMENTS, 1))
    again = compared_again(old, QUERIES, {1: AdaptedVectors(ArrayVectors(OLD), _adapter())}, "new")
    np.testing.assert_array_equal(again.hits.ids[:, :K], _truth().ids)
    assert (np.diff(again.hits.similarities, axis=1) <= 0).all()


def test_unfilled_places_stay_unfilled() -> None:
    few = np.arange(4)
    old = SpacedHits("old", _search(OLD, few, normalize(QUERIES @ ROTATION), K, 1))
    again = compared_again(old, QUERIES, {1: AdaptedVectors(ArrayVectors(OLD[few]), _adapter())}, "new")
    assert (again.hits.rows[:, 4:] == -1).all() and np.isnan(again.hits.similarities[:, 4:]).all()
    assert (again.hits.rows[:, :4] >= 0).all()


def test_similarities_of_two_spaces_are_never_merged() -> None:
    new, old, _ = _parts(np.arange(100), K)
    with pytest.raises(MixedSpaces, match=r"hits to merge by similarity \(of spaces new, old\) must be of one space"):
        merge_within_space([new, old], K)
    with pytest.raises(MixedSpaces, match=r"of spaces none"):
        merge_within_space([], K)


def test_fusion_is_the_published_formula() -> None:
    one, other = _hits([["a", "b", "c"]]), _hits([["c", "a", None]])
    fused = fuse_ranks([SpacedHits("x", one), SpacedHits("y", other)], 4)
    assert fused.ids.tolist() == [["a", "c", "b", None]]
    expected = [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62]
    np.testing.assert_allclose(fused.weights[0, :3], expected, rtol=1e-6)
    assert np.isnan(fused.weights[0, 3]) and fused.rows[0, 3] == -1
    assert fused.rows[0, :3].tolist() == [0, 2, 1]


def test_fusion_of_equals_is_by_id_and_of_nothing_is_nothing() -> None:
    parts = [SpacedHits("x", _hits([["b"], [None]])), SpacedHits("y", _hits([["a"], [None]]))]
    fused = fuse_ranks(parts, 2)
    assert fused.ids.tolist() == [["a", "b"], [None, None]]
    assert fuse_ranks(parts[::-1], 2).ids.tolist() == fused.ids.tolist()


def test_shares_place_the_rows_of_a_small_part_where_they_belong() -> None:
    done = np.sort(np.random.default_rng(3).permutation(DOCUMENTS)[: DOCUMENTS // 10])
    new, old, _ = _parts(done, K)
    truth = _truth().ids
    found = [
        np.mean([len(set(mine) & set(true)) / K for mine, true in zip(fused.ids, truth, strict=True)])
        for fused in (fuse_ranks([new, old], K), fuse_ranks([new, old], K, shares=[0.1, 0.9]))
    ]
    assert found[1] > found[0] + 0.2 and found[1] > 0.8


def _hits(ids: Sequence[Sequence[str | None]]) -> Hits:
    names = np.array(ids, dtype=object)
    filled = names != np.array(None)
    rows = np.where(filled, np.arange(names.shape[1])[None, :], -1)
    near = np.where(filled, 0.5, np.nan).astype(np.float32)
    return Hits(names, near, np.where(filled, 0, -1).astype(np.int32), rows.astype(np.int64))


def test_adapted_vectors_are_those_of_the_adapter() -> None:
    adapter = _adapter()
    adapted = AdaptedVectors(ArrayVectors(OLD), adapter)
    assert (len(adapted), adapted.dimension) == (DOCUMENTS, D)
    np.testing.assert_allclose(adapted.take(np.array([5, 2])), NEW[[5, 2]], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(list(adapted.batches())), NEW, atol=1e-5)
    shortened = AdaptedVectors(ArrayVectors(OLD), adapter, 0.5)
    np.testing.assert_allclose(shortened.take(np.array([7])), NEW[[7]] / 2, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(list(shortened.batches())), NEW / 2, atol=1e-5)


def test_shortened_vectors_have_the_products_to_be_expected() -> None:
    """Old vectors that know half of the dimensions: images of unit length are too near to what they show."""
    generator = np.random.default_rng(5)
    new = normalize(generator.standard_normal((3_000, D)))
    old = new[:, : D // 2]
    adapter = fit_adapter(Ridge(1e-6), Pairs(old[:2_000], new[:2_000]), Metric.COSINE)
    unseen = Pairs(old[2_000:], new[2_000:])
    length = mean_cosine(adapter, unseen)
    queries, rows = normalize(generator.standard_normal((1_000, D))), np.arange(1_000)
    true = np.einsum("nd,nd->n", queries, unseen.target)
    expected = [
        np.polyfit(
            np.einsum("nd,nd->n", queries, AdaptedVectors(ArrayVectors(old[2_000:]), adapter, one).take(rows)), true, 1
        )[0]
        for one in (1.0, length)
    ]
    assert expected[0] < 0.8  # a product that is larger by one is truly larger by so much
    assert expected[1] == pytest.approx(1, abs=0.1)


def test_what_cannot_be_merged_is_named() -> None:
    new, old, rest = _parts(np.arange(100), K)
    with pytest.raises(ValueError, match=r"stored vectors \(5 dimensions\) must have the 12 of the space"):
        AdaptedVectors(ArrayVectors(np.ones((3, 5), np.float32)), _adapter())
    with pytest.raises(ValueError, match=r"length of adapted vectors \(0\) must be above 0 and at most 1"):
        AdaptedVectors(ArrayVectors(OLD), _adapter(), 0)
    with pytest.raises(ValueError, match=r"vectors of shard 1 \(dimensions: none\) must be given in the 12"):
        compared_again(old, QUERIES, {}, "new")
    with pytest.raises(ValueError, match=r"vectors of shard 1 \(dimensions: 5\)"):
        compared_again(old, QUERIES, {1: ArrayVectors(np.ones((len(rest), 5), np.float32))}, "new")
    with pytest.raises(ValueError, match=r"parts to fuse \(of spaces new, new\) must be one for each space"):
        fuse_ranks([new, new], K)
    with pytest.raises(ValueError, match=r"parts to fuse answer \[1, 40\] queries"):
        fuse_ranks([new, SpacedHits("x", _hits([["a"]]))], K)
    with pytest.raises(ValueError, match=r"shares \(\[0.5\]\) must be one for each of 2 parts"):
        fuse_ranks([new, old], K, shares=[0.5])
