"""Answers of a half-finished backfill, against one exact search in the new space."""

from collections.abc import Sequence

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.adapter_fitting import Pairs, fit_adapter
from penstock.operators.adapters import Adapter, Procrustes, Ridge
from penstock.operators.bridging import mean_cosine
from penstock.operators.indexing import Metric
from penstock.operators.mixed_spaces import (
    AdaptedVectors,
    MixedSpaces,
    SpacedHits,
    compared_again,
    fill_places,
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


def _places(old: Sequence[str | None], superseded: set[str], new: Sequence[str | None], k: int) -> list[str | None]:
    """As the method reads, for one query."""
    left = [name for name in new if name is not None]
    ranked: list[str | None] = []
    for name in old:
        if name in superseded and left:
            ranked.append(left.pop(0))
        elif name is not None and name not in superseded:
            ranked.append(name)
    return [*ranked, *left, *[None] * k][:k]


@given(
    st.permutations([*"abcdef", None]),
    st.sets(st.sampled_from("abcdef")),
    st.permutations([*"uvwxyz"]),
    st.integers(0, 6),
)
def test_new_hits_take_the_places_of_superseded_ones(
    old: list[str | None], superseded: set[str], new: list[str], count: int
) -> None:
    before = sorted(old, key=lambda name: name is None)  # unfilled places come last
    after = [*new[:count], *[None] * (6 - count)]
    hits = _hits([before, ["a", *[None] * 6]]), _hits([after, [None] * 6])
    flags = np.array([[name in superseded for name in row] for row in hits[0].ids])
    for k in (1, 4, 7):
        found = fill_places(SpacedHits("old", hits[0]), flags, SpacedHits("new", hits[1]), k)
        expected = _places(before, superseded, after, k)
        assert found.ids[0].tolist() == expected
        assert found.ids[1].tolist() == [None if "a" in superseded else "a", *[None] * (k - 1)]
        assert np.isnan(found.similarities).all() and found.similarities.shape == found.rows.shape == (2, k)
        assert ((found.rows >= 0) == (found.ids != np.array(None))).all()
        assert ((found.shards >= 0) == (found.rows >= 0)).all()
        assert (found.ids.dtype, found.shards.dtype, found.rows.dtype) == (object, np.int32, np.int64)


def test_places_make_the_old_ranking_the_new_one_step_by_step() -> None:
    """Similarities of the old space are blurred: what is embedded again is nearer to the truth at every step."""
    blurred = normalize(OLD * (np.arange(D) < 9))
    asked = normalize(QUERIES @ ROTATION * (np.arange(D) < 9))
    old, truth = SpacedHits("old", _search(blurred, np.arange(DOCUMENTS), asked, K, 1)), _truth().ids
    order, agreements = np.random.default_rng(3).permutation(DOCUMENTS), []
    for share in (0, 0.25, 0.5, 0.75, 1):
        done = np.sort(order[: round(share * DOCUMENTS)])
        new = SpacedHits("new", _search(NEW, done, QUERIES, K, 0))
        found = fill_places(old, np.isin(old.hits.rows, done), new, K).ids
        agreements.append(
            np.mean([len({*mine} & {*true}) / K for mine, true in zip(found.tolist(), truth.tolist(), strict=True)])
        )
        if share in (0, 1):
            np.testing.assert_array_equal(found, truth if share else old.hits.ids)
    assert agreements == sorted(agreements) and agreements[0] < 0.8 and agreements[-1] == 1


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
    with pytest.raises(ValueError, match=r"places to fill \(old hits \(40, 10\), superseded \(40, 9\), new hits"):
        fill_places(old, np.zeros((40, 9), bool), new, K)
    with pytest.raises(ValueError, match=r"must be of the same queries, and 11 of the old space for each at least"):
        fill_places(old, np.zeros((40, 10), bool), new, K + 1)
