"""What an upgrade will take: rows and tokens to embed, worker-hours, money, when it ends, and storage meanwhile."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from penstock.pipelines.config import Prices
from penstock.pipelines.planning import FragmentFacts
from penstock.pipelines.window import DailyWindow

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True)
class Pace:
    """How fast one encoder worker was, measured on a sample of the corpus, and how many there are."""

    tokens_per_s: float | None
    workers: int


@dataclass(frozen=True)
class Overlap:
    """Bytes that are there beside the old version until clean-up: vectors, and versions over all or parts of them."""

    vectors: int
    versions: int

    @classmethod
    def of(cls, rows: int, vector_bytes: int, version_bytes_per_row: float, steps: int) -> "Overlap":
        """For a corpus of so many rows, whose parts (one more at each step) are versions of their own."""
        whole = rows * version_bytes_per_row
        return cls(rows * vector_bytes, round(whole * (1 + (steps - 1) / 2)))


@dataclass(frozen=True)
class Forecast:
    """What is left to do, and what it takes. Times are those of embedding; cutting and building are not in them. None
    is what a pace is needed for that was not measured, as all vectors of the sample were known."""

    rows: int
    rows_to_embed: int
    tokens_to_embed: int
    tokens_per_s_per_worker: float | None
    workers: int
    worker_hours: float | None
    hours: float | None
    finishes: str | None
    cost: float | None
    overlap_bytes: int
    overlap_cost: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    facts: Sequence[FragmentFacts],
    done: Sequence[FragmentFacts],
    pace: Pace,
    overlap: Overlap,
    prices: Prices,
    window: DailyWindow | None,
    now: datetime,
) -> Forecast:
    """The forecast for the fragments of a corpus.

    Args:
        done: those whose vectors are there, and slices of others whose vectors are: each passage once.
        overlap: for the whole corpus.
        now: local time.
    """
    rows, embedded = (sum(fact.kept for fact in some) for some in (facts, done))
    tokens = sum(fact.tokens for fact in facts if fact.kept) - sum(fact.tokens for fact in done)
    stored = overlap.vectors + overlap.versions
    known = Forecast(
        rows=rows,
        rows_to_embed=rows - embedded,
        tokens_to_embed=tokens,
        tokens_per_s_per_worker=pace.tokens_per_s,
        workers=pace.workers,
        worker_hours=None,
        hours=None,
        finishes=None,
        cost=None,
        overlap_bytes=stored,
        overlap_cost=None,
    )
    if tokens and not pace.tokens_per_s:
        return known
    worker_hours = tokens / pace.tokens_per_s / 3600 if pace.tokens_per_s else 0.0
    end = finish(now, timedelta(hours=worker_hours / pace.workers), window)
    hours = (end - now).total_seconds() / 3600
    return replace(
        known,
        worker_hours=round(worker_hours, 3),
        hours=round(hours, 3),
        finishes=end.isoformat(timespec="minutes"),
        cost=round(worker_hours * prices.worker_hour, 2),
        overlap_cost=round(stored / 1e9 * prices.gb_month * hours / HOURS_PER_MONTH, 2),
    )


def finish(now: datetime, busy: timedelta, window: DailyWindow | None) -> datetime:
    """When work of some length ends that runs only while the window is open."""
    if window is None:
        return now + busy
    while True:
        now += timedelta(seconds=window.seconds_until_open(now))
        left = timedelta(seconds=window.seconds_until_closed(now))
        if busy <= left:
            return now + busy
        busy, now = busy - left, now + left
