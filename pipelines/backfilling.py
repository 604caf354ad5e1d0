"""Embed a corpus again, the most wanted first, and publish and measure on the way what is there so far."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from penstock.cluster.catalog import AliasEntry, Catalog, Reason
from penstock.cluster.jobs.priorities import FragmentPriority, PriorityTask, fragment_priorities
from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.leases import acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.backfill_order import fragment_order, has_fallen
from penstock.operators.indexing import Codec, Family
from penstock.pipelines.config import Index, Upgrade
from penstock.pipelines.gate import failed
from penstock.pipelines.history import Status, new_run_id
from penstock.pipelines.loading import Origin
from penstock.pipelines.measuring_answers import measure_answers
from penstock.pipelines.mixed import publish_mixed
from penstock.pipelines.planning import FragmentFacts, Plan, Resolved, embedded_of, finished_fragments, is_trainable
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import model_of
from penstock.pipelines.records import read_json, write_json
from penstock.pipelines.running import Part, embed_part, execute
from penstock.pipelines.wanted import WantedTask, wanted_documents
from penstock.pipelines.window import DailyWindow

FRAGMENTS_PER_TASK = 64
# Fragments for each worker that are embedded before the clock is looked at again, where there is a window.
FRAGMENTS_BETWEEN_LOOKS = 4


class BackfillStopped(Exception):
    """A backfill that went no further, as answers had become worse than before it."""


@dataclass
class Backfill:
    """The steps from an old version to a new one, over the same corpus.

    Attributes:
        folder: where the records of the upgrade are.
        old: the old version and `old_index` how it was built: what parts are built by, where the file says auto.
        new: the new pipeline, its precision decided; facts: its passages fragments.
        bridge: the folder of adapters that passed their gate, or None.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    folder: str
    settings: Upgrade
    old: str
    old_index: Index
    new: Resolved
    facts: Sequence[FragmentFacts]
    bridge: str | None

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.store, self.new.pipeline.name)

    def run(self) -> list[dict[str, Any]]:
        """The steps that are missing; the records of all.

        Raises:
            BackfillStopped: what was measured of a step is worse than the first, beyond its confidence interval.
        """
        records: list[dict[str, Any]] = []
        parts = self.parts()
        with self.reporter.stage("backfill", len(parts), "steps") as advance:
            for number, fragments in enumerate(parts):
                record = self._step(number, fragments, records[0] if records else None)
                records.append(record)
                advance(1, f"{record['share']:.0%} embedded, {quality_text(record)}")
        return records

    def start(self) -> dict[str, Any]:
        """The first step alone: the old version, as one of which nothing is in the new space yet."""
        return self._step(0, [], None)

    def parts(self) -> list[list[str]]:
        """The passages fragments of each step, which holds those of the steps before it: none in the first, and in the
        last fewer than all, as all are the new version itself."""
        ordered = self._ordered()
        rows = np.cumsum([fact.kept for fact in ordered])
        shares = np.arange(1, self.settings.steps) / self.settings.steps
        ends = np.searchsorted(rows, shares * rows[-1], side="left") + 1 if len(rows) else np.empty(0, int)
        sizes = sorted({int(end) for end in ends if end < len(ordered)})
        return [[], *([fact.passages for fact in ordered[:size]] for size in sizes)]

    def _ordered(self) -> list[FragmentFacts]:
        """The fragments in the order of a backfill: first those that are embedded already."""
        kept = sorted((fact for fact in self.facts if fact.kept), key=lambda fact: fact.passages)
        embedded = embedded_of(self.new, self.facts)
        done = finished_fragments(self.store, EMBEDDINGS, embedded.embeddings_fingerprint)
        first = {fact.passages for fact in kept if embedded.embeddings[fact.passages] in done}
        known = self._known_order([fact.passages for fact in kept])
        places = {name: place for place, name in enumerate(known)}
        return sorted(kept, key=lambda fact: (fact.passages not in first, places[fact.passages]))

    def _known_order(self, fragments: list[str]) -> list[str]:
        """The order of these fragments, found once."""
        path = f"{self.folder}/order.json"
        record = read_json(self.store, path)
        if record is None or set(record["fragments"]) != set(fragments):
            record = {"fragments": self._order(fragments)}
            write_json(self.store, path, record)
        order: list[str] = record["fragments"]
        return order

    def _order(self, fragments: list[str]) -> list[str]:
        asked, found = self._wanted()
        settings = self.settings
        stage = self.new.stage_fingerprint(PASSAGES)
        tasks = [
            PriorityTask(
                self.store.url,
                stage,
                tuple(fragments[start : start + FRAGMENTS_PER_TASK]),
                settings.traffic,
                asked,
                found,
            )
            for start in range(0, len(fragments), FRAGMENTS_PER_TASK)
        ]
        priorities: dict[str, FragmentPriority] = {}
        with self.reporter.stage("priority", len(fragments), "fragments") as advance:
            for group in self.session.stream(fragment_priorities, tasks):
                priorities |= {one.fragment: one for one in group}
                advance(len(group))
        rows = {fact.passages: fact.kept for fact in self.facts}
        sums = [priorities[name] for name in fragments]
        order = fragment_order(
            np.array([rows[name] for name in fragments]),
            np.array([one.traffic for one in sums]),
            np.array([one.occurrences for one in sums]),
        )
        return [fragments[place] for place in order.tolist()]

    def _wanted(self) -> tuple[dict[str, float], dict[str, float]]:
        """How often documents are asked for, by the log, and how often they are among the neighbours of others."""
        pipeline = self.new.pipeline
        task = WantedTask(self.store.url, pipeline.name, self.old, None, pipeline.embedding.trust_remote_code)
        asked: dict[str, float] = {}
        if self.settings.log is not None:
            asked = self.session.run(wanted_documents, replace(task, log=self.settings.log))
        return asked, self.session.run(wanted_documents, task)

    def _step(self, number: int, fragments: list[str], first: dict[str, Any] | None) -> dict[str, Any]:
        """One step: embed, build, publish, measure, and point the alias to it if answers are no worse."""
        path = f"{self.folder}/steps/{number:03d}.json"
        record = read_json(self.store, path)
        if record is not None and record["fragments"] == len(fragments) and self._is_published(record):
            return record
        started = time.monotonic()
        encoded = self._embed(fragments)
        part = self._build(fragments) if fragments else None
        run_id = new_run_id(f"{self.new.pipeline.name}-backfill")
        with acquire(self.store, self.new.pipeline.name, run_id) as lease:
            manifest = self._publish(run_id, part)
            version = manifest["version"]
            record = {
                **measure_answers(self.session, self.store.url, manifest, self.old, self.new),
                "step": number,
                "version": version,
                "part": part,
                "fragments": len(fragments),
                "rows": self._rows(fragments),
                "share": self._rows(fragments) / max(1, self._rows(None)),
                "encoded": encoded,
                "seconds": round(time.monotonic() - started, 1),
            }
            refuse_fall(first, record, self.settings)
            lease.check()
            self._point(version, run_id)
        write_json(self.store, path, record)
        return record

    def _is_published(self, record: dict[str, Any]) -> bool:
        return self.catalog.has_manifest(record["version"])

    def _rows(self, fragments: Sequence[str] | None) -> int:
        wanted = None if fragments is None else set(fragments)
        return sum(fact.kept for fact in self.facts if wanted is None or fact.passages in wanted)

    def _embed(self, fragments: list[str]) -> int:
        """The vectors of fragments that are missing, while the window is open; how many passages were encoded."""
        embedded = embedded_of(self.new, self.facts)
        done = finished_fragments(self.store, EMBEDDINGS, embedded.embeddings_fingerprint)
        todo = [name for name in fragments if embedded.embeddings[name] not in done]
        window = None if self.settings.window is None else DailyWindow.parse(self.settings.window)
        size = len(todo)
        if window is not None:
            size = FRAGMENTS_BETWEEN_LOOKS * (self.new.pipeline.embedding.workers.count or 1)
        encoded = 0
        for start in range(0, len(todo), max(size, 1)):
            self._wait(window)
            part = Part(frozenset(todo[start : start + size]), self.folder)
            encoded += embed_part(
                self._plan(self.new), self.origin, self.store, self.session, self.reporter, part
            ).encoded
        return encoded

    def _wait(self, window: DailyWindow | None) -> None:
        while window is not None and (pause_s := window.seconds_until_open(datetime.now())):
            self.reporter.note(f"waiting for the window {self.settings.window}: {pause_s / 3600:.1f} hours")
            time.sleep(min(pause_s, 3600.0))

    def _build(self, fragments: list[str]) -> str:
        """A version of these fragments alone, which no alias points to."""
        resolved = part_of(self.new, self.old_index, self._rows(fragments))
        part = Part(frozenset(fragments), self.folder)
        report = execute(self._plan(resolved), self.origin, self.store, self.session, self.reporter, part)
        if report.status is Status.GATE_FAILED:
            missed = "; ".join(f"{one.name} {one.measured:.4f} against {one.bound:g}" for one in failed(report.checks))
            raise BackfillStopped(
                f"version {report.version} of {len(fragments)} fragments failed its gate ({missed}); change the index, "
                "or its gate, and go on"
            )
        return report.version

    def _plan(self, resolved: Resolved) -> Plan:
        return Plan(resolved, (), None, published=False, alias_moves=False, alias_head=0)

    def _publish(self, run_id: str, part: str | None) -> dict[str, Any]:
        """The mixed version of the old one and a part; while nothing is embedded, it says the new model itself."""
        model = model_of(self.new) if part is None else None
        queries = self.settings.queries
        return publish_mixed(self.session, self.catalog, run_id, self.old, part, self.bridge, queries, model)

    def _point(self, version: str, run_id: str) -> AliasEntry | None:
        alias = self.new.pipeline.publish.alias
        present = self.catalog.alias(alias) if alias else None
        if alias is None or present is None or present.version == version:
            return present
        return self.catalog.move(alias, version, expected=present.number, run_id=run_id, reason=Reason.BACKFILL)


def refuse_fall(first: dict[str, Any] | None, record: dict[str, Any], settings: Upgrade) -> None:
    """The stop-loss: ranking quality query by query against the first step, where there are judgements.

    Raises:
        BackfillStopped: the mean is below, beyond the confidence interval of the difference.
    """
    if first is None or "ndcg" not in first or "ndcg" not in record:
        return
    before, now = (np.array(one["per_query"]["ndcg"]) for one in (first, record))
    if has_fallen(before * (1 - settings.tolerance), now, settings.seed):
        raise BackfillStopped(
            f"version {record['version']}: ndcg ({now.mean():.4f}) must not be below that of the start of the backfill "
            f"({before.mean():.4f}) beyond the confidence interval; the alias stays where it is. Look at the canary, "
            "raise upgrade.tolerance to go on, or return with `penstock rollback`"
        )


def quality_text(record: dict[str, Any]) -> str:
    """What was measured of a version, in words."""
    return f"nDCG {record['ndcg']:.4f}" if "ndcg" in record else f"{record['overlap']:.1%} of the old answers"


def part_of(new: Resolved, old_index: Index, rows: int) -> Resolved:
    """The new pipeline for a part of so many rows: without an alias and judgements (which are of the whole corpus), and
    with an index that so few rows can train: that of the file, of the old version where the file says auto, else an
    exhaustive one."""
    pipeline = new.pipeline
    gate = pipeline.gate and pipeline.gate.model_copy(update={"ndcg": None, "mrr": None})
    evaluate = pipeline.evaluate.model_copy(update={"relevance": None})
    publish = pipeline.publish.model_copy(update={"alias": None})
    changed = {"gate": gate, "evaluate": evaluate, "publish": publish}
    exhaustive = Index(
        family=Family.FLAT,
        codec=Codec.NONE,
        metric=pipeline.index.metric,
        shards=pipeline.index.shards,
        recall=pipeline.index.recall,
    )
    for index in (pipeline.index if new.index_chosen else old_index, exhaustive):
        found = replace(new, pipeline=pipeline.model_copy(update=changed | {"index": index}))
        if found.index_chosen and _fits(found, rows):
            return found
    return found


def _fits(resolved: Resolved, rows: int) -> bool:
    """Whether the index can be built from so many vectors of the new model's dimension."""
    try:
        return is_trainable(resolved, rows)
    except ValueError:
        return False
