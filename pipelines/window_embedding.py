"""Make the vectors of an upgrade: within the daily window, and while no other run of the index is under way."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from penstock.cluster.layout import EMBEDDINGS
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.pipelines.loading import Origin
from penstock.pipelines.planning import FragmentFacts, Plan, Resolved, embedded_of, finished_fragments
from penstock.pipelines.progress import Reporter
from penstock.pipelines.running import Part, embed_part
from penstock.pipelines.upgrade_record import note
from penstock.pipelines.waiting import when_free
from penstock.pipelines.window import DailyWindow

WINDOW_PAUSE_S = 3600.0  # at most: the clock may be set meanwhile


@dataclass(frozen=True)
class WindowEmbedding:
    """Embeds fragments of passages for an upgrade.

    Attributes:
        folder: where the upgrade is recorded.
        window: when to embed, as in 01:00-06:00, in local time; None: at any time.
        now: tells local time; pause: sleeps, for so many seconds.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    folder: str
    window: str | None
    now: Callable[[], datetime] = datetime.now
    pause: Callable[[float], None] = time.sleep

    def embed(self, new: Resolved, fragments: Sequence[FragmentFacts], slices: Sequence[FragmentFacts] = ()) -> int:
        """The vectors that are missing; how many passages were encoded.

        Args:
            fragments: of passages, slices among them. slices: those that a part of the corpus may consist of.
        """
        encoded, warned = 0, False
        todo = self._missing(new, fragments)
        while todo:
            part = Part(frozenset(todo), self.folder, tuple(slices))
            call = partial(self._embed_while_open, new, part)
            encoded += when_free(self.store, new.pipeline.name, self.reporter, call, self.pause)
            left = self._missing(new, fragments)
            if len(left) == len(todo) and not warned:
                self.reporter.warn(
                    f"upgrade.window ({self.window}) must be open for longer than encoders take to start: it closed "
                    f"before any of {len(todo)} fragments was embedded; widen it"
                )
                warned = True
            todo = left
        return encoded

    def _embed_while_open(self, new: Resolved, part: Part) -> int:
        """What is missing of a part, until the window closes. The window is looked at again after each wait for a
        lease: whichever of the two opens last, it is when both are that work begins."""
        window = None if self.window is None else DailyWindow.parse(self.window)
        self._wait(window)
        note(self.store, self.folder, {})
        closes_at = math.inf if window is None else time.time() + window.seconds_until_closed(self.now())
        plan = part_plan(new)
        return embed_part(plan, self.origin, self.store, self.session, self.reporter, part, closes_at).encoded

    def _wait(self, window: DailyWindow | None) -> None:
        while window is not None and (pause_s := window.seconds_until_open(self.now())):
            self.reporter.note(f"waiting for the window {self.window}: {pause_s / 3600:.1f} hours")
            self.pause(min(pause_s, WINDOW_PAUSE_S))

    def _missing(self, new: Resolved, fragments: Sequence[FragmentFacts]) -> list[str]:
        embedded = embedded_of(new, fragments)
        done = finished_fragments(self.store, EMBEDDINGS, embedded.embeddings_fingerprint)
        return [passages for passages, made in embedded.embeddings.items() if made not in done]


def part_plan(new: Resolved) -> Plan:
    """The plan of a run over a part of the corpus, which moves no alias."""
    return Plan(new, (), None, published=False, alias_moves=False, alias_head=0)
