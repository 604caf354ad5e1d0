"""The order of slices and fragments, and which fragments hold a part of it."""

import json
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import poisson

from penstock.cluster.jobs.canary_sample import SampleFragment
from penstock.cluster.jobs.priorities import UnitPriority
from penstock.operators.backfill_order import of_hubs
from penstock.pipelines.backfill_units import BackfillUnit, OrderedBy, embedded_first, fragments_of, in_order
from penstock.pipelines.planning import FragmentFacts
from penstock.pipelines.wanted import HUB_CHANCE, HUB_QUERIES, hub_occurrences

ROWS = {"a": 10, "b": 10, "c": 10, "d": 10}
SLICES = {"a": 2, "b": 3}


def facts(name: str, rows: int) -> FragmentFacts:
    return FragmentFacts(name, rows, rows, {}, rows, rows, 0, 0, 0)


def units() -> list[BackfillUnit]:
    """Fragments a and b with slices; c has hubs, d a residual."""
    found = []
    for name, rows in ROWS.items():
        if name in SLICES:
            slice_ = SampleFragment(f"{name}-slice", SLICES[name], 1, 9)
            found.append(UnitPriority(name, SLICES[name], 6.0, 0.0, None, slice_))
        rest = rows - SLICES.get(name, 0)
        found.append(UnitPriority(name, rest, 0.0, 40.0 if name == "c" else 0.0, 0.5 if name == "d" else None))
    return in_order(found, {name: facts(name, rows) for name, rows in ROWS.items()})


def test_traffic_then_hubs_then_residuals_then_the_rest() -> None:
    shown = [one.shown() for one in units()]
    assert [(one["fragment"], one["slice"], one["rows"], one["by"]) for one in shown] == [
        ("a", "a-slice", 2, OrderedBy.TRAFFIC),
        ("b", "b-slice", 3, OrderedBy.TRAFFIC),
        ("c", None, 10, OrderedBy.HUBS),
        ("d", None, 10, OrderedBy.RESIDUAL),
        ("a", None, 8, OrderedBy.REST),
        ("b", None, 7, OrderedBy.REST),
    ]
    assert [one["traffic"] for one in shown[:3]] == [3.0, 2.0, 0.0] and shown[2]["occurrences"] == 4.0


def test_units_are_the_same_from_their_record() -> None:
    assert [BackfillUnit.from_json(json.loads(json.dumps(one.to_json()))) for one in units()] == units()


def test_any_first_units_hold_each_passage_once() -> None:
    kept = {one.facts.passages: one.facts.kept for one in units()}
    names = list(kept)
    for count in range(len(names) + 1):
        for done in combinations(names, count):
            ordered = embedded_first(units(), frozenset(done))
            assert {one.facts.passages for one in ordered[:count]} >= set(done)
            for size in range(len(ordered) + 1):
                taken = fragments_of(ordered[:size])
                assert not {f"{name}-slice" for name in taken} & set(taken)
                assert sum(kept[name] for name in taken) == sum(one.rows for one in ordered[:size])
    assert sorted(fragments_of(units())) == sorted(ROWS)


def test_occurrences_in_a_sample_count_for_all_rows_by_their_lower_bound() -> None:
    found = {"once": 1.0, "often": 7.0}
    assert hub_occurrences(found, HUB_QUERIES) == found and hub_occurrences({}, 40_000) == {}
    bounds = hub_occurrences(found, 40 * HUB_QUERIES)
    for name, count in found.items():
        assert poisson.sf(count - 1, bounds[name] / 40) == pytest.approx(HUB_CHANCE)


@pytest.mark.parametrize(("rows", "told"), [(1_500, 0.99), (10_000, 0.99), (40_000, 0.6), (400_000, 0.01)])
def test_chance_alone_makes_no_hubs_and_hubs_are_found(rows: int, told: float) -> None:
    """Each row among the ten nearest of ten others on average, as rows without hubs are, and one in 40 of 200."""
    generator, sampled = np.random.default_rng(rows), HUB_QUERIES / rows
    truth = np.where(np.arange(4_000) % 40 == 0, 200.0, 10.0)
    counts = generator.poisson(truth * sampled)
    found = {str(row): float(count) for row, count in enumerate(counts) if count}
    bounds = hub_occurrences(found, rows)
    least = np.array([bounds.get(str(row), 0.0) for row in range(len(truth))])
    hubs = of_hubs(least, np.ones(len(truth))) > 0
    assert hubs[truth == 10].mean() <= HUB_CHANCE
    assert hubs[truth == 200].mean() > told
