"""Bootstrap intervals against the normal theory of means, and what they refuse."""

import numpy as np
import pytest

from penstock.operators.confidence import Interval, mean_interval, ratio_interval


def test_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3, 2, 1_000)
    found = mean_interval(values, seed=5)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found.estimate == values.mean()
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert found == mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for trial in range(40):
        interval = mean_interval(generator.exponential(1, 100), trial)
        held += interval.low <= 1 <= interval.high
    assert held >= 33  # 38 of 40 are expected, fewer than 33 have a chance of 1 in 700


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    generator = np.random.default_rng(3)
    hardness = generator.normal(0, 1, 500)
    before, after = hardness, hardness + 0.1 + generator.normal(0, 0.1, 500)
    paired = mean_interval(after - before, 1)
    assert paired.low > 0.05
    assert mean_interval(after, 1).low < mean_interval(before, 1).high


def test_ratio_of_equals_is_one_without_doubt() -> None:
    values = np.random.default_rng(4).uniform(0, 1, 100)
    found = ratio_interval(values / 2, values, 1)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert Interval(0.5, 0.4, 0.6).to_json() == {"estimate": 0.5, "low": 0.4, "high": 0.6}


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        (np.ones((2, 2)), np.ones(2), r"values \(shape \(2, 2\)\)"),
        (np.ones(0), np.ones(0), "at least one query"),
        (np.array([1.0, np.nan]), np.ones(2), "values of query 1 .nan. must be finite"),
        (np.ones(2), np.zeros(2), r"reference \(2 queries, mean 0\) must have a mean above 0"),
        (np.ones(3), np.ones(2), r"values \(3\) must be as many as the reference \(2\)"),
    ],
)
def test_what_has_no_interval_is_named(values: np.ndarray, reference: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_interval(values, reference, 0)
