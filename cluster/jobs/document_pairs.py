"""Pairs of similar passages → pairs of documents of which one covers the other, and what documents go by them.

Tasks take a bucket of row hashes first, then one of document hashes. A bucket of rows tells those of its neighbours to
which documents its rows belong; then it knows for each of its rows which documents have a similar one, and tells the
buckets of the rows' own documents. These add up shares, and tell the buckets of the covering documents, which know of
both how they are preferred: a pair is a document and one that is preferred to it and covers it. What goes is then
decided as for rows. The result is that of deciding document by document in the order of preference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import read_fragment, read_hash_range, read_rows_with, write_fragment
from penstock.cluster.jobs.document_facts import deal_facts, read_facts
from penstock.cluster.jobs.pair_ends import bucket_of, bucket_range
from penstock.cluster.jobs.removal import (
    REMOVED_SCHEMA,
    BucketRows,
    BucketTask,
    RemovalJob,
    deal_pairs,
    descends,
    member_facts,
    remove_duplicates,
    removed_of,
    stands_of,
)
from penstock.cluster.jobs.similarity import LEFT, PAIR_SCHEMA, RIGHT, SIMILARITY, stored_pairs
from penstock.cluster.layout import DOCUMENT_PAIRS, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.document_cover import document_shares
from penstock.operators.independent_set import Keep, ranks

# Of one file: about 150 bytes each while they are put in order.
INCIDENCES_PER_FILE = 2_000_000
DOCUMENT_FACT = ("document_hash",)  # of a passage
# A passage of a document that is similar to `twin`, a passage of another document.
INCIDENCE_SCHEMA = pa.schema(
    [
        ("bucket", pa.int64()),
        ("document", pa.uint64()),
        ("row", pa.uint64()),
        ("other", pa.uint64()),
        ("twin", pa.uint64()),
        (SIMILARITY, pa.float32()),
    ]
)

# A passage that went with its document, linked to the most similar passage of kept_document, which covers that share of
# the document.
WENT_SCHEMA = pa.schema([*REMOVED_SCHEMA, ("kept_document", pa.uint64()), ("share", pa.float32())])


@dataclass(frozen=True)
class DocumentJob:
    """Decide on documents by pairs of their passages.

    Attributes:
        rows: the pairs of passages, where passages are, and the order of preference; its fingerprint is that of the
            documents' removal.
        share: of the passages of a document that must be similar to passages of one other, above 0 and at most 1.
        standing: fingerprint of decisions on documents that were carried over: those that stand come before all others.
    """

    fingerprint: str
    rows: RemovalJob
    share: float
    standing: str | None = None

    @property
    def root(self) -> str:
        return self.rows.root

    @property
    def buckets(self) -> int:
        return self.rows.buckets

    @property
    def removal(self) -> RemovalJob:
        """The choice among documents."""
        names = range(self.buckets)
        return RemovalJob(
            self.root,
            self.rows.fingerprint,
            tuple(_path(self, f"pairs-{bucket:05d}") for bucket in names),
            0.0,
            Keep.COLUMN,
            self.buckets,
            stage=DOCUMENT_PAIRS,
            passages_fingerprint=self.fingerprint,
            passages=tuple(f"documents-{bucket:05d}" for bucket in names),
            column="key",
            descending=descends(self.rows),
            standing=self.standing,
            fragments=self.rows.fragments,
        )


@dataclass(frozen=True)
class DocumentTask:
    job: DocumentJob
    bucket: int


@dataclass(frozen=True)
class IncidencesTask:
    """Files of pairs, and of links from the first of equal rows to the others."""

    root: str
    files: tuple[str, ...]
    equal_files: tuple[str, ...]
    similarity: float


def count_incidences(task: IncidencesTask) -> int:
    """At most how many incidences (INCIDENCE_SCHEMA) pairs make: m equal rows m * (m - 1), and a pair of rows of which
    one has m equals and the other n twice m * n. Memory: 16 bytes for each row that has equals."""
    store = connect(task.root)
    firsts = [table.column(LEFT).to_numpy() for table in stored_pairs(store, task.equal_files, 0.0)]
    row, others = np.unique(np.concatenate([np.empty(0, np.uint64), *firsts]), return_counts=True)
    found = int((others * (others + 1)).sum())
    for table in stored_pairs(store, task.files, task.similarity):
        one, other = (_sizes(row, others, table.column(side).to_numpy()) for side in (LEFT, RIGHT))
        found += 2 * int((one * other).sum())
    return found


def remove_documents(session: Session, job: DocumentJob) -> int:
    """Decides all documents, stores what goes, and links their passages to similar ones of the document that each goes
    for; returns the number of documents that go. What is done is not done again."""
    deal_pairs(session, job.rows, DOCUMENT_FACT)
    deal_facts(session, job.rows, job.fingerprint)
    tasks = [DocumentTask(job, bucket) for bucket in range(job.buckets)]
    for step in (send_documents, send_incidences, send_shares, pair_documents):
        for _ in session.stream(step, tasks):
            pass
    removed = remove_duplicates(session, job.removal)
    for _ in session.stream(link_passages, tasks):
        pass
    return removed


def send_documents(task: DocumentTask) -> int:
    """Tell the neighbours of the bucket's rows to which documents these belong; returns the number of these rows.
    Memory: the rows and pairs of the bucket, and INCIDENCES_PER_FILE of what is told."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"rows-{task.bucket:05d}"):
        return 0
    bucket = BucketTask(job.rows, task.bucket)
    rows = BucketRows(store, bucket)
    hashes, of = rows.members()
    document = member_facts(store, bucket, rows, DOCUMENT_FACT).to_numpy()
    order = np.lexsort((hashes, document, of))
    hashes, of, document = hashes[order], of[order], document[order]
    members = pa.table({"first": rows.own[of], "row": hashes, "document": document})
    once = np.ones(len(of), bool)  # of a document's equal rows the lowest is told
    once[1:] = (of[1:] != of[:-1]) | (document[1:] != document[:-1])

    def told(pair: np.ndarray, member: np.ndarray) -> pa.Table:
        columns = {
            "bucket": bucket_of(rows.neighbour[pair], job.buckets),
            "first": rows.neighbour[pair],
            "other": document[once][member],
            "twin": hashes[once][member],
            SIMILARITY: rows.similarity[pair],
        }
        return pa.table(columns).sort_by("bucket")

    blocks = (told(*block) for block in _matching_blocks(of[once], rows.place, INCIDENCES_PER_FILE))
    _write_blocks(store, job, f"told-{task.bucket:05d}", blocks)
    _write(store, job, f"rows-{task.bucket:05d}", members)
    return len(hashes)


def send_incidences(task: DocumentTask) -> int:
    """Tell the documents of the bucket's rows which others have a similar row (INCIDENCE_SCHEMA); returns how many.
    Memory: the rows of the bucket and what they are told, and INCIDENCES_PER_FILE of the incidences, which are more:
    m rows that are equal make m * (m - 1)."""
    job, store = task.job, connect(task.job.root)
    name = f"incidences-{task.bucket:05d}"
    if _is_done(store, job, name):
        return 0
    members = read_fragment(store, _path(job, f"rows-{task.bucket:05d}")).replace_schema_metadata()
    equal = members.rename_columns(["first", "twin", "other"]).append_column(
        SIMILARITY, pa.array(np.ones(members.num_rows, np.float32))
    )
    columns = ["first", "other", "twin", SIMILARITY]
    told = _told_to(store, job, "told", task.bucket).select(columns)
    near = pa.concat_tables([equal.select(columns), told])
    first, document, row = (members.column(column).to_numpy() for column in ("first", "document", "row"))
    near_first, other, twin, similarity = (near.column(column).to_numpy() for column in columns)

    def incidences(place: np.ndarray, member: np.ndarray) -> pa.Table:
        apart = document[member] != other[place]
        place, member = place[apart], member[apart]
        of = document[member]
        arrays = bucket_of(of, job.buckets), of, row[member], other[place], twin[place], similarity[place]
        return pa.table(list(map(pa.array, arrays)), schema=INCIDENCE_SCHEMA).sort_by("bucket")

    blocks = (incidences(*block) for block in _matching_blocks(first, near_first, INCIDENCES_PER_FILE))
    return _write_blocks(store, job, name, blocks)


def send_shares(task: DocumentTask) -> int:
    """Store how the bucket's documents are preferred, and tell the documents that cover enough of one; returns the
    number of documents."""
    job, store = task.job, connect(task.job.root)
    if _is_done(store, job, f"documents-{task.bucket:05d}"):
        return 0
    found = _told_to(store, job, "incidences", task.bucket)
    own, document = np.unique(found.column("document").to_numpy(), return_inverse=True)
    facts = read_facts(store, job.rows, job.fingerprint, task.bucket, own)
    row, other = (found.column(name).to_numpy() for name in ("row", "other"))
    document, other, share = document_shares(document, other, row, facts.passages)
    keys = facts.keys(job.rows, np.bincount(document, minlength=len(own)))
    stands = stands_of(store, job.removal, task.bucket, own)
    enough = share >= np.float32(job.share)
    told = {
        "bucket": bucket_of(other[enough], job.buckets),
        "covering": other[enough],
        "covered": own[document[enough]],
        SIMILARITY: share[enough],
        "key": keys.take(pa.array(document[enough])),
        "stands": stands[document[enough]],
    }
    _write(store, job, f"shares-{task.bucket:05d}", pa.table(told).sort_by("bucket"))
    _write(store, job, f"documents-{task.bucket:05d}", pa.table({"row_hash": own, "key": keys, "stands": stands}))
    return len(own)


def pair_documents(task: DocumentTask) -> int:
    """Store the pairs (PAIR_SCHEMA, with the share as similarity) of a document of the bucket and one that it covers
    and is preferred to; returns their number."""
    job, store = task.job, connect(task.job.root)
    name = f"pairs-{task.bucket:05d}"
    if _is_done(store, job, name):
        return 0
    told = _told_to(store, job, "shares", task.bucket)
    own = read_fragment(store, _path(job, f"documents-{task.bucket:05d}")).replace_schema_metadata()
    known = pa.concat_tables([own, told.select(["covered", *own.column_names[1:]]).rename_columns(own.column_names)])
    hashes, first = np.unique(known.column("row_hash").to_numpy(), return_index=True)
    rank = ranks(known.column("key").take(pa.array(first)), hashes, descends(job.rows))
    rank = np.where(known.column("stands").to_numpy()[first], rank, rank + len(rank))
    covering, covered = (told.column(side).to_numpy() for side in ("covering", "covered"))
    earlier = rank[np.searchsorted(hashes, covering)] < rank[np.searchsorted(hashes, covered)]
    covering, covered = covering[earlier], covered[earlier]
    ends = [np.minimum(covering, covered), np.maximum(covering, covered)]
    table = pa.table([*ends, told.column(SIMILARITY).filter(pa.array(earlier))], schema=PAIR_SCHEMA)
    _write(store, job, name, table.sort_by([(field, "ascending") for field in PAIR_SCHEMA.names[:2]]))
    return len(table)


def link_passages(task: DocumentTask) -> int:
    """Store the passages of the bucket's documents that go which have similar ones in the document that each goes for,
    with the most similar of these (WENT_SCHEMA, by removed row); returns their number. A document that goes has at
    least one such passage."""
    job, store = task.job, connect(task.job.root)
    removed = removed_of(store, job.removal, task.bucket)
    found = _told_to(store, job, "incidences", task.bucket)
    gone, kept, share = (removed.column(name).to_numpy() for name in REMOVED_SCHEMA.names)
    document, row, other, twin, similarity = (found.column(name).to_numpy() for name in INCIDENCE_SCHEMA.names[1:])
    place, number = _matches(gone, document)
    covered = kept[number] == other[place]
    wanted, number = place[covered], number[covered]
    row, twin, similarity = row[wanted], twin[wanted], similarity[wanted]
    order = np.lexsort((twin, -similarity, row))
    first = order[np.unique(row[order], return_index=True)[1]]
    columns = [row, twin, similarity, kept[number], share[number]]
    table = pa.table([column[first] for column in columns], schema=WENT_SCHEMA)
    _write(store, job, f"links-{task.bucket:05d}", table)
    return len(first)


def passage_links(store: Store, job: DocumentJob) -> Iterator[pa.Table]:
    """The links (REMOVED_SCHEMA) that link_passages stored, bucket by bucket of documents."""
    for bucket in range(job.buckets):
        table = read_fragment(store, _path(job, f"links-{bucket:05d}"), REMOVED_SCHEMA.names)
        yield table.replace_schema_metadata()


def passages_gone(store: Store, job: DocumentJob, bucket: int) -> pa.Table:
    """What link_passages stored (WENT_SCHEMA) of the row hashes of a bucket, by row hash."""
    names, hashes = [f"links-{documents:05d}" for documents in range(job.buckets)], bucket_range(bucket, job.buckets)
    tables = [read_hash_range(store, _path(job, name), *hashes, WENT_SCHEMA.names, "removed") for name in names]
    return pa.concat_tables(tables).replace_schema_metadata().sort_by("removed")


def _matches(ascending: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places int64 (m,), int64 (m,) of equal values: in `wanted` (w,) and among the ascending ones."""
    start = np.searchsorted(ascending, wanted, side="left")
    counts = np.searchsorted(ascending, wanted, side="right") - start
    place = np.repeat(np.arange(len(wanted)), counts)
    within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, np.repeat(start, counts) + within


def _matching_blocks(ascending: np.ndarray, wanted: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What _matches gives, for as many of the `wanted` at a time as have `most` matches, or for one that has more; once
    where there are none."""
    counts = np.searchsorted(ascending, wanted, side="right") - np.searchsorted(ascending, wanted, side="left")
    matches = np.concatenate([[0], np.cumsum(counts)])
    start = 0
    while start == 0 or start < len(wanted):
        end = max(start + 1, int(np.searchsorted(matches, matches[start] + most, side="right")) - 1)
        place, match = _matches(ascending, wanted[start:end])
        yield place + start, match
        start = end


def _sizes(first: np.ndarray, others: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many rows are equal to each of some (n,), itself included, int64 (n,): of the ascending `first` (f,) so many
    others are."""
    if len(first) == 0:
        return np.ones(len(rows), np.int64)
    place = np.minimum(np.searchsorted(first, rows), len(first) - 1)
    return np.where(first[place] == rows, others[place] + 1, 1)


def _told_to(store: Store, job: DocumentJob, kind: str, bucket: int) -> pa.Table:
    """What the tasks of a step wrote for a bucket."""
    names = sorted(store.names(stage_folder(DOCUMENT_PAIRS, job.fingerprint)))
    files = [name.removesuffix(".parquet") for name in names if name.startswith(f"{kind}-")]
    return pa.concat_tables([read_rows_with(store, _path(job, name), "bucket", bucket) for name in files])


def _write_blocks(store: Store, job: DocumentJob, name: str, tables: Iterator[pa.Table]) -> int:
    """Write tables to files of their own, of which the last alone has the name as it is: it says that all are there.
    Returns their rows."""
    rows, last = 0, next(tables)
    for number, table in enumerate(tables):
        _write(store, job, f"{name}-{number:05d}", last)
        rows, last = rows + len(last), table
    _write(store, job, name, last)
    return rows + len(last)


def _write(store: Store, job: DocumentJob, name: str, table: pa.Table) -> None:
    write_fragment(store, _path(job, name), table)


def _is_done(store: Store, job: DocumentJob, name: str) -> bool:
    return f"{name}.parquet" in store.names(stage_folder(DOCUMENT_PAIRS, job.fingerprint))


def _path(job: DocumentJob, name: str) -> str:
    return fragment_path(DOCUMENT_PAIRS, job.fingerprint, name)
