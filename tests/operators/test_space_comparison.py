"""Spaces side by side: invariances of relative representations, and figures of answers against counting by hand."""

import json

import numpy as np
import pytest

from penstock.operators.compatibility import measure_compatibility
from penstock.operators.indexing import Metric
from penstock.operators.searching import normalize
from penstock.operators.space_comparison import (
    flips,
    likeness,
    neighbour_agreement,
    neighbour_overlap,
    quality_change,
    relative_representations,
)

COSINE = Metric.COSINE


def _rows(seed: int, rows: int, dimension: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension)) + 0.3


def _rotation(seed: int, dimension: int = 12) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0]


def test_agreement_counts_common_neighbours() -> None:
    queries, documents = normalize(_rows(1, 30)), normalize(_rows(2, 200))
    other = normalize(documents + 0.3 * _rows(3, 200))
    expected = [
        len(set(np.argsort(-(query @ documents.T))[:5]) & set(np.argsort(-(query @ other.T))[:5])) / 5
        for query in queries
    ]
    np.testing.assert_allclose(neighbour_agreement((queries, documents), (queries, other), COSINE, 5), expected)


def test_overlap_leaves_the_row_itself_out() -> None:
    one, other = normalize(_rows(1, 150)), normalize(_rows(1, 150) + 0.5 * _rows(2, 150))
    expected = []
    for row in range(150):
        near = [np.argsort(-(space[row] @ space.T)) for space in (one, other)]
        top = [set([place for place in order if place != row][:6]) for order in near]
        expected.append(len(top[0] & top[1]) / 6)
    np.testing.assert_allclose(neighbour_overlap(one, other, COSINE, 6), expected)
    np.testing.assert_array_equal(neighbour_overlap(one, one @ _rotation(3), COSINE, 6), 1)


def test_relative_representations_do_not_see_rotation_scale_and_shift() -> None:
    vectors, anchors = _rows(1, 50), _rows(2, 20)
    plain = relative_representations(vectors, anchors)
    moved = relative_representations(3 * vectors @ _rotation(4) + 5, 3 * anchors @ _rotation(4) + 5)
    np.testing.assert_allclose(plain, moved, atol=1e-5)
    assert plain.shape == (50, 20) and np.abs(plain).max() <= 1 + 1e-6


def test_likeness_orders_spaces_by_how_far_they_were_moved() -> None:
    space = _rows(1, 300)
    noisy = space + 0.3 * np.random.default_rng(2).standard_normal(space.shape)
    other = _rows(3, 300, dimension=7)
    table = likeness([space, space @ _rotation(5), noisy @ _rotation(6), other], anchors=100)
    same, near, far = table[0][1], table[0][2], table[0][3]
    assert (same.mean_cosine, same.matched) == (pytest.approx(1, abs=1e-5), 1)
    assert 1 > near.mean_cosine > 0.5 and near.matched > 0.8
    assert abs(far.mean_cosine) < 0.1 and far.matched < 0.1
    assert table[2][0].mean_cosine == pytest.approx(near.mean_cosine, abs=1e-6)


def test_changes_are_paired() -> None:
    before = np.random.default_rng(1).uniform(0, 0.5, 200)
    change = quality_change(before, before + 0.01, seed=2)
    assert change.difference.low == pytest.approx(0.01) and change.difference.high == pytest.approx(0.01)
    assert change.before.high > change.after.low
    assert json.loads(json.dumps(change.to_json()))["difference"]["estimate"] == pytest.approx(0.01)


def test_flips_are_counted_both_ways() -> None:
    before = np.array([True, True, False, False, True])
    after = np.array([False, True, True, False, False])
    found = flips(before, after, seed=1)
    assert (found.negative.estimate, found.positive.estimate) == (0.4, 0.2)
    assert found.negative_queries == (0, 4)
    assert found.negative.low <= 0.4 <= found.negative.high
    assert json.loads(json.dumps(found.to_json()))["negative_queries"] == [0, 4]


def test_compatible_is_what_is_better_beyond_doubt() -> None:
    old = np.random.default_rng(1).uniform(0, 0.8, 300)
    better, barely = measure_compatibility(old, old + 0.05, 1), measure_compatibility(old, old, 1)
    assert better.compatible and not barely.compatible
    noisy = old + np.random.default_rng(2).normal(0.005, 0.5, 300)
    assert not measure_compatibility(old, noisy, 1).compatible
    assert json.loads(json.dumps(better.to_json()))["compatible"] is True


def test_update_gain_is_the_share_of_the_full_gain() -> None:
    old = np.full(50, 0.4)
    assert measure_compatibility(old, np.full(50, 0.5), 1, np.full(50, 0.6)).update_gain == pytest.approx(0.5)
    assert measure_compatibility(old, np.full(50, 0.5), 1, np.full(50, 0.3)).update_gain is None
    assert measure_compatibility(old, np.full(50, 0.5), 1).update_gain is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: neighbour_overlap(_rows(1, 20), _rows(1, 21), COSINE), r"spaces to compare \(of \[20, 21\] rows\)"),
        (lambda: likeness([], 3), r"spaces to compare \(of \[\] rows\)"),
        (lambda: likeness([_rows(1, 20)], 20), r"anchors \(20\) must be at least 2 and fewer than the 20 rows"),
        (lambda: relative_representations(_rows(1, 5), _rows(2, 1)), r"anchors \(shape \(1, 12\)\) must be at least 2"),
        (lambda: quality_change(np.ones(2), np.ones(3), 1), r"figures of two systems \(shapes \(2,\) and \(3,\)\)"),
        (lambda: flips(np.ones(2, bool), np.ones(3, bool), 1), r"figures of two systems \(shapes \(2,\) and \(3,\)\)"),
        (lambda: measure_compatibility(np.ones(3), np.ones(2), 1), r"cross \(shape \(2,\)\) must have a figure .* 3"),
        (lambda: measure_compatibility(np.ones(3), np.ones(3), 1, np.ones(2)), r"new \(shape \(2,\)\)"),
    ],
)
def test_errors_name_what_is_wrong(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
