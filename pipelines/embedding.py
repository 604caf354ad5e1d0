"""Make the vectors of passages: the encoder workers, what they are told, and the vectors that are known already."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penstock.cluster.fragments import Work
from penstock.cluster.jobs.embeddings import EmbeddingJob, EmbeddingTask, KnownTask, Pool, embed_fragments, find_known
from penstock.cluster.jobs.selection import bucket_count
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path, stage_record_path
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.chunking import PassageType
from penstock.pipelines.embedding_meter import EmbeddingMeter
from penstock.pipelines.loading import Origin, PipelineFileInvalid
from penstock.pipelines.planning import FragmentFacts, Resolved, finished_fragments, vector_bytes
from penstock.pipelines.progress import Reporter
from penstock.pipelines.records import read_json

# An actor takes a little less than its CPUs, so that reading and writing find a place beside a full pool.
ACTOR_CPU_SHARE = 0.98


@dataclass
class Embedding:
    """Embeds fragments of passages on workers; vectors that earlier fragments hold for a text are taken from there."""

    session: Session
    store: Store
    reporter: Reporter
    resolved: Resolved
    origin: Origin
    run_id: str

    def job(self, fingerprint: str) -> EmbeddingJob:
        """What workers are told of the embeddings stage of this fingerprint."""
        resolved = self.resolved
        workers = resolved.pipeline.embedding.workers
        return EmbeddingJob(
            root=self.store.url,
            passages_fingerprint=resolved.stage_fingerprint(PASSAGES),
            selection_fingerprint=resolved.selection_fingerprint,
            fingerprint=fingerprint,
            encoder=resolved.encoder,
            store_format=resolved.pipeline.embedding.store,
            threads=workers.cpus,
            device="cuda" if workers.gpus else "cpu",
            timeout_s=workers.timeout_s,
            late=resolved.chunker.kind is PassageType.LATE,
        )

    def embed(
        self,
        fingerprint: str,
        fragments: Mapping[str, str],
        todo: Sequence[FragmentFacts],
        pool: Pool,
        closes_at: float = math.inf,
    ) -> tuple[list[Work], dict[str, Any] | None]:
        """Embed fragments of passages; the work done, and what the workers did, for people and machines.

        Args:
            fingerprint: of the embeddings stage.
            fragments: the embeddings fragment of each passages fragment.
            closes_at: when no more fragments are begun, in seconds since the epoch.
        """
        job = replace(self.job(fingerprint), closes_at=closes_at)
        donors = self._donors(fingerprint)
        if donors:
            job = replace(job, known=self._known(job, todo, donors))
        tasks = [EmbeddingTask(fact.passages, fragments[fact.passages], fact.kept < fact.passages_in) for fact in todo]
        works: list[Work] = []
        rows = sum(fact.kept for fact in todo)
        with self.reporter.stage("embeddings", rows, "passages") as advance:
            meter = EmbeddingMeter(rows, pool.most, advance)
            meter.starting()
            for work in embed_fragments(self.session, job, tasks, pool, meter.live):
                works.append(work)
                meter.finished(work)
        for warning in meter.warnings(works):
            self.reporter.warn(warning)
        return works, meter.summary(works)

    def _donors(self, fingerprint: str) -> list[str]:
        """Embeddings files that may hold vectors of the passages: of this encoder, or of it with more components."""
        done = sorted(finished_fragments(self.store, EMBEDDINGS, fingerprint))
        donors = [fragment_path(EMBEDDINGS, fingerprint, name) for name in done]
        own = self.resolved.parameters[EMBEDDINGS]
        for name in self.store.folders(f"stages/{EMBEDDINGS}"):
            record = read_json(self.store, stage_record_path(EMBEDDINGS, name)) or {}
            theirs = record.get("parameters", {})
            same = {**theirs, "dimension": own["dimension"]} == own
            if same and theirs["dimension"] > own["dimension"]:
                names = sorted(finished_fragments(self.store, EMBEDDINGS, name))
                return donors + [fragment_path(EMBEDDINGS, name, fragment) for fragment in names]
        return donors

    def _known(self, job: EmbeddingJob, todo: Sequence[FragmentFacts], donors: list[str]) -> tuple[str, ...]:
        """Tables of the vectors that earlier fragments of this encoder hold for passages to embed now."""
        folders = {donor.rpartition("/")[0] for donor in donors}
        stored = sum(info.size_bytes for folder in folders for info in self.store.list(folder))
        buckets = bucket_count(stored // vector_bytes(self.resolved))
        pending = tuple(fact.passages for fact in todo)
        tasks = [KnownTask(job, self.run_id, pending, tuple(donors), bucket, buckets) for bucket in range(buckets)]
        paths, found = [], 0
        with self.reporter.stage("reuse", buckets, "buckets") as advance:
            for path, rows in self.session.stream(find_known, tasks):
                paths += [path] if path else []
                found += rows
                advance(1, f"{found:,} vectors known")
        return tuple(sorted(paths))

    def pool(self, tasks: int) -> Pool:
        """The encoder workers: as many as the file says, or as fit; never more than there are fragments."""
        workers = self.resolved.pipeline.embedding.workers
        have = self.session.resources()
        fit = int(have.get("CPU", 1) // workers.cpus)
        if workers.gpus:
            fit = min(fit, int(have.get("GPU", 0) / workers.gpus))
        least = workers.count or workers.min or max(fit, 1)
        most = workers.max or least
        if least > fit and not os.environ.get("RAY_ADDRESS"):
            rule = (
                f"({least} workers of {workers.cpus} CPUs and {workers.gpus:g} GPUs) must fit on this machine, "
                f"which has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; lower them, "
                "or set RAY_ADDRESS to a cluster"
            )
            raise PipelineFileInvalid([self.origin.problem("embedding.workers", rule)])
        if not os.environ.get("RAY_ADDRESS"):
            most = min(most, max(fit, 1))
        return Pool(min(least, tasks), min(most, tasks), workers.cpus * ACTOR_CPU_SHARE, workers.gpus)
