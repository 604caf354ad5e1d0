"""Moments: any cut and any order of merging is one pass."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.moments import BLOCK_ROWS, Moments, moments_of
from penstock.operators.tensors import pack

DIMENSION = 12
GENERATOR = np.random.default_rng(3)
MIX = GENERATOR.standard_normal((DIMENSION, DIMENSION))
ROWS = GENERATOR.standard_normal((500, DIMENSION)) @ MIX + 3 * GENERATOR.standard_normal(DIMENSION)
WEIGHTS = GENERATOR.uniform(0, 5, len(ROWS))
PILOT = ROWS[:20].mean(axis=0)


def assert_same(one: Moments, other: Moments, tolerance: float = 1e-9) -> None:
    assert (one.rows, one.dimension) == (other.rows, other.dimension)
    assert one.weight == pytest.approx(other.weight, rel=tolerance)
    for name in ("pilot", "first", "second"):
        found, expected = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(ROWS)), max_size=8), st.randoms(use_true_random=False), st.booleans())
def test_any_cut_merged_in_any_order_is_one_pass(cuts: list[int], random: Random, weighted: bool) -> None:
    edges = [0, *sorted(cuts), len(ROWS)]
    parts = [
        moments_of(ROWS[first:last], PILOT, WEIGHTS[first:last] if weighted else None)
        for first, last in zip(edges, edges[1:], strict=False)
    ]
    random.shuffle(parts)
    total = Moments.nothing(PILOT)
    for part in parts:
        total = total.merged(part)
    assert_same(total, moments_of(ROWS, PILOT, WEIGHTS if weighted else None))


def test_blocks_are_one_pass() -> None:
    many = np.tile(ROWS, (BLOCK_ROWS // len(ROWS) + 2, 1))
    moments = moments_of(many, PILOT)
    assert len(many) > BLOCK_ROWS
    np.testing.assert_allclose(moments.covariance(), np.cov(ROWS.T, bias=True), rtol=1e-9, atol=1e-9)


def test_mean_covariance_and_second_moment_are_numpys() -> None:
    moments = moments_of(ROWS.astype(np.float32), PILOT)
    rows = ROWS.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(moments.mean(), rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(moments.second_moment(), rows.T @ rows / len(rows), rtol=1e-9, atol=1e-10)
    assert np.linalg.eigvalsh(moments.second).min() > 0
    np.testing.assert_array_equal(moments.second, moments.second.T)


def test_whole_weights_are_repetitions() -> None:
    counts = GENERATOR.integers(0, 4, len(ROWS))
    weighed, repeated = moments_of(ROWS, PILOT, counts), moments_of(np.repeat(ROWS, counts, axis=0), PILOT)
    assert (weighed.rows, repeated.rows) == (len(ROWS), counts.sum())
    np.testing.assert_allclose(weighed.mean(), repeated.mean(), rtol=1e-12)
    np.testing.assert_allclose(weighed.covariance(), repeated.covariance(), rtol=1e-9, atol=1e-10)


def test_a_pilot_keeps_the_covariance_of_rows_far_from_the_origin() -> None:
    far = np.random.default_rng(5).standard_normal((400, 3)) + 1e8
    exact = np.cov((far - 1e8).T, bias=True)  # the subtraction is exact to 1e-8
    near_pilot, at_origin = moments_of(far, far[:5].mean(axis=0)), moments_of(far, np.zeros(3))
    np.testing.assert_allclose(near_pilot.covariance(), exact, atol=1e-6)
    assert np.abs(at_origin.covariance() - exact).max() > 0.1


def test_rows_side_by_side_give_cross_moments() -> None:
    moments = moments_of(ROWS, PILOT)
    left, right = ROWS[:, :4], ROWS[:, 4:]
    cross = left.T @ right / len(ROWS) - np.outer(left.mean(axis=0), right.mean(axis=0))
    np.testing.assert_allclose(moments.covariance()[:4, 4:], cross, rtol=1e-9, atol=1e-9)


def test_mapped_moments_are_those_of_mapped_rows() -> None:
    matrix, shift = GENERATOR.standard_normal((5, DIMENSION)), GENERATOR.standard_normal(5)
    mapped = moments_of(ROWS, PILOT, WEIGHTS).mapped(matrix, shift)
    assert_same(mapped, moments_of(ROWS @ matrix.T + shift, matrix @ PILOT + shift, WEIGHTS))


def test_bytes_hold_all_of_it_and_depend_on_it_alone() -> None:
    moments = moments_of(ROWS, PILOT, WEIGHTS)
    data = moments.to_bytes()
    again = Moments.from_bytes(data)
    assert_same(again, moments, tolerance=0)
    assert again.to_bytes() == data == moments_of(ROWS, PILOT, WEIGHTS).to_bytes()
    assert_same(again.merged(moments), moments.merged(moments), tolerance=0)


def test_errors_name_the_value_and_the_rule() -> None:
    moments = moments_of(ROWS, PILOT)
    with pytest.raises(ValueError, match=r"moments to merge \(of 500 and 0 rows\) must have one pilot"):
        moments.merged(Moments.nothing(PILOT + 1))
    with pytest.raises(ValueError, match=r"moments \(0 rows of weight 0.0\) must be of at least one row"):
        Moments.nothing(PILOT).mean()
    with pytest.raises(ValueError, match=r"vectors \(shape \(3, 2\)\) must be rows of the pilot's 12 dimensions"):
        moments_of(np.zeros((3, 2)), PILOT)
    with pytest.raises(ValueError, match=r"weights \(shape \(4,\)\) must be one for each of 500 vectors"):
        moments_of(ROWS, PILOT, np.ones(4))
    with pytest.raises(ValueError, match=r"weight 2 \(-1.0\) must be finite and not negative"):
        moments_of(ROWS[:3], PILOT, np.array([1.0, 0.0, -1.0]))
    with pytest.raises(ValueError, match=r"vector 1 must be finite"):
        moments_of(np.array([[0.0] * DIMENSION, [np.nan] * DIMENSION]), PILOT)
    with pytest.raises(ValueError, match=r"first of moments \(shape \(3,\), float64\) must be finite float64 of shape"):
        Moments(PILOT, 1, 1.0, np.zeros(3), np.zeros((DIMENSION, DIMENSION)))


def test_damaged_and_foreign_bytes_are_refused() -> None:
    data = moments_of(ROWS, PILOT).to_bytes()
    with pytest.raises(
        ValueError, match=r"moments \(100 bytes\) must be a safetensors file, got .*; compare its sha256"
    ):
        Moments.from_bytes(data[:100])
    with pytest.raises(ValueError, match=r"must be of kind moments, version 1, got kind transforms, version 1"):
        Moments.from_bytes(pack("transforms", {}, {}))
