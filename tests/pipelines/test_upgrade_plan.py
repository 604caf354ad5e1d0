from datetime import datetime, timedelta

import pytest

from penstock.pipelines.config import Prices
from penstock.pipelines.planning import FragmentFacts
from penstock.pipelines.upgrade_plan import Overlap, Pace, finish, forecast
from penstock.pipelines.window import DailyWindow

NOON = datetime(2026, 11, 21, 12)


def fact(name: str, kept: int, tokens: int) -> FragmentFacts:
    return FragmentFacts(name, kept, kept, {}, kept, tokens, 0, 0, 0)


def test_what_is_left_costs_what_was_measured() -> None:
    facts = [fact("a", 100, 36_000), fact("b", 50, 18_000), fact("c", 50, 18_000), fact("empty", 0, 0)]
    found = forecast(
        facts,
        facts[:1],
        Pace(10.0, 2),
        Overlap(3 * 10**9, 10**9),
        Prices(worker_hour=4.0, gb_month=73.0),
        None,
        NOON,
    )
    assert (found.rows, found.rows_to_embed, found.tokens_to_embed) == (200, 100, 36_000)
    assert (found.worker_hours, found.hours, found.cost) == (1.0, 0.5, 4.0)
    assert found.finishes == "2026-11-21T12:30"
    assert (found.overlap_bytes, found.overlap_cost) == (4 * 10**9, pytest.approx(4 * 73 * 0.5 / 730))


def test_a_finished_slice_is_not_left_to_do() -> None:
    facts = [fact("a", 100, 36_000), fact("b", 50, 18_000)]
    found = forecast(facts, [fact("b-slice", 10, 3_000)], Pace(10.0, 2), Overlap(0, 0), Prices(), None, NOON)
    assert (found.rows, found.rows_to_embed, found.tokens_to_embed) == (150, 140, 51_000)


def test_nothing_left_takes_no_time() -> None:
    found = forecast([fact("a", 5, 99)], [fact("a", 5, 99)], Pace(10.0, 2), Overlap(0, 0), Prices(), None, NOON)
    assert (found.worker_hours, found.finishes) == (0.0, "2026-11-21T12:00")


def test_without_a_pace_what_depends_on_it_is_not_said() -> None:
    found = forecast([fact("a", 5, 99)], [], Pace(None, 2), Overlap(10, 5), Prices(), None, NOON)
    assert (found.rows_to_embed, found.tokens_to_embed, found.overlap_bytes) == (5, 99, 15)
    assert (found.worker_hours, found.finishes, found.cost) == (None, None, None)


def test_parts_are_stored_besides_the_whole() -> None:
    assert Overlap.of(100, 8, 20.0, steps=1) == Overlap(800, 2_000)
    assert Overlap.of(100, 8, 20.0, steps=3) == Overlap(800, 4_000)  # a third, two thirds, all


@pytest.mark.parametrize(
    ("hours", "window", "end"),
    [
        (3, None, "21 15:00"),
        (3, "01:00-06:00", "22 04:00"),
        (7, "01:00-06:00", "23 03:00"),
        (5, "01:00-06:00", "22 06:00"),
        (3, "11:00-13:00", "22 13:00"),
        (30, "09:00-09:00", "22 18:00"),
    ],
)
def test_work_ends_within_windows(hours: int, window: str | None, end: str) -> None:
    parsed = None if window is None else DailyWindow.parse(window)
    assert f"{finish(NOON, timedelta(hours=hours), parsed):%d %H:%M}" == end
