"""A daily window of time, as in 01:00-06:00: when work may run that others must not feel."""

from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Self


@dataclass(frozen=True)
class DailyWindow:
    """From `start` until just before `end`, every day in local time; over midnight where the end is not after the
    start, and all day where both are the same."""

    start: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Self:
        """A window written as HH:MM-HH:MM.

        Raises:
            ValueError: it is written otherwise.
        """
        try:
            start, end = (datetime.strptime(part, "%H:%M").time() for part in text.split("-"))
        except ValueError as error:
            raise ValueError(f"window ({text}) must be written HH:MM-HH:MM, as in 01:00-06:00") from error
        return cls(start, end)

    def is_open(self, now: datetime) -> bool:
        """Whether work may run now."""
        clock = now.time()
        if self.start < self.end:
            return self.start <= clock < self.end
        return clock >= self.start or clock < self.end

    def seconds_until_open(self, now: datetime) -> float:
        """0 while it is open; else how long until it opens next."""
        if self.is_open(now):
            return 0.0
        return _seconds_until(self.start, now)

    def seconds_until_closed(self, now: datetime) -> float:
        """How long it stays open from now on; 0 while it is closed, a day at most."""
        return _seconds_until(self.end, now) if self.is_open(now) else 0.0


def _seconds_until(clock: time, now: datetime) -> float:
    """To the next time that clocks show this, which is not now."""
    then = datetime.combine(now.date(), clock, now.tzinfo)
    return ((then if then > now else then + timedelta(days=1)) - now).total_seconds()
