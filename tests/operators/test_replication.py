"""Copies across parts: no pair is lost, and none is compared twice."""

import numpy as np
import pytest

from penstock.operators.duplicate_measures import (
    pair_recall,
    sample_truth,
    similarity_histogram,
)
from penstock.operators.replication import MARGIN, copies_of, near_distance
from penstock.operators.similar_pairs import Pairs, pair_similarities, similar_pairs, unit_rows

ROWS, CELLS, PARTS = 1_500, 24, 4


def vectors_of(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((60, 24))
    spread = random.uniform(0.02, 0.4, (ROWS, 1))
    return unit_rows(centres[random.integers(0, 60, ROWS)] + spread * random.standard_normal((ROWS, 24)))


def centroids_of(vectors: np.ndarray, unit: bool) -> np.ndarray:
    chosen = vectors[np.random.default_rng(1).choice(len(vectors), CELLS, replace=False)]
    return chosen if unit else chosen * np.linspace(0.5, 1, CELLS)[:, None].astype(np.float32)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("floor", [0.9, 0.98])
def test_each_pair_meets_in_exactly_one_part(floor: float, unit: bool) -> None:
    vectors = vectors_of(0)
    parts = np.random.default_rng(2).integers(0, PARTS, CELLS)
    parts[:PARTS] = np.arange(PARTS)
    centroids = centroids_of(vectors, unit)
    copies = copies_of(vectors, centroids, parts, floor)
    nearest = ((vectors[:, None] - centroids[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert np.array_equal(copies.cell, nearest) and np.array_equal(copies.home, parts[nearest])
    assert (copies.part > copies.home[copies.row]).all()
    held = np.zeros((ROWS, PARTS), bool)
    held[copies.row, copies.part] = True
    held[np.arange(ROWS), copies.home] = True
    pairs = Pairs.joined(list(similar_pairs(vectors, floor)))
    across = copies.home[pairs.left] != copies.home[pairs.right]
    assert across.sum() > 50
    low = np.where(copies.home[pairs.left] < copies.home[pairs.right], pairs.left, pairs.right)
    high = pairs.left + pairs.right - low
    assert held[low, copies.home[high]].all() and not (held[high, copies.home[low]] & across).any()
    assert copies.factor == 1 + len(copies.row) / ROWS


def test_fewer_copies_for_closer_pairs_and_none_beyond_the_most() -> None:
    vectors = vectors_of(3)
    centroids, parts = centroids_of(vectors, True), np.arange(CELLS)
    factors = [copies_of(vectors, centroids, parts, floor).factor for floor in (0.8, 0.95, 0.999)]
    assert factors[0] > factors[1] > factors[2] >= 1
    few = copies_of(vectors, centroids, parts, 0.8, most=2)
    assert np.bincount(few.row).max() <= 2 < np.bincount(copies_of(vectors, centroids, parts, 0.8).row).max()
    assert copies_of(vectors, centroids, parts, 0.8, most=0).factor == 1
    assert copies_of(vectors, centroids, np.zeros(CELLS, int), 0.8).factor == 1
    assert copies_of(vectors[:0], centroids, parts, 0.8).factor == 1


def test_the_nearest_parts_depend_on_the_row_alone() -> None:
    """Rows that are as near to many parts, but for the rounding of products, which differs with what is multiplied."""
    random = np.random.default_rng(8)
    axes = np.linalg.qr(random.standard_normal((48, 48)))[0]
    between = axes[0] + 0.2 * axes[1:12].sum(axis=0)
    vectors = unit_rows(between + 1e-8 * random.standard_normal((200, 48)))
    centroids, parts = unit_rows(axes[:12]), np.arange(12)
    whole = copies_of(vectors, centroids, parts, 0.8, most=2)
    assert np.bincount(whole.row).tolist() == [2] * len(vectors) and (whole.home == 0).all()
    for rows in (1, 3, 64):
        pieces = [copies_of(vectors[i : i + rows], centroids, parts, 0.8, most=2) for i in range(0, 200, rows)]
        assert np.array_equal(np.concatenate([one.part for one in pieces]), whole.part)
    exact = centroids.astype(np.float64)
    nearness = vectors.astype(np.float64) @ exact.T - (exact**2).sum(axis=1) / 2
    distances = (nearness[:, :1] - nearness[:, 1:] - MARGIN) / np.linalg.norm(exact[1:] - exact[0], axis=1)
    order = np.argsort(distances, axis=1)
    nearest = np.sort(order[:, :2] + 1, axis=1)
    apart = np.diff(np.sort(distances, axis=1)[:, 1:3], axis=1)[:, 0] > 1e-12
    assert len(np.unique(nearest)) > 6 and apart.sum() > 100
    assert np.array_equal(whole.part.reshape(-1, 2)[apart], nearest[apart])


@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("floor", [0.99999, 0.999999, 0.9999999, 1.0])
def test_pairs_that_reach_a_floor_near_one_as_rounded_are_not_lost(floor: float, most: int | None) -> None:
    turned = np.concatenate([[-1e-7], np.arccos(np.minimum(1, floor - np.linspace(0, 1.2e-7, 300)))])
    angles = np.pi / 4 - turned
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    copies = copies_of(vectors, np.eye(2, dtype=np.float32), np.arange(2), floor, most)
    assert copies.home[0] == 1
    others = np.arange(1, len(vectors))
    near = pair_similarities(vectors, np.zeros(len(others), int), others) >= np.float32(floor)
    assert near.any() and set(others[near & (copies.home[1:] == 0)].tolist()) <= set(copies.row.tolist())


def test_equal_centroids_are_neighbours() -> None:
    vectors = vectors_of(4)
    twice = np.concatenate([vectors[:1], vectors[:1]])
    assert np.bincount(copies_of(vectors, twice, np.array([0, 1]), 0.95).row, minlength=ROWS).min() == 1


def test_distance_of_similar_unit_vectors() -> None:
    assert near_distance(1.0) == 0 and near_distance(0.5) == pytest.approx(1.0)


def test_recall_of_a_sample_covers_the_recall_of_all() -> None:
    vectors = vectors_of(5)
    pairs = Pairs.joined(list(similar_pairs(vectors, 0.9)))
    random = np.random.default_rng(6)
    found = random.random(len(pairs)) < 0.8
    known = {(int(a), int(b)) for a, b in zip(pairs.left[found], pairs.right[found], strict=True)}
    true_share, bounds = found.mean(), []
    for _ in range(20):
        sample = np.sort(random.choice(ROWS, 300, replace=False))
        truth = sample_truth(vectors[sample], vectors, 0.9)
        row, other = sample[truth.left], truth.right
        row, other = row[row != other], other[row != other]
        hit = np.array([(min(a, b), max(a, b)) in known for a, b in zip(row.tolist(), other.tolist(), strict=True)])
        measured = pair_recall(row, hit)
        assert measured.recall == pytest.approx(true_share, abs=0.06) and measured.pairs == len(row)
        bounds.append(measured.at_least <= true_share)
    assert sum(bounds) >= 17


def test_truth_of_a_sample_is_that_of_the_exact_join() -> None:
    vectors = vectors_of(7)
    pairs = Pairs.joined(list(similar_pairs(vectors, 0.9)))
    truth = sample_truth(vectors, vectors, 0.9)
    upper = truth.where(truth.left < truth.right)
    assert np.array_equal(upper.left, pairs.left) and np.array_equal(upper.similarity, pairs.similarity)


def test_what_a_sample_that_found_all_can_show() -> None:
    all_found = pair_recall(np.arange(299), np.ones(299, bool))
    assert all_found.recall == 1 and all_found.at_least == pytest.approx(0.99, abs=1e-3)
    nothing = pair_recall(np.empty(0, np.int64), np.empty(0, bool))
    assert (nothing.recall, nothing.at_least, nothing.rows) == (1.0, 0.0, 0)


def test_histogram_adds_up_over_parts() -> None:
    similarities = np.array([0.9, 0.91, 0.95, 0.999, 1.0], np.float32)
    counts, edges = similarity_histogram([similarities[:2], similarities[2:]], 0.9, 10)
    assert counts.sum() == 5 and counts[[0, -1]].tolist() == [1, 2] and edges[[0, -1]].tolist() == [0.9, 1.0]
