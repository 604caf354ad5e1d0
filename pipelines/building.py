"""The stages between vectors and a version: transforms, centroids, training, and the shards with what they share."""

import time
from dataclasses import dataclass, field, replace

import numpy as np

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.cells import CellsJob, CellsTask, CountTask, count_cells, write_cells
from penstock.cluster.jobs.clustering import ClusteringJob, fit_centroids
from penstock.cluster.jobs.evaluation import EncodeQueriesTask, encode_queries
from penstock.cluster.jobs.links import LinksJob, LinkSource, deal_links, link_ranges
from penstock.cluster.jobs.moments import MomentsJob, embedding_moments
from penstock.cluster.jobs.placement import (
    PlacementJob,
    PlacementTask,
    SharingTask,
    owners_path,
    place_rows,
    share_out,
)
from penstock.cluster.jobs.shards import FragmentPair, RowSource, ShardJob, ShardRecord, ShardTask, build_shard
from penstock.cluster.jobs.training import TrainingTask, train, training_record_path
from penstock.cluster.jobs.transforms import chain_record_path, write_chain
from penstock.cluster.layout import CELLS, CENTROIDS, PASSAGES, PLACEMENT, SHARDS, TRAINING, TRANSFORMS
from penstock.cluster.published import VersionFiles
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.cell_sharing import MOST_IMBALANCE
from penstock.operators.clustering import TWO_LEVEL_CENTROIDS, ClusteringSpec
from penstock.operators.indexing import compares_products, nlist_of
from penstock.operators.moments import Moments, moments_of
from penstock.operators.sharding import Sharding
from penstock.operators.transform_fitting import fit_chain
from penstock.operators.vector_codecs import is_lvq
from penstock.pipelines.ledger import StageEntry
from penstock.pipelines.planning import (
    Chain,
    Resolved,
    centroids_job,
    finished_fragments,
    finished_shards,
    part_of_corpus,
    split_path,
    vector_bytes,
)
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import files_of, place_files, shards_of

FRAGMENTS_PER_COUNT = 500
# k-means over the sample, by one process: short where iterations over all vectors, by all workers, follow.
SAMPLE_ITERATIONS, BEGUN_ITERATIONS = 10, 4
BEGUN_ROWS_PER_CELL, MOST_ROWS = 16, 2**62


@dataclass
class Building:
    """Builds the index of a chain, doing what is missing of each stage; `entries` say for the ledger what was done."""

    session: Session
    store: Store
    reporter: Reporter
    resolved: Resolved
    chain: Chain
    entries: list[StageEntry] = field(default_factory=list)

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.store, self.resolved.pipeline.name)

    def fit_transforms(self) -> None:
        """Fit the transforms before the index, in one pass over the vectors."""
        path = self.chain.transforms_fingerprint
        if path is None or self.store.info(chain_record_path(path)) is not None:
            return
        index = self.resolved.pipeline.index
        job = MomentsJob(
            self.store.url, self.chain.embeddings_fingerprint, tuple(sorted(self.chain.embeddings.values()))
        )
        started = time.monotonic()
        with self.reporter.stage(TRANSFORMS, 1, "fit") as advance:
            documents, queries = embedding_moments(self.session, job), query_moments(self.session, self.resolved)
            fitted = fit_chain(index.steps(), documents.dimension, documents, queries)
            write_chain(self.store, path, fitted)
            advance(1, f"{fitted} on {self.chain.rows:,} vectors")
        self.entries.append(vectors_read(TRANSFORMS, self.chain.rows, started, self.resolved))

    def train(self) -> None:
        """Train the empty index that every shard is built from."""
        if self.store.info(training_record_path(self.chain.training_fingerprint)) is not None:
            return
        fragments = tuple(sorted(self.chain.embeddings.values()))
        task = TrainingTask(
            self.store.url,
            self.chain.embeddings_fingerprint,
            fragments,
            self.chain.rows,
            self.chain.spec,
            self.chain.training_fingerprint,
            transforms=self.chain.transforms_fingerprint,
            centroids=self._centroids(),
            with_mean=self.resolved.stored is not None and is_lvq(self.resolved.stored),
        )
        started = time.monotonic()
        with self.reporter.stage(TRAINING, 1, "index") as advance:
            rows = self.session.run(train, task)
            advance(1, f"{self.chain.spec.factory} on {rows:,} vectors")
        self.entries.append(vectors_read(TRAINING, rows, started, self.resolved))

    def _centroids(self) -> str | None:
        """Centroids of deduplication, or of k-means over all vectors, or in two levels where they are many; None where
        training finds them by itself."""
        shared = self._shared_job()
        if shared is not None:
            fit_centroids(self.session, shared)  # which is done, unless clean-up took them
            return shared.fingerprint
        iterations, cells = self.resolved.pipeline.index.iterations, nlist_of(self.chain.spec)
        if not cells or (iterations == 0 and cells < TWO_LEVEL_CENTROIDS):
            return None
        spec = ClusteringSpec(
            cells,
            self.chain.spec.dimension,
            spherical=compares_products(self.chain.spec),
            training_rows=min(self.chain.spec.training_rows, BEGUN_ROWS_PER_CELL * cells if iterations else MOST_ROWS),
            seed=self.chain.spec.seed,
            sample_iterations=BEGUN_ITERATIONS if iterations else SAMPLE_ITERATIONS,
            iterations=iterations,
        )
        job = ClusteringJob(
            self.store.url,
            self.chain.training_fingerprint,
            self.chain.embeddings_fingerprint,
            tuple(sorted(self.chain.embeddings.values())),
            self.chain.rows,
            spec,
            transforms=self.chain.transforms_fingerprint,
        )
        with self.reporter.stage(CENTROIDS, iterations + 1, "iterations") as advance:
            fit_centroids(self.session, job, lambda one: advance(1, f"{one.rows:,} vectors"))
        return job.fingerprint

    def _shared_job(self) -> ClusteringJob | None:
        """What finds the centroids of deduplication, where the index takes these."""
        plan, encoded = self.chain.deduplicated, self.chain.encoded
        if self.chain.shared_centroids is None or plan is None or encoded is None or plan.clustering is None:
            return None
        return centroids_job(self.store.url, plan, encoded, plan.clustering, self.resolved.encoder.dimension)

    def build_shards(self, vectors: int) -> list[ShardRecord]:
        """Build the shards that are missing; `vectors` is how many rows there are for the ledger to count."""
        started = time.monotonic()
        count = self.resolved.pipeline.index.shards
        records = self._published_shards() or finished_shards(self.store, self.chain.shards_fingerprint, count)
        before = len(records)
        todo = [shard for shard in range(count) if shard not in records]
        job = self._shard_job()
        if job.sharding is Sharding.CLUSTER and not self.catalog.has_manifest(self.chain.version):
            self._share_cells(job)
        if todo:
            if job.sharding is Sharding.CLUSTER:
                self._place(job)
            deal_links(self.session, self._links_job())
            with self.reporter.stage(SHARDS, len(todo), "shards") as advance:
                for record in self.session.stream(build_shard, [ShardTask(job, shard) for shard in todo]):
                    records[record.shard] = record
                    advance(1, f"{sum(one.rows for one in records.values()):,} vectors")
        built = [records[shard] for shard in todo]
        self.entries.append(
            StageEntry(
                stage=SHARDS,
                rows_in=vectors,
                rows_out=sum(record.rows for record in records.values()),
                fragments=count,
                fragments_done_before=before,
                seconds=time.monotonic() - started,
                busy_s=sum(record.busy_s for record in built),
                bytes_read=sum(record.bytes_read for record in built),
                bytes_written=sum(file.size_bytes for record in built for file in record.files),
            )
        )
        return [records[shard] for shard in range(count)]

    def _place(self, job: ShardJob) -> None:
        """Write every row to the shard that owns its cell."""
        pairs = {pair.embeddings: pair for pair in job.fragments}
        placement = PlacementJob(job.source, job.fingerprint, self._cells_job())
        todo = sorted(pairs.keys() - finished_fragments(self.store, PLACEMENT, job.fingerprint))
        with self.reporter.stage(PLACEMENT, len(todo), "fragments") as advance:
            for _ in self.session.stream(place_rows, [PlacementTask(placement, pairs[name]) for name in todo]):
                advance(1, "")

    def _cells_job(self) -> CellsJob:
        return CellsJob(
            self.store.url,
            self.chain.training_fingerprint,
            self.chain.embeddings_fingerprint,
            self.chain.training_fingerprint,
            nlist_of(self.chain.spec),
            self.chain.transforms_fingerprint,
        )

    def _share_cells(self, job: ShardJob) -> None:
        """Find the cell of every row, and share out cells to shards, unless that was done."""
        if self.store.info(owners_path(job.fingerprint)) is not None:
            return
        cells, fragments = self._cells_job(), sorted(self.chain.embeddings.values())
        todo = sorted(set(fragments) - finished_fragments(self.store, CELLS, cells.fingerprint))
        with self.reporter.stage(CELLS, len(todo), "fragments") as advance:
            for work in self.session.stream(write_cells, [CellsTask(cells, name) for name in todo]):
                advance(1, f"{work.receipt.rows_out:,} vectors")
        groups = [fragments[i : i + FRAGMENTS_PER_COUNT] for i in range(0, len(fragments), FRAGMENTS_PER_COUNT)]
        counts = self.session.stream(count_cells, [CountTask(cells, tuple(group)) for group in groups])
        task = SharingTask(
            self.store.url,
            job.fingerprint,
            self.chain.embeddings_fingerprint,
            tuple(fragments),
            self.chain.rows,
            self.chain.training_fingerprint,
            self.chain.transforms_fingerprint,
            sum(counts, np.zeros(cells.cells, np.int64)),
            job.shards,
            self.chain.spec.seed,
        )
        imbalance = self.session.run(share_out, task)
        if imbalance > MOST_IMBALANCE:
            self.reporter.warn(
                f"the largest shard has {imbalance:.2f} times the mean of rows, as cells are not cut: set index.nlist "
                "higher, or index.shards lower"
            )

    def _published_shards(self) -> dict[int, ShardRecord]:
        """The shards of this very version, if it is published: nothing is ever written into its folder again."""
        if not self.catalog.has_manifest(self.chain.version):
            return {}
        folder = self.catalog.version_folder(self.chain.version)
        return {record.shard: record for record in shards_of(self.catalog.manifest(self.chain.version), folder)}

    def _shard_job(self) -> ShardJob:
        resolved = self.resolved
        pairs = [
            FragmentPair(fact.passages, self.chain.embeddings[fact.passages], fact.kept < fact.passages_in)
            for fact in self.chain.facts
            if fact.passages in self.chain.embeddings
        ]
        return ShardJob(
            source=RowSource(
                self.store.url,
                resolved.stage_fingerprint(PASSAGES),
                resolved.selection_fingerprint,
                self.chain.embeddings_fingerprint,
            ),
            fingerprint=self.chain.shards_fingerprint,
            folder=self.catalog.version_folder(self.chain.version),
            training_fingerprint=self.chain.training_fingerprint,
            fragments=tuple(sorted(pairs, key=lambda pair: pair.embeddings)),
            shards=resolved.pipeline.index.shards,
            spec=self.chain.spec,
            dimension=resolved.encoder.dimension,
            stored=resolved.stored,
            sharding=resolved.pipeline.index.sharding,
            transforms=self.chain.transforms_fingerprint,
            link_ranges=self._links_job().ranges,
        )

    def _links_job(self) -> LinksJob:
        """The links of all passages that stayed out, by their text or by meaning, to be dealt out to shards."""
        plan, encoded = self.chain.deduplicated, self.chain.encoded
        source = LinkSource(
            self.resolved.selection_fingerprint, fragments=part_of_corpus(self.resolved, self.chain.facts)
        )
        links = sum(fact.passages_in - fact.kept for fact in self.chain.facts)
        if plan is not None and encoded is not None:
            fragments = tuple(sorted(plan.fragment(name) for name in encoded.embeddings.values()))
            source = replace(source, kept_fingerprint=plan.kept, kept_fragments=fragments)
            links += encoded.rows - self.chain.rows
        return LinksJob(self.store.url, self.chain.shards_fingerprint, source, link_ranges(links))

    def place_files(self) -> VersionFiles:
        """What shards share, in the version's folder."""
        folder = self.catalog.version_folder(self.chain.version)
        if self.catalog.has_manifest(self.chain.version):
            return VersionFiles(folder, files_of(self.catalog.manifest(self.chain.version)))
        return place_files(self.store, folder, self.resolved, self.chain)


def query_moments(session: Session, resolved: Resolved) -> Moments | None:
    """The moments of the queries that transforms are fitted to; None where the file names none."""
    path = resolved.pipeline.index.queries
    if path is None:
        return None
    store, name = split_path(path)
    vectors = session.run(encode_queries, EncodeQueriesTask(store.url, name, resolved.query_encoder)).vectors
    return moments_of(vectors, vectors.mean(axis=0, dtype=np.float64))


def vectors_read(stage: str, vectors: int, started: float, resolved: Resolved) -> StageEntry:
    """The entry of a stage that reads vectors and loses none."""
    seconds = time.monotonic() - started
    return StageEntry(
        stage, vectors, vectors, seconds=seconds, busy_s=seconds, bytes_read=vectors * vector_bytes(resolved)
    )
