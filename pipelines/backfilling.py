"""Embed a corpus again, the most wanted first, and publish and measure on the way what is there so far."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from penstock.cluster.catalog import Catalog, Reason
from penstock.cluster.jobs.priorities import PriorityJob
from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.leases import Lease, acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.backfill_order import has_fallen
from penstock.operators.chunking import PassageType
from penstock.operators.identity import fingerprint, fingerprint_set
from penstock.operators.indexing import Codec, Family
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines.backfill_units import BackfillUnit, embedded_first, find_units, fragments_of, order_path
from penstock.pipelines.config import Index, Upgrade
from penstock.pipelines.gate import failed
from penstock.pipelines.history import Status, new_run_id
from penstock.pipelines.loading import Origin, PipelineFileInvalid
from penstock.pipelines.measuring_answers import measure_answers
from penstock.pipelines.mixed import publish_mixed
from penstock.pipelines.planning import (
    FragmentFacts,
    Resolved,
    content_of,
    embedded_of,
    finished_fragments,
    is_trainable,
)
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import model_of
from penstock.pipelines.records import read_json, write_json
from penstock.pipelines.running import Part, Report, execute
from penstock.pipelines.upgrade_record import note
from penstock.pipelines.waiting import when_free
from penstock.pipelines.wanted import WantedTask, hub_occurrences, wanted_documents
from penstock.pipelines.window_embedding import WindowEmbedding, part_plan

UNITS_VERSION = 1  # of the rules by which fragments are sliced and ordered

T = TypeVar("T")


class BackfillStopped(Exception):
    """A backfill that went no further, as answers had become worse than before it."""


@dataclass
class AliasHead:
    """The alias as this upgrade left it: a move by others meanwhile, as by a rollback, is not undone."""

    catalog: Catalog
    alias: str
    number: int

    def move(self, version: str, run_id: str, reason: Reason) -> None:
        """Point the alias to a version.

        Raises:
            PublishConflict: somebody else moved it.
        """
        present = self.catalog.alias(self.alias)
        if present is not None and present.number == self.number and present.version == version:
            return
        entry = self.catalog.move(self.alias, version, expected=self.number, run_id=run_id, reason=reason)
        self.number = entry.number


@dataclass
class Backfill:
    """The steps from an old version to a new one, over the same corpus.

    Attributes:
        folder: where the records of the upgrade are.
        head: the alias.
        old: the old version, and `old_index` how it was built: what parts are built by, where the file says auto.
        new: the new pipeline, its precision decided; facts: its passages fragments.
        bridge: the folder of adapters that passed their gate; queries: how texts become queries of the old version.
        residuals: how far the adapter misses documents of the sample, by id; asked for when the order is found.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    folder: str
    settings: Upgrade
    head: AliasHead
    old: str
    old_index: Index
    new: Resolved
    facts: Sequence[FragmentFacts]
    bridge: str
    queries: QueryMode
    residuals: Callable[[], Mapping[str, float]] = dict

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.store, self.new.pipeline.name)

    def run(self) -> list[dict[str, Any]]:
        """The steps that are missing; the records of all.

        Raises:
            BackfillStopped: what was measured of a step is worse than before, beyond its confidence interval.
            PublishConflict: somebody else moved the alias.
        """
        self.start()
        parts = self.left()
        with self.reporter.stage("backfill", len(parts), "steps") as advance:
            for part in parts:
                record = self._step(part)
                advance(1, f"{record['share']:.0%} embedded, {quality_text(record)}")
        return self.recorded()

    def start(self) -> dict[str, Any]:
        """The step from which to go on: the last one, if it is still published, else one of as much as it had; at the
        beginning the old version, as one of which nothing is in the new space yet. The alias points to it then."""
        records = self.recorded()
        if not records:
            return self._step([])
        last = records[-1]
        if not self.catalog.has_manifest(last["version"]):
            grown = [part for part in self.parts() if self._rows(part) >= last["rows"]]
            return self._step(grown[0] if grown else self.parts()[-1])
        self.head.move(last["version"], new_run_id(f"{self.new.pipeline.name}-backfill"), Reason.BACKFILL)
        return last

    def left(self) -> list[list[str]]:
        """The parts of the steps that are missing: larger than that of the last step, whose share was one of the corpus
        as it was then."""
        done = self.recorded()[-1]["rows"]
        return [part for part in self.parts() if self._rows(part) > done]

    def recorded(self) -> list[dict[str, Any]]:
        """The records of the steps that were published, in their order."""
        names = sorted(self.store.names(f"{self.folder}/steps"))
        found = [read_json(self.store, f"{self.folder}/steps/{name}") for name in names]
        return [record for record in found if record is not None]

    @property
    def embedding(self) -> WindowEmbedding:
        window = self.settings.window
        return WindowEmbedding(self.session, self.store, self.reporter, self.origin, self.folder, window)

    def parts(self) -> list[list[str]]:
        """The passages fragments of each step, which holds those of the steps before it: none in the first, and in the
        last fewer than all, as all are the new version itself. Slices are among them until their fragments are."""
        embedded = embedded_of(self.new, self._known_facts)
        done = finished_fragments(self.store, EMBEDDINGS, embedded.embeddings_fingerprint)
        units = embedded_first(
            self.units, frozenset(name for name, made in embedded.embeddings.items() if made in done)
        )
        rows = np.cumsum([unit.rows for unit in units])
        shares = np.arange(1, self.settings.steps) / self.settings.steps
        ends = np.searchsorted(rows, shares * rows[-1], side="left") + 1 if len(rows) else np.empty(0, int)
        sizes = sorted({int(end) for end in ends if end < len(units)})
        return [[], *(fragments_of(units[:size]) for size in sizes)]

    @cached_property
    def units(self) -> list[BackfillUnit]:
        """Fragments and slices in the order of what is wanted, found once for a corpus."""
        path = order_path(self.folder)
        settings = self.settings
        log = None if settings.log is None else content_of(settings.log)
        asked = fingerprint(
            version=UNITS_VERSION,
            fragments=fingerprint_set([self.new.selection_fingerprint, *(fact.passages for fact in self.facts)]),
            traffic=settings.traffic,
            log=log,
            bridge=self.bridge,
        )
        record = read_json(self.store, path)
        if record is not None and record["asked"] == asked:
            units = [BackfillUnit.from_json(one) for one in record["units"]]
            if self._are_there(units):
                return units
        units = find_units(self.session, self.reporter, self._priorities(), self.facts)
        write_json(self.store, path, {"asked": asked, "units": [unit.to_json() for unit in units]})
        return units

    def _are_there(self, units: Sequence[BackfillUnit]) -> bool:
        """Whether clean-up left all slices."""
        passages = finished_fragments(self.store, PASSAGES, self.new.stage_fingerprint(PASSAGES))
        return all(unit.facts.passages in passages for unit in units)

    def _priorities(self) -> PriorityJob:
        asked, found = self._wanted()
        return PriorityJob(
            self.store.url,
            self.new.stage_fingerprint(PASSAGES),
            self.new.selection_fingerprint,
            self.settings.traffic,
            asked,
            hub_occurrences(found, int(self.catalog.manifest(self.old)["rows"])),
            self.residuals(),
            self.new.chunker.kind is PassageType.LATE,
        )

    @cached_property
    def _slices(self) -> tuple[FragmentFacts, ...]:
        return tuple(unit.facts for unit in self.units if unit.is_slice)

    @property
    def _known_facts(self) -> list[FragmentFacts]:
        return [*self.facts, *self._slices]

    def _wanted(self) -> tuple[dict[str, float], dict[str, float]]:
        """How often documents are asked for, by the log, and how often they are among the neighbours of others."""
        pipeline = self.new.pipeline
        task = WantedTask(self.store.url, pipeline.name, self.old, None, pipeline.embedding.trust_remote_code)
        asked: dict[str, float] = {}
        if self.settings.log is not None:
            asked = self.session.run(wanted_documents, replace(task, log=self.settings.log))
        return asked, self.session.run(wanted_documents, task)

    def _step(self, fragments: list[str]) -> dict[str, Any]:
        """One step: embed, build, publish, measure, and point the alias to it if answers are no worse."""
        started = time.monotonic()
        number = len(self.store.names(f"{self.folder}/steps"))
        encoded = self._embed(fragments) if fragments else 0
        part = self._build(fragments) if fragments else None
        run_id = new_run_id(f"{self.new.pipeline.name}-backfill")
        with self.lease(run_id) as lease:
            manifest = self._publish(run_id, part)
            record = {
                **self.measured(manifest),
                "step": number,
                "version": manifest["version"],
                "part": part,
                "fragments": len(fragments),
                "rows": self._rows(fragments),
                "share": self._share(fragments),
                "encoded": encoded,
                "seconds": round(time.monotonic() - started, 1),
            }
            if fragments:  # the first step is what all others are compared with
                refuse_fall(self.least(), record, self.settings)
            lease.check()
            write_json(self.store, f"{self.folder}/steps/{number:03d}.json", record)
            note(self.store, self.folder, {})
            self.head.move(manifest["version"], run_id, Reason.BACKFILL)
        return record

    def measured(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """What a version answers, and which questions that is about."""
        found = measure_answers(self.session, self.store.url, manifest, self.old, self.new)
        return found | {"asked": self._questions()}

    def baseline(self) -> dict[str, Any]:
        """What the old version answers to the questions of the file."""
        path = f"{self.folder}/baseline.json"
        record = read_json(self.store, path)
        if record is None or record["asked"] != self._questions():
            record = self.measured(self.catalog.manifest(self.old)) | {"version": self.old}
            write_json(self.store, path, record)
        return record

    def _questions(self) -> str:
        """Identity of the queries, their judgements and how many answers count."""
        evaluate = self.new.pipeline.evaluate
        files = [content_of(path) for path in (evaluate.queries, evaluate.relevance) if isinstance(path, str)]
        return fingerprint(files=files, k=evaluate.k, queries=str(evaluate.queries))

    def least(self) -> dict[str, Any]:
        """What steps are compared with: the old version, or the first step where that is less, as it is where queries
        pass a bridge."""
        before, first = self.baseline(), self.recorded()[0]
        lower = "ndcg" in first and first["asked"] == before["asked"] and first["ndcg"] < before["ndcg"]
        return first if lower else before

    @contextmanager
    def lease(self, run_id: str) -> Iterator[Lease]:
        """The index's lease, as soon as it is free: a scheduled run does not end a backfill of days."""
        with self.when_free(partial(acquire, self.store, self.new.pipeline.name, run_id)) as lease:
            yield lease

    def when_free(self, call: Callable[[], T]) -> T:
        """What a call returns that takes the index's lease."""
        return when_free(self.store, self.new.pipeline.name, self.reporter, call)

    def _rows(self, fragments: Sequence[str] | None) -> int:
        wanted = None if fragments is None else set(fragments)
        known = self._known_facts if fragments else self.facts
        return sum(fact.kept for fact in known if wanted is None or fact.passages in wanted)

    def _share(self, fragments: Sequence[str]) -> float:
        return self._rows(fragments) / max(1, self._rows(None))

    def _embed(self, fragments: list[str]) -> int:
        """The vectors of fragments that are missing, while the window is open; how many passages were encoded."""
        wanted = set(fragments)
        taken = [fact for fact in self._known_facts if fact.passages in wanted]
        return self.embedding.embed(self.new, taken, self._slices)

    def _build(self, fragments: list[str]) -> str:
        """A version of these fragments alone, which no alias points to."""
        resolved = part_of(self.new, self.old_index, self._rows(fragments))
        part = Part(frozenset(fragments), self.folder, self._slices)
        try:
            report = self._executed(resolved, part)
        except PipelineFileInvalid:
            if self.new.pipeline.deduplicate.type != "semantic":
                raise
            report = self._executed(exhaustive_part(self.new), part)  # too few are left without duplicates to train
        if report.status is Status.GATE_FAILED:
            missed = "; ".join(f"{one.name} {one.measured:.4f} against {one.bound:g}" for one in failed(report.checks))
            raise BackfillStopped(
                f"version {report.version} of {len(fragments)} fragments failed its gate ({missed}); change the index, "
                "or its gate, and go on"
            )
        return report.version

    def _executed(self, resolved: Resolved, part: Part) -> Report:
        plan = part_plan(resolved)
        return self.when_free(partial(execute, plan, self.origin, self.store, self.session, self.reporter, part))

    def _publish(self, run_id: str, part: str | None) -> dict[str, Any]:
        """The mixed version of the old one and a part; while nothing is embedded, it says the new model itself."""
        model = model_of(self.new) if part is None else None
        return publish_mixed(self.session, self.catalog, run_id, self.old, part, self.bridge, self.queries, model)


def refuse_fall(before: dict[str, Any], record: dict[str, Any], settings: Upgrade) -> None:
    """The stop-loss: ranking quality query by query against what was before, where there are judgements.

    Raises:
        BackfillStopped: the mean is below, beyond the confidence interval of the difference.
    """
    if "ndcg" not in before or before["asked"] != record["asked"]:
        return
    old, now = (np.array(one["per_query"]["ndcg"]) for one in (before, record))
    if has_fallen(old * (1 - settings.tolerance), now, settings.seed):
        raise BackfillStopped(
            f"version {record['version']}: ndcg ({now.mean():.4f}) must not be below the {old.mean():.4f} of version "
            f"{before['version']} beyond the confidence interval; the alias stays where it is. Look at the canary, "
            "raise upgrade.tolerance to go on, or return with `penstock rollback`"
        )


def quality_text(record: dict[str, Any]) -> str:
    """What was measured of a version, in words."""
    return f"nDCG {record['ndcg']:.4f}" if "ndcg" in record else f"{record['overlap']:.1%} of the old answers"


def part_of(new: Resolved, old_index: Index, rows: int) -> Resolved:
    """The new pipeline for a part of so many rows, with an index that so few can train: that of the file, of the old
    version where the file says auto, else an exhaustive one."""
    found = _with_index(new, new.pipeline.index if new.index_chosen else old_index)
    return found if found.index_chosen and _fits(found, rows) else exhaustive_part(new)


def exhaustive_part(new: Resolved) -> Resolved:
    """The new pipeline for a part of any size: its index is not trained."""
    index = new.pipeline.index
    flat = Index(family=Family.FLAT, codec=Codec.NONE, metric=index.metric, shards=index.shards, recall=index.recall)
    return _with_index(new, flat)


def _with_index(new: Resolved, index: Index) -> Resolved:
    """For a part: without an alias and judgements, and without bounds of what may be lost, as all of these are of the
    whole corpus. Faulty documents may all lie in the first part."""
    pipeline = new.pipeline
    of_whole = {"ndcg": None, "mrr": None, "max_dropped_fraction": 1.0, "max_lost_files": sys.maxsize}
    changed = {
        "gate": pipeline.gate and pipeline.gate.model_copy(update=of_whole),
        "evaluate": pipeline.evaluate.model_copy(update={"relevance": None}),
        "publish": pipeline.publish.model_copy(update={"alias": None}),
        "index": index,
    }
    return replace(new, pipeline=pipeline.model_copy(update=changed))


def _fits(resolved: Resolved, rows: int) -> bool:
    """Whether the index can be built from so many vectors of the new model's dimension."""
    try:
        return is_trainable(resolved, rows)
    except ValueError:
        return False
