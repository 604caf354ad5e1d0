"""How many vectors encoders made of a space's fragments, and of how many texts: more of the former are waste."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import read_fragment
from penstock.cluster.jobs.selection import ReceiptsTask, bucket_count, read_receipts
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.operators.deduplication import bucket_of, hash_prefix
from penstock.operators.identity import TEXT_HASH_TYPE

RECEIPTS_PER_TASK = 500


@dataclass(frozen=True)
class EncodedTexts:
    """Of finished fragments: vectors that an encoder made, not taken over from an earlier fragment; and distinct texts
    that have a vector.

    Both are equal where nothing valid was embedded twice. A fragment whose worker or driver was killed is not finished
    and has no receipt: what was encoded of it is lost, and counts when it is made again. Fewer vectors than texts were
    made where some came from longer ones, in another folder.
    """

    encoded: int
    texts: int


@dataclass(frozen=True)
class TextsTask:
    """One bucket of the texts of some embeddings fragments."""

    root: str
    fingerprint: str
    fragments: tuple[str, ...]
    bucket: int
    buckets: int


def count_encoded(session: Session, root: str, fingerprint: str, fragments: Sequence[str]) -> EncodedTexts:
    """What encoders made for finished embeddings fragments of a stage: samples, slices and whole ones alike."""
    starts = range(0, len(fragments), RECEIPTS_PER_TASK)
    groups = [tuple(fragments[start : start + RECEIPTS_PER_TASK]) for start in starts]
    tasks = [ReceiptsTask(root, EMBEDDINGS, fingerprint, group) for group in groups]
    receipts = [receipt for group in session.stream(read_receipts, tasks) for receipt in group]
    buckets = bucket_count(sum(receipt.rows_out for receipt in receipts))
    parts = [TextsTask(root, fingerprint, tuple(fragments), bucket, buckets) for bucket in range(buckets)]
    return EncodedTexts(
        encoded=sum(receipt.encoded for receipt in receipts), texts=sum(session.stream(distinct_texts, parts))
    )


def distinct_texts(task: TextsTask) -> int:
    """Distinct text hashes of the bucket. Memory: 16 bytes for each of its rows, and a hash table of these."""
    store, parts = connect(task.root), [pa.chunked_array([], TEXT_HASH_TYPE)]
    for fragment in task.fragments:
        path = fragment_path(EMBEDDINGS, task.fingerprint, fragment)
        column = read_fragment(store, path, ["text_hash"]).column("text_hash")
        inside = np.flatnonzero(bucket_of(hash_prefix(column), task.buckets) == task.bucket)
        parts.append(column.take(pa.array(inside)))
    found = pa.chunked_array([chunk for part in parts for chunk in part.chunks], TEXT_HASH_TYPE)
    return int(pc.count_distinct(found).as_py())
