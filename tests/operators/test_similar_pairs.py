"""Joins: every pair that plain float64 multiplication finds, and none else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators import similar_pairs as module
from penstock.operators.similar_pairs import (
    FILTER_MARGIN,
    Join,
    Pairs,
    cell_pairs,
    graph_pairs,
    pair_similarities,
    refuse_similarity,
    similar_pairs,
    unit_rows,
)

DIMENSION = 96


def clustered(rows: int, seed: int, noise: float = 0.5, dimension: int = DIMENSION) -> np.ndarray:
    """Unit rows around few directions, some of them close to others: similarities of all sizes."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((rows // 8 + 1, dimension)) * np.linspace(2, 0.2, dimension)
    spread = random.uniform(0.05, noise, (rows, 1))
    vectors = centres[random.integers(0, len(centres), rows)] + spread * random.standard_normal((rows, dimension))
    return unit_rows(vectors)


def truth(vectors: np.ndarray, floor: float, first: int = 0) -> set[tuple[int, int]]:
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    left, right = np.nonzero(np.triu((exact @ exact.T).astype(np.float32) >= np.float32(floor), 1))
    return {(int(a), int(b)) for a, b in zip(left, right, strict=True) if b >= first}


def partners(rows: np.ndarray, cosines: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Unit rows at given cosines to others, in random directions."""
    away = random.standard_normal(rows.shape)
    away = unit_rows(away - np.einsum("ij,ij->i", away, rows)[:, None] * rows)
    return unit_rows(cosines[:, None] * rows + np.sqrt(1 - cosines[:, None] ** 2) * away)


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    found = set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))
    assert len(found) == len(pairs)
    return found


@pytest.mark.parametrize("floor", [0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("rows", [2, 129, 1_500])
def test_exact_join_finds_what_multiplying_all_rows_finds(rows: int, floor: float) -> None:
    vectors = clustered(rows, rows)
    pairs = Pairs.joined(list(similar_pairs(vectors, floor)))
    assert as_set(pairs) == truth(vectors, floor)
    assert np.allclose(pairs.similarity, np.einsum("ij,ij->i", vectors[pairs.left], vectors[pairs.right]), atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_either_type_of_filter_loses_nothing_near_the_floor(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(module, "_filter_type", lambda device: kind)
    random = np.random.default_rng(5)
    base = unit_rows(random.standard_normal((300, DIMENSION)))
    other = unit_rows(random.standard_normal((300, DIMENSION)))
    other = unit_rows(other - np.einsum("ij,ij->i", other, base)[:, None] * base)
    cosine = 0.9 + np.linspace(-1e-3, 1e-3, 300)[:, None]
    vectors = np.concatenate([base, unit_rows(cosine * base + np.sqrt(1 - cosine**2) * other)])
    expected = truth(vectors, 0.9)
    assert 140 <= len(expected) <= 160
    assert as_set(Pairs.joined(list(similar_pairs(vectors, 0.9)))) == expected
    rounded = vectors.astype(np.float16).astype(np.float32)
    halves = (rounded @ rounded.T).astype(np.float16)
    left, right = np.nonzero(np.triu(halves >= np.float16(0.9), 1))
    assert set(zip(left.tolist(), right.tolist(), strict=True)) != expected  # half precision flips decisions here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("floor", [0.8, 0.95])
def test_a_gpu_finds_the_same_pairs(floor: float) -> None:
    vectors = clustered(20_000, 13)
    cells = np.arange(len(vectors)) % 3
    for join in (similar_pairs, lambda rows, least, device: cell_pairs(rows, cells, least, device)):
        pairs = [Pairs.joined(list(join(vectors, floor, device=device))) for device in ("cpu", "cuda")]
        assert as_set(pairs[0]) == as_set(pairs[1]) and np.array_equal(pairs[0].similarity, pairs[1].similarity)


def test_roundings_of_the_filter_stay_within_its_margin() -> None:
    vectors = np.abs(clustered(400, 2, noise=0.1, dimension=512))  # all of one sign: roundings add up
    vectors = unit_rows(vectors)
    narrow = torch.from_numpy(vectors).to(torch.bfloat16).float()
    products = (narrow @ narrow.T).numpy()
    assert np.abs(products - vectors @ vectors.T).max() < FILTER_MARGIN["bfloat16"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 130), st.floats(0.8, 1), st.sampled_from(["bfloat16", "float32"]))
def test_the_filter_lets_pairs_through_that_are_at_the_floor(
    seed: int, dimension: int, floor: float, kind: str
) -> None:
    """Pairs of the least similarity that float32 tells from the floor, in any direction, whole numbers among them."""
    random = np.random.default_rng(seed)
    left = unit_rows(random.standard_normal((40, dimension)) ** random.choice([1, 3, 9]))
    right = partners(left, np.full(40, floor), random)
    rows = np.concatenate([left, right])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_filter_type", lambda device: kind)
        found = list(module._Filter(rows, floor, "cpu").candidates(0, 40, 80))
    passed = {(int(a), int(b)) for one, other in found for a, b in zip(one, other, strict=True)}
    assert {(a, b) for a, b in truth(rows, floor) if b >= 40} <= passed and all(b >= 40 for _, b in passed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 64), st.integers(1, 20), st.floats(0, 1))
def test_short_rows_bound_products(seed: int, dimension: int, components: int, inside: float) -> None:
    """Rows that lie in the axes by any share, some of them wholly and some not at all."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.standard_normal((dimension, dimension)))[0].astype(np.float32)
    components = min(components, dimension - 1)
    rows = random.standard_normal((60, dimension))
    rows[:40] *= np.where(np.arange(dimension) < components, inside, 1 - inside)
    rows[:5, components:], rows[5:10, :components] = 0, 0
    rows[10:20] = rows[:10] + 0.2 * rows[50:]
    rows[np.abs(rows).max(axis=1) < 1e-6] = 1
    vectors = unit_rows(rows @ axes.T)
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    short = module._shortened(vectors, axes[:, :components]).astype(np.float64)
    assert (short @ short.T - exact).min() > -2e-6


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_pairs_at_the_floor_are_found_whatever_they_have_in_common(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Short rows of some components, whose axes hold most of a row, little of it or none."""
    monkeypatch.setattr(module, "_filter_type", lambda device: kind)
    random = np.random.default_rng(22)
    base = unit_rows(random.standard_normal((600, DIMENSION)) * np.exp(-np.arange(DIMENSION) / 15))
    for floor in (0.8, 0.9, 0.97, 1.0):
        near = partners(base, np.minimum(1, floor + np.linspace(-3e-6, 3e-6, 600)), random)
        vectors = np.concatenate([base, near])
        assert module._short_rows(vectors, floor).shape[1] < DIMENSION
        expected = truth(vectors, floor)
        assert as_set(Pairs.joined(list(similar_pairs(vectors, floor)))) == expected and len(expected) >= 250


def test_short_rows_are_never_less_similar() -> None:
    vectors = unit_rows(clustered(600, 3) * np.exp(-np.arange(DIMENSION) / 15))
    short = module._short_rows(vectors, 0.9)
    assert short.shape[1] < DIMENSION
    assert as_set(Pairs.joined(list(similar_pairs(vectors, 0.9)))) == truth(vectors, 0.9)
    assert (short @ short.T - vectors @ vectors.T).min() > -1e-5


def test_products_of_near_copies_are_named_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_rows(1 + 1e-3 * np.random.default_rng(2).standard_normal((150, DIMENSION)))
    vectors[::7] = clustered(22, 5)
    expected = truth(vectors, 0.9)
    monkeypatch.setattr(module, "MOST_REACHING", 400)
    monkeypatch.setattr(module, "BLOCK_ROWS", 64)
    monkeypatch.setattr(module, "_filter_type", lambda device: "float32")
    products = torch.from_numpy(vectors @ vectors.T)
    parts = list(module._reaching(products, 0.9))
    assert len(parts) > 20 and max(len(row) for row, _ in parts) <= 400 + len(vectors)
    row, column = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    assert np.array_equal(np.stack([row, column]), np.stack(np.nonzero(products.numpy() >= np.float32(0.9))))
    assert not list(module._reaching(products, 1.1))
    assert as_set(Pairs.joined(list(similar_pairs(vectors, 0.9)))) == expected


def test_rows_below_first_are_not_compared_with_one_another() -> None:
    vectors = clustered(700, 4)
    assert as_set(Pairs.joined(list(similar_pairs(vectors, 0.85, first=400)))) == truth(vectors, 0.85, first=400)
    assert not list(similar_pairs(vectors, 0.85, first=700))


def test_the_order_of_rows_changes_neither_pairs_nor_similarities() -> None:
    vectors = clustered(800, 6)
    mixed = np.random.default_rng(1).permutation(len(vectors))
    straight = Pairs.joined(list(similar_pairs(vectors, 0.85)))
    turned = Pairs.joined(list(similar_pairs(vectors[mixed], 0.85)))
    one, other = mixed[turned.left], mixed[turned.right]
    order = np.lexsort((np.maximum(one, other), np.minimum(one, other)))
    assert np.array_equal(np.minimum(one, other)[order], straight.left)
    assert np.array_equal(turned.similarity[order], straight.similarity)


def test_fewer_pairs_above_a_higher_floor() -> None:
    vectors = clustered(700, 7)
    low = Pairs.joined(list(similar_pairs(vectors, 0.8)))
    high = Pairs.joined(list(similar_pairs(vectors, 0.92)))
    assert as_set(high) == as_set(low.where(low.similarity >= np.float32(0.92))) and 0 < len(high) < len(low)


def test_equal_and_nearly_equal_rows_are_all_found() -> None:
    base = clustered(200, 8)
    noise = 1e-3 * np.random.default_rng(9).standard_normal(base.shape)
    vectors = np.concatenate([base, base, unit_rows(base + noise)])
    found = as_set(Pairs.joined(list(similar_pairs(vectors, 0.99))))
    assert all({(row, row + 200), (row, row + 400), (row + 200, row + 400)} <= found for row in range(200))
    assert (pair_similarities(vectors, np.arange(200), np.arange(200, 400)) == 1).all()


def test_cluster_join_finds_the_pairs_of_each_cell_and_of_a_giant_one() -> None:
    vectors = clustered(1_500, 10)
    cells = np.where(np.arange(1_500) % 3 == 0, np.arange(1_500) % 40, 7)
    everything = truth(vectors, 0.7)
    expected = {(a, b) for a, b in everything if cells[a] == cells[b]}
    assert as_set(Pairs.joined(list(cell_pairs(vectors, cells, 0.7)))) == expected != everything
    assert not list(cell_pairs(vectors[:40], np.arange(40), 0.01))


@pytest.mark.parametrize("floor", [0.001, 0.05])
def test_cluster_join_takes_low_floors(floor: float) -> None:
    vectors = clustered(200, 11)
    pairs = Pairs.joined(list(cell_pairs(vectors, np.zeros(200, int), floor)))
    assert as_set(pairs) == truth(vectors, floor)


def test_graph_join_finds_no_false_pair_and_most_true_ones() -> None:
    vectors = clustered(1_000, 12)
    expected, found = truth(vectors, 0.9), as_set(Pairs.joined(list(graph_pairs(vectors, 0.9))))
    assert found <= expected and len(found) > 0.95 * len(expected)
    part = as_set(Pairs.joined(list(graph_pairs(vectors, 0.9, first=900))))
    assert part <= truth(vectors, 0.9, first=900) and part
    assert not list(graph_pairs(vectors[:1], 0.9))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_rows_without_a_direction_are_named(value: float) -> None:
    vectors = np.ones((5, 8), np.float32)
    vectors[3] = value
    with pytest.raises(ValueError, match=r"vector 3 \(length .*\) must be finite and not zero"):
        unit_rows(vectors)


def test_unit_rows_take_half_precision_and_leave_the_input() -> None:
    vectors = np.full((2, 4), 2, np.float16)
    rows = unit_rows(vectors)
    assert rows.dtype == np.float32 and np.allclose(rows, 0.5) and (vectors == 2).all()


def test_similarities_that_a_join_cannot_use_are_refused() -> None:
    for similarity in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"must be above 0 and at most 1"):
            refuse_similarity(similarity, Join.CLUSTER)
    with pytest.raises(ValueError, match=r"similarity \(0.79\) must be at least 0.8 for join exact.*graph or cluster"):
        list(similar_pairs(clustered(10, 1), 0.79))
    refuse_similarity(0.5, Join.GRAPH)


@pytest.mark.parametrize("first", [0, 1, 350, 699, 700])
def test_rows_of_a_cell_below_first_are_not_compared_with_one_another(first: int) -> None:
    vectors, cells = clustered(700, 4), np.arange(700) % 3
    found = as_set(Pairs.joined(list(cell_pairs(vectors, cells, 0.85, first=first))))
    assert found == {(a, b) for a, b in truth(vectors, 0.85, first=first) if a % 3 == b % 3}
