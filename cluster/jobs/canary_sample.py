"""Passages fragments → a seeded sample of the passages that stay, with those of judged documents, as fragments of the
same stage.

As fragments they are embedded like any others, and the embedding of the whole corpus later finds their vectors by the
hashes of their texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import Receipt, open_fragment, read_fragment, read_hash_range, write_fragment
from penstock.cluster.jobs.embeddings import ids_digest
from penstock.cluster.jobs.sampling import oversampled_share
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.layout import PASSAGES, documents_path, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.identity import fingerprint, row_hashes
from penstock.operators.sharding import hash_range, sample_order

FRAGMENT_ROWS = 1_000  # so that several encoders share the sample; whatever their number, fragments are the same
PLACE = ["source", "position"]


@dataclass(frozen=True)
class CanarySampleJob:
    """What all fragments share.

    Attributes:
        passages: how many there are that stay.
        wanted: how many of them to draw.
        judged: ids of documents whose passages are all taken.
        late: whether passages are embedded within their documents, which then belong to the sample.
    """

    root: str
    passages_fingerprint: str
    selection_fingerprint: str
    passages: int
    wanted: int
    seed: int
    judged: frozenset[str]
    late: bool


@dataclass(frozen=True)
class CanarySampleTask:
    """A passages fragment, and whether any of its passages are excluded."""

    job: CanarySampleJob
    fragment: str
    has_exclusions: bool


@dataclass(frozen=True, eq=False)
class SampledPassages:
    """Passages with all their columns: those in the range of hashes that is drawn from, and those of judged documents;
    and the documents of all of these, where they are needed. `fragment` is what they are of."""

    fragment: str
    drawn: pa.Table
    judged: pa.Table
    documents: pa.Table | None

    @staticmethod
    def joined(found: Sequence["SampledPassages"]) -> "SampledPassages":
        """Those of several fragments, the same in whatever order they come."""
        parts = sorted(found, key=lambda part: part.fragment)
        documents = [part.documents for part in parts if part.documents is not None]
        return SampledPassages(
            "",
            pa.concat_tables([part.drawn for part in parts]),
            pa.concat_tables([part.judged for part in parts]),
            pa.concat_tables(documents) if documents else None,
        )


@dataclass(frozen=True)
class SampleFragment:
    """A fragment of the sample, its passages and their tokens."""

    name: str
    passages: int
    documents: int
    tokens: int


def sample_passages(task: CanarySampleTask) -> SampledPassages:
    """What of a fragment may belong to the sample. Reads hashes of all its documents, but rows of few; memory: the
    fragment, where a judged document is in it."""
    job, store = task.job, connect(task.job.root)
    path = fragment_path(PASSAGES, job.passages_fingerprint, task.fragment)
    with open_fragment(store, path) as file:
        names = file.schema_arrow.names
    ranges = hash_range(oversampled_share(job.wanted, job.passages), job.seed)
    drawn = pa.concat_tables([read_hash_range(store, path, first, last, names) for first, last in ranges])
    kept = [_staying(task, store, rows.select(names)) for rows in (drawn, _judged_rows(job, store, path, names))]
    documents = None
    if job.late:
        documents = of_places(read_fragment(store, documents_path(job.passages_fingerprint, task.fragment)), kept)
    return SampledPassages(task.fragment, kept[0], kept[1], documents)


def first_drawn(table: pa.Table, wanted: int, seed: int) -> pa.Table:
    """`wanted` passages of a table with row_hash, from where the seed's range begins: a smaller sample lies in a larger
    one, however the corpus is cut."""
    order = sample_order(table.column("row_hash").to_numpy(), seed)
    return table.take(pa.array(order[:wanted]))


def write_sample_fragments(
    store: Store, passages_fingerprint: str, table: pa.Table, documents: pa.Table | None
) -> list[SampleFragment]:
    """Write passages as fragments of a stage, FRAGMENT_ROWS each, named by what they hold; those that are there stay.

    Args:
        documents: of all the passages, where these are embedded within them.
    """
    ordered = table.sort_by("row_hash")
    parts = [ordered.slice(first, FRAGMENT_ROWS) for first in range(0, ordered.num_rows, FRAGMENT_ROWS)]
    return [write_passages(store, passages_fingerprint, part, documents) for part in parts]


def write_passages(
    store: Store, passages_fingerprint: str, part: pa.Table, documents: pa.Table | None
) -> SampleFragment:
    """Write passages, sorted by row_hash, as one fragment of a stage, named by what it holds; one that is there stays.

    Args:
        documents: of all the passages at least, where these are embedded within them.
    """
    # By the passages alone: two models that cut texts alike have the same fragments.
    name = fingerprint(sample=ids_digest(part), late=documents is not None)
    path = fragment_path(PASSAGES, passages_fingerprint, name)
    fragment = SampleFragment(
        name,
        part.num_rows,
        pc.count_distinct(part.column("document_id")).as_py(),
        pc.sum(part.column("tokens")).as_py(),
    )
    if store.info(path) is None:
        if documents is not None:
            write_fragment(store, documents_path(passages_fingerprint, name), of_places(documents, [part]))
        count = fragment.documents
        receipt = Receipt(name, count, count, passages=part.num_rows, tokens=fragment.tokens)
        write_fragment(store, path, part, receipt)
    return fragment


def _staying(task: CanarySampleTask, store: Store, rows: pa.Table) -> pa.Table:
    plain = rows.replace_schema_metadata()
    if not task.has_exclusions:
        return plain
    return kept_rows(store, plain, task.job.selection_fingerprint, task.fragment)


def _judged_rows(job: CanarySampleJob, store: Store, path: str, names: list[str]) -> pa.Table:
    """The passages of judged documents."""
    hashes = read_fragment(store, path, ["document_hash"]).column("document_hash").to_numpy()
    if not np.isin(hashes, row_hashes(sorted(job.judged))).any():
        return read_hash_range(store, path, 0, 0, names).slice(0, 0)
    table = read_fragment(store, path)
    return table.filter(pc.is_in(table.column("document_id"), pa.array(sorted(job.judged), pa.string())))


def of_places(documents: pa.Table, passages: Sequence[pa.Table]) -> pa.Table:
    """The documents that some passages were cut from, which their places tell apart."""
    wanted = {tuple(row.values()) for table in passages for row in table.select(PLACE).to_pylist()}
    mine = [tuple(row.values()) in wanted for row in documents.select(PLACE).to_pylist()]
    return documents.filter(pa.array(mine, pa.bool_())).replace_schema_metadata()
