"""Figures of spaces with known spectra, neighbours and lengths, against their definitions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from penstock.operators.indexing import Metric
from penstock.operators.moments import Moments, moments_of
from penstock.operators.searching import normalize
from penstock.operators.space_health import (
    SpaceHealth,
    alarms,
    drift,
    k_occurrences,
    mean_cosine,
    nearest_others,
    space_health,
)

COSINE, INNER = Metric.COSINE, Metric.INNER_PRODUCT


def _gaussian(seed: int, rows: int, spread: np.ndarray, shift: float = 0.0) -> np.ndarray:
    rows_drawn = np.random.default_rng(seed).standard_normal((rows, len(spread))) * spread + shift
    return rows_drawn.astype(np.float32)


def _health(vectors: np.ndarray, metric: Metric = INNER) -> SpaceHealth:
    return space_health(_moments(vectors), vectors[:600], metric)


def _moments(vectors: np.ndarray) -> Moments:
    return moments_of(vectors, np.zeros(vectors.shape[1]))


def test_a_sphere_uses_all_directions_and_a_line_one() -> None:
    axes = np.tile(np.concatenate([np.eye(12), -np.eye(12)]), (40, 1))
    round_space = _health(axes.astype(np.float32))
    assert round_space.effective_rank == pytest.approx(12, rel=1e-4)
    assert round_space.centred_rank == pytest.approx(12, rel=1e-4)
    assert round_space.isotropy == pytest.approx(1, abs=1e-9)
    line = _gaussian(1, 900, np.r_[1.0, np.zeros(11)]) + 1e-4
    assert _health(line).effective_rank < 1.01
    assert _health(line).isotropy == pytest.approx(0, abs=1e-3)


def test_ranks_and_isotropy_follow_their_definitions() -> None:
    vectors = _gaussian(2, 1_000, 0.7 ** np.arange(8), shift=0.5).astype(np.float64)
    health = _health(vectors)
    for figure, rows in (("effective_rank", vectors), ("centred_rank", vectors - vectors.mean(axis=0))):
        singular = np.linalg.svd(rows, compute_uv=False)
        shares = singular / singular.sum() + 1e-7
        assert getattr(health, figure) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert health.isotropy == pytest.approx(_iso_score_of_the_paper(vectors), abs=1e-9)


def _iso_score_of_the_paper(vectors: np.ndarray) -> float:
    """Algorithm 1 of Rudman et al., step by step."""
    count = vectors.shape[1]
    _, axes = np.linalg.eigh(np.cov(vectors.T))
    variances = np.var((vectors - vectors.mean(axis=0)) @ axes, axis=0)
    normalized = np.sqrt(count) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalized - np.ones(count)) / np.sqrt(2 * (count - np.sqrt(count)))
    fraction = (count - defect**2 * (count - np.sqrt(count))) ** 2 / count**2
    return float((count * fraction - 1) / (count - 1))


def test_cosines_and_lengths_are_those_of_all_pairs() -> None:
    vectors = _gaussian(3, 300, np.ones(6), shift=0.4)
    cosines = normalize(vectors).astype(np.float64) @ normalize(vectors).T
    expected = cosines[~np.eye(300, dtype=bool)].mean()
    assert mean_cosine(vectors) == pytest.approx(expected, abs=1e-6)
    health = _health(vectors)
    lengths = np.linalg.norm(vectors, axis=1)
    assert health.mean_norm == pytest.approx(lengths.mean(), rel=1e-6)
    assert health.norm_spread == pytest.approx(lengths.std() / lengths.mean(), rel=1e-5)
    assert _health(normalize(vectors), COSINE).norm_spread == pytest.approx(0, abs=1e-6)


def test_neighbours_are_the_others_also_among_equal_rows() -> None:
    vectors = normalize(_gaussian(4, 200, np.ones(5)))
    vectors[:30] = vectors[0]
    found = nearest_others(vectors, 7, COSINE)
    assert found.shape == (200, 7)
    assert (found != np.arange(200)[:, None]).all()
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -np.inf)
    expected = np.sort(similarities, axis=1)[:, ::-1][:, :7]
    np.testing.assert_allclose(np.take_along_axis(similarities, found, axis=1), expected, atol=1e-6)
    assert all(len(set(row)) == 7 for row in found.tolist())


def test_hubs_are_counted() -> None:
    """Rows on a circle are nearest to those at either side; none is a hub, and none is left out."""
    angles = 2 * np.pi * np.arange(400) / 400
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    health = space_health(_moments(circle), circle, COSINE, k=2)
    np.testing.assert_array_equal(k_occurrences(circle, 2, COSINE), 2)
    assert (health.hubness, health.antihub_share, health.hub_share, health.hub_occupancy) == (0, 0, 0, 0)
    star = np.concatenate([3 * np.ones((2, 50)), np.eye(50)]).astype(np.float32)  # by product, all ask for the first 2
    counts = k_occurrences(star, 1, INNER)
    assert counts[:2].sum() == 52 and counts[2:].sum() == 0
    crowded = space_health(_moments(star), star, INNER, k=1)
    assert crowded.antihub_share == 50 / 52
    assert crowded.hub_occupancy >= 51 / 52
    assert crowded.hubness == pytest.approx(_skewness(counts))


def _skewness(counts: np.ndarray) -> float:
    import scipy.stats

    return float(scipy.stats.skew(counts))


def test_many_dimensions_and_a_shifted_mean_make_hubs() -> None:
    """By product, rows far along the mean are near to all; centring ends it (Suzuki et al. 2013)."""
    shifted = _gaussian(5, 800, np.ones(60), shift=0.6)
    centred = shifted - shifted.mean(axis=0)
    assert _health(shifted).hubness > _health(centred).hubness + 1
    assert _health(shifted).antihub_share > _health(centred).antihub_share


def test_drift_alarms_when_a_figure_leaves_its_bounds() -> None:
    before = _health(normalize(_gaussian(6, 900, np.ones(16))), COSINE)
    assert alarms(drift(before, before)) == []
    narrower = _health(normalize(_gaussian(6, 900, np.ones(16), shift=0.5)), COSINE)
    broken = {rule.figure: rule for rule in alarms(drift(before, narrower))}
    assert broken["mean_cosine"].change == pytest.approx(narrower.mean_cosine - before.mean_cosine)
    flat = replace(before, effective_rank=0.89 * before.effective_rank, antihub_share=before.antihub_share + 0.051)
    assert [rule.figure for rule in alarms(drift(before, flat))] == ["effective_rank", "antihub_share"]
    assert alarms(drift(flat, before)) == []
    assert json.loads(json.dumps(drift(before, flat)[0].to_json()))["alarm"] is True
    assert json.loads(json.dumps(before.to_json()))["dimension"] == 16


def test_what_cannot_be_measured_or_compared_is_named() -> None:
    vectors = _gaussian(7, 100, np.ones(4))
    moments = _moments(vectors)
    with pytest.raises(ValueError, match=r"sample \(shape \(10, 4\)\) must be more than 10 rows of the moments' 4"):
        space_health(moments, vectors[:10], COSINE)
    with pytest.raises(ValueError, match=r"row 3 of the sample \(length 0\)"):
        space_health(moments, vectors * (np.arange(100) != 3)[:, None], COSINE)
    with pytest.raises(ValueError, match=r"vectors \(3\) must be more than the 3 neighbours"):
        nearest_others(vectors[:3], 3, COSINE)
    health = _health(vectors)
    with pytest.raises(ValueError, match=r"spaces to compare \(4 dimensions, 100 sampled rows, and 4, 80\)"):
        drift(health, replace(health, sample_rows=80))
