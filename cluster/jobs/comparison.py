"""Two published versions → how many documents were added, removed and changed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.node import connect
from penstock.cluster.published import open_rows
from penstock.cluster.storage import Store
from penstock.operators.comparing import EXAMPLES, DocumentChanges, compare_documents, digest_documents
from penstock.operators.identity import row_hashes

BATCH_ROWS = 16_384


@dataclass(frozen=True)
class ComparisonTask:
    """One bucket of the documents of two versions."""

    root: str
    old: tuple[ShardRecord, ...]
    new: tuple[ShardRecord, ...]
    bucket: int
    buckets: int


def compare_versions(task: ComparisonTask) -> DocumentChanges:
    """Read both versions' rows, keep the bucket, compare. Memory: 16 bytes for each passage of the bucket, twice."""
    store = connect(task.root)
    old, new = (digest_documents(_rows(store, shards), task.bucket, task.buckets) for shards in (task.old, task.new))
    found = compare_documents(old, new)
    examples = {
        name: _names(_rows(store, task.old if name == "removed" else task.new), found[name][:EXAMPLES])
        for name in ("added", "removed", "changed")
    }
    counts = {name: len(hashes) for name, hashes in found.items()}
    return DocumentChanges(**counts, examples=examples)


def _rows(store: Store, shards: tuple[ShardRecord, ...]) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        yield from open_rows(store, shard).select(["document_id", "text"]).to_batches(BATCH_ROWS)


def _names(rows: Iterator[pa.RecordBatch], hashes: np.ndarray) -> tuple[str, ...]:
    """The ids behind a few hashes."""
    found: set[str] = set()
    for batch in rows:
        if len(found) == len(hashes):
            break
        ids = batch.column("document_id").to_pylist()
        inside = np.flatnonzero(np.isin(row_hashes(ids), hashes))
        found |= {ids[row] for row in inside}
    return tuple(sorted(found))
