"""What the embeddings stage shows while it runs, and what it says of itself at the end."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from penstock.cluster.fragments import Work
from penstock.cluster.jobs.embeddings import Live
from penstock.pipelines.progress import Advance


class EmbeddingMeter:
    """Turns finished fragments, and what the encoders say in between, into progress, rates and time left.

    Passages count as done when their batch is; a fragment's known vectors when it is written. Rates are of the time
    since the first encoder was ready, over the encoded rows; idle is the share of that time that encoders did not
    compute.
    """

    def __init__(self, rows: int, workers: int, advance: Advance) -> None:
        self._rows, self._workers, self._advance = rows, workers, advance
        self._lock = threading.Lock()
        self._finished: dict[str, int] = {}
        self._shown = 0
        self._started_at_s = self._finished_at_s = time.time()
        self._ready_at: float | None = None
        self._live = Live()

    def starting(self) -> None:
        """Say that workers load the model."""
        self._advance(0, f"starting {self._workers} worker{'s' if self._workers > 1 else ''}")

    def live(self, live: Live) -> None:
        """New figures of the encoders; called from a thread of its own."""
        with self._lock:
            if live.workers and self._ready_at is None:
                self._ready_at = time.monotonic()
            self._live = live
            if live.tokens:
                self._show()

    def finished(self, work: Work) -> None:
        """A fragment is written."""
        with self._lock:
            self._finished[work.receipt.fragment] = work.receipt.rows_in
            self._finished_at_s = time.time()
            self._show()

    def _show(self) -> None:
        in_flight = sum(rows for name, rows in self._live.rows.items() if name not in self._finished)
        done = min(sum(self._finished.values()) + in_flight, self._rows)
        figures = self.figures()
        self._advance(max(done - self._shown, 0), _words(figures), figures)
        self._shown = max(done, self._shown)

    def figures(self) -> dict[str, float]:
        """Rates since the encoders were ready, in the units of their names; shares are of 1."""
        live = self._live
        if self._ready_at is None or not live.tokens:
            return {}
        seconds = max(time.monotonic() - self._ready_at, 1e-3)
        encoded = sum(live.rows.values())
        if not encoded:
            return {}
        rate = encoded / seconds
        capacity = seconds * max(live.workers, 1)
        figures = {
            "passages_per_s": round(rate, 1),
            "tokens_per_s": round(live.tokens / seconds, 1),
            "padding_share": round(1 - live.tokens / max(live.padded_tokens, 1), 4),
            "idle_share": round(max(0.0, 1 - live.busy_s / capacity), 4),
            "seconds_left": round(max(self._rows - self._shown, 0) / rate, 1),
        }
        if live.peak_flops:
            figures["tflops"] = round(live.flops / seconds / 1e12, 2)
            peak = live.peak_flops / live.workers
            figures["matrix_peak_share"] = round(live.flops / max(live.busy_s, 1e-9) / peak, 4)
        return figures

    def summary(self, works: Sequence[Work]) -> dict[str, Any]:
        """What the run's report says of the encoders: `start_s` is the time until the first was ready, `rates` are
        over the time from then until the last fragment was written."""
        tokens = sum(work.encoded_tokens for work in works)
        padded = sum(work.padded_tokens for work in works)
        worker: dict[str, Any] = next((json.loads(work.worker) for work in works if work.worker), {})
        return {
            "workers": self._workers,
            "tokens": tokens,
            "padding_share": round(1 - tokens / padded, 4) if padded else 0.0,
            "restarts": sum(work.restarts for work in works),
            "budget_halvings": sum(work.budget_halvings for work in works),
            "worker": worker,
            "start_s": round(self._first_ready_s(works) - self._started_at_s, 2),
            "rates": self._final_rates(works),
        }

    def _final_rates(self, works: Sequence[Work]) -> dict[str, float]:
        seconds = max(self._finished_at_s - self._first_ready_s(works), 1e-3)
        busy_s, flops = sum(work.busy_s for work in works), sum(work.flops for work in works)
        rates = {
            "seconds": round(seconds, 2),
            "passages_per_s": round(sum(work.encoded for work in works) / seconds, 1),
            "tokens_per_s": round(sum(work.encoded_tokens for work in works) / seconds, 1),
            "idle_share": round(max(0.0, 1 - busy_s / (seconds * self._workers)), 4),
        }
        return rates | ({"tflops": round(flops / seconds / 1e12, 2)} if self._live.peak_flops else {})

    def _first_ready_s(self, works: Sequence[Work]) -> float:
        """When the first encoder was ready, by its own clock; within the stage, whatever that clock says."""
        told = [json.loads(work.worker)["ready_at_s"] for work in works if work.worker]
        return min(max(min(told, default=self._started_at_s), self._started_at_s), self._finished_at_s)

    @staticmethod
    def warnings(works: Sequence[Work]) -> list[str]:
        """What went wrong and was mended."""
        restarts = sum(work.restarts for work in works)
        halvings = sum(work.budget_halvings for work in works)
        found = []
        if restarts:
            found.append(f"an encoder's process ended {restarts} times and was started again")
        if halvings:
            found.append(f"memory ran out {halvings} times; batches were halved, and the smaller size is remembered")
        if any(work.worker and not json.loads(work.worker)["takes_token_ids"] for work in works):
            found.append("this model prepares its texts in a way of its own: encoders tokenise, not tasks ahead")
        return found


def _words(figures: dict[str, float]) -> str:
    if not figures:
        return ""
    left = figures["seconds_left"]
    words = [
        f"{figures['passages_per_s']:,.0f} passages/s",
        f"{figures['tokens_per_s']:,.0f} tokens/s",
        f"padding {figures['padding_share']:.0%}",
        f"idle {figures['idle_share']:.0%}",
    ]
    if "tflops" in figures:
        words.append(f"{figures['tflops']:.0f} TFLOP/s ({figures['matrix_peak_share']:.0%} of peak)")
    words.append(f"{left / 60:,.0f} min left" if left >= 90 else f"{left:,.0f} s left")
    return ", ".join(words)
