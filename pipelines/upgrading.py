"""Move an index to another model while it is searched: plan, canary, bridge, backfill, flip, each resumable.

What is done is recorded under `upgrades/INDEX/ID` and not done again. Passages, vectors and indexes are the outputs of
ordinary runs, so that the flip publishes what a fresh run with the new model would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from penstock.cluster.catalog import Catalog, Reason
from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.leases import LeaseHeld, acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.backfill_order import area_under_quality
from penstock.operators.identity import fingerprint
from penstock.operators.indexing import Metric
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines.backfill_units import BackfillUnit, finished_of, recorded_slices
from penstock.pipelines.backfilling import AliasHead, Backfill, BackfillStopped, refuse_fall
from penstock.pipelines.bridges import answers_through_bridge, fit_bridges, sample_residuals
from penstock.pipelines.canary import canary
from penstock.pipelines.canary_sample import Canary, TakenSample
from penstock.pipelines.config import Embedding, Passages, PipelineFile, Upgrade, Workers
from penstock.pipelines.coverage import REMEDY, cover
from penstock.pipelines.embedding import Embedding as EmbeddingStage
from penstock.pipelines.history import new_run_id, read_run
from penstock.pipelines.loading import Origin, PipelineFileInvalid
from penstock.pipelines.mixed_format import MixedParts, is_mixed
from penstock.pipelines.model_identity import identity_words, is_same_dimension, is_same_model, model_identity
from penstock.pipelines.model_pair import ModelPair
from penstock.pipelines.planning import (
    FragmentFacts,
    Plan,
    Resolved,
    chosen_before,
    finished_fragments,
    make_plan,
    resolve,
    split_path,
    vector_bytes,
)
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import model_of
from penstock.pipelines.records import read_json, write_json
from penstock.pipelines.running import execute, prepare
from penstock.pipelines.upgrade_plan import Overlap, Pace, forecast
from penstock.pipelines.upgrade_record import UPGRADES, note
from penstock.pipelines.waiting import upgrade_lease, when_free
from penstock.pipelines.window import DailyWindow

ID_HEX_DIGITS = 16

T = TypeVar("T")


class UpgradeStep(StrEnum):
    """The steps of an upgrade, in order."""

    PLAN = "plan"
    CANARY = "canary"
    BRIDGE = "bridge"
    BACKFILL = "backfill"
    FLIP = "flip"


class NothingToUpgrade(Exception):
    """There is no published version to move to another model, or it is there already."""


@dataclass(frozen=True)
class Base:
    """The version that readers are answered from before an upgrade."""

    version: str
    manifest: dict[str, Any]


@dataclass
class Upgrading:
    """One upgrade: the version that was there, and the pipeline file with the new model.

    Attributes:
        old: the pipeline of the old version, as it was run.
        asked: the pipeline file with the new model; plan: of it.
        head: the alias, as the plan found it.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    base: Base
    old: Resolved
    asked: PipelineFile
    plan: Plan
    head: AliasHead

    @property
    def settings(self) -> Upgrade:
        return self.plan.resolved.pipeline.upgrade

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.store, self.plan.resolved.pipeline.name)

    @cached_property
    def prepared(self) -> tuple[Resolved, list[FragmentFacts]]:
        """The new pipeline with its precision decided, and its passages."""
        return self._prepared(self.plan)

    def _prepared(self, plan: Plan) -> tuple[Resolved, list[FragmentFacts]]:
        return self._when_free(partial(prepare, plan, self.origin, self.store, self.session, self.reporter))

    def _when_free(self, call: Callable[[], T]) -> T:
        return when_free(self.store, self.catalog.index, self.reporter, call)

    @cached_property
    def folder(self) -> str:
        """Where this upgrade is recorded: named by what it leads from and to, not by the corpus, which may change
        meanwhile."""
        new = self.plan.resolved
        name = fingerprint(
            old=self.base.version,
            new=model_identity(new.encoder, new.query_encoder),
            passages=new.stage_fingerprint(PASSAGES),
        )
        return f"{UPGRADES}/{new.pipeline.name}/{name[:ID_HEX_DIGITS]}"

    def run(self, until: UpgradeStep) -> dict[str, Any]:
        """All steps up to one, each unless it was done before; what they found. Runs of the index are waited for.

        Raises:
            LeaseHeld: another upgrade of this index is under way.
            BackfillStopped, and what runs raise.
        """
        index = self.catalog.index
        self.store.probe()
        with acquire(self.store, upgrade_lease(index), new_run_id(f"{index}-upgrade")):
            return self._run(until)

    def _run(self, until: UpgradeStep) -> dict[str, Any]:
        record: dict[str, Any] = {
            "upgrade": self.folder,
            "index": self.catalog.index,
            "old": _model_facts(self.base.manifest),
            "new": self.plan.resolved.encoder.model,
        }
        resolved = self.prepared[0]
        kept = [[stage, resolved.stage_fingerprint(stage)] for stage in (PASSAGES, EMBEDDINGS)]
        note(self.store, self.folder, record | {"keep": kept})
        steps: dict[UpgradeStep, Callable[[], Any]] = {
            UpgradeStep.PLAN: self.forecast,
            UpgradeStep.CANARY: self.canary,
            UpgradeStep.BRIDGE: self.bridge,
            UpgradeStep.BACKFILL: self.backfill,
            UpgradeStep.FLIP: self.flip,
        }
        for step, do in steps.items():
            record[step.value] = do()
            if step is until:
                break
        return record

    def forecast(self) -> dict[str, Any]:
        """What is left to do, and what it takes: anew each time."""
        resolved, facts = self.prepared
        pace, settings = self._pace(), self.settings
        slices = recorded_slices(self.store, self.folder, facts)
        done = finished_fragments(self.store, EMBEDDINGS, resolved.stage_fingerprint(EMBEDDINGS))
        window = None if settings.window is None else DailyWindow.parse(settings.window)
        finished = finished_of(resolved, facts, slices, done)
        found = forecast(facts, finished, pace, self._overlap(slices), settings.prices, window, datetime.now())
        record = found.to_json() | {"reused": self._reused(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(self.store, f"{self.folder}/plan.json", record)
        return record

    def _overlap(self, slices: Sequence[BackfillUnit]) -> Overlap:
        """Of the whole corpus; vectors of slices lie there twice."""
        resolved, facts = self.prepared
        manifest, rows = self.base.manifest, sum(fact.kept for fact in facts)
        stored = sum(file["size_bytes"] for shard in manifest["shards"] for file in shard["files"])
        per_row = stored / max(1, manifest["rows"]) * resolved.encoder.dimension / manifest["dimension"]
        overlap = Overlap.of(rows, vector_bytes(resolved), per_row, self.settings.steps)
        twice = sum(one.rows for one in slices) * vector_bytes(resolved)
        return replace(overlap, vectors=overlap.vectors + twice)

    def canary(self) -> dict[str, Any]:
        """Both models on a sample, and adapters between their spaces."""
        path = f"{self.folder}/canary.json"
        found = read_json(self.store, path)
        if found is None or found["bridges"]["fingerprint"] != self._bridges["fingerprint"]:
            found = canary(self.session, self._taken, self._bridges)
            write_json(self.store, path, found)
        return found

    def bridge(self) -> dict[str, Any]:
        """Answer from the old version, as one of which nothing is in the new space yet: the first step of a backfill,
        with the adapters that passed their gate."""
        if not answers_through_bridge(self._bridges):
            self.reporter.warn(
                "no adapter of queries passed its gate: while both models are live queries are encoded with both"
            )
        return {**_without_queries(self._backfill.start()), "bridges": self._bridges}

    def backfill(self) -> dict[str, Any]:
        """Embed, and publish on the way."""
        order = [unit.shown() for unit in self._backfill.units]
        note(self.store, self.folder, {"order": order})
        return {"steps": [_without_queries(step) for step in self._backfill.run()], "order": order}

    @cached_property
    def _taken(self) -> TakenSample:
        """The sample in both spaces: new vectors are found by the backfill, and not made again."""
        resolved, facts = self.prepared
        pair, settings = ModelPair(self.old, resolved, self.base.manifest), self.settings
        run_id = new_run_id(f"{self.catalog.index}-canary")
        with self._when_free(partial(acquire, self.store, self.catalog.index, run_id)):
            sampling = (pair, facts, settings.sample, settings.seed)
            return Canary(self.session, self.store, self.reporter, self.origin, run_id, *sampling).take()

    @cached_property
    def _bridges(self) -> dict[str, Any]:
        settings = self.settings
        declared = settings.compatible_with is not None
        return fit_bridges(self.session, self.store, self.reporter, self._taken, settings.recovery, declared)

    @cached_property
    def _backfill(self) -> Backfill:
        resolved, facts = self.prepared
        old = chosen_before(self.old, self.store, self.base.manifest["rows"])
        return Backfill(
            self.session,
            self.store,
            self.reporter,
            self.origin,
            self.folder,
            self.settings,
            self.head,
            self.base.version,
            old.pipeline.index,
            resolved,
            facts,
            f"bridges/{self._bridges['fingerprint']}",
            QueryMode.DIRECT if self._bridges["skipped"] else self.settings.queries,
            partial(sample_residuals, self.store, self._bridges["fingerprint"], self._taken.paired),
        )

    def _pace(self) -> Pace:
        """The workers of the whole job, and how fast one was on the sample, now or when that was embedded first."""
        resolved, facts = self.prepared
        kept = sum(fact.kept > 0 for fact in facts)
        run_id = new_run_id(f"{self.catalog.index}-plan")
        encoders = EmbeddingStage(self.session, self.store, self.reporter, resolved, self.origin, run_id)
        path = f"{self.folder}/pace.json"
        measured = self._taken.about["throughput"] or read_json(self.store, path)
        if measured is not None:
            write_json(self.store, path, measured)
        rate = None if measured is None else measured["tokens_per_s_by_worker"]
        return Pace(rate, encoders.pool(kept).most)

    def flip(self) -> dict[str, Any]:
        """Publish the whole corpus in the new space, and point the alias to it if that is no worse than before."""
        backfill = self._backfill
        version, encoded = self._published()
        manifest = self.catalog.manifest(version)
        missed = [check["name"] for check in manifest["gate"] if not check["passed"]]
        if missed:
            raise BackfillStopped(
                f"version {version} failed its gate ({', '.join(missed)}): the alias stays where it is; "
                "`penstock versions` has the figures"
            )
        covered = cover(self.session, self.catalog, manifest)
        if covered.problems():
            raise BackfillStopped(
                f"version {version} is not whole: {covered.problems()}; the alias stays where it is: {REMEDY}"
            )
        record = backfill.measured(manifest) | {
            "version": version,
            "rows": manifest["rows"],
            "encoded": encoded,
            "gate": manifest["gate"],
            "coverage": covered.to_json(),
            "alias": self.plan.resolved.pipeline.publish.alias,
            "previous": self.base.version,
        }
        refuse_fall(backfill.baseline(), record, self.settings)
        record["area_under_quality"] = self._area(record)
        write_json(self.store, f"{self.folder}/flip.json", record)
        run_id = new_run_id(f"{self.catalog.index}-flip")
        with backfill.lease(run_id) as lease:
            lease.check()
            self.head.move(version, run_id, Reason.UPGRADE)
        return _without_queries(record)

    def _published(self) -> tuple[str, int]:
        """The version of the corpus as it is now, and how many passages were encoded for it, in the window: what
        changed meanwhile too, until nothing does. Only then is it built."""
        encoded = 0
        while True:
            plan = self._when_free(self._whole)
            if plan.up_to_date:
                return str(plan.version), encoded
            more = self._backfill.embedding.embed(*self._prepared(plan))
            encoded += more
            if more:
                continue
            try:
                report = execute(plan, self.origin, self.store, self.session, self.reporter)
            except LeaseHeld:  # by a run that began just now: the corpus may be another when it ends
                continue
            return report.version, encoded + sum(one.encoded for one in report.entries if one.stage == EMBEDDINGS)

    def _whole(self) -> Plan:
        """The plan of the whole corpus as it is now, which moves no alias."""
        publish = self.plan.resolved.pipeline.publish.model_copy(update={"alias": None})
        return make_plan(resolve(self.asked.model_copy(update={"publish": publish}), self.origin), self.store, 0)

    def _area(self, last: dict[str, Any]) -> float | None:
        """Mean nDCG over the whole backfill; None without judgements."""
        steps = [step for step in self._backfill.recorded() if "ndcg" in step and step["asked"] == last["asked"]]
        points = {step["share"]: step["ndcg"] for step in steps} | {1.0: last.get("ndcg")}
        if 0.0 not in points or points[1.0] is None:
            return None
        shares = np.array(sorted(points))
        return area_under_quality(shares, np.array([points[share] for share in shares.tolist()]))

    def _reused(self) -> dict[str, bool]:
        """What of the old version's making serves the new one too."""
        old, new = self.old, self.plan.resolved
        passages = old.stage_fingerprint(PASSAGES) == new.stage_fingerprint(PASSAGES)
        links = passages and new.pipeline.deduplicate.type != "semantic"  # which is decided by the new vectors
        layout = ("shards", "sharding")
        same = all(getattr(old.pipeline.index, name) == getattr(new.pipeline.index, name) for name in layout)
        return {"passages": passages, "duplicates": links, "shard_layout": same}


def base_of(store: Store, pipeline: PipelineFile) -> Base:
    """The version in the old space that the pipeline's alias points to, or that its mixed version is made of.

    Raises:
        NothingToUpgrade: there is no alias, or nothing under it.
    """
    catalog, alias = Catalog(store, pipeline.name), pipeline.publish.alias
    entry = catalog.alias(alias) if alias else None
    if alias is None or entry is None:
        raise NothingToUpgrade(
            f"publish.alias ({alias or 'none'}) must point to a published version of index {pipeline.name}, which an "
            "upgrade replaces; run the pipeline first"
        )
    served = catalog.manifest(entry.version)
    version = MixedParts.of(served).old if is_mixed(served) else entry.version
    return Base(version, catalog.manifest(version))


def refuse_same_space(base: Base, new: Resolved) -> None:
    """Refuse to move an index to the space in which it is.

    Raises:
        NothingToUpgrade: naming the model.
    """
    recorded, declared = base.manifest["model"], new.pipeline.upgrade.compatible_with
    if _is_of(recorded, new):  # first: after an upgrade the declaration still names the model before
        raise NothingToUpgrade(
            f"version {base.version} of index {new.pipeline.name} is of model {recorded['reference']} with the same "
            "weights, prompts and dimension; name another with --model or upgrade.model"
        )
    if declared not in (None, recorded["reference"]):
        raise NothingToUpgrade(
            f"upgrade.compatible_with ({declared}) must be the model of version {base.version}, which is "
            f"{recorded['reference']}; leave it out where the new model was not trained to be"
        )


def refuse_other_space(manifest: dict[str, Any], new: Resolved) -> None:
    """Refuse to build an index anew with another model than the one that answers; its dimension may change.

    Raises:
        NothingToUpgrade: naming both.
    """
    stated = manifest["model"]
    if not is_same_model(model_identity(new.encoder, new.query_encoder), stated):
        asked = model_of(new) | {"precision": new.pipeline.embedding.precision}  # which may be undecided yet
        raise NothingToUpgrade(
            f"embedding.model ({identity_words(asked)}) must be the model of version {manifest['version']}, "
            f"{identity_words(stated)}, with its prompts: `penstock upgrade` moves an index to another"
        )


def _is_of(recorded: dict[str, Any], new: Resolved) -> bool:
    return is_same_dimension(model_identity(new.encoder, new.query_encoder), recorded)


def with_model(pipeline: PipelineFile, model: str | None) -> PipelineFile:
    """The pipeline file with the new model: that given, or the file's section `upgrade`, or its own embedding, for a
    file in which the model was changed already; with no more workers than the upgrade may have."""
    settings = pipeline.upgrade
    embedding = settings.embedding or pipeline.embedding
    embedding = embedding.model_copy(update={"model": model or settings.model or embedding.model})
    if settings.max_workers is not None:
        embedding = embedding.model_copy(update={"workers": _at_most(embedding.workers, settings.max_workers)})
    return pipeline.model_copy(update={"embedding": embedding})


def _at_most(workers: Workers, most: int) -> Workers:
    if workers.count is not None:
        return workers.model_copy(update={"count": min(workers.count, most)})
    return workers.model_copy(update={"min": min(workers.min or 1, most), "max": min(workers.max or most, most)})


def check_log(pipeline: PipelineFile, origin: Origin) -> None:
    """Refuse a log of queries that is not there, before work starts.

    Raises:
        PipelineFileInvalid: naming the path.
    """
    log = pipeline.upgrade.log
    if log is not None:
        store, name = split_path(log)
        if store.info(name) is None:
            rule = f"({log}) must be a file, there is none; check the path"
            raise PipelineFileInvalid([origin.problem("upgrade.log", rule)])


def old_pipeline(store: Store, pipeline: PipelineFile, base: Base) -> PipelineFile:
    """The file with the model, the passages and the metric that a version was made with: the metric from its manifest,
    as vectors of length 1 are another space, the others as its run recorded them."""
    index = pipeline.index.model_copy(update={"metric": Metric(base.manifest["metric"])})
    record = read_run(store, str(base.manifest["run_id"]))
    if record is None:  # cleaned up: the file has to name the old model itself
        return pipeline.model_copy(update={"index": index})
    made = record["pipeline"]
    sections = {
        "embedding": Embedding.model_validate(made["embedding"]),
        "passages": Passages.model_validate(made["passages"]),
        "index": index,
    }
    return pipeline.model_copy(update=sections)


def _model_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    model = manifest["model"]
    return {"version": manifest["version"], "model": model["reference"], "space": model["space"]}


def _without_queries(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "per_query"}
