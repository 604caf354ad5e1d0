"""Carry out a plan: stage by stage, resumable after each fragment, published only through the gate."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from penstock.cluster.catalog import AliasEntry, Catalog
from penstock.cluster.fragments import Receipt, Work, write_fragment
from penstock.cluster.jobs.embeddings import (
    AgreementTask,
    check_agreement,
)
from penstock.cluster.jobs.passages import PassageJob, PassageTask, make_passages, merge_reasons
from penstock.cluster.jobs.selection import (
    BucketTask,
    DuplicateDocumentIds,
    Exclusions,
    ReceiptsTask,
    SelectionJob,
    bucket_count,
    read_receipts,
    resolve_documents,
    resolve_passages,
)
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.layout import (
    CENTROIDS,
    EMBEDDINGS,
    EVALUATION,
    KEPT,
    PAIRS,
    PASSAGES,
    REMOVAL,
    SELECTION,
    dead_letter_path,
    stage_record_path,
)
from penstock.cluster.leases import Lease, acquire
from penstock.cluster.published import VersionFiles
from penstock.cluster.session import Session
from penstock.cluster.storage import AlreadyExists, StorageUnavailable, Store
from penstock.operators.deduplication import DuplicateIds
from penstock.operators.encoding import Backend
from penstock.pipelines.building import Building, vectors_read
from penstock.pipelines.config import TabularDocuments
from penstock.pipelines.coverage import REMEDY, cover
from penstock.pipelines.deduplicating import Deduplicating
from penstock.pipelines.embedding import ACTOR_CPU_SHARE, Embedding
from penstock.pipelines.evaluating import Measurement
from penstock.pipelines.gate import Check, failed, gate_checks
from penstock.pipelines.history import Status, new_run_id, write_dead_letters, write_run, write_sources
from penstock.pipelines.ledger import DOCUMENTS, StageEntry, check_sums, dropped_fraction, write_ledger
from penstock.pipelines.loading import Origin, PipelineFileInvalid
from penstock.pipelines.planning import (
    ENCODED,
    Chain,
    Embedded,
    FragmentFacts,
    Plan,
    Resolved,
    alias_moves,
    check_budget,
    check_trainable,
    choice_path,
    chosen_before,
    decided_before,
    embedded_of,
    evaluation_path,
    facts_path,
    facts_table,
    finished_fragments,
    make_chain,
    pending_passages,
    precision_path,
    read_facts,
)
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import (
    Placed,
    index_bytes,
    make_manifest,
    move_alias,
    place_shards,
    publish_manifest,
    write_lineage,
)
from penstock.pipelines.records import read_json, write_json
from penstock.pipelines.tuning import tune_index, unmet

RECEIPTS_PER_TASK = 500
SAMPLE_FRAGMENTS = 8  # that the check of precisions takes passages from


@dataclass(frozen=True)
class Report:
    """What a run did, for people and machines."""

    run_id: str
    name: str
    status: Status
    version: str
    alias: AliasEntry | None
    checks: tuple[Check, ...]
    entries: tuple[StageEntry, ...]
    manifest: dict[str, Any]
    index_bytes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())
    encoder: dict[str, Any] | None = None
    agreement: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None

    @property
    def shares_centroids(self) -> bool:
        """Whether the index has the centroids that deduplication found."""
        return CENTROIDS in self.manifest["lineage"]["stages"]

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "name": self.name,
            "status": self.status.value,
            "version": self.version,
            "alias": vars(self.alias) | {"modified": self.alias.modified.isoformat()} if self.alias else None,
            "gate": [check.to_json() for check in self.checks],
            "stages": [entry.to_json() for entry in self.entries],
            "rows": self.manifest["rows"],
            "documents": self.manifest["documents"],
            "duplicates": self.manifest["duplicates"],
            "bytes_per_vector": self.manifest["bytes_per_vector"],
            "evaluation": self.manifest["evaluation"],
            "index_bytes": self.index_bytes,
            "shared_centroids": self.shares_centroids,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "encoder": self.encoder,
            "agreement": self.agreement,
            "tuning": self.tuning,
        }


@dataclass(frozen=True)
class Part:
    """Some of the passages fragments of a corpus, which are to be a version by themselves; `of` is the upgrade that it
    belongs to. `slices` are fragments with some documents of one of the corpus, which may take its place."""

    fragments: frozenset[str]
    of: str
    slices: tuple[FragmentFacts, ...] = ()


def execute(
    plan: Plan,
    origin: Origin,
    store: Store,
    session: Session,
    reporter: Reporter,
    part: Part | None = None,
) -> Report:
    """Do what the plan says, under the index's lease.

    Args:
        part: index no more than this.

    Raises:
        LeaseHeld: another run of this index is under way.
        StoreUnsuitable: the store cannot keep two runs apart.
        PublishConflict, LeaseLost: somebody else published meanwhile.
    """
    resolved = plan.resolved
    store.probe()
    run = Run(resolved, origin, store, session, reporter, new_run_id(resolved.pipeline.name), part)
    run.covers = plan.covers
    with acquire(store, resolved.pipeline.name, run.run_id) as lease:
        return run.execute(lease, plan.alias_head)


def prepare(
    plan: Plan, origin: Origin, store: Store, session: Session, reporter: Reporter
) -> tuple[Resolved, list[FragmentFacts]]:
    """Passages, which of them count, and the precision of the encoder; what is known of each fragment then.

    Raises:
        LeaseHeld, StoreUnsuitable: as `execute`.
    """
    store.probe()
    run = Run(plan.resolved, origin, store, session, reporter, new_run_id(plan.resolved.pipeline.name))
    with acquire(store, plan.resolved.pipeline.name, run.run_id):
        return run.prepare()


def embed_part(
    plan: Plan,
    origin: Origin,
    store: Store,
    session: Session,
    reporter: Reporter,
    part: Part,
    closes_at: float = math.inf,
) -> StageEntry:
    """The vectors of a part that are missing, and what making them took.

    Args:
        closes_at: when no more fragments are begun, in seconds since the epoch: what is left then is for another call.

    Raises:
        LeaseHeld, StoreUnsuitable: as `execute`.
    """
    store.probe()
    run = Run(plan.resolved, origin, store, session, reporter, new_run_id(plan.resolved.pipeline.name), part)
    with acquire(store, plan.resolved.pipeline.name, run.run_id):
        return run.embed(closes_at)


def tune(
    plan: Plan, origin: Origin, store: Store, session: Session, reporter: Reporter, exhaustive: bool
) -> dict[str, Any]:
    """Measure configurations of the index anew, on vectors that are made first where they are missing; with family
    `auto` the next run builds what was chosen.

    Raises:
        LeaseHeld, StoreUnsuitable: as `execute`.
    """
    store.probe()
    run = Run(plan.resolved, origin, store, session, reporter, new_run_id(plan.resolved.pipeline.name))
    with acquire(store, plan.resolved.pipeline.name, run.run_id):
        return run.tune(exhaustive)


def curve_of_duplicates(
    plan: Plan, origin: Origin, store: Store, session: Session, reporter: Reporter
) -> dict[str, Any]:
    """What thresholds of deduplication by meaning would remove, on vectors that are made first where they are missing.

    Raises:
        LeaseHeld, StoreUnsuitable: as `execute`.
    """
    store.probe()
    run = Run(plan.resolved, origin, store, session, reporter, new_run_id(plan.resolved.pipeline.name))
    with acquire(store, plan.resolved.pipeline.name, run.run_id):
        return run.curve_of_duplicates()


class Run:
    """One execution. Each stage method does what is missing of its stage and enters it in the ledger."""

    def __init__(
        self,
        resolved: Resolved,
        origin: Origin,
        store: Store,
        session: Session,
        reporter: Reporter,
        run_id: str,
        part: Part | None = None,
    ) -> None:
        self.resolved = resolved
        self.run_id = run_id
        self.covers = False
        self._origin = origin
        self._store = store
        self._session = session
        self._reporter = reporter
        self._part = part
        self._catalog = Catalog(store, resolved.pipeline.name)
        self._entries: list[StageEntry] = []
        self._agreement: dict[str, Any] | None = None
        self._encoder: dict[str, Any] | None = None
        self._tuning: dict[str, Any] | None = None
        self._started = time.monotonic()
        self._record: dict[str, Any] = {
            "run_id": run_id,
            "name": resolved.pipeline.name,
            "status": Status.RUNNING.value,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "pipeline": resolved.pipeline.model_dump(mode="json"),
            "parameters": resolved.parameters,
            **({"part_of": part.of} if part else {}),
        }

    def execute(self, lease: Lease, head: int) -> Report:
        """Run all stages and publish; whatever happens, the run's record says how it ended."""
        write_sources(self._store, self.run_id, self.resolved.files)
        write_run(self._store, self._record)
        try:
            report = self._stages(lease, head)
        except KeyboardInterrupt:
            self._finish(Status.INTERRUPTED, {})
            raise
        except Exception as error:
            self._finish(Status.FAILED, {"error": f"{type(error).__name__}: {error}"})
            raise
        try:
            self._finish(report.status, {"version": report.version, "report": report.to_json()})
        except (OSError, StorageUnavailable) as error:  # what was published is published: the exit code says so
            self._reporter.warn(f"the run's record could not be written: {error}")
        return report

    def tune(self, exhaustive: bool) -> dict[str, Any]:
        """All stages that end with vectors, then the measurement."""
        asked = self.resolved
        embedded = self._deduplicated(self._vectors()[0])
        record = tune_index(self._session, self.resolved, embedded, self._store.url, self._reporter, exhaustive)
        if not asked.index_chosen:
            write_json(self._store, choice_path(self.resolved.choice_fingerprint(embedded.rows)), record)
        return record

    def curve_of_duplicates(self) -> dict[str, Any]:
        """All stages that end with vectors, then the pairs, and what each threshold removes."""
        embedded = self._vectors()[0]
        return Deduplicating(self._session, self._store, self._reporter, self.resolved, embedded).curve()

    def prepare(self) -> tuple[Resolved, list[FragmentFacts]]:
        """The stages before vectors, and the choice of a precision; the facts of all fragments."""
        self._write_stage_record(PASSAGES, self.resolved.stage_fingerprint(PASSAGES))
        self._passages()
        facts = self._selection()
        self._decide_precision(facts)
        return self.resolved, facts

    def embed(self, closes_at: float = math.inf) -> StageEntry:
        """All stages that end with vectors, of which the last may close before it is done; its entry."""
        embedded = embedded_of(self.resolved, self._taken(self.prepare()[1]))
        self._write_stage_record(EMBEDDINGS, embedded.embeddings_fingerprint)
        self._embeddings(embedded, closes_at)
        return self._entries[-1]

    def _vectors(self) -> tuple[Embedded, list[Receipt]]:
        facts = self._taken(self.prepare()[1])
        embedded = embedded_of(self.resolved, facts)
        if self.resolved.index_chosen:
            check_trainable(self.resolved, embedded.rows, self._origin)
        else:
            check_budget(self.resolved, embedded.rows, self._origin)
        self._write_stage_record(EMBEDDINGS, embedded.embeddings_fingerprint)
        return embedded, self._embeddings(embedded)

    def _deduplicated(self, embedded: Embedded) -> Embedded:
        """The embeddings that stay where duplicates by meaning are left out."""
        if self.resolved.pipeline.deduplicate.type != "semantic":
            return embedded
        kept, entry = Deduplicating(self._session, self._store, self._reporter, self.resolved, embedded).run()
        self._entries.append(entry)
        return kept

    def _stages(self, lease: Lease, head: int) -> Report:
        """`head` is the alias entry that the plan started from: one that moved since makes publishing fail, not
        overwrite."""
        embedded, receipts = self._vectors()
        embedded = self._deduplicated(embedded)
        if self.resolved.index_chosen:
            check_trainable(self.resolved, embedded.rows, self._origin)  # fewer than before duplicates went
        self._choose_index(embedded)
        self._record["parameters"] = self.resolved.parameters
        chain = make_chain(self.resolved, embedded)
        for stage, stage_fingerprint in chain.stages(self.resolved).items():
            kept = stage in (CENTROIDS, PAIRS, REMOVAL) or (stage == EMBEDDINGS and chain.encoded is not None)
            if stage != ENCODED:  # which has its record since its first fragment
                self._write_stage_record(stage, stage_fingerprint, of=KEPT if kept else stage)
        building = Building(self._session, self._store, self._reporter, self.resolved, chain)
        building.fit_transforms()
        building.train()
        vectors = sum(receipt.rows_out for receipt in receipts)
        shards = building.build_shards(vectors if chain.encoded is None else chain.rows)
        self._entries += building.entries
        files = building.place_files()
        evaluation = self._evaluation(chain, shards, files)
        lost_files = self._dead_letters(chain.encoded or chain, receipts)
        check_sums(self._entries)
        return self._publish(lease, head, chain, shards, files, evaluation, lost_files)

    def _write_stage_record(self, stage: str, stage_fingerprint: str, of: str = "") -> None:
        """Say beside a stage's outputs what made them: its parameters, or those of another stage."""
        path = stage_record_path(stage, stage_fingerprint)
        if self._store.info(path) is None:
            parameters = self.resolved.parameters[of or stage]
            record = {"stage": stage, "fingerprint": stage_fingerprint, "parameters": parameters}
            if (of or stage) == EMBEDDINGS and self._agreement is not None:
                record["agreement"] = self._agreement
            write_json(self._store, path, record)

    def _passages(self) -> None:
        resolved, started = self.resolved, time.monotonic()
        todo = pending_passages(resolved, self._store)
        job = PassageJob(
            self._store.url,
            resolved.stage_fingerprint(PASSAGES),
            resolved.reader,
            resolved.chunker,
            resolved.card.reference,
            resolved.card.tokenizer_hash,
        )
        works: list[Work] = []
        passages = 0
        if todo:
            tasks = [PassageTask(job, fragment.fingerprint, fragment.parts) for fragment in todo]
            with self._reporter.stage("passages", len(todo), "fragments") as advance:
                for work in self._session.stream(make_passages, tasks):
                    works.append(work)
                    passages += work.receipt.passages
                    advance(1, f"{passages:,} passages")
        self._passage_work = _entry(PASSAGES, works, len(resolved.fragments), started)

    def _taken(self, facts: list[FragmentFacts]) -> list[FragmentFacts]:
        """Those of the part, where a part is asked for."""
        part = self._part
        return facts if part is None else [fact for fact in (*facts, *part.slices) if fact.passages in part.fragments]

    def _selection(self) -> list[FragmentFacts]:
        started = time.monotonic()
        known = read_facts(self._store, self.resolved.selection_fingerprint)
        if known is None:
            known = self._select()
        facts = self._taken(known)  # which the ledger counts
        dropped = merge_reasons([fact.dropped for fact in facts])
        documents_in, documents_out = (
            sum(fact.documents_in for fact in facts),
            sum(fact.documents_out for fact in facts),
        )
        self._entries.append(
            replace(self._passage_work, stage=DOCUMENTS, rows_in=documents_in, rows_out=documents_out, dropped=dropped)
        )
        duplicates = {
            "duplicate_id": sum(fact.duplicate_ids for fact in facts),
            "duplicate_text": sum(fact.duplicate_texts for fact in facts),
        }
        self._entries.append(
            StageEntry(
                stage=SELECTION,
                rows_in=sum(fact.passages_in for fact in facts),
                rows_out=sum(fact.kept for fact in facts),
                dropped={reason: count for reason, count in duplicates.items() if count},
                tokens=sum(fact.tokens for fact in facts),
                seconds=time.monotonic() - started,
            )
        )
        if not any(fact.kept for fact in facts):
            rule = (
                f"none of {documents_in} documents gave a passage ({dropped or 'no rows'}): there is nothing to index"
            )
            raise PipelineFileInvalid([self._origin.problem("documents", rule)])
        return known

    def _select(self) -> list[FragmentFacts]:
        """Join over all fragments, then write the facts per fragment: the sign that selection is done."""
        resolved = self.resolved
        passages_fingerprint = resolved.stage_fingerprint(PASSAGES)
        names = sorted({fragment.fingerprint for fragment in resolved.fragments})
        with self._reporter.stage("selection", 3, "steps") as advance:
            receipts = self._receipts(PASSAGES, passages_fingerprint, names)
            advance(1, "receipts read")
            job = SelectionJob(
                root=self._store.url,
                passages_fingerprint=passages_fingerprint,
                fingerprint=resolved.selection_fingerprint,
                fragments=tuple(names),
                buckets=bucket_count(sum(receipt.passages for receipt in receipts)),
                duplicate_ids=self._duplicate_policy(),
                deduplicate=resolved.pipeline.deduplicate.by_text,
            )
            losing = self._resolve_documents(job)
            advance(1, "document ids")
            exclusions = self._resolve_passages(job, losing)
            advance(1, "duplicates")
        facts = [_facts(receipt, exclusions.get(receipt.fragment, Exclusions())) for receipt in receipts]
        write_fragment(self._store, facts_path(resolved.selection_fingerprint), facts_table(facts))
        return facts

    def _duplicate_policy(self) -> DuplicateIds:
        """Ids derived from content repeat only where the content does: such rows are one document, never an error."""
        documents = self.resolved.pipeline.documents
        if isinstance(documents, TabularDocuments) and documents.id is None:
            return DuplicateIds.FIRST
        return documents.duplicate_ids

    def _resolve_documents(self, job: SelectionJob) -> frozenset[str]:
        losing: set[str] = set()
        examples: list[str] = []
        repeated = 0
        for found in self._session.stream(
            resolve_documents, [BucketTask(job, bucket) for bucket in range(job.buckets)]
        ):
            losing |= set(found.losing_fragments)
            examples += found.examples
            repeated += found.repeated_ids
        if examples:
            raise DuplicateDocumentIds(
                f"documents.id: ids must be unique, {repeated} are not: {'; '.join(examples[:5])}. "
                "Set documents.duplicate_ids to first or last to keep one of them, or name another id column"
            )
        return frozenset(losing)

    def _resolve_passages(self, job: SelectionJob, losing: frozenset[str]) -> dict[str, Exclusions]:
        merged: dict[str, Exclusions] = {}
        tasks = [(BucketTask(job, bucket), losing) for bucket in range(job.buckets)]
        for found in self._session.stream(resolve_passages, tasks):
            for fragment, exclusions in found.items():
                merged[fragment] = merged.get(fragment, Exclusions()).merge(exclusions)
        return merged

    def _receipts(self, stage: str, stage_fingerprint: str, fragments: Sequence[str]) -> list[Receipt]:
        tasks = [
            ReceiptsTask(self._store.url, stage, stage_fingerprint, tuple(fragments[i : i + RECEIPTS_PER_TASK]))
            for i in range(0, len(fragments), RECEIPTS_PER_TASK)
        ]
        # A few footers are read sooner here than Ray starts.
        groups = self._session.stream(read_receipts, tasks) if len(tasks) > 1 else map(read_receipts, tasks)
        receipts = [receipt for group in groups for receipt in group]
        return sorted(receipts, key=lambda receipt: receipt.fragment)

    def _decide_precision(self, facts: Sequence[FragmentFacts]) -> None:
        """Choose the precision that `auto` stands for, once per encoder and root; and measure what the file's choices
        (dimension, layers, backend) cost, where there is something to measure."""
        self.resolved = resolved = decided_before(self.resolved, self._store)
        embedding = resolved.pipeline.embedding
        shortened = resolved.encoder.dimension < resolved.card.dimension
        decision = precision_path(resolved.decision_fingerprint)
        own = precision_path(resolved.encoder.fingerprint())
        if resolved.decided and embedding.backend is Backend.TORCH and not shortened:
            self._agreement = read_json(self._store, decision) if embedding.precision == "auto" else None
            return
        wanted = resolved.encoder.precision if resolved.decided else None
        self._agreement = read_json(self._store, own if resolved.decided else decision)
        if self._agreement is not None:
            return
        encoders = self._embedding()
        encoders.pool(1)  # refuses workers that do not fit before a task waits for them for ever
        kept = sorted(fact.passages for fact in facts if fact.kept)
        step = -(-len(kept) // SAMPLE_FRAGMENTS)
        task = AgreementTask(encoders.job(""), resolved.card.dimension, tuple(kept[::step]), wanted)
        workers = embedding.workers
        with self._reporter.stage("precision", 1, "check") as advance:
            cpus = workers.cpus * ACTOR_CPU_SHARE
            found = self._session.run(check_agreement, task, cpus=cpus, gpus=workers.gpus)
            advance(1, f"{found.chosen.value}")
        record = self._create(own if resolved.decided else decision, found.to_json())
        if not resolved.decided:
            self.resolved = resolved = decided_before(resolved, self._store)
            if shortened:
                self._create(precision_path(resolved.encoder.fingerprint()), found.to_json())
        self._agreement = record
        overlap = record["dimension_overlap_at_10"]
        if overlap is not None:
            self._reporter.note(
                f"dimension {resolved.encoder.dimension} of {resolved.card.dimension}: {overlap:.1%} of the 10 nearest "
                f"neighbours of full vectors, on {record['sample_texts']} passages"
            )

    def _create(self, path: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write a record that is written once; where another run was faster, its record."""
        try:
            return self._store.create(path, record)
        except AlreadyExists:
            return read_json(self._store, path) or record

    def _embedding(self) -> Embedding:
        return Embedding(self._session, self._store, self._reporter, self.resolved, self._origin, self.run_id)

    def _choose_index(self, embedded: Embedded) -> None:
        """Choose what family `auto` stands for, once for such vectors, such a budget and such a size."""
        resolved = chosen_before(self.resolved, self._store, embedded.rows)
        path = choice_path(self.resolved.choice_fingerprint(embedded.rows))
        if not resolved.index_chosen:
            # Not only created: a choice that the corpus has become too small to train is replaced.
            write_json(
                self._store, path, tune_index(self._session, resolved, embedded, self._store.url, self._reporter)
            )
            resolved = chosen_before(resolved, self._store, embedded.rows)
        if not self.resolved.index_chosen:
            self._tuning = read_json(self._store, path)
            if self._tuning is not None and not self._tuning["met"]:
                self._reporter.warn(unmet(self._tuning))
        self.resolved = resolved

    def _embeddings(self, chain: Embedded, closes_at: float = math.inf) -> list[Receipt]:
        started = time.monotonic()
        done = finished_fragments(self._store, EMBEDDINGS, chain.embeddings_fingerprint)
        kept = [fact for fact in chain.facts if fact.kept]
        todo = [fact for fact in kept if chain.embeddings[fact.passages] not in done]
        works: list[Work] = []
        pool = None
        if todo:
            embedding = self._embedding()
            pool = embedding.pool(len(todo))
            works, self._encoder = embedding.embed(
                chain.embeddings_fingerprint, chain.embeddings, todo, pool, closes_at
            )
        fresh = {work.receipt.fragment: work.receipt for work in works}
        left = {chain.embeddings[fact.passages] for fact in todo} - fresh.keys() if closes_at < math.inf else set()
        earlier = [name for name in chain.embeddings.values() if name not in fresh and name not in left]
        receipts = [*fresh.values(), *self._receipts(EMBEDDINGS, chain.embeddings_fingerprint, sorted(earlier))]
        entry = _entry(EMBEDDINGS, works, len(kept) - len(left), started)
        capacity_s = entry.seconds * (pool.most if pool else 0)
        self._entries.append(
            replace(
                entry,
                rows_in=sum(receipt.rows_in for receipt in receipts),
                rows_out=sum(receipt.rows_out for receipt in receipts),
                dropped=merge_reasons([receipt.dropped for receipt in receipts]),
                idle_s=max(0.0, capacity_s - entry.busy_s),
            )
        )
        if entry.truncated_tokens:
            self._reporter.warn(f"{entry.truncated_tokens:,} tokens lay beyond the model's window and were truncated")
        return receipts

    def _evaluation(self, chain: Chain, shards: list[ShardRecord], files: VersionFiles) -> dict[str, Any]:
        path = evaluation_path(chain.evaluation_fingerprint)
        record = read_json(self._store, path)
        if record is not None:
            return record
        started = time.monotonic()
        measurement = Measurement(self._session, self.resolved, chain, shards, files, self._store.url)
        with self._reporter.stage(EVALUATION, measurement.rounds * len(shards), "shards") as advance:
            record = measurement.evaluate(advance)
        write_json(self._store, path, record)
        self._entries.append(vectors_read(EVALUATION, chain.rows, started, self.resolved))
        return record

    def _dead_letters(self, chain: Embedded, receipts: Sequence[Receipt]) -> int:
        passages = self.resolved.stage_fingerprint(PASSAGES)
        paths = [dead_letter_path(PASSAGES, passages, fact.passages) for fact in chain.facts if fact.dropped]
        paths += [
            dead_letter_path(EMBEDDINGS, chain.embeddings_fingerprint, receipt.fragment)
            for receipt in receipts
            if receipt.dropped
        ]
        return write_dead_letters(self._store, self.run_id, paths)

    def _publish(
        self,
        lease: Lease,
        head: int,
        chain: Chain,
        shards: list[ShardRecord],
        files: VersionFiles,
        evaluation: dict[str, Any],
        lost_files: int,
    ) -> Report:
        folder = self._catalog.version_folder(chain.version)
        shards = place_shards(self._store, folder, shards)
        rows = sum(shard.rows for shard in shards)
        lost = (
            0 if chain.encoded else sum(sum(one.dropped.values()) for one in self._entries if one.stage == EMBEDDINGS)
        )
        coverage = rows / (chain.rows - lost) if chain.rows > lost else 0.0
        dropped = dropped_fraction(self._entries)
        checks = gate_checks(self.resolved.pipeline, evaluation, coverage, dropped, lost_files)
        lease.check()
        if self._catalog.has_manifest(chain.version):
            manifest = self._catalog.manifest(chain.version)
        else:
            lineage = write_lineage(self._store, folder, self.resolved, chain)
            placed = Placed(shards, files.files, lineage)
            made = make_manifest(self.resolved, chain, self.run_id, placed, evaluation, checks, self._entries)
            made |= {"part_of": self._part.of} if self._part else {}
            manifest = publish_manifest(self._catalog, made)
        write_ledger(self._store, self.run_id, self._entries)
        checks += self._covered(manifest) if self.covers else []
        status, entry, notes = self._promote(lease, head, chain.version, checks)
        return Report(
            run_id=self.run_id,
            name=self.resolved.pipeline.name,
            status=status,
            version=chain.version,
            alias=entry,
            checks=tuple(checks),
            entries=tuple(self._entries),
            manifest=manifest,
            index_bytes=index_bytes(shards, files.files),
            seconds=time.monotonic() - self._started,
            notes=notes,
            encoder=self._encoder,
            agreement=self._agreement,
            tuning=self._tuning,
        )

    def _covered(self, manifest: dict[str, Any]) -> list[Check]:
        """The checks of the version's files and rows."""
        covered = cover(self._session, self._catalog, manifest)
        if covered.problems():
            self._reporter.warn(f"version {manifest['version']} is not whole: {covered.problems()}; {REMEDY}")
        return covered.checks()

    def _promote(
        self, lease: Lease, head: int, version: str, checks: Sequence[Check]
    ) -> tuple[Status, AliasEntry | None, tuple[str, ...]]:
        alias = self.resolved.pipeline.publish.alias
        if failed(checks):
            return Status.GATE_FAILED, None, ()
        if alias is None:
            return Status.UNPUBLISHED, None, ()
        moves, note = alias_moves(self.resolved, self._catalog, version)
        if not moves:
            return Status.PUBLISHED, self._catalog.alias(alias), (note,) if note else ()
        lease.check()
        return Status.PUBLISHED, move_alias(self._catalog, alias, version, head, self.run_id), ()

    def _finish(self, status: Status, more: dict[str, Any]) -> None:
        self._record |= {"status": status.value, "finished": datetime.now(UTC).isoformat(timespec="seconds"), **more}
        write_run(self._store, self._record)


def _facts(receipt: Receipt, exclusions: Exclusions) -> FragmentFacts:
    return FragmentFacts(
        passages=receipt.fragment,
        documents_in=receipt.rows_in,
        documents_out=receipt.rows_out,
        dropped=receipt.dropped,
        passages_in=receipt.passages,
        tokens=receipt.tokens - exclusions.tokens,
        duplicate_ids=exclusions.duplicate_ids,
        duplicate_texts=exclusions.duplicate_texts,
        digest=exclusions.digest,
    )


def _entry(stage: str, works: Sequence[Work], fragments: int, started: float) -> StageEntry:
    """A ledger entry with what this run did; its rows are filled in from the receipts of all fragments."""
    return StageEntry(
        stage=stage,
        rows_in=0,
        rows_out=0,
        fragments=fragments,
        fragments_done_before=fragments - len(works),
        tokens=sum(work.receipt.tokens for work in works),
        truncated_tokens=sum(work.receipt.truncated_tokens for work in works),
        encoded=sum(work.encoded for work in works),
        reused=sum(work.reused for work in works),
        seconds=time.monotonic() - started,
        busy_s=sum(work.busy_s for work in works),
        bytes_read=sum(work.bytes_read for work in works),
        bytes_written=sum(work.bytes_written for work in works),
    )
