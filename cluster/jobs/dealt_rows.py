"""What was found of the rows of a bucket → the same by fragment: who writes a fragment reads what concerns it alone.

A bucket is a range of row hashes, which is one slice of every fragment.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import read_hash_range, read_rows_with, write_fragment
from penstock.cluster.jobs.document_pairs import WENT_SCHEMA, DocumentJob, passages_gone
from penstock.cluster.jobs.groups import read_groups
from penstock.cluster.jobs.pair_ends import bucket_range
from penstock.cluster.jobs.removal import RemovalJob, removed_of
from penstock.cluster.layout import EMBEDDINGS, REMOVAL, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.sorted_places import places_among

# What follows the group is null where a row stays; of whole documents that go also where the row is like none in the
# one that stays. Rows that go by themselves have no kept_document and no share.
DEALT_SCHEMA = pa.schema(
    [
        ("fragment", pa.int32()),
        ("row_hash", pa.uint64()),
        ("group", pa.uint64()),
        *list(WENT_SCHEMA)[1:],
    ]
)


@dataclass(frozen=True)
class DealTask:
    """A bucket of a removal of rows, or of the rows of `documents`, of which the groups are known."""

    removal: RemovalJob
    embeddings_fingerprint: str
    bucket: int
    documents: DocumentJob | None = None


def deal_rows(
    session: Session, removal: RemovalJob, embeddings_fingerprint: str, documents: DocumentJob | None = None
) -> None:
    """Deals out what is known of all rows."""
    tasks = [DealTask(removal, embeddings_fingerprint, bucket, documents) for bucket in range(removal.buckets)]
    for _ in session.stream(deal_bucket, tasks):
        pass


def deal_bucket(task: DealTask) -> int:
    """Write the rows of a bucket that are in groups (DEALT_SCHEMA, by fragment and row hash); returns their number.
    Memory: these rows, and the row hashes of a fragment in the bucket.

    Raises:
        ValueError: a row is of no fragment, or one that goes is in no group.
    """
    job, store = task.removal, connect(task.removal.root)
    groups = read_groups(store, job, task.bucket)
    hashes = groups.column("row_hash").to_numpy()
    fragment = np.full(len(hashes), -1, np.int32)
    for number, name in enumerate(job.fragments):
        path = fragment_path(EMBEDDINGS, task.embeddings_fingerprint, name)
        rows = read_hash_range(store, path, *bucket_range(task.bucket, job.buckets), []).column("row_hash").to_numpy()
        fragment[places_among(hashes, rows)[1]] = number
    if (fragment < 0).any():
        raise ValueError(
            f"rows of removal {job.fingerprint} ({int((fragment < 0).sum())} of {len(fragment)} in bucket "
            f"{task.bucket}) must be of its fragments, these are of none: pairs of other embeddings were joined; run "
            "again"
        )
    columns = [pa.array(fragment), groups.column("row_hash"), groups.column("group"), *_gone(store, task, hashes)]
    table = pa.table(columns, schema=DEALT_SCHEMA).take(pa.array(np.argsort(fragment, kind="stable")))
    write_fragment(store, _path(job, task.bucket), table)
    return len(table)


def read_dealt(store: Store, removal: RemovalJob, fragment: str) -> pa.Table:
    """What is known of the rows of a fragment that are in groups (DEALT_SCHEMA), by row hash."""
    number = removal.fragments.index(fragment)
    parts = [read_rows_with(store, _path(removal, bucket), "fragment", number) for bucket in range(removal.buckets)]
    return pa.concat_tables(parts)


def _gone(store: Store, task: DealTask, hashes: np.ndarray) -> list[pa.ChunkedArray]:
    """What follows the group, for each of the rows, ascending uint64 (n,)."""
    job, bucket = task.removal, task.bucket
    documents = task.documents
    gone = removed_of(store, job, bucket) if documents is None else passages_gone(store, documents, bucket)
    row, place = places_among(hashes, gone.column("removed").to_numpy())
    if len(row) < len(gone):
        raise ValueError(
            f"rows of removal {job.fingerprint} that go ({len(gone) - len(row)} of {len(gone)} in bucket {bucket}) "
            "must be in groups, these are in none: groups of other pairs were stored; run again"
        )
    at = np.full(len(hashes), -1)
    at[place] = row
    taken = gone.take(pa.array(at, mask=at < 0))
    absent = pa.nulls(len(hashes))
    return [
        taken.column(field.name) if field.name in taken.column_names else absent.cast(field.type)
        for field in list(WENT_SCHEMA)[1:]
    ]


def _path(removal: RemovalJob, bucket: int) -> str:
    return fragment_path(REMOVAL, removal.fingerprint, f"dealt-{bucket:05d}")
