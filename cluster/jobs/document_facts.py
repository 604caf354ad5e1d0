"""Passages → what they tell of each document, by the bucket of its hash: number, tokens, place and column.

Each fragment of passages is read once; who decides on a bucket of documents reads what concerns these alone.
"""

from dataclasses import dataclass
from typing import assert_never

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import read_rows_with, write_fragment
from penstock.cluster.jobs.pair_ends import bucket_of
from penstock.cluster.jobs.removal import RemovalJob, sortable, staying_passages
from penstock.cluster.layout import DOCUMENT_PAIRS, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.independent_set import Keep, random_keys
from penstock.operators.sorted_places import places_among

TOKENS = "tokens"


@dataclass(frozen=True)
class FactsTask:
    """The fragment of a number of those that `job` has passages in; `fingerprint` is of the choice among documents."""

    job: RemovalJob
    fingerprint: str
    number: int


class DocumentFacts:
    """What passages tell of some documents, ascending uint64 (n,).

    Attributes:
        passages: int64 (n,), their number.
    """

    def __init__(self, found: pa.Table, own: np.ndarray) -> None:
        rows, place = places_among(own, found.column("document").to_numpy())
        self._own, self._found = own, found.take(pa.array(rows))
        self._place = place
        self.passages = self._sum("passages")

    def keys(self, job: RemovalJob, near: np.ndarray) -> pa.Array:
        """What each document is preferred by: tokens of its passages together, its place, how many documents are `near`
        it, int64 (n,), a seeded hash, or a column, which all its passages have from it."""
        match job.keep:
            case Keep.LONGEST:
                return pa.array(self._sum(TOKENS))
            case Keep.FIRST | Keep.COLUMN:
                columns = [self._of_first_passage(f"first_{name}") for name in _first_columns(job)]
                return columns[0] if len(columns) == 1 else sortable(columns)
            case Keep.DENSEST:
                return pa.array(near)
            case Keep.RANDOM:
                return pa.array(random_keys(self._own, job.seed))
            case _:
                assert_never(job.keep)

    def _sum(self, name: str) -> np.ndarray:
        total = np.zeros(len(self._own), np.int64)
        np.add.at(total, self._place, self._found.column(name).to_numpy())
        return total

    def _of_first_passage(self, name: str) -> pa.Array:
        first = np.unique(self._place, return_index=True)[1]
        return self._found.column(name).take(pa.array(first)).combine_chunks()


def deal_facts(session: Session, job: RemovalJob, fingerprint: str) -> None:
    """Writes what all passages tell of documents. What is done is not done again."""
    for _ in session.stream(write_facts, [FactsTask(job, fingerprint, number) for number in range(len(job.passages))]):
        pass


def write_facts(task: FactsTask) -> int:
    """Write what the passages of a fragment tell of their documents, by bucket of these; returns their number. Memory:
    these columns of the fragment."""
    job, store = task.job, connect(task.job.root)
    name = _name(task.number)
    if f"{name}.parquet" in store.names(stage_folder(DOCUMENT_PAIRS, task.fingerprint)):
        return 0
    names = _first_columns(job)
    sums = [TOKENS] if job.keep is Keep.LONGEST else []
    found = staying_passages(store, job, job.passages[task.number], ["document_hash", *sums, *names])
    own, first, place, passages = np.unique(
        found.column("document_hash").to_numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    columns = {"bucket": bucket_of(own, job.buckets), "document": own, "passages": passages}
    for column in sums:
        columns[column] = np.bincount(place, found.column(column).to_numpy(), len(own)).astype(np.int64)
    facts = pa.table(columns)
    for column in names:
        facts = facts.append_column(f"first_{column}", found.column(column).take(pa.array(first)))
    write_fragment(store, fragment_path(DOCUMENT_PAIRS, task.fingerprint, name), facts)  # buckets are ranges of hashes
    return len(own)


def read_facts(store: Store, job: RemovalJob, fingerprint: str, bucket: int, own: np.ndarray) -> DocumentFacts:
    """What passages tell of the documents `own` of a bucket, ascending uint64 (n,)."""
    paths = [fragment_path(DOCUMENT_PAIRS, fingerprint, _name(number)) for number in range(len(job.passages))]
    return DocumentFacts(pa.concat_tables([read_rows_with(store, path, "bucket", bucket) for path in paths]), own)


def _first_columns(job: RemovalJob) -> list[str]:
    """The columns of which a document has one value, that of its first passage."""
    columns = {Keep.FIRST: ["source", "position"], Keep.COLUMN: [job.column]}
    return columns.get(job.keep, [])


def _name(number: int) -> str:
    return f"facts-{number:05d}"
