"""Pairs of similar rows → which rows go, and what represents each: the independent set over buckets of row hashes.

A task takes one bucket of the hash space. It first tells the buckets of its rows' neighbours how these rows are
preferred, then round by round which of them are decided. What it wrote is read by the tasks of the next step: no
process reads or holds more than its bucket's pairs. The result is that of deciding row by row in the order of
preference.

Rows with equal vectors are decided as one, which is preferred as the best of them: they have the same neighbours and
are neighbours themselves, so all but the best go in any case, and the best stays unless something preferred to it is
similar to all of them.

A chain of rows across buckets would need a round for each link. So when rounds have left few pairs open, one task
decides what is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import (
    Receipt,
    read_fragment,
    read_hash_range,
    read_receipt,
    read_rows_with,
    write_fragment,
)
from penstock.cluster.jobs.pair_ends import EndsTask, Sides, bucket_of, bucket_range, read_ends, write_ends
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.jobs.similarity import SIMILARITY
from penstock.cluster.jobs.standing import decisions_on
from penstock.cluster.layout import PASSAGES, REMOVAL, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
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
from penstock.operators.sharding import HASH_SPACE

# Pairs of one bucket: about 150 bytes each while they are put in order.
BUCKET_PAIRS = 4_000_000
# So many open pairs, those of a bucket, one task can decide: most rows are decided in the first round, and the open
# ends of chains would keep all buckets busy for many more.
FINISH_PAIRS = BUCKET_PAIRS
POSITION_DIGITS = 20
PLACE_COLUMNS = ("passage_id", "source", "position")  # by which a selection names passages
ORDER = ["row", "key", "best", "stands"]  # what rows are put in order by
REMOVED_SCHEMA = pa.schema([("removed", pa.uint64()), ("kept", pa.uint64()), (SIMILARITY, pa.float32())])


@dataclass(frozen=True)
class RemovalJob:
    """Decide among pairs of at least a similarity.

    Attributes:
        files: of pairs.
        passages: the fragments (of `stage`, which has a row for each row_hash) where the order of
            preference is read from a column, and which of them have `exclusions` by a selection.
        column: of passages, for Keep.COLUMN; `descending` prefers its largest values.
        seed: of Keep.RANDOM.
        standing: fingerprint of decisions that were carried over, on `fragments` of embeddings: rows that stand come
            before all others.
        equal_files: of links from the first of rows with equal vectors, which alone is in pairs, to the others.
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
    stage: str = PASSAGES
    equal_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class BucketTask:
    job: RemovalJob
    bucket: int
    round: int = 0


@dataclass(frozen=True)
class FactsTask:
    """Columns of the passages of a bucket's rows."""

    job: RemovalJob
    bucket: int
    facts: tuple[str, ...]


def buckets_for(pairs: int) -> int:
    return max(1, -(-2 * pairs // BUCKET_PAIRS))


def remove_duplicates(session: Session, job: RemovalJob) -> int:
    """Decides all rows and stores what goes; returns the number of rows that go. What is done is not done again."""
    buckets = range(job.buckets)
    deal_pairs(session, job, _facts_of(job))
    for step in (send_sizes, send_keys, order_neighbours) if _weighted(job) else (send_keys, order_neighbours):
        for _ in session.stream(step, [BucketTask(job, bucket) for bucket in buckets]):
            pass
    undecided, number = FINISH_PAIRS + 1, 0
    while undecided > FINISH_PAIRS:
        tasks = [BucketTask(job, bucket, number) for bucket in buckets]
        undecided = sum(session.stream(decide, tasks))
        number += 1
    if undecided:
        for _ in session.stream(collect_open, [BucketTask(job, bucket, number) for bucket in buckets]):
            pass
        session.run(finish, BucketTask(job, 0, number))
    for _ in session.stream(represent, [BucketTask(job, bucket, number) for bucket in buckets]):
        pass
    return sum(session.stream(gather_removed, [BucketTask(job, bucket) for bucket in buckets]))


def deal_pairs(session: Session, job: RemovalJob, facts: tuple[str, ...]) -> None:
    """Deals pairs out to the buckets of both rows, links to those of the first of equal rows, and what passages say of
    its equals (passage_column of `facts`) as well."""
    ends = [EndsTask(job.root, path, job.buckets) for path in job.files]
    for sides in (Sides.FIRST, Sides.OTHER) if facts else (Sides.FIRST,):
        ends += [EndsTask(job.root, path, job.buckets, sides) for path in job.equal_files]
    for _ in session.stream(write_ends, ends):
        pass
    tasks = [FactsTask(job, bucket, facts) for bucket in range(job.buckets)]
    for _ in session.stream(send_facts, tasks if facts and job.equal_files else []):
        pass


def send_facts(task: FactsTask) -> int:
    """Tell the first of equal rows what passages say of those of its equals that are rows of the bucket; returns the
    number of these. So the passages of a bucket are read for it alone: equal rows are anywhere."""
    job, store = task.job, connect(task.job.root)
    name = f"equals-{task.bucket:05d}"
    if _is_done(store, job, name):
        return 0
    links = read_ends(store, job.equal_files, job.buckets, task.bucket, 0.0, Sides.OTHER).sort_by("row")
    row = links.column("row").to_numpy()
    messages = pa.table(
        {
            "first": links.column("neighbour"),
            "row": row,
            "fact": passage_column(store, job, row, list(task.facts)),
        }
    )
    _write(store, job, name, messages.sort_by([("first", "ascending"), ("row", "ascending")]))
    return len(row)


def send_sizes(task: BucketTask) -> int:
    """Tell the neighbours of the bucket's rows how many more rows are equal to these; returns the messages."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"sizes-{task.bucket:05d}"):
        return 0
    rows = BucketRows(store, task)
    more = np.bincount(rows.first, minlength=len(rows.own))[rows.place]
    told = more > 0
    messages = pa.table(
        {
            "bucket": bucket_of(rows.neighbour[told], job.buckets),
            "row": rows.neighbour[told],
            "more": more[told],
        }
    )
    _write(store, job, f"sizes-{task.bucket:05d}", messages.sort_by([("bucket", "ascending"), ("row", "ascending")]))
    return int(np.count_nonzero(told))


def send_keys(task: BucketTask) -> int:
    """Tell the neighbours of the bucket's rows how these are preferred; returns the number of these rows, of equal ones
    the first alone."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"keys-{task.bucket:05d}"):
        return 0
    rows = BucketRows(store, task)
    keys, best = _preferred(store, task, rows)
    stands = stands_of(store, job, task.bucket, rows.own)
    messages = pa.table(
        {
            "bucket": bucket_of(rows.neighbour, job.buckets),
            "row": rows.neighbour,
            "neighbour": rows.row,
            SIMILARITY: rows.similarity,
            "key": keys.take(pa.array(rows.place)),
            "best": best[rows.place],
            "stands": stands[rows.place],
        }
    )
    columns = np.full(len(best), task.bucket), rows.own, keys, best, stands
    owners = pa.table(dict(zip(["bucket", *ORDER], columns, strict=True)))
    _write(store, job, f"own-{task.bucket:05d}", owners)
    _write(store, job, f"keys-{task.bucket:05d}", messages.sort_by([("bucket", "ascending"), ("row", "ascending")]))
    return len(best)


def order_neighbours(task: BucketTask) -> int:
    """Store for each pair of a row of the bucket whether the neighbour is preferred to it; returns the pairs."""
    job, store = task.job, connect(task.job.root)
    name = f"neighbours-{task.bucket:05d}"
    if _is_done(store, job, name):
        return 0
    messages = pa.concat_tables([_messages(store, job, f"keys-{b:05d}", task.bucket) for b in range(job.buckets)])
    own = read_fragment(store, _path(job, f"own-{task.bucket:05d}"))
    told = messages.select(["neighbour", *ORDER[1:]]).rename_columns(ORDER)
    known = pa.concat_tables([own.select(ORDER), told])
    hashes, first = np.unique(known.column("row").to_numpy(), return_index=True)
    known = known.take(pa.array(first))
    best, rank = known.column("best").to_numpy(), _preference(job, known)
    row, neighbour = (np.searchsorted(hashes, messages.column(column).to_numpy()) for column in ("row", "neighbour"))
    table = pa.table(
        {
            "row": hashes[row],
            "neighbour": hashes[neighbour],
            SIMILARITY: messages.column(SIMILARITY),
            "earlier": rank[neighbour] < rank[row],
            "row_rank": rank[row],
            "best": best[neighbour],
        }
    )
    _write(store, job, name, table.sort_by([("row", "ascending"), ("neighbour", "ascending")]))
    return len(row)


def decide(task: BucketTask) -> int:
    """One round: decide all rows of the bucket that can be from what is known, and tell the buckets of their later
    neighbours; returns the pairs of rows that stay undecided with what they wait for."""
    job, store = task.job, connect(task.job.root)
    name = _of_round("decided", task.round, task.bucket)
    if _is_done(store, job, name):
        return read_receipt(store, _path(job, name)).dropped["undecided"]
    bucket = _Bucket(store, task)
    before = bucket.states.copy()
    settle(bucket.neighbours, bucket.rank, bucket.states, bucket.own)
    decided = bucket.own & (before == UNDECIDED) & (bucket.states != UNDECIDED)
    pairs, undecided = len(bucket.neighbours.row), int(np.count_nonzero(bucket.waiting()))
    receipt = Receipt(name, pairs, pairs - undecided, {"undecided": undecided})
    _write(store, job, _of_round("states", task.round, task.bucket), pa.table({"state": bucket.states}))
    _write(store, job, name, bucket.messages(decided, job.buckets, task.bucket), receipt)
    return undecided


def collect_open(task: BucketTask) -> int:
    """Store the bucket's rows that the rounds before left undecided, with how they are preferred and whether one that
    stays is similar, and their pairs with earlier undecided rows; returns the number of these rows."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"open-{task.bucket:05d}"):
        return 0
    bucket = _Bucket(store, task)
    open_ = bucket.own & (bucket.states == UNDECIDED)
    row, earlier = bucket.neighbours.row, bucket.neighbours.earlier
    goes = np.zeros(len(open_), bool)
    goes[row[bucket.states[earlier] == STAYS]] = True
    waiting = bucket.waiting()
    pairs = {"row": bucket.hashes[row[waiting]], "earlier": bucket.hashes[earlier[waiting]]}
    own = read_fragment(store, _path(job, f"own-{task.bucket:05d}")).replace_schema_metadata().select(ORDER)
    place = np.searchsorted(own.column("row").to_numpy(), bucket.hashes[open_])
    rows = own.take(pa.array(place)).append_column("goes", pa.array(goes[open_]))
    _write(store, job, f"open-pairs-{task.bucket:05d}", pa.table(pairs))
    _write(store, job, f"open-{task.bucket:05d}", rows)
    return len(rows)


def finish(task: BucketTask) -> int:
    """Decide all rows that collect_open stored, of all buckets, for the round of the task; returns their number.
    Memory: about 100 bytes for each of FINISH_PAIRS."""
    job, store = task.job, connect(task.job.root)
    name = _rest(task.round)
    if _is_done(store, job, name):
        return 0
    rows = _of_all(store, job, "open")  # by row: buckets are ranges
    pairs = _of_all(store, job, "open-pairs")
    hashes = rows.column("row").to_numpy()
    row, earlier = (np.searchsorted(hashes, pairs.column(side).to_numpy()) for side in ("row", "earlier"))
    states = np.where(rows.column("goes").to_numpy(), GOES, UNDECIDED).astype(np.uint8)
    neighbours = Neighbours(row, earlier, np.ones(len(row), np.float32))
    settle(neighbours, _preference(job, rows), states, np.ones(len(states), bool))
    _write(store, job, name, pa.table({"row": hashes, "stays": states == STAYS}))
    return len(hashes)


def represent(task: BucketTask) -> int:
    """Store the bucket's rows that go, and rows that are equal to these, with the row that represents each
    (REMOVED_SCHEMA, by removed row); returns their number."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"gone-{task.bucket:05d}"):
        return 0
    bucket = _Bucket(store, task)
    gone, kept, similarity = representatives(bucket.neighbours, bucket.states)
    known = read_fragment(store, _path(job, f"own-{task.bucket:05d}"))
    own, stands_for = (known.column(name).to_numpy() for name in ("row", "best"))  # what represents each row
    own_similarity, goes = np.ones(len(own), np.float32), np.searchsorted(own, bucket.hashes[gone])
    stands_for = stands_for.copy()
    stands_for[goes], own_similarity[goes] = bucket.best[kept], similarity
    links = read_ends(store, job.equal_files, job.buckets, task.bucket, 0.0, Sides.FIRST)
    first = np.searchsorted(own, links.column("row").to_numpy())
    rows = np.concatenate([own, links.column("neighbour").to_numpy()])
    of = np.concatenate([np.arange(len(own)), first])
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] != stands_for[of[order]]]
    columns = [rows[order], stands_for[of[order]], own_similarity[of[order]]]
    _write(store, job, f"gone-{task.bucket:05d}", pa.table(columns, schema=REMOVED_SCHEMA))
    return len(order)


def gather_removed(task: BucketTask) -> int:
    """Store what goes of the hashes of a bucket (REMOVED_SCHEMA, by removed row), by whatever bucket it was decided: a
    row goes with the first of its equals, which is in any. Returns the number of rows."""
    job, store = task.job, connect(task.job.root)
    name = f"removed-{task.bucket:05d}"
    if _is_done(store, job, name):
        return read_receipt(store, _path(job, name)).rows_out
    removed = _told_in(store, job, "gone", task.bucket, REMOVED_SCHEMA.names).sort_by("removed")
    _write(store, job, name, removed, Receipt(name, len(removed), len(removed)))
    return len(removed)


def removed_rows(store: Store, job: RemovalJob) -> Iterator[pa.Table]:
    """What goes (REMOVED_SCHEMA), bucket by bucket."""
    for bucket in range(job.buckets):
        yield removed_of(store, job, bucket)


def removed_of(store: Store, job: RemovalJob, bucket: int) -> pa.Table:
    """What goes of the row hashes of a bucket (REMOVED_SCHEMA), by row hash."""
    return read_fragment(store, _path(job, f"removed-{bucket:05d}")).replace_schema_metadata()


class _Bucket:
    """The rows of a bucket and their neighbours by number in the order of hashes, and what is decided of them before
    a round."""

    def __init__(self, store: Store, task: BucketTask) -> None:
        job = task.job
        table = read_fragment(store, _path(job, f"neighbours-{task.bucket:05d}"))
        row, neighbour = (table.column(name).to_numpy() for name in ("row", "neighbour"))
        self.hashes = np.unique(np.concatenate([row, neighbour]))
        self._row, self._neighbour = (np.searchsorted(self.hashes, column) for column in (row, neighbour))
        self.best = np.zeros(len(self.hashes), np.uint64)  # of the rows that are equal to a neighbour
        self.best[self._neighbour] = table.column("best").to_numpy()
        self._earlier = table.column("earlier").to_numpy()
        similarity = table.column(SIMILARITY).to_numpy()[self._earlier]
        self.neighbours = Neighbours(self._row[self._earlier], self._neighbour[self._earlier], similarity)
        self.own = np.zeros(len(self.hashes), bool)
        self.own[self._row] = True
        self.rank = np.zeros(len(self.hashes), np.int64)
        self.rank[self._row] = table.column("row_rank").to_numpy()
        self.states = np.full(len(self.hashes), UNDECIDED, np.uint8)
        if task.round:
            self._learn_round(store, task)

    def waiting(self) -> np.ndarray:
        """Which of the pairs with earlier neighbours, bool (e,), are of two undecided rows."""
        row, earlier = self.neighbours.row, self.neighbours.earlier
        waits: np.ndarray = (self.states[row] == UNDECIDED) & (self.states[earlier] == UNDECIDED)
        return waits

    def _learn_round(self, store: Store, task: BucketTask) -> None:
        """What the bucket knew after the round before, and was told in it."""
        job, before = task.job, task.round - 1
        known = read_fragment(store, _path(job, _of_round("states", before, task.bucket)))
        self.states = known.column("state").to_numpy().copy()
        for sender in range(job.buckets):
            self._learn(_messages(store, job, _of_round("decided", before, sender), task.bucket))
        if _is_done(store, job, _rest(task.round)):
            rest = read_fragment(store, _path(job, _rest(task.round)))
            self._learn(rest.filter(pa.array(np.isin(rest.column("row").to_numpy(), self.hashes))))

    def _learn(self, messages: pa.Table) -> None:
        place = np.searchsorted(self.hashes, messages.column("row").to_numpy())
        self.states[place] = np.where(messages.column("stays").to_numpy(), STAYS, GOES)

    def messages(self, decided: np.ndarray, buckets: int, bucket: int) -> pa.Table:
        """What is decided of rows, bool (n,), to the other buckets of their later neighbours, once each."""
        told = decided[self._row] & ~self._earlier
        rows, to = self._row[told], bucket_of(self.hashes[self._neighbour[told]], buckets)
        to, rows = np.unique(np.stack([to[to != bucket], rows[to != bucket]]), axis=1)
        return pa.table({"bucket": to, "row": self.hashes[rows], "stays": self.states[rows] == STAYS})


class BucketRows:
    """The rows of a bucket that are in pairs or the first of equal ones.

    Attributes:
        row, neighbour: uint64 (e,), every row with each of its neighbours; `similarity` float32 (e,).
        own: uint64 (n,), the rows, ascending; `place` int64 (e,) is that of each pair's.
        first, equal: int64 (m,) and uint64 (m,), a row by its place in `own` and another that is equal to it.
    """

    def __init__(self, store: Store, task: BucketTask) -> None:
        job = task.job
        pairs = read_ends(store, job.files, job.buckets, task.bucket, job.similarity)
        links = read_ends(store, job.equal_files, job.buckets, task.bucket, 0.0, Sides.FIRST)
        self.row, self.neighbour, self.similarity = (pairs.column(i).to_numpy() for i in (1, 2, 3))
        first, self.equal = (links.column(i).to_numpy() for i in (1, 2))
        self.own = np.unique(np.concatenate([self.row, first]))
        self.first = np.searchsorted(self.own, first)

    @cached_property
    def place(self) -> np.ndarray:
        place: np.ndarray = np.searchsorted(self.own, self.row)
        return place

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows with those that are equal to them, ascending uint64 (k,), and the place int64 (k,) of the first of
        their equals."""
        number = np.arange(len(self.own))
        hashes, of = np.concatenate([self.own, self.equal]), np.concatenate([number, self.first])
        order = np.argsort(hashes, kind="stable")
        return hashes[order], of[order]


def _preferred(store: Store, task: BucketTask, rows: BucketRows) -> tuple[pa.Array, np.ndarray]:
    """What each of the bucket's rows is preferred by, and which of its equals that is: uint64 (n,)."""
    job, (hashes, of) = task.job, rows.members()
    keys = pa.array(_degrees(store, task, rows)[of]) if job.keep is Keep.DENSEST else _keys(store, task, rows, hashes)
    if len(rows.equal) == 0:
        return keys, hashes
    rank = ranks(keys, hashes, descends(job))
    best = np.lexsort((rank, of))
    best = best[np.flatnonzero(np.diff(of[best], prepend=-1))]
    return keys.take(pa.array(best)), hashes[best]


def _weighted(job: RemovalJob) -> bool:
    """Whether it matters of how many equal rows a neighbour is one."""
    return job.keep is Keep.DENSEST and len(job.equal_files) > 0


def _degrees(store: Store, task: BucketTask, rows: BucketRows) -> np.ndarray:
    """The neighbours int64 (n,) of each of the bucket's rows, its equals among them."""
    job, count = task.job, len(rows.own)
    degrees = np.bincount(rows.place, minlength=count) + np.bincount(rows.first, minlength=count)
    for bucket in range(job.buckets) if _weighted(job) else ():
        messages = _messages(store, job, f"sizes-{bucket:05d}", task.bucket)
        place = np.searchsorted(rows.own, messages.column("row").to_numpy())
        degrees += np.bincount(place, messages.column("more").to_numpy(), count).astype(np.int64)
    return degrees


def _keys(store: Store, task: BucketTask, rows: BucketRows, members: np.ndarray) -> pa.Array:
    """What each of the members of a bucket's rows, uint64 (k,), is preferred by, where that is a fact of the row."""
    facts = _facts_of(task.job)
    return member_facts(store, task, rows, facts) if facts else pa.array(random_keys(members, task.job.seed))


def _facts_of(job: RemovalJob) -> tuple[str, ...]:
    """The columns of passages by which single rows are preferred."""
    match job.keep:
        case Keep.LONGEST:
            return ("tokens",)
        case Keep.FIRST:
            return ("source", "position", "ordinal")
        case Keep.COLUMN:
            return (job.column,)
        case Keep.RANDOM | Keep.DENSEST:
            return ()
        case _:
            assert_never(job.keep)


def stands_of(store: Store, job: RemovalJob, bucket: int, own: np.ndarray) -> np.ndarray:
    """Which of a bucket's rows `own` (n,), ascending, stay by earlier decisions: bool (n,)."""
    stands = np.zeros(len(own), bool)
    if job.standing is not None:
        first, last = bucket_range(bucket, job.buckets)
        for fragment in job.fragments:
            standing = decisions_on(store, job.standing, fragment, first, last)[0]
            stands |= np.isin(own, standing.column("row_hash").to_numpy())
    return stands


def descends(job: RemovalJob) -> bool:
    return job.descending if job.keep is Keep.COLUMN else job.keep in (Keep.LONGEST, Keep.DENSEST)


def member_facts(store: Store, task: BucketTask, rows: BucketRows, names: tuple[str, ...]) -> pa.Array:
    """passage_column of rows.members(): read of the bucket's rows, and told of those that are equal to these."""
    job = task.job
    own = passage_column(store, job, rows.own, list(names))
    if not job.equal_files:
        return own
    told = _told_in(store, job, "equals", task.bucket, ["first", "row", "fact"])
    order = np.argsort(np.concatenate([rows.own, told.column("row").to_numpy()]), kind="stable")
    return pa.chunked_array([own, *told.column("fact").chunks]).take(pa.array(order)).combine_chunks()


def passage_column(store: Store, job: RemovalJob, own: np.ndarray, names: list[str]) -> pa.Array:
    """A column of the passages of the rows `own`, ascending, in their order; of several columns a text that sorts as
    they do. Reads the row groups between the first and the last of them."""
    tables = []
    for fragment in job.passages:
        table = staying_passages(store, job, fragment, ["row_hash", *names], *_bounds(own))
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
    return columns[0] if len(columns) == 1 else sortable(columns)


def _bounds(ascending: np.ndarray) -> tuple[int, int]:
    return (int(ascending[0]), int(ascending[-1])) if len(ascending) else (0, 0)


def staying_passages(
    store: Store, job: RemovalJob, fragment: str, names: list[str], first: int = 0, last: int = HASH_SPACE - 1
) -> pa.Table:
    """Columns of the passages of a fragment with row hashes from first to last that a selection does not exclude."""
    path = fragment_path(job.stage, job.passages_fingerprint, fragment)
    excluding = fragment in job.exclusions
    read = list(dict.fromkeys([*(PLACE_COLUMNS if excluding else ()), *names]))
    table = read_hash_range(store, path, first, last, read).replace_schema_metadata()
    if excluding:
        table = kept_rows(store, table, job.selection_fingerprint, fragment)
    return table.select(names)


def sortable(columns: list[pa.Array]) -> pa.Array:
    """Texts that sort as a text and then some whole numbers do."""
    numbers = [pc.utf8_lpad(pc.cast(column, pa.string()), POSITION_DIGITS, "0") for column in columns[1:]]
    return pc.binary_join_element_wise(columns[0], *numbers, "\0")


def _preference(job: RemovalJob, rows: pa.Table) -> np.ndarray:
    """The place int64 (n,) of rows (ORDER) in the order in which they are preferred: those that stand come first."""
    rank = ranks(rows.column("key"), rows.column("best").to_numpy(), descends(job))
    place: np.ndarray = np.where(rows.column("stands").to_numpy(), rank, rank + len(rank))
    return place


def _of_all(store: Store, job: RemovalJob, kind: str) -> pa.Table:
    """What all buckets stored of a kind."""
    return pa.concat_tables([read_fragment(store, _path(job, f"{kind}-{b:05d}")) for b in range(job.buckets)])


def _of_round(kind: str, number: int, bucket: int) -> str:
    return f"{kind}-{number:05d}-{bucket:05d}"


def _rest(number: int) -> str:
    """What one task decided after so many rounds."""
    return f"rest-{number:05d}"


def _messages(store: Store, job: RemovalJob, name: str, bucket: int) -> pa.Table:
    """The rows for a bucket in a file sorted by bucket."""
    return read_rows_with(store, _path(job, name), "bucket", bucket)


def _told_in(store: Store, job: RemovalJob, kind: str, bucket: int, columns: list[str]) -> pa.Table:
    """Columns of what all buckets wrote of a kind, sorted by the first, of the hashes of one bucket in it."""
    hashes, names = bucket_range(bucket, job.buckets), [f"{kind}-{sender:05d}" for sender in range(job.buckets)]
    tables = [read_hash_range(store, _path(job, name), *hashes, columns, columns[0]) for name in names]
    return pa.concat_tables(tables).replace_schema_metadata()


def _write(store: Store, job: RemovalJob, name: str, table: pa.Table, receipt: Receipt | None = None) -> None:
    write_fragment(store, _path(job, name), table, receipt)


def _is_done(store: Store, job: RemovalJob, name: str) -> bool:
    return f"{name}.parquet" in store.names(stage_folder(REMOVAL, job.fingerprint))


def _path(job: RemovalJob, name: str) -> str:
    return fragment_path(REMOVAL, job.fingerprint, name)
