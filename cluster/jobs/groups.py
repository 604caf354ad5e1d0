"""Pairs of similar rows → groups: rows that chains of pairs link, of which the ends need not be similar.

A group is a name to look at duplicates by. What goes is decided by pairs alone.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import read_fragment, write_fragment
from penstock.cluster.jobs.removal import RemovalJob
from penstock.cluster.jobs.similarity import LEFT, PAIRS_PER_FILE, RIGHT, stored_pairs
from penstock.cluster.jobs.standing import decisions_on
from penstock.cluster.layout import REMOVAL, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.deduplication import bucket_of
from penstock.operators.independent_set import component_labels

_Ends = tuple[np.ndarray, np.ndarray]


def group_rows(job: RemovalJob) -> int:
    """Write the group of every row that is in a pair or was represented by another before: the lowest hash of its rows.
    Returns the number of groups. Memory of this one task: 40 bytes for each of these rows, and for each of
    PAIRS_PER_FILE pairs."""
    store = connect(job.root)
    hashes = np.empty(0, np.uint64)
    for ends in _gathered(store, job):
        hashes = np.union1d(hashes, np.concatenate(ends))
    labels = np.arange(len(hashes))
    for ends in _gathered(store, job):
        one, other = (labels[np.searchsorted(hashes, side)] for side in ends)
        labels = component_labels(one, other, len(hashes))[labels]
    buckets = bucket_of(hashes, job.buckets)
    for bucket in range(job.buckets):
        own = buckets == bucket
        table = pa.table({"row_hash": hashes[own], "group": hashes[labels[own]]})
        write_fragment(store, _path(job, bucket), table)
    return len(np.unique(labels))


def are_grouped(store: Store, job: RemovalJob) -> bool:
    last = _path(job, job.buckets - 1).rsplit("/", 1)[1]
    return last in store.names(stage_folder(REMOVAL, job.fingerprint))


def groups_of(store: Store, job: RemovalJob, rows: np.ndarray) -> np.ndarray:
    """The group uint64 (n,) of each of some rows, any uint64 (n,); a row without pairs is a group by itself."""
    groups = rows.copy()
    for bucket in range(job.buckets):
        table = read_fragment(store, _path(job, bucket))
        known, group = (table.column(name).to_numpy() for name in ("row_hash", "group"))
        place = np.searchsorted(known, rows)
        here = np.flatnonzero(place < len(known))
        here = here[known[place[here]] == rows[here]]
        groups[here] = group[place[here]]
    return groups


def _gathered(store: Store, job: RemovalJob) -> Iterator[_Ends]:
    """The ends of all pairs, about PAIRS_PER_FILE at a time."""
    waiting: list[_Ends] = []
    for ends in _all_ends(store, job):
        waiting.append(ends)
        if sum(len(one) for one, _ in waiting) >= PAIRS_PER_FILE:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[_Ends]) -> _Ends:
    return np.concatenate([one for one, _ in parts]), np.concatenate([other for _, other in parts])


def _all_ends(store: Store, job: RemovalJob) -> Iterator[_Ends]:
    for files, least in ((job.files, job.similarity), (job.equal_files, 0.0)):
        for table in stored_pairs(store, files, least):
            yield table.column(LEFT).to_numpy(), table.column(RIGHT).to_numpy()
    if job.standing is None:
        return
    for fragment in job.fragments:
        gone = decisions_on(store, job.standing, fragment)[1]
        gone = gone.filter(pc.greater(gone.column("similarity"), 0))  # what a row represents
        yield gone.column("row_hash").to_numpy(), gone.column("kept_hash").to_numpy()


def _path(job: RemovalJob, bucket: int) -> str:
    return fragment_path(REMOVAL, job.fingerprint, f"groups-{bucket:05d}")
