"""A published version → a seeded sample of its vectors: those stored for re-ranking, or those it was built from."""

from dataclasses import dataclass

import numpy as np

from penstock.cluster.jobs.sampling import oversampled_share, sample_vectors
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.published import open_stored
from penstock.operators.identity import row_hashes
from penstock.operators.indexing import Metric
from penstock.operators.sharding import hash_range, sample_order
from penstock.operators.space_report import SpaceReport, space_report


@dataclass(frozen=True)
class StoredSampleTask:
    """About `wanted` of a version's `rows`: those of one shard, whose vectors are stored."""

    root: str
    shard: ShardRecord
    rows: int
    wanted: int
    seed: int


@dataclass(frozen=True, eq=False)
class StoredSample:
    """Row hashes, uint64 (n,), and the vectors of these rows, float32 (n, d)."""

    hashes: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True)
class EmbeddingsSampleTask:
    """`wanted` of the `rows` vectors in embeddings fragments."""

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    wanted: int
    seed: int


@dataclass(frozen=True, eq=False)
class ReportTask:
    """A sample, float32 (n, d), to report on."""

    vectors: np.ndarray
    metric: Metric
    seed: int


def sample_stored(task: StoredSampleTask) -> StoredSample:
    """The shard's rows in the seed's range of hashes. Fetches its ids and vectors; hashes every id."""
    ids, vectors = open_stored(connect(task.root), task.shard)
    hashes = row_hashes(ids.to_pylist())
    share = oversampled_share(task.wanted, task.rows)
    inside = np.zeros(len(hashes), dtype=bool)
    for first, last in hash_range(share, task.seed):
        inside |= (hashes >= np.uint64(first)) & (hashes <= np.uint64(last))
    rows = np.flatnonzero(inside)
    return StoredSample(hashes[rows], vectors.take(rows))


def merge_stored(parts: list[StoredSample], wanted: int, seed: int) -> np.ndarray:
    """The first `wanted` rows behind the start of the seed's range, in that order: float32 (n, d), the same rows for
    any number of shards, and nearly the same for two versions that share most of theirs."""
    hashes = np.concatenate([part.hashes for part in parts])
    vectors = np.concatenate([part.vectors for part in parts])
    sample: np.ndarray = vectors[sample_order(hashes, seed)[:wanted]]
    return sample


def sample_embeddings(task: EmbeddingsSampleTask) -> np.ndarray:
    """float32 (n, d); raises FileNotFoundError where a fragment was cleaned up."""
    paths = [fragment_path(EMBEDDINGS, task.embeddings_fingerprint, name) for name in task.fragments]
    return sample_vectors(connect(task.root), paths, task.rows, task.wanted, task.seed)


def report_space(task: ReportTask) -> SpaceReport:
    """The report of a sample."""
    return space_report(task.vectors, task.metric, task.seed)
