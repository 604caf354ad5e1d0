"""The order of a backfill, against sorting by hand, and what an order is worth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.backfill_order import (
    SLICE_SHARE,
    Priorities,
    adapter_residuals,
    area_under_quality,
    backfill_order,
    first_wanted,
    fragment_order,
    has_fallen,
    of_hubs,
)

ROWS = 60


def _hashes(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows).astype(np.uint64) * np.uint64(2**58)


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_traffic_then_hubs_then_hashes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    traffic, occurrences = generator.integers(0, 3, ROWS), generator.integers(0, 40, ROWS)
    hashes = _hashes(seed)

    def place(row: int) -> tuple[float, ...]:
        hub = occurrences[row] if occurrences[row] >= 20 else 0
        return -traffic[row], -hub, float(hashes[row])

    order = backfill_order(Priorities(hashes, traffic, occurrences))
    assert order.tolist() == sorted(range(ROWS), key=place)


def test_the_order_does_not_depend_on_how_rows_lie() -> None:
    generator = np.random.default_rng(1)
    hashes, traffic = _hashes(1), generator.integers(0, 3, ROWS)
    shuffled = generator.permutation(ROWS)
    plain, other = (backfill_order(Priorities(hashes[rows], traffic[rows])) for rows in (np.arange(ROWS), shuffled))
    np.testing.assert_array_equal(hashes[plain], hashes[shuffled][other])
    np.testing.assert_array_equal(backfill_order(Priorities(hashes)), np.argsort(hashes))


def test_fragments_go_by_traffic_per_row_then_occurrences_then_residuals() -> None:
    rows, traffic = np.array([3, 2, 2, 1]), np.array([9, 8, 0, 0])
    assert fragment_order(rows, traffic).tolist() == [1, 0, 2, 3]
    assert fragment_order(rows, traffic, occurrences=np.array([0, 0, 4, 3])).tolist() == [1, 0, 3, 2]
    assert fragment_order(rows, residuals=np.array([0.1, np.nan, 0.3, 0.2])).tolist() == [2, 3, 0, 1]
    assert fragment_order(rows).tolist() == [0, 1, 2, 3]


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_a_slice_is_the_first_fifth_of_what_is_wanted(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(1, 6, ROWS)
    traffic, occurrences = generator.integers(0, 3, ROWS) * 1.0, generator.integers(0, 40, ROWS)
    priorities, eligible = Priorities(_hashes(seed), traffic, occurrences), generator.random(ROWS) < 0.8
    chosen = first_wanted(priorities, rows, eligible)
    expected, taken = set(), 0
    for row in backfill_order(priorities).tolist():
        if eligible[row] and (traffic[row] > 0 or occurrences[row] >= 20) and taken < SLICE_SHARE * rows.sum():
            expected.add(row)
            taken += rows[row]
    assert set(np.flatnonzero(chosen).tolist()) == expected


def test_documents_that_are_wanted_alike_make_no_slice() -> None:
    rows, every = np.full(ROWS, 2), np.ones(ROWS, bool)
    for traffic in (np.zeros(ROWS), np.full(ROWS, 7.0)):
        assert not first_wanted(Priorities(_hashes(2), traffic), rows, every).any()
    one = np.arange(1, 2)
    assert not first_wanted(Priorities(_hashes(2)[:1], one), one, one > 0).any()
    rare = np.where(np.arange(ROWS) == 3, 1.0, 0.0)
    assert first_wanted(Priorities(_hashes(2), rare), rows, every).nonzero()[0].tolist() == [3]


def test_hubs_are_told_by_the_mean_of_their_rows() -> None:
    assert of_hubs(np.array([19, 20, 39, 60]), np.array([1, 1, 2, 3])).tolist() == [0, 20, 0, 60]


def test_residuals_are_distances() -> None:
    np.testing.assert_allclose(adapter_residuals(np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])), [5.0])


def test_area_is_the_mean_quality() -> None:
    shares = np.array([0, 0.5, 1])
    assert area_under_quality(shares, np.array([0.2, 0.2, 0.2])) == pytest.approx(0.2)
    assert area_under_quality(shares, np.array([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert area_under_quality(np.linspace(0, 1, 11), np.linspace(0, 1, 11)) == pytest.approx(0.5)


def test_what_is_asked_for_first_gains_more() -> None:
    """Each query is right once its row is embedded: the area is the traffic that is served early."""
    traffic = np.random.default_rng(2).permutation(1 / np.arange(1, 501))
    hashes = _hashes(3, 500)
    shares = np.linspace(0, 1, 11)
    areas = []
    for order in (backfill_order(Priorities(hashes, traffic)), backfill_order(Priorities(hashes))):
        served = [traffic[order[: round(share * 500)]].sum() / traffic.sum() for share in shares]
        areas.append(area_under_quality(shares, np.array(served)))
    assert areas[0] > 0.8 and areas[0] > areas[1] + 0.2


def test_only_a_fall_beyond_doubt_stops_the_backfill() -> None:
    best = np.random.default_rng(4).uniform(0, 1, 300)
    noise = np.random.default_rng(5).normal(0, 0.2, 300)
    assert has_fallen(best, best + noise - 0.1, seed=1)
    assert not has_fallen(best, best + noise - noise.mean(), seed=1)
    assert not has_fallen(best, best + 0.1, seed=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Priorities(_hashes(1), np.ones(3)), r"traffic \(shape \(3,\)\) must have a value for each of the 60"),
        (lambda: Priorities(_hashes(1), np.full(60, -1)), r"traffic of row 0 \(-1\) must be finite and not negative"),
        (lambda: Priorities(_hashes(1), occurrences=np.ones(3)), r"occurrences \(shape \(3,\)\)"),
        (lambda: fragment_order(np.array([2, 0])), r"rows of fragment 1 \(0\) must be at least 1"),
        (lambda: fragment_order(np.array([2, 1]), np.ones(3)), r"traffic \(3\) must have a figure for each of the 2"),
        (lambda: adapter_residuals(np.ones((2, 3)), np.ones((2, 4))), r"adapted vectors \(shape \(2, 3\)\)"),
        (lambda: area_under_quality(np.array([0, 0.5]), np.ones(2)), r"shares \(\[0.  0.5\]\) must ascend from 0 to 1"),
        (lambda: area_under_quality(np.array([0, 1]), np.ones(3)), "one for each of the 3 qualities"),
    ],
)
def test_errors_name_what_is_wrong(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
