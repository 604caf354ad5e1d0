"""Move an index to another model while it is searched: plan, canary, bridge, backfill, flip, each resumable.

What is done is recorded under `upgrades/INDEX/ID` and not done again. Passages, vectors and indexes are the outputs of
ordinary runs, so that the flip publishes what a fresh run with the new model would.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from penstock.cluster.catalog import Catalog, Reason
from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.leases import acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.backfill_order import area_under_quality
from penstock.operators.identity import fingerprint
from penstock.pipelines.backfilling import Backfill, BackfillStopped, refuse_fall
from penstock.pipelines.bridges import answers_through_bridge, fit_bridges
from penstock.pipelines.canary import canary
from penstock.pipelines.canary_sample import Canary, TakenSample
from penstock.pipelines.config import Embedding, Passages, PipelineFile, Upgrade
from penstock.pipelines.history import new_run_id, read_run
from penstock.pipelines.loading import Origin
from penstock.pipelines.measuring_answers import measure_answers
from penstock.pipelines.mixed_format import MixedParts, is_mixed
from penstock.pipelines.model_pair import ModelPair
from penstock.pipelines.planning import (
    FragmentFacts,
    Plan,
    Resolved,
    chosen_before,
    embedded_of,
    finished_fragments,
    make_plan,
    resolve,
    vector_bytes,
)
from penstock.pipelines.progress import Reporter
from penstock.pipelines.records import read_json, write_json
from penstock.pipelines.running import execute, prepare
from penstock.pipelines.upgrade_plan import Overlap, Pace, forecast
from penstock.pipelines.window import DailyWindow

UPGRADES = "upgrades"
ID_HEX_DIGITS = 16


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
        plan: of the new pipeline.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    base: Base
    old: Resolved
    plan: Plan

    @property
    def settings(self) -> Upgrade:
        return self.plan.resolved.pipeline.upgrade

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.store, self.plan.resolved.pipeline.name)

    @cached_property
    def prepared(self) -> tuple[Resolved, list[FragmentFacts]]:
        """The new pipeline with its precision decided, and its passages."""
        return prepare(self.plan, self.origin, self.store, self.session, self.reporter)

    @cached_property
    def folder(self) -> str:
        """Where this upgrade is recorded: named by what it leads from and to, not by the corpus, which may change
        meanwhile."""
        new = self.plan.resolved
        name = fingerprint(
            old=self.base.version, encoder=new.decision_fingerprint, passages=new.stage_fingerprint(PASSAGES)
        )
        return f"{UPGRADES}/{new.pipeline.name}/{name[:ID_HEX_DIGITS]}"

    def run(self, until: UpgradeStep) -> dict[str, Any]:
        """All steps up to one, each unless it was done before; what they found.

        Raises:
            BackfillStopped, and what runs raise.
        """
        record: dict[str, Any] = {
            "upgrade": self.folder,
            "index": self.catalog.index,
            "old": _model_facts(self.base.manifest),
            "new": self.plan.resolved.encoder.model,
        }
        write_json(self.store, f"{self.folder}/upgrade.json", record)
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
        embedded = embedded_of(resolved, facts)
        done = finished_fragments(self.store, EMBEDDINGS, embedded.embeddings_fingerprint)
        names = frozenset(name for name, fragment in embedded.embeddings.items() if fragment in done)
        index = self.base.manifest["bytes_per_vector"] * resolved.encoder.dimension / self.base.manifest["dimension"]
        overlap = Overlap(embedded.rows * vector_bytes(resolved), round(embedded.rows * index))
        settings = self.settings
        window = None if settings.window is None else DailyWindow.parse(settings.window)
        found = forecast(facts, names, self._pace(), overlap, settings.prices, window, datetime.now())
        record = found.to_json() | {"reused": self._reused(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(self.store, f"{self.folder}/plan.json", record)
        return record

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
        return {"steps": [_without_queries(step) for step in self._backfill.run()]}

    @cached_property
    def _taken(self) -> TakenSample:
        """The sample in both spaces: new vectors are found by the backfill, and not made again."""
        resolved, facts = self.prepared
        pair, settings = ModelPair(self.old, resolved, self.base.manifest), self.settings
        run_id = new_run_id(f"{self.catalog.index}-canary")
        with acquire(self.store, self.catalog.index, run_id):
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
            self.base.version,
            old.pipeline.index,
            resolved,
            facts,
            f"bridges/{self._bridges['fingerprint']}" if self._bridges["directions"] else None,
        )

    def _pace(self) -> Pace:
        measured = self._taken.about["throughput"]
        if measured is None:  # all of the sample was known
            return Pace(0.0, 1)
        return Pace(measured["tokens_per_s_by_worker"], measured["workers"])

    def flip(self) -> dict[str, Any]:
        """Publish the whole corpus in the new space, and point the alias to it if that is no worse than before."""
        path = f"{self.folder}/flip.json"
        publish = self.plan.resolved.pipeline.publish
        pipeline = self.plan.resolved.pipeline.model_copy(
            update={"publish": publish.model_copy(update={"alias": None})}
        )
        plan = make_plan(resolve(pipeline, self.origin), self.store, 0)
        report = None if plan.up_to_date else execute(plan, self.origin, self.store, self.session, self.reporter)
        version = plan.version if report is None else report.version
        manifest = self.catalog.manifest(str(version))
        missed = [check for check in manifest["gate"] if not check["passed"]]
        record = measure_answers(self.session, self.store.url, manifest, self.base.version, plan.resolved)
        entries = [] if report is None else [one for one in report.entries if one.stage == EMBEDDINGS]
        encoded = sum(entry.encoded for entry in entries)
        record |= {"version": version, "rows": manifest["rows"], "encoded": encoded, "gate": manifest["gate"]}
        if missed:
            raise BackfillStopped(
                f"version {version} failed its gate ({', '.join(check['name'] for check in missed)}): the alias stays "
                "where it is; `penstock status` has the figures"
            )
        refuse_fall(self._first_step(), record, self.settings)
        record |= self._move(str(version), publish.alias)
        record["area_under_quality"] = self._area(record)
        write_json(self.store, path, record)
        return _without_queries(record)

    def _move(self, version: str, alias: str | None) -> dict[str, Any]:
        run_id = new_run_id(f"{self.catalog.index}-flip")
        if alias is None:
            return {"alias": None}
        with acquire(self.store, self.catalog.index, run_id) as lease:
            present = self.catalog.alias(alias)
            if present is not None and present.version == version:
                return {"alias": alias, "previous": present.previous}
            lease.check()
            number = present.number if present else 0
            self.catalog.move(alias, version, expected=number, run_id=run_id, reason=Reason.UPGRADE)
        return {"alias": alias, "previous": self.base.version}

    def _first_step(self) -> dict[str, Any] | None:
        return read_json(self.store, f"{self.folder}/steps/000.json")

    def _area(self, last: dict[str, Any]) -> float | None:
        """Mean nDCG over the whole backfill; None without judgements."""
        names = sorted(self.store.names(f"{self.folder}/steps"))
        steps = [read_json(self.store, f"{self.folder}/steps/{name}") or {} for name in names]
        points = {step["share"]: step["ndcg"] for step in steps if "ndcg" in step} | {1.0: last.get("ndcg")}
        if 0.0 not in points or points[1.0] is None:
            return None
        shares = np.array(sorted(points))
        return area_under_quality(shares, np.array([points[share] for share in shares.tolist()]))

    def _reused(self) -> dict[str, bool]:
        """What of the old version's making serves the new one too."""
        old, new = self.old, self.plan.resolved
        passages = old.stage_fingerprint(PASSAGES) == new.stage_fingerprint(PASSAGES)
        layout = ("shards", "sharding")
        same = all(getattr(old.pipeline.index, name) == getattr(new.pipeline.index, name) for name in layout)
        return {"passages": passages, "duplicates": passages, "shard_layout": same}


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
    if declared not in (None, recorded["reference"]):
        raise NothingToUpgrade(
            f"upgrade.compatible_with ({declared}) must be the model of version {base.version}, which is "
            f"{recorded['reference']}; leave it out where the new model was not trained to be"
        )
    if _is_of(recorded, new):
        raise NothingToUpgrade(
            f"version {base.version} of index {new.pipeline.name} is of model {recorded['reference']} with the same "
            "weights, prompts and dimension; name another with --model or upgrade.model"
        )


def refuse_other_space(manifest: dict[str, Any], new: Resolved) -> None:
    """Refuse to build an index anew with another model than the one that answers.

    Raises:
        NothingToUpgrade: naming both.
    """
    stated = manifest["model"]
    models = [stated["weights_sha256"], stated["query_prompt"], stated["document_prompt"]]
    if models != [new.encoder.weights_hash, new.query_encoder.prompt, new.encoder.prompt]:
        raise NothingToUpgrade(
            f"embedding.model ({new.encoder.model}) must be the model of version {manifest['version']}, "
            f"{stated['reference']}, with its prompts: `penstock upgrade` moves an index to another"
        )


def _is_of(recorded: dict[str, Any], new: Resolved) -> bool:
    return all(recorded[name] == value for name, value in _identity(new).items())


def _identity(new: Resolved) -> dict[str, Any]:
    """What tells spaces apart, as manifests name it; precision does not, which only decides how exactly they are
    met."""
    encoder = new.encoder
    return {
        "weights_sha256": encoder.weights_hash,
        "tokenizer_sha256": encoder.tokenizer_hash,
        "configuration_sha256": encoder.configuration_hash,
        "dimension": encoder.dimension,
        "normalize": encoder.normalize,
        "layers": encoder.layers,
        "document_prompt": encoder.prompt,
        "query_prompt": new.query_encoder.prompt,
    }


def with_model(pipeline: PipelineFile, model: str | None) -> PipelineFile:
    """The pipeline file with the new model: that given, or the file's section `upgrade`, or its own embedding, for a
    file in which the model was changed already."""
    settings = pipeline.upgrade
    if model is None and settings.embedding is not None:
        return pipeline.model_copy(update={"embedding": settings.embedding})
    name = model or settings.model or pipeline.embedding.model
    workers = pipeline.embedding.workers
    if settings.max_workers is not None:
        workers = workers.model_copy(update={"count": settings.max_workers, "min": None, "max": None})
    changed = pipeline.embedding.model_copy(update={"model": name, "workers": workers})
    return pipeline.model_copy(update={"embedding": changed})


def old_pipeline(store: Store, pipeline: PipelineFile, base: Base) -> PipelineFile:
    """The file with the model and the passages that a version was made with, as its run recorded them."""
    record = read_run(store, str(base.manifest["run_id"]))
    if record is None:
        return pipeline
    made = record["pipeline"]
    sections = {
        "embedding": Embedding.model_validate(made["embedding"]),
        "passages": Passages.model_validate(made["passages"]),
    }
    return pipeline.model_copy(update=sections)


def _model_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    model = manifest["model"]
    return {"version": manifest["version"], "model": model["reference"], "space": model["space"]}


def _without_queries(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "per_query"}
