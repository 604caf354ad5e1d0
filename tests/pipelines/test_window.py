from datetime import datetime

import pytest

from penstock.pipelines.window import DailyWindow

DAY = datetime(2026, 11, 21)


def at(clock: str) -> datetime:
    hours, minutes = map(int, clock.split(":"))
    return DAY.replace(hour=hours, minute=minutes)


@pytest.mark.parametrize(
    ("window", "clock", "wait_s"),
    [
        ("01:00-06:00", "01:00", 0),
        ("01:00-06:00", "05:59", 0),
        ("01:00-06:00", "06:00", 19 * 3600),
        ("01:00-06:00", "00:30", 1800),
        ("22:00-06:00", "23:00", 0),
        ("22:00-06:00", "05:00", 0),
        ("22:00-06:00", "06:00", 16 * 3600),
        ("04:00-04:00", "03:00", 0),
    ],
)
def test_a_window_says_how_long_to_wait(window: str, clock: str, wait_s: float) -> None:
    found = DailyWindow.parse(window)
    assert found.seconds_until_open(at(clock)) == wait_s
    assert found.is_open(at(clock)) == (wait_s == 0)


@pytest.mark.parametrize("text", ["1-2-3", "25:00-26:00", "morning", "01:00"])
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"window \(.+\) must be written HH:MM-HH:MM, as in 01:00-06:00"):
        DailyWindow.parse(text)
