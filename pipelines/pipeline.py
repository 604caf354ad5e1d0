"""A pipeline as an object: what the command line calls."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.cluster.session import Session
from penstock.cluster.storage import Store, open_store
from penstock.pipelines.backfilling import AliasHead
from penstock.pipelines.canary import ModelTrial
from penstock.pipelines.canary_sample import SAMPLE_PASSAGES
from penstock.pipelines.config import PipelineFile
from penstock.pipelines.coverage import is_whole
from penstock.pipelines.diffing import Difference, compare
from penstock.pipelines.loading import Origin, PipelineFileInvalid, load_pipeline, parse_pipeline
from penstock.pipelines.mixed_format import is_mixed
from penstock.pipelines.model_pair import refuse_other_model
from penstock.pipelines.planning import Plan, alias_head, decided_before, make_plan, resolve
from penstock.pipelines.progress import Reporter, SilentReporter
from penstock.pipelines.running import Report, curve_of_duplicates, execute, tune
from penstock.pipelines.upgrading import (
    UpgradeStep,
    Upgrading,
    base_of,
    check_log,
    old_pipeline,
    refuse_other_space,
    refuse_same_space,
    with_model,
)


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

    def reindex(
        self, reporter: Reporter | None = None, plan: Plan | None = None
    ) -> tuple[Report | None, Difference | None]:
        """`run`, which compares the version's rows and files with what they should be before the alias moves, and how
        what is published differs from the version that the alias pointed to before; None for each where there is
        nothing to do, or nothing (whole) to compare.

        Raises:
            As `run`; NothingToUpgrade where the file names another model than that version's.
        """
        store, reporter = self.store, reporter or SilentReporter()
        plan = plan or self.plan()
        catalog, alias = Catalog(store, self.config.name), self.config.publish.alias
        before = catalog.alias(alias) if alias else None
        if before is not None:
            refuse_other_space(catalog.manifest(before.version), plan.resolved)
        report = self.run(reporter, replace(plan, covers=True))
        if report is None or before is None or before.version == report.version:
            return report, None
        if not is_whole(report.checks):
            return report, None
        if is_mixed(catalog.manifest(before.version)):  # of which there are no documents of its own to compare
            return report, None
        trust = self.config.embedding.trust_remote_code
        with Session() as session:
            return report, compare(store, catalog, before.version, report.version, session, reporter, trust)

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

    def upgrade(
        self, reporter: Reporter | None = None, model: str | None = None, until: UpgradeStep = UpgradeStep.FLIP
    ) -> dict[str, Any]:
        """Move the index to another model while it is searched, up to a step; what was done before is not done again.

        Args:
            model: the new model; without it, the one of the section `upgrade`, or the file's own where the published
            version has another.

        Raises:
            NothingToUpgrade: no version is published, or it is of the new model's space.
            BackfillStopped: answers became worse than before.
            As `run` otherwise.
        """
        store = self.store
        number = alias_head(self.config, store)
        base = base_of(store, self.config)
        new = with_model(self.config, model)
        check_log(new, self.origin)
        plan = make_plan(resolve(new, self.origin), store, number)
        refuse_same_space(base, plan.resolved)
        old = decided_before(resolve(old_pipeline(store, self.config, base), self.origin), store)
        refuse_other_model(old, base.manifest)
        head = AliasHead(Catalog(store, self.config.name), str(self.config.publish.alias), number)
        reporter = reporter or SilentReporter()
        with _stop_on_sigterm(), Session() as session:
            upgrading = Upgrading(session, store, reporter, self.origin, base, old, new, plan, head)
            return upgrading.run(until)

    def dedup_curve(self, reporter: Reporter | None = None) -> dict[str, Any]:
        """What each threshold of `deduplicate.similarity` would remove, embedding first what is not embedded.

        Raises:
            As `run`; PipelineFileInvalid where the file does not ask for deduplication by meaning.
        """
        if self.config.deduplicate.type != "semantic":
            rule = f"({self.config.deduplicate.type}) must be semantic for a curve of thresholds; set it in the file"
            raise PipelineFileInvalid([self.origin.problem("deduplicate.type", rule)])
        store = self.store
        plan = make_plan(resolve(self.config, self.origin), store, 0)
        with _stop_on_sigterm(), Session() as session:
            return curve_of_duplicates(plan, self.origin, store, session, reporter or SilentReporter())

    def bridge(
        self, new: "Pipeline", reporter: Reporter | None = None, passages: int = SAMPLE_PASSAGES, seed: int = 0
    ) -> dict[str, Any]:
        """Fit bridges between the published version's model and that of `new`, this pipeline with another `embedding`
        section; the report of the sample that they were fitted to, with their records.

        Args:
            passages: how many to draw, beside those of judged documents.

        Raises:
            As `run`; ModelMismatch where the version was not made with this pipeline's model.
        """
        store, old = self.store, resolve(self.config, self.origin)
        plan = make_plan(resolve(new.config, new.origin), store, 0)
        with _stop_on_sigterm(), Session() as session:
            trial = ModelTrial(session, store, reporter or SilentReporter(), new.origin, passages, seed)
            return trial.run(old, plan)


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
