"""Pairs of similar rows → which rows go, and what represents each: the independent set over buckets of row hashes.

A task takes one bucket of the hash space. It first tells the buckets of its rows' neighbours how these rows are
preferred, then round by round which of them are decided. What it wrote is read by the tasks of the next step: no
process holds more than its bucket's pairs. The result is that of deciding row by row in the order of preference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import (
    Receipt,
    read_fragment,
    read_receipt,
    read_rows_with,
    write_fragment,
)
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.jobs.similarity import LEFT, RIGHT, SIMILARITY, stored_pairs
from penstock.cluster.jobs.standing import decisions_on
from penstock.cluster.layout import PASSAGES, REMOVAL, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.deduplication import bucket_of
from penstock.operators.independent_set import (
    GOES,
    STAYS,
    UNDECIDED,
    Keep,
    Neighbours,
    random_keys,
    ranks,
    representatives,
    settle,
)

# Pairs of one bucket: about 150 bytes each while they are put in order.
BUCKET_PAIRS = 4_000_000
POSITION_DIGITS = 20
PLACE_COLUMNS = ("passage_id", "source", "position")  # by which a selection names passages
ORDER = ["row", "key", "stands"]  # what rows are put in order by
REMOVED_SCHEMA = pa.schema([("removed", pa.uint64()), ("kept", pa.uint64()), (SIMILARITY, pa.float32())])


@dataclass(frozen=True)
class RemovalJob:
    """Decide among pairs of at least a similarity.

    Attributes:
        files: of pairs.
        passages: the passages fragments of the rows, where the order of preference is read from a column, and which of
            them have `exclusions` by a selection.
        column: of passages, for Keep.COLUMN; `descending` prefers its largest values.
        seed: of Keep.RANDOM.
        standing: fingerprint of decisions that were carried over, on `fragments` of embeddings: rows that stand come
            before all others.
    """

    root: str
    fingerprint: str
    files: tuple[str, ...]
    similarity: float
    keep: Keep
    buckets: int
    passages_fingerprint: str = ""
    passages: tuple[str, ...] = ()
    column: str = ""
    descending: bool = False
    seed: int = 0
    selection_fingerprint: str = ""
    exclusions: frozenset[str] = frozenset()
    standing: str | None = None
    fragments: tuple[str, ...] = ()


@dataclass(frozen=True)
class BucketTask:
    job: RemovalJob
    bucket: int
    round: int = 0


def buckets_for(pairs: int) -> int:
    return max(1, -(-2 * pairs // BUCKET_PAIRS))


def remove_duplicates(session: Session, job: RemovalJob) -> int:
    """Decides all rows and stores what goes; returns the number of rows that go. What is done is not done again."""
    buckets = range(job.buckets)
    for step in (send_keys, order_neighbours):
        for _ in session.stream(step, [BucketTask(job, bucket) for bucket in buckets]):
            pass
    undecided, number = 1, 0
    while undecided:
        tasks = [BucketTask(job, bucket, number) for bucket in buckets]
        undecided = sum(session.stream(decide, tasks))
        number += 1
    return sum(session.stream(represent, [BucketTask(job, bucket, number) for bucket in buckets]))


def send_keys(task: BucketTask) -> int:
    """Tell the neighbours of the bucket's rows how these are preferred; returns their number."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"keys-{task.bucket:05d}"):
        return 0
    row, neighbour, similarity = _own_pairs(store, task)
    own, place = np.unique(row, return_inverse=True)
    keys, stands = _keys(store, job, own, place), pa.array(_standing(store, job, own))
    messages = pa.table(
        {
            "bucket": bucket_of(neighbour, job.buckets),
            "row": neighbour,
            "neighbour": row,
            SIMILARITY: similarity,
            "key": keys.take(pa.array(place)),
            "stands": stands.take(pa.array(place)),
        }
    )
    owners = pa.table({"bucket": np.full(len(own), task.bucket), "row": own, "key": keys, "stands": stands})
    _write(store, job, f"own-{task.bucket:05d}", owners)
    _write(store, job, f"keys-{task.bucket:05d}", messages.sort_by([("bucket", "ascending"), ("row", "ascending")]))
    return len(own)


def order_neighbours(task: BucketTask) -> int:
    """Store for each pair of a row of the bucket whether the neighbour is preferred to it; returns the pairs."""
    job, store = task.job, connect(task.job.root)
    name = f"neighbours-{task.bucket:05d}"
    if _is_done(store, job, name):
        return 0
    messages = pa.concat_tables([_messages(store, job, f"keys-{b:05d}", task.bucket) for b in range(job.buckets)])
    own = read_fragment(store, _path(job, f"own-{task.bucket:05d}"))
    known = pa.concat_tables([own.select(ORDER), messages.select(["neighbour", *ORDER[1:]]).rename_columns(ORDER)])
    hashes, first = np.unique(known.column("row").to_numpy(), return_index=True)
    rank = ranks(known.column("key").take(pa.array(first)), hashes, _descends(job))
    rank = np.where(known.column("stands").to_numpy()[first], rank, rank + len(rank))
    row, neighbour = (messages.column(column).to_numpy() for column in ("row", "neighbour"))
    row_rank = rank[np.searchsorted(hashes, row)]
    earlier = rank[np.searchsorted(hashes, neighbour)] < row_rank
    table = pa.table(
        {
            "row": row,
            "neighbour": neighbour,
            SIMILARITY: messages.column(SIMILARITY),
            "earlier": earlier,
            "row_rank": row_rank,
        }
    )
    _write(store, job, name, table.sort_by([("row", "ascending"), ("neighbour", "ascending")]))
    return len(row)


def decide(task: BucketTask) -> int:
    """One round: decide all rows of the bucket that can be from what is known, and tell the buckets of their later
    neighbours; returns the rows that stay undecided."""
    job, store = task.job, connect(task.job.root)
    name = f"decided-{task.round:05d}-{task.bucket:05d}"
    if _is_done(store, job, name):
        return read_receipt(store, _path(job, name)).dropped["undecided"]
    bucket = _Bucket(store, task)
    before = bucket.states.copy()
    settle(bucket.neighbours, bucket.rank, bucket.states, bucket.own)
    decided = bucket.own & (before == UNDECIDED) & (bucket.states != UNDECIDED)
    undecided = int(np.count_nonzero(bucket.own & (bucket.states == UNDECIDED)))
    rows = int(np.count_nonzero(bucket.own))
    receipt = Receipt(name, rows, rows - undecided, {"undecided": undecided})
    _write(store, job, name, bucket.messages(decided, job.buckets, task.bucket), receipt)
    return undecided


def represent(task: BucketTask) -> int:
    """Store the bucket's rows that go with the row that represents each (REMOVED_SCHEMA, by removed row); returns their
    number."""
    job, store = task.job, connect(task.job.root)
    bucket = _Bucket(store, task)
    gone, kept, similarity = representatives(bucket.neighbours, bucket.states)
    table = pa.table([bucket.hashes[gone], bucket.hashes[kept], similarity], schema=REMOVED_SCHEMA)
    receipt = Receipt(f"removed-{task.bucket:05d}", len(gone), len(gone))
    _write(store, job, f"removed-{task.bucket:05d}", table, receipt)
    return len(gone)


def removed_rows(store: Store, job: RemovalJob) -> Iterator[pa.Table]:
    """What goes (REMOVED_SCHEMA), bucket by bucket."""
    for bucket in range(job.buckets):
        yield read_fragment(store, _path(job, f"removed-{bucket:05d}")).replace_schema_metadata()


class _Bucket:
    """The rows of a bucket and their neighbours by number in the order of hashes, and what is decided of them before
    a round."""

    def __init__(self, store: Store, task: BucketTask) -> None:
        job = task.job
        table = read_fragment(store, _path(job, f"neighbours-{task.bucket:05d}"))
        row, neighbour = (table.column(name).to_numpy() for name in ("row", "neighbour"))
        self.hashes = np.unique(np.concatenate([row, neighbour]))
        self._row, self._neighbour = (np.searchsorted(self.hashes, column) for column in (row, neighbour))
        self._earlier = table.column("earlier").to_numpy()
        similarity = table.column(SIMILARITY).to_numpy()[self._earlier]
        self.neighbours = Neighbours(self._row[self._earlier], self._neighbour[self._earlier], similarity)
        self.own = np.zeros(len(self.hashes), bool)
        self.own[self._row] = True
        self.rank = np.zeros(len(self.hashes), np.int64)
        self.rank[self._row] = table.column("row_rank").to_numpy()
        self.states = np.full(len(self.hashes), UNDECIDED, np.uint8)
        for number in range(task.round):
            for sender in range(job.buckets):
                self._learn(_messages(store, job, f"decided-{number:05d}-{sender:05d}", task.bucket))

    def _learn(self, messages: pa.Table) -> None:
        place = np.searchsorted(self.hashes, messages.column("row").to_numpy())
        self.states[place] = np.where(messages.column("stays").to_numpy(), STAYS, GOES)

    def messages(self, decided: np.ndarray, buckets: int, bucket: int) -> pa.Table:
        """What is decided of rows, bool (n,), to the own bucket and to those of their later neighbours, once each."""
        told = decided[self._row] & ~self._earlier
        rows = np.concatenate([np.flatnonzero(decided), self._row[told]])
        to = np.concatenate(
            [np.full(np.count_nonzero(decided), bucket), bucket_of(self.hashes[self._neighbour[told]], buckets)]
        )
        to, rows = np.unique(np.stack([to, rows]), axis=1)
        return pa.table({"bucket": to, "row": self.hashes[rows], "stays": self.states[rows] == STAYS})


def _own_pairs(store: Store, task: BucketTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every row of the bucket with each of its neighbours: uint64 (e,), uint64 (e,), float32 (e,)."""
    job = task.job
    rows, neighbours = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    similarities = [np.empty(0, np.float32)]
    for table in stored_pairs(store, job.files, job.similarity):
        for one, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
            row = table.column(one).to_numpy()
            own = bucket_of(row, job.buckets) == task.bucket
            rows.append(row[own])
            neighbours.append(table.column(other).to_numpy()[own])
            similarities.append(table.column(SIMILARITY).to_numpy()[own])
    return np.concatenate(rows), np.concatenate(neighbours), np.concatenate(similarities)


def _keys(store: Store, job: RemovalJob, own: np.ndarray, place: np.ndarray) -> pa.Array:
    """What each of the rows `own` (n,) is preferred by; `place` is the row of each pair."""
    match job.keep:
        case Keep.RANDOM:
            return pa.array(random_keys(own, job.seed))
        case Keep.DENSEST:
            return pa.array(np.bincount(place, minlength=len(own)))
        case Keep.LONGEST:
            return _column(store, job, own, ["tokens"])
        case Keep.FIRST:
            return _column(store, job, own, ["source", "position", "ordinal"])
        case Keep.COLUMN:
            return _column(store, job, own, [job.column])


def _standing(store: Store, job: RemovalJob, own: np.ndarray) -> np.ndarray:
    """Which of the rows `own` (n,), ascending, stay by earlier decisions: bool (n,)."""
    stands = np.zeros(len(own), bool)
    if job.standing is not None:
        for fragment in job.fragments:
            stands |= np.isin(own, decisions_on(store, job.standing, fragment)[0].column("row_hash").to_numpy())
    return stands


def _descends(job: RemovalJob) -> bool:
    return job.descending if job.keep is Keep.COLUMN else job.keep in (Keep.LONGEST, Keep.DENSEST)


def _column(store: Store, job: RemovalJob, own: np.ndarray, names: list[str]) -> pa.Array:
    """A column of the passages of the rows `own`, in their order; of several columns a text that sorts as they do."""
    tables = []
    for fragment in job.passages:
        path = fragment_path(PASSAGES, job.passages_fingerprint, fragment)
        excluding = fragment in job.exclusions
        known = dict.fromkeys([*(PLACE_COLUMNS if excluding else ()), *names])
        table = read_fragment(store, path, ["row_hash", *known]).replace_schema_metadata()
        if excluding:
            table = kept_rows(store, table, job.selection_fingerprint, fragment)
        table = table.select(["row_hash", *names])
        tables.append(table.filter(pa.array(np.isin(table.column("row_hash").to_numpy(), own))))
    found = pa.concat_tables(tables)
    hashes = found.column("row_hash").to_numpy()
    order = np.argsort(hashes, kind="stable")
    if not np.array_equal(hashes[order], own):
        raise ValueError(
            f"passages ({len(np.unique(hashes))} of {len(own)} rows with pairs, {len(hashes)} in all) must hold each "
            "row once; name all passages fragments of the embeddings, and none else"
        )
    columns = [found.column(name).take(pa.array(order)).combine_chunks() for name in names]
    return columns[0] if len(columns) == 1 else _sortable(columns)


def _sortable(columns: list[pa.Array]) -> pa.Array:
    """Texts that sort as a text and then some whole numbers do."""
    numbers = [pc.utf8_lpad(pc.cast(column, pa.string()), POSITION_DIGITS, "0") for column in columns[1:]]
    return pc.binary_join_element_wise(columns[0], *numbers, "\0")


def _messages(store: Store, job: RemovalJob, name: str, bucket: int) -> pa.Table:
    """The rows for a bucket in a file sorted by bucket."""
    return read_rows_with(store, _path(job, name), "bucket", bucket)


def _write(store: Store, job: RemovalJob, name: str, table: pa.Table, receipt: Receipt | None = None) -> None:
    write_fragment(store, _path(job, name), table, receipt)


def _is_done(store: Store, job: RemovalJob, name: str) -> bool:
    return f"{name}.parquet" in store.names(stage_folder(REMOVAL, job.fingerprint))


def _path(job: RemovalJob, name: str) -> str:
    return fragment_path(REMOVAL, job.fingerprint, name)
