"""Deduplication by meaning: pairs of similar vectors, which of them stay, and the embeddings that are left."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from penstock.cluster.fragments import Receipt
from penstock.cluster.jobs.clustering import fit_centroids
from penstock.cluster.jobs.dealt_rows import deal_rows
from penstock.cluster.jobs.document_pairs import DocumentJob, IncidencesTask, count_incidences, remove_documents
from penstock.cluster.jobs.document_standing import DocumentCarry, carry_documents, standing_documents
from penstock.cluster.jobs.groups import group_rows
from penstock.cluster.jobs.kept import DUPLICATE_MEANING, KeptJob, KeptTask, keep_rows
from penstock.cluster.jobs.pair_texts import NearTask, TextsTask, near_pairs, texts_of
from penstock.cluster.jobs.removal import RemovalJob, buckets_for, remove_duplicates
from penstock.cluster.jobs.removed_names import NamesTask, name_ranges, write_names
from penstock.cluster.jobs.shard_rows import FragmentPair, RowSource
from penstock.cluster.jobs.similarity import (
    JOIN_MEMORY_BYTES,
    HistogramTask,
    JoinJob,
    PartRecord,
    affordable,
    cut_into_parts,
    find_pairs,
    measured_recall,
    pair_histogram,
    parts_for,
)
from penstock.cluster.jobs.standing import Carried, StandingJob, carry_decisions, ranges_for
from penstock.cluster.layout import CENTROIDS, DOCUMENT_PAIRS, KEPT, PAIRS, PASSAGES, REMOVAL, STANDING, stage_folder
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.identity import fingerprint
from penstock.operators.similar_pairs import Join
from penstock.pipelines.config import Level
from penstock.pipelines.curve_points import count_documents, document_points, passage_points
from penstock.pipelines.curve_quality import CurveQuality
from penstock.pipelines.decisions import read_decision, record_path
from penstock.pipelines.ledger import StageEntry
from penstock.pipelines.planning import (
    Deduplicated,
    Embedded,
    Resolved,
    centroids_job,
    deduplicated_of,
    deduplication_of,
    pair_recall_path,
    vector_bytes,
)
from penstock.pipelines.progress import Reporter
from penstock.pipelines.records import read_json, write_json
from penstock.pipelines.shared_centroids import Clustering, join_clustering, most_parts, own_clustering

RECALL_QUERIES = 300
HISTOGRAM_BINS = 20
CURVE_STEPS = 11
EXAMPLES, EXAMPLE_MARGIN = 40, 0.02


@dataclass(frozen=True)
class PlannedJoin:
    """A join as it is done.

    Attributes:
        factor: rows that it is predicted to store for each row.
        clustering: of its cells; None where all rows are compared in one part.
        exact_factor: of the exact join that was asked for, where this one takes its place.
    """

    job: JoinJob
    factor: float
    clustering: Clustering | None
    exact_factor: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "join": self.job.join.value,
            "predicted_factor": round(self.factor, 4),
            "exact_factor": None if self.exact_factor is None else round(self.exact_factor, 4),
            "centroids": None if self.clustering is None else self.clustering.to_json(),
        }


@dataclass
class Deduplicating:
    """Does what is missing of the join, the choice and the embeddings that stay."""

    session: Session
    store: Store
    reporter: Reporter
    resolved: Resolved
    embedded: Embedded

    def run(self) -> tuple[Embedded, StageEntry]:
        """The embeddings that stay, and the entry of the ledger."""
        started = time.monotonic()
        done = deduplicated_of(self.resolved, self.embedded, self.store)
        decided = done is not None
        if done is None:
            self._deduplicate(deduplication_of(self.resolved, self.embedded, self.store))
            done = deduplicated_of(self.resolved, self.embedded, self.store)
        if done is None or done.deduplicated is None:
            raise FileNotFoundError("what stays was written and is gone; run again")
        decision = read_decision(self.store, done.deduplicated.kept)
        if decision is None:
            raise FileNotFoundError("what stays was written and is gone; run again")
        if decided:
            self._warn_of(decision.record["exact_factor"])
        removed = decision.record["removed"]
        dropped = {DUPLICATE_MEANING: removed} if removed else {}
        seconds = time.monotonic() - started
        before = decision.record["rows"]
        return done, StageEntry(KEPT, before, done.rows, dropped, len(done.embeddings), seconds=seconds)

    def curve(self) -> dict[str, Any]:
        """What thresholds from the floor on would remove, in rows (and documents, where these go), their share, and
        bytes of stored vectors.

        With pairs near the threshold of the file, to judge it by, and with what becomes of the answers to the queries
        of the evaluation, if it has a file of them.

        Pairs that are stored are not looked for again.

        Memory: as `run`; each threshold decides in buckets.
        """
        plan = Deduplicated.of(self.resolved, self.embedded)
        job = self._planned_join(plan, self.embedded.rows, self.embedded.rows).job
        records = self._pairs(job)
        rows = sum(record.rows for record in records)
        thresholds = sorted({*np.linspace(plan.floor, 1.0, CURVE_STEPS).round(4).tolist(), plan.similarity})
        points, choices, documents = self._points(plan, records, thresholds, rows)
        return {
            "level": self.resolved.pipeline.deduplicate.level.value,
            "rows": rows,
            "documents": documents,
            "pairs": sum(record.pairs for record in records),
            "join": job.join.value,
            "pair_recall": self._pair_recall(plan, job, records, rows),
            "floor": plan.floor,
            "similarity": plan.similarity,
            "points": points,
            "examples": self._examples(plan, records),
            **self._quality(points, choices),
        }

    def _points(
        self, plan: Deduplicated, records: list[PartRecord], thresholds: list[float], rows: int
    ) -> tuple[list[dict[str, Any]], list[RemovalJob] | list[DocumentJob], int | None]:
        """What each threshold removes of the rows, the choices, and how many documents there are where these go."""
        singles: list[RemovalJob] = []
        whole: list[DocumentJob] = []
        removed: list[int] = []
        base = self._in_buckets(plan, self._removal(plan, records), 0)
        with self.reporter.stage("thresholds", len(thresholds), "thresholds") as advance:
            for threshold in thresholds:
                removal = replace(base, similarity=threshold, fingerprint=plan.removal_at(threshold))
                documents = self._documents(plan, removal)
                if documents is None:
                    singles.append(removal)
                else:
                    whole.append(documents)
                removed.append(self._chosen(removal, documents))
                advance(1, f"{threshold:g}: {removed[-1]:,} {_kind(documents)} go")
        row_bytes = vector_bytes(self.resolved)
        if not whole:
            return passage_points(thresholds, removed, rows, row_bytes), singles, None
        counts = count_documents(self.session, self.reporter, self.store.url, self.embedded, whole)
        return document_points(thresholds, counts, row_bytes), whole, int(counts[0, 0])

    def _quality(self, points: list[dict[str, Any]], removals: list[RemovalJob] | list[DocumentJob]) -> dict[str, Any]:
        """What the evaluation has queries for: how the points change their answers, which is put into the points."""
        if not isinstance(self.resolved.pipeline.evaluate.queries, str):
            return {}
        measured = CurveQuality(self.session, self.resolved, self.embedded, self.reporter, self.store.url)
        quality = measured.measure(removals)
        for point, figures in zip(points, quality.pop("after"), strict=True):
            point |= figures
        return {"quality": quality}

    def _examples(self, plan: Deduplicated, records: list[PartRecord]) -> list[dict[str, Any]]:
        """Pairs near the threshold, with their texts."""
        root, files = self.store.url, tuple(path for record in records for path in record.files)
        task = NearTask(root, files, plan.similarity, EXAMPLE_MARGIN, EXAMPLES, plan.seed)
        pairs = self.session.run(near_pairs, task)
        hashes = np.unique(np.concatenate([pairs.column(name).to_numpy() for name in ("left", "right")]))
        fingerprint = self.resolved.stage_fingerprint(PASSAGES)
        fragments = [fact.passages for fact in self.embedded.facts if fact.passages in self.embedded.embeddings]
        texts: dict[int, dict[str, str]] = {}
        with self.reporter.stage("texts", len(fragments), "fragments") as advance:
            for table in self.session.stream(
                texts_of, [TextsTask(root, fingerprint, one, hashes) for one in fragments]
            ):
                texts |= {row["row_hash"]: {"id": row["passage_id"], "text": row["text"]} for row in table.to_pylist()}
                advance(1, f"{len(texts)} passages")
        return [
            {"similarity": round(pair["similarity"], 6), "left": texts[pair["left"]], "right": texts[pair["right"]]}
            for pair in pairs.to_pylist()
        ]

    def _pairs(self, job: JoinJob) -> list[PartRecord]:
        with self.reporter.stage(PAIRS, job.parts, "parts") as advance:
            return find_pairs(self.session, job, _counted(advance))

    def _deduplicate(self, plan: Deduplicated) -> None:
        carried, whole = self._carry(plan)
        planned = self._planned_join(plan, carried.standing + carried.open, carried.open)
        records = self._pairs(planned.job) if carried.open else []
        recall = self._pair_recall(plan, planned.job, records, carried.open)
        removal = self._in_buckets(plan, self._removal(plan, records), carried.gone)
        documents = self._documents(plan, removal)
        removed = self._decide(removal, documents)
        kept = self._keep(plan, removal, documents)
        self._name(plan, sum(receipt.rows_in - receipt.rows_out for receipt in kept.values()))
        record = self._joined(planned, records) | {
            "rule": plan.rule,
            "earlier": plan.earlier,
            "encoded": self.embedded.embeddings,
            "asked": plan.join.value,
            "index_cells": None if plan.index_cells is None else plan.index_cells.to_json(),
            "similarity": plan.similarity,
            "carried": asdict(carried),
            "carried_documents": None if whole is None else asdict(whole),
            "pair_recall": recall,
            "removed": sum(receipt.rows_in - receipt.rows_out for receipt in kept.values()),
            "removed_documents": None if documents is None else removed + (whole.gone if whole else 0),
            "rows": sum(receipt.rows_in for receipt in kept.values()),
            "fragments": {passages: receipt.rows_out for passages, receipt in kept.items()},
        }
        write_json(self.store, record_path(plan.kept), record)

    def _decide(self, removal: RemovalJob, documents: DocumentJob | None) -> int:
        """Choose what goes; returns how many rows that is, or documents."""
        with self.reporter.stage(REMOVAL, 1, "choice") as advance:
            removed = self._chosen(removal, documents)
            advance(1, f"{removed:,} {_kind(documents)} go")
        group_rows(self.session, removal)
        deal_rows(self.session, removal, self.embedded.embeddings_fingerprint, documents)
        return removed

    def _chosen(self, removal: RemovalJob, documents: DocumentJob | None) -> int:
        if documents is None:
            return remove_duplicates(self.session, removal)
        return remove_documents(self.session, documents)

    def _joined(self, planned: PlannedJoin, records: list[PartRecord]) -> dict[str, Any]:
        """What the join found."""
        job = planned.job
        files = tuple(path for one in records for path in one.files)
        counts, edges = self.session.run(pair_histogram, HistogramTask(job.root, files, job.floor, HISTOGRAM_BINS))
        return planned.to_json() | {
            "floor": job.floor,
            "parts": job.parts,
            "copies": sum(one.copies for one in records),
            "comparisons": sum(one.comparisons for one in records),
            "pairs": sum(one.pairs for one in records),
            "equal_rows": sum(one.equal for one in records),
            "histogram": {"edges": [round(float(edge), 6) for edge in edges], "pairs": counts.tolist()},
        }

    def _carry(self, plan: Deduplicated) -> tuple[Carried, Carried | None]:
        """What stands, is gone and is open, by the earlier decision; all is open where there is none. Of rows, and of
        documents where these go and there is an earlier decision."""
        if plan.standing is None or plan.earlier is None:
            return Carried(open=self.embedded.rows), None
        earlier = read_decision(self.store, plan.earlier)
        if earlier is None:
            raise FileNotFoundError(f"{record_path(plan.earlier)}, or what it names, was there and is gone; run again")
        fragments, links = tuple(sorted(self.embedded.embeddings.values())), earlier.links
        came = sum(
            fact.kept for fact in self.embedded.facts if self.embedded.embeddings.get(fact.passages) not in links
        )
        job = StandingJob(
            self.store.url,
            plan.standing,
            self.embedded.embeddings_fingerprint,
            fragments,
            earlier.kept,
            links,
            ranges_for(max(came, earlier.record["rows"] + came - self.embedded.rows)),
        )
        with self.reporter.stage(STANDING, len(fragments), "fragments") as advance:
            standing = 0

            def tell(receipt: Receipt) -> None:
                nonlocal standing
                standing += receipt.rows_out
                advance(1, f"{standing:,} vectors stand")

            if self.resolved.pipeline.deduplicate.level is Level.PASSAGE:
                return carry_decisions(self.session, job, tell), None
            passages = {name: passages for passages, name in self.embedded.embeddings.items()}
            carry = DocumentCarry(job, self.resolved.stage_fingerprint(PASSAGES), passages)
            return carry_documents(self.session, carry, tell)

    def _pair_recall(
        self, plan: Deduplicated, job: JoinJob, records: list[PartRecord], open_rows: int
    ) -> dict[str, Any]:
        """The share of true pairs that the join found, measured once for it; of none where no row is open."""
        path = pair_recall_path(plan.pairs)
        found = read_json(self.store, path)
        if found is None:
            share = min(1.0, RECALL_QUERIES / max(open_rows, 1))
            job = job if open_rows else replace(job, fragments=())
            with self.reporter.stage("pair recall", 1, "sample") as advance:
                recall = measured_recall(self.session, job, records, share, plan.seed)
                advance(1, f"{recall.recall:.4f} of {recall.pairs:,} pairs")
            found = asdict(recall)
            write_json(self.store, path, found)
        return found

    def _planned_join(self, plan: Deduplicated, rows: int, open_rows: int) -> PlannedJoin:
        """The join of the rows that take part, of which some are open: decided once, as pairs are kept by it."""
        path = f"{stage_folder(PAIRS, plan.pairs)}/join.json"
        record = read_json(self.store, path)
        if record is None:
            planned = self._decided_join(plan, rows, open_rows)
            write_json(self.store, path, {**planned.to_json(), "part_of_cell": planned.job.part_of_cell})
        else:
            clustering = Clustering.from_json(record["centroids"])
            job = self._whole_join(plan, Join(record["join"]), tuple(record["part_of_cell"]), clustering)
            planned = PlannedJoin(job, record["predicted_factor"], clustering, record["exact_factor"])
        self._warn_of(planned.exact_factor)
        return planned

    def _whole_join(
        self, plan: Deduplicated, join: Join, part_of_cell: tuple[int, ...], clustering: Clustering | None
    ) -> JoinJob:
        embedded = self.embedded
        return JoinJob(
            self.store.url,
            plan.pairs,
            embedded.embeddings_fingerprint,
            plan.centroids if clustering is None else plan.centroids_of(clustering),
            tuple(sorted(embedded.embeddings.values())),
            part_of_cell,
            join,
            plan.floor,
            plan.standing,
            self._gpus(),
        )

    def _gpus(self) -> float:
        """GPUs that a worker of the embedding takes, for joins as well; none where the machine has not as many."""
        asked = self.resolved.pipeline.embedding.workers.gpus
        return asked if asked and self.session.resources().get("GPU", 0) >= asked else 0.0

    def _decided_join(self, plan: Deduplicated, rows: int, open_rows: int) -> PlannedJoin:
        """A join of so many rows whose parts fit into memory; where none of them is open, nothing is clustered."""
        parts = self._parts(plan.join, rows)
        if open_rows == 0 or (parts == 1 and plan.join is not Join.CLUSTER):
            return PlannedJoin(self._whole_join(plan, plan.join, (0,), None), 1.0, None)
        index, of_all, dimension = self.resolved.pipeline.index, self.embedded.rows, self.resolved.encoder.dimension
        planned = self._cut_join(plan, plan.join, parts, join_clustering(index, of_all, parts, dimension))
        join = affordable(plan.join, planned.factor)
        if join is plan.join:
            return planned
        # Its pairs are kept for an exact join, of which the index decides nothing.
        parts = self._parts(join, rows)
        instead = self._cut_join(plan, join, parts, own_clustering(of_all, parts, dimension))
        return replace(instead, exact_factor=planned.factor)

    def _parts(self, join: Join, rows: int) -> int:
        most = most_parts(self.embedded.rows)
        return parts_for(rows, self.resolved.encoder.dimension, JOIN_MEMORY_BYTES, join, most)

    def _cut_join(self, plan: Deduplicated, join: Join, parts: int, clustering: Clustering) -> PlannedJoin:
        """A join in so many parts of the cells of a k-means, which is done if it is not yet."""
        self._centroids(plan, clustering)
        job = self._whole_join(plan, join, (0,) * clustering.cells, clustering)
        job, factor = cut_into_parts(self.session, job, self.embedded.rows, parts, plan.seed)
        return PlannedJoin(job, factor, clustering)

    def _warn_of(self, exact_factor: float | None) -> None:
        """Tells that the graph join took the place of an exact one, of which the factor is given then."""
        if exact_factor is not None:
            self.reporter.warn(
                f"an exact join would store {exact_factor:.1f} rows for each row; the graph join takes its place, "
                "which misses some pairs: pair_recall of kept.json and of dedup-curve say what share it finds"
            )

    def _centroids(self, plan: Deduplicated, clustering: Clustering) -> None:
        job = centroids_job(self.store.url, plan, self.embedded, clustering, self.resolved.encoder.dimension)
        with self.reporter.stage(CENTROIDS, 1, "sample") as advance:
            fit_centroids(
                self.session, job, lambda one: advance(1, f"{clustering.cells:,} cells of {one.rows:,} vectors")
            )

    def _removal(self, plan: Deduplicated, records: list[PartRecord]) -> RemovalJob:
        embedded, deduplicate = self.embedded, self.resolved.pipeline.deduplicate
        kept = [fact for fact in embedded.facts if fact.passages in embedded.embeddings]
        column, descending = deduplicate.keep_column()
        return RemovalJob(
            self.store.url,
            plan.removal,
            tuple(path for record in records for path in record.files),
            plan.similarity,
            deduplicate.keep_rule(),
            buckets_for(sum(record.pairs + record.equal for record in records)),
            passages_fingerprint=self.resolved.stage_fingerprint(PASSAGES),
            passages=tuple(sorted(fact.passages for fact in kept)),
            selection_fingerprint=self.resolved.selection_fingerprint,
            exclusions=frozenset(fact.passages for fact in kept if fact.kept < fact.passages_in),
            column=column,
            descending=descending,
            seed=plan.seed,
            standing=plan.standing,
            fragments=tuple(sorted(embedded.embeddings.values())),
            equal_files=tuple(path for record in records for path in record.equal_files),
        )

    def _in_buckets(self, plan: Deduplicated, removal: RemovalJob, gone: int) -> RemovalJob:
        """The choice in as many buckets as its pairs need, or the links of rows that are gone since earlier, or the
        incidences of documents, which can be far more. All are counted from the floor on: so every threshold has the
        same buckets, and ends of pairs that are written serve them all."""
        removal = replace(removal, buckets=max(removal.buckets, buckets_for(gone)))
        if self.resolved.pipeline.deduplicate.level is Level.PASSAGE:
            return removal
        task = IncidencesTask(removal.root, removal.files, removal.equal_files, plan.floor)
        return replace(
            removal, buckets=max(removal.buckets, buckets_for(self.session.run(count_incidences, task) // 2))
        )

    def _documents(self, plan: Deduplicated, removal: RemovalJob) -> DocumentJob | None:
        """The choice among documents, where these go as a whole."""
        deduplicate = self.resolved.pipeline.deduplicate
        match deduplicate.level:
            case Level.PASSAGE:
                return None
            case Level.DOCUMENT:
                name = fingerprint(stage=DOCUMENT_PAIRS, removal=removal.fingerprint)
                standing = None if plan.standing is None else standing_documents(plan.standing)
                return DocumentJob(name, removal, deduplicate.covered_share, standing)

    def _name(self, plan: Deduplicated, removed: int) -> None:
        """The table of what went, by ids."""
        fragments = tuple(sorted(plan.fragment(name) for name in self.embedded.embeddings.values()))
        ranges = name_ranges(removed)
        tasks = [NamesTask(self.store.url, plan.kept, fragments, number, ranges) for number in range(ranges)]
        with self.reporter.stage("names", ranges, "files") as advance:
            for rows in self.session.stream(write_names, tasks):
                advance(1, f"{rows:,} passages that went")

    def _keep(self, plan: Deduplicated, removal: RemovalJob, documents: DocumentJob | None) -> dict[str, Receipt]:
        """Embeddings that stay: passages fragment → rows in and out. Rows in are those that have a vector."""
        embedded = self.embedded
        source = RowSource(
            self.store.url,
            self.resolved.stage_fingerprint(PASSAGES),
            self.resolved.selection_fingerprint,
            embedded.embeddings_fingerprint,
        )
        job = KeptJob(source, removal, plan.kept, documents)
        names = {
            plan.fragment(name): fact.passages
            for fact in embedded.facts
            if (name := embedded.embeddings.get(fact.passages))
        }
        tasks = [
            KeptTask(job, FragmentPair(fact.passages, name, fact.kept < fact.passages_in), plan.fragment(name))
            for fact in embedded.facts
            if (name := embedded.embeddings.get(fact.passages))
        ]
        receipts: dict[str, Receipt] = {}
        with self.reporter.stage(KEPT, len(tasks), "fragments") as advance:
            for work in self.session.stream(keep_rows, tasks):
                receipts[names[work.receipt.fragment]] = work.receipt
                advance(1, f"{sum(receipt.rows_out for receipt in receipts.values()):,} vectors stay")
        return receipts


def _kind(documents: DocumentJob | None) -> str:
    """What goes."""
    return "rows" if documents is None else "documents"


def _counted(advance: Callable[[int, str], None]) -> Callable[[PartRecord], None]:
    """Tells of each part as it is joined."""
    found = 0

    def tell(record: PartRecord) -> None:
        nonlocal found
        found += record.pairs
        advance(1, f"{found:,} pairs")

    return tell
