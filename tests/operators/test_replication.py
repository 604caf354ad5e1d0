"""Copies across parts: no pair is lost, and none is compared twice."""

import numpy as np
import pytest

from penstock.operators.duplicate_measures import (
    pair_recall,
    sample_truth,
    similarity_histogram,
)
from penstock.operators.replication import copies_of, near_distance
from penstock.operators.similar_pairs import Pairs, similar_pairs, unit_rows

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
