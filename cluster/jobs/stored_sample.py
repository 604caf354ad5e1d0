"""A published version → a seeded sample of its texts, or of its vectors: those stored for re-ranking, or those it was
built from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.jobs.sampling import oversampled_share, sample_vectors
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.published import open_ids, open_rows, open_stored
from penstock.operators.identity import row_hashes
from penstock.operators.indexing import Metric
from penstock.operators.sharding import hash_range, sample_order
from penstock.operators.space_report import SpaceReport, space_report


@dataclass(frozen=True)
class StoredSampleTask:
    """About `wanted` of a version's `rows`: those of one shard; its vectors are stored, where these are sampled."""

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
    hashes, rows = _in_range(ids, task)
    return StoredSample(hashes, vectors.take(rows))


def sample_texts(tasks: Sequence[StoredSampleTask]) -> list[str]:
    """Texts of the rows that are the sample of all shards of a version, in the order of hashes. Fetches ids and rows;
    hashes every id.

    A shard's first rows are no sample: rows lie fragment after fragment, which are cut from files in turn.
    """
    hashes, texts = [], []
    for task in tasks:
        store = connect(task.root)
        found, rows = _in_range(open_ids(store, task.shard).column("id"), task)
        hashes.append(found)
        texts += open_rows(store, task.shard).column("text").take(pa.array(rows)).to_pylist()
    order = sample_order(np.concatenate(hashes), tasks[0].seed)
    return [texts[row] for row in order[: tasks[0].wanted].tolist()]


def _in_range(ids: pa.ChunkedArray, task: StoredSampleTask) -> tuple[np.ndarray, np.ndarray]:
    """The hashes uint64 (n,), and the numbers int64 (n,), of the rows in the seed's range."""
    hashes = row_hashes(ids.to_pylist())
    inside = np.zeros(len(hashes), dtype=bool)
    for first, last in hash_range(oversampled_share(task.wanted, task.rows), task.seed):
        inside |= (hashes >= np.uint64(first)) & (hashes <= np.uint64(last))
    rows = np.flatnonzero(inside)
    return hashes[rows], rows


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
