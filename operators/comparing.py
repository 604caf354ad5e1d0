"""What differs between two published versions: documents by the text of their passages, answers by their ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.operators.deduplication import bucket_of, hash_prefix
from penstock.operators.identity import hash_texts, row_hashes

EXAMPLES = 5
COUNTS = ("added", "removed", "changed", "unchanged")


@dataclass(frozen=True)
class DocumentDigests:
    """Documents by a hash of their id, sorted: `ids` uint64 (n,), and a `digest` uint64 (n,) of what they say."""

    ids: np.ndarray
    digests: np.ndarray


@dataclass(frozen=True)
class DocumentChanges:
    """How many documents two versions have in common or not; examples are ids."""

    added: int
    removed: int
    changed: int
    unchanged: int
    examples: dict[str, tuple[str, ...]]

    def add(self, other: "DocumentChanges") -> "DocumentChanges":
        """The changes of two disjoint sets of documents."""
        examples = {
            name: tuple(sorted({*self.examples.get(name, ()), *other.examples.get(name, ())})[:EXAMPLES])
            for name in {*self.examples, *other.examples}
        }
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return DocumentChanges(**counts, examples=examples)


def digest_documents(rows: Iterable[pa.RecordBatch], bucket: int, buckets: int) -> DocumentDigests:
    """The documents of one bucket. A digest is the sum of hashes of the passages' texts, and so independent of their
    order and of the shards they lie in. Memory: 16 bytes for each passage of the bucket, twice.

    Args:
        rows: batches with columns document_id and text.
    """
    ids, digests = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for batch in rows:
        own = row_hashes(batch.column("document_id").to_pylist())
        inside = np.flatnonzero(bucket_of(own, buckets) == bucket)
        texts = batch.column("text").take(pa.array(inside)).to_pylist()
        ids.append(own[inside])
        digests.append(hash_prefix(pa.chunked_array([hash_texts(texts)])))
    unique, group = np.unique(np.concatenate(ids), return_inverse=True)
    sums = np.zeros(len(unique), np.uint64)
    np.add.at(sums, group, np.concatenate(digests))  # wraps around, which a digest may
    return DocumentDigests(unique, sums)


def compare_documents(old: DocumentDigests, new: DocumentDigests) -> dict[str, np.ndarray]:
    """Hashes of the documents that were added, removed and changed, and of those that are unchanged, uint64 each."""
    common, in_old, in_new = np.intersect1d(old.ids, new.ids, assume_unique=True, return_indices=True)
    same = old.digests[in_old] == new.digests[in_new]
    return {
        "added": np.setdiff1d(new.ids, common, assume_unique=True),
        "removed": np.setdiff1d(old.ids, common, assume_unique=True),
        "changed": common[~same],
        "unchanged": common[same],
    }


def neighbour_churn(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Share of the k answers of each query that are no longer there, float64 (q,); NaN where there were none.

    Args:
        old: object (q, k) of str, None where there is no answer. new: likewise.
    """
    churn = np.full(len(old), np.nan)
    for query, (before, after) in enumerate(zip(old, new, strict=True)):
        wanted = _present(before)
        if wanted:
            churn[query] = len(wanted - _present(after)) / len(wanted)
    return churn


def _present(ids: Sequence[str | None]) -> set[str]:
    return {name for name in ids if name is not None}
