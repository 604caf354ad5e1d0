"""A pipeline as an object: what the command line calls."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from penstock.cluster.session import Session
from penstock.cluster.storage import Store, open_store
from penstock.pipelines.config import Level, PipelineFile
from penstock.pipelines.loading import Origin, PipelineFileInvalid, load_pipeline, parse_pipeline
from penstock.pipelines.planning import Plan, alias_head, make_plan, resolve
from penstock.pipelines.progress import Reporter, SilentReporter
from penstock.pipelines.running import Report, curve_of_duplicates, execute, tune


@dataclass(frozen=True)
class Pipeline:
    """A validated pipeline file, and where it was written."""

    config: PipelineFile
    origin: Origin

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Pipeline":
        """Read and validate a pipeline file; `overrides` are `key.key=value`.

        Raises:
            PipelineFileInvalid: with all problems at once.
        """
        return cls(*load_pipeline(path, overrides))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = ()) -> "Pipeline":
        """As `load`, from the YAML text itself."""
        return cls(*parse_pipeline(text, overrides=overrides))

    @property
    def store(self) -> Store:
        return open_store(self.config.root)

    def plan(self) -> Plan:
        """What a run would do now; starts nothing."""
        store = self.store
        head = alias_head(self.config, store)
        return make_plan(resolve(self.config, self.origin), store, head)

    def run(self, reporter: Reporter | None = None, plan: Plan | None = None) -> Report | None:
        """Do it; None when there is nothing to do.

        Raises:
            PipelineFileInvalid, LeaseHeld, PublishConflict and the other exceptions with a message for people.
            KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; run again to go on.
        """
        plan = plan or self.plan()
        if plan.up_to_date:
            return None
        with _stop_on_sigterm(), Session() as session:
            return execute(plan, self.origin, self.store, session, reporter or SilentReporter())

    def tune(self, reporter: Reporter | None = None, exhaustive: bool = False) -> dict[str, Any]:
        """Measure index configurations on this corpus, embedding first what is not embedded; the record of it all.

        With `index.family: auto` the next run builds what was chosen. With `exhaustive`, every candidate is measured at
        the full sample, which took 4 to 6 times as long on 20,000 vectors, and 9 times on 39,000.

        Raises:
            As `run`.
        """
        store = self.store
        plan = make_plan(resolve(self.config, self.origin), store, 0)
        with _stop_on_sigterm(), Session() as session:
            return tune(plan, self.origin, store, session, reporter or SilentReporter(), exhaustive)

    def dedup_curve(self, reporter: Reporter | None = None) -> dict[str, Any]:
        """What each threshold of `deduplicate.similarity` would remove, embedding first what is not embedded.

        Raises:
            As `run`; PipelineFileInvalid where the file does not ask for deduplication of passages by meaning.
        """
        if self.config.deduplicate.type != "semantic":
            rule = f"({self.config.deduplicate.type}) must be semantic for a curve of thresholds; set it in the file"
            raise PipelineFileInvalid([self.origin.problem("deduplicate.type", rule)])
        if self.config.deduplicate.level is Level.DOCUMENT:
            rule = "(document) must be passage for a curve of thresholds, which counts passages; set it in the file"
            raise PipelineFileInvalid([self.origin.problem("deduplicate.level", rule)])
        store = self.store
        plan = make_plan(resolve(self.config, self.origin), store, 0)
        with _stop_on_sigterm(), Session() as session:
            return curve_of_duplicates(plan, self.origin, store, session, reporter or SilentReporter())


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM (a scheduler's stop, a spot notice) as Ctrl-C while a run is under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
