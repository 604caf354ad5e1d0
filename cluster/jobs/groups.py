"""Pairs of similar rows → groups: rows that chains of pairs link, of which the ends need not be similar.

A group is a name to look at duplicates by. What goes is decided by pairs alone.

Each file of pairs is first cut down to links from its rows to the lowest that they are linked to in it. Then tasks take
one bucket of rows and replace links by links to lower rows, round by round, until each row has one alone, to the lowest
of its group: the large star and the small star of Kiveris et al., "Connected components in MapReduce and beyond", SoCC
2014, which need about log n rounds. No process holds more than the rows of its bucket.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import Receipt, read_fragment, read_receipt, read_rows_with, write_fragment
from penstock.cluster.jobs.pair_ends import bucket_of
from penstock.cluster.jobs.removal import RemovalJob
from penstock.cluster.jobs.similarity import LEFT, PAIR_SCHEMA, PAIRS_PER_FILE, RIGHT, stored_pairs
from penstock.cluster.jobs.standing import GONE, decisions_on
from penstock.cluster.layout import REMOVAL, STANDING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.independent_set import component_labels

MOVED = "moved"
# Fragments of which one task reads the earlier decisions: of most a receipt says that nothing is gone, which takes
# milliseconds to read from an object store, and every bucket reads each file of links.
FRAGMENTS_PER_TASK = 128
LINKED_SCHEMA = pa.schema([("bucket", pa.int64()), ("row", pa.uint64()), ("neighbour", pa.uint64())])
_Ends = tuple[np.ndarray, np.ndarray]
_Links = tuple[np.ndarray, np.ndarray, int]  # higher and lower rows, and how many of these links are new


@dataclass(frozen=True)
class PairsTask:
    """The source of a number: files of pairs of at least a similarity, or (None) earlier decisions on fragments."""

    job: RemovalJob
    number: int
    paths: tuple[str, ...]
    least: float | None


@dataclass(frozen=True)
class StarTask:
    job: RemovalJob
    bucket: int
    round: int


def group_rows(session: Session, job: RemovalJob) -> int:
    """Write the group of every row that is in a pair or was represented by another before: the lowest hash of its rows.
    Returns the number of groups. What is done is not done again."""
    for _ in session.stream(link_pairs, _sources(job)):
        pass
    moved, number = 1, 0
    while moved:
        tasks = [StarTask(job, bucket, number) for bucket in range(job.buckets)]
        moved = sum(session.stream(link_higher, tasks)) + sum(session.stream(link_lower, tasks))
        number += 1
    return sum(session.stream(name_groups, [StarTask(job, bucket, number) for bucket in range(job.buckets)]))


def read_groups(store: Store, job: RemovalJob, bucket: int) -> pa.Table:
    """The rows of a bucket that are in groups: `row_hash`, ascending, and `group`."""
    return read_fragment(store, _path(job, f"groups-{bucket:05d}")).replace_schema_metadata()


def link_pairs(task: PairsTask) -> int:
    """Link each row of a file of pairs to the lowest that they link it to, file by file; returns 0. Memory: 100 bytes
    for each pair of a file, and PAIRS_PER_FILE links."""
    job, store = task.job, connect(task.job.root)
    name = f"linked-00000-{task.number:05d}"
    if _is_done(store, job, name):
        return 0
    links = (_to_lowest(*_pairs_of(store, task, path)) for path in task.paths)
    return _write_links(store, job, name, links, both=True)


def link_higher(task: StarTask) -> int:
    """Link the higher neighbours of the bucket's rows to the lowest neighbour of each row, or the row if it is lower
    (the large star); returns how many links moved. Memory: 16 bytes for each row of the bucket, and PAIRS_PER_FILE
    links."""
    job, store = task.job, connect(task.job.root)
    name = f"higher-{task.round:05d}-{task.bucket:05d}"
    if _is_done(store, job, name):
        return _moved(store, job, name)
    rows, lowest = _lowest(_linked(store, task, "linked"))
    lowest = np.minimum(rows, lowest)

    def links() -> Iterator[_Links]:
        for row, neighbour in _linked(store, task, "linked"):
            higher = neighbour > row
            row, low = row[higher], lowest[np.searchsorted(rows, row[higher])]
            yield neighbour[higher], low, int(np.count_nonzero(low < row))

    return _write_links(store, job, name, links(), both=False)


def link_lower(task: StarTask) -> int:
    """Link the lower neighbours of the bucket's rows, and the rows, to the lowest of these neighbours (the small star);
    returns how many links moved. Memory: as link_higher."""
    job, store = task.job, connect(task.job.root)
    name = f"linked-{task.round + 1:05d}-{task.bucket:05d}"
    if _is_done(store, job, name):
        return _moved(store, job, name)
    rows, lowest = _lowest(_linked(store, task, "higher"))

    def links() -> Iterator[_Links]:
        yield rows, lowest, 0
        for row, neighbour in _linked(store, task, "higher"):
            low = lowest[np.searchsorted(rows, row)]
            apart = neighbour != low
            yield neighbour[apart], low[apart], int(np.count_nonzero(apart))

    return _write_links(store, job, name, links(), both=True)


def name_groups(task: StarTask) -> int:
    """Write the groups of the bucket's rows; returns how many of these are the lowest of theirs."""
    job, store = task.job, connect(task.job.root)
    rows, lowest = _lowest(_linked(store, task, "linked"))
    group = np.minimum(rows, lowest)
    write_fragment(store, _path(job, f"groups-{task.bucket:05d}"), pa.table({"row_hash": rows, "group": group}))
    return int(np.count_nonzero(group == rows))


def _sources(job: RemovalJob) -> list[PairsTask]:
    decided = job.fragments if job.standing is not None else ()
    sources: list[tuple[tuple[str, ...], float | None]] = [((path,), job.similarity) for path in job.files]
    sources += [((path,), 0.0) for path in job.equal_files]
    starts = range(0, len(decided), FRAGMENTS_PER_TASK)
    sources += [(decided[start : start + FRAGMENTS_PER_TASK], None) for start in starts]
    return [PairsTask(job, number, *source) for number, source in enumerate(sources)]


def _pairs_of(store: Store, task: PairsTask, path: str) -> _Ends:
    if task.least is None:
        return _decided_pairs(store, str(task.job.standing), path)
    pairs = [PAIR_SCHEMA.empty_table(), *stored_pairs(store, [path], task.least)]
    left, right = (np.concatenate([table.column(side).to_numpy() for table in pairs]) for side in (LEFT, RIGHT))
    return left, right


def _decided_pairs(store: Store, standing: str, fragment: str) -> _Ends:
    """The rows of a fragment that are gone by earlier decisions, and what represents them."""
    if not read_receipt(store, fragment_path(STANDING, standing, fragment)).dropped.get(GONE):
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    gone = decisions_on(store, standing, fragment)[1]
    gone = gone.filter(pc.greater(gone.column("similarity"), 0))  # what a row represents
    return gone.column("row_hash").to_numpy(), gone.column("kept_hash").to_numpy()


def _to_lowest(left: np.ndarray, right: np.ndarray) -> _Links:
    """Links from the rows of pairs to the lowest that these link each to."""
    hashes, place = np.unique(np.concatenate([left, right]), return_inverse=True)
    labels = component_labels(place[: len(left)], place[len(left) :], len(hashes))
    apart = labels != np.arange(len(labels))
    return hashes[apart], hashes[labels[apart]], 0


def _lowest(links: Iterable[_Ends]) -> _Ends:
    """Rows uint64 (n,), ascending, and the lowest neighbour of each, uint64 (n,)."""
    rows, lowest = np.empty(0, np.uint64), np.empty(0, np.uint64)
    for row, neighbour in links:
        rows, lowest = np.concatenate([rows, row]), np.concatenate([lowest, neighbour])
        order = np.lexsort((lowest, rows))
        rows, lowest = rows[order], lowest[order]
        first = np.insert(rows[1:] != rows[:-1], 0, True)[: len(rows)]
        rows, lowest = rows[first], lowest[first]
    return rows, lowest


def _linked(store: Store, task: StarTask, kind: str) -> Iterator[_Ends]:
    """The links of the bucket's rows of a round, file by file."""
    folder, start = stage_folder(REMOVAL, task.job.fingerprint), f"{kind}-{task.round:05d}-"
    for name in sorted(name for name in store.names(folder) if name.startswith(start)):
        table = read_rows_with(store, f"{folder}/{name}", "bucket", task.bucket)
        if table.num_rows:
            yield table.column("row").to_numpy(), table.column("neighbour").to_numpy()


def _write_links(store: Store, job: RemovalJob, name: str, links: Iterable[_Links], both: bool) -> int:
    """Write links for the bucket of the higher row, or for those of both, to files of about PAIRS_PER_FILE. The last
    alone has the name as it is: it says that all are there, and how many are new, which is returned."""
    waiting: list[_Ends] = []
    total = moved = files = 0
    for high, low, new in links:
        waiting.append((high, low))
        total, moved = total + len(high), moved + new
        if sum(len(rows) for rows, _ in waiting) >= PAIRS_PER_FILE:
            write_fragment(store, _path(job, f"{name}-{files:05d}"), _by_bucket(waiting, job.buckets, both))
            waiting, files = [], files + 1
    receipt = Receipt(name, total, total - moved, {MOVED: moved})
    write_fragment(store, _path(job, name), _by_bucket(waiting, job.buckets, both), receipt)
    return moved


def _by_bucket(parts: list[_Ends], buckets: int, both: bool) -> pa.Table:
    """Links once each (LINKED_SCHEMA), from one end or from both."""
    high, low = (np.concatenate([np.empty(0, np.uint64), *(part[side] for part in parts)]) for side in (0, 1))
    ends = ((high, low), (low, high)) if both else ((high, low),)
    row, neighbour = (np.concatenate([end[side] for end in ends]) for side in (0, 1))
    order = np.lexsort((neighbour, row))  # buckets are ranges of rows
    row, neighbour = row[order], neighbour[order]
    once = np.insert((row[1:] != row[:-1]) | (neighbour[1:] != neighbour[:-1]), 0, True)[: len(row)]
    columns = [bucket_of(row[once], buckets), row[once], neighbour[once]]
    return pa.table(columns, schema=LINKED_SCHEMA)


def _moved(store: Store, job: RemovalJob, name: str) -> int:
    return read_receipt(store, _path(job, name)).dropped[MOVED]


def _is_done(store: Store, job: RemovalJob, name: str) -> bool:
    return f"{name}.parquet" in store.names(stage_folder(REMOVAL, job.fingerprint))


def _path(job: RemovalJob, name: str) -> str:
    return fragment_path(REMOVAL, job.fingerprint, name)
