"""What was found of the rows of a bucket → the same by fragment: who writes a fragment reads what concerns it alone.

A bucket is a range of row hashes, which is one slice of every fragment.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import read_hash_range, read_rows_with, write_fragment
from penstock.cluster.jobs.groups import read_groups
from penstock.cluster.jobs.pair_ends import bucket_range
from penstock.cluster.jobs.removal import RemovalJob, removed_of
from penstock.cluster.jobs.similarity import SIMILARITY
from penstock.cluster.layout import EMBEDDINGS, REMOVAL, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store

# kept and similarity are null where a row stays, and where whole documents go.
DEALT_SCHEMA = pa.schema(
    [
        ("fragment", pa.int32()),
        ("row_hash", pa.uint64()),
        ("group", pa.uint64()),
        ("kept", pa.uint64()),
        (SIMILARITY, pa.float32()),
    ]
)


@dataclass(frozen=True)
class DealTask:
    """A bucket of a removal of rows, or (without `removes`) of one of documents, of which the groups are known."""

    removal: RemovalJob
    embeddings_fingerprint: str
    bucket: int
    removes: bool = True


def deal_rows(session: Session, removal: RemovalJob, embeddings_fingerprint: str, removes: bool = True) -> None:
    """Deals out what is known of all rows."""
    tasks = [DealTask(removal, embeddings_fingerprint, bucket, removes) for bucket in range(removal.buckets)]
    for _ in session.stream(deal_bucket, tasks):
        pass


def deal_bucket(task: DealTask) -> int:
    """Write the rows of a bucket that are in groups (DEALT_SCHEMA, by fragment and row hash); returns their number.
    Memory: these rows, and the row hashes of a fragment in the bucket.

    Raises:
        ValueError: a row is of no fragment.
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
    kept, similarity = _removed(store, task, hashes)
    columns = [pa.array(fragment), groups.column("row_hash"), groups.column("group"), kept, similarity]
    table = pa.table(columns, schema=DEALT_SCHEMA).take(pa.array(np.argsort(fragment, kind="stable")))
    write_fragment(store, _path(job, task.bucket), table)
    return len(table)


def read_dealt(store: Store, removal: RemovalJob, fragment: str) -> pa.Table:
    """What is known of the rows of a fragment that are in groups (DEALT_SCHEMA), by row hash."""
    number = removal.fragments.index(fragment)
    parts = [read_rows_with(store, _path(removal, bucket), "fragment", number) for bucket in range(removal.buckets)]
    return pa.concat_tables(parts)


def _removed(store: Store, task: DealTask, hashes: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """What stays for each of the rows, ascending uint64 (n,), and how similar it is; null for those that stay."""
    kept, similarity = np.zeros(len(hashes), np.uint64), np.zeros(len(hashes), np.float32)
    stays = np.ones(len(hashes), bool)
    if task.removes:
        removed = removed_of(store, task.removal, task.bucket)
        row, place = places_among(hashes, removed.column("removed").to_numpy())
        kept[place] = removed.column("kept").to_numpy()[row]
        similarity[place] = removed.column(SIMILARITY).to_numpy()[row]
        stays[place] = False
    return pa.array(kept, mask=stays), pa.array(similarity, mask=stays)


def places_among(ascending: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the wanted, uint64 (n,), are among the ascending ones, and where these stand there: int64 (m,) each."""
    place = np.searchsorted(ascending, wanted)
    found = np.flatnonzero(place < len(ascending))
    found = found[ascending[place[found]] == wanted[found]]
    return found, place[found]


def _path(removal: RemovalJob, bucket: int) -> str:
    return fragment_path(REMOVAL, removal.fingerprint, f"dealt-{bucket:05d}")
