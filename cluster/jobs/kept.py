"""Removed rows → embeddings without them, and the links of the removed ones, fragment by fragment."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import Receipt, Work, write_fragment
from penstock.cluster.jobs.dealt_rows import read_dealt
from penstock.cluster.jobs.document_pairs import DocumentJob
from penstock.cluster.jobs.document_standing import decided_path, keep_documents
from penstock.cluster.jobs.removal import REMOVED_SCHEMA, RemovalJob
from penstock.cluster.jobs.shard_rows import FragmentPair, RowSource, read_rows
from penstock.cluster.jobs.similarity import SIMILARITY
from penstock.cluster.jobs.standing import decisions_on
from penstock.cluster.layout import EMBEDDINGS, KEPT, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.sharding import HASH_SPACE
from penstock.operators.sorted_places import places_among

DUPLICATE_MEANING = "duplicate_meaning"
# kept_hash and similarity are null where a passage went with its document and has none like it in the one that stays.
LINK_SCHEMA = pa.schema(
    [
        ("row_hash", pa.uint64()),
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("kept_hash", pa.uint64()),
        ("similarity", pa.float32()),
        ("group", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class KeptJob:
    """What all fragments share: where rows are, what goes, and the fingerprint of the embeddings that stay. Where whole
    documents go, `documents` says which."""

    source: RowSource
    removal: RemovalJob
    fingerprint: str
    documents: DocumentJob | None = None


@dataclass(frozen=True)
class KeptTask:
    """A fragment, and the name of what stays of it."""

    job: KeptJob
    pair: FragmentPair
    name: str


def links_path(fingerprint: str, fragment: str) -> str:
    """The links (LINK_SCHEMA) of the rows of a fragment that went."""
    return fragment_path(KEPT, fingerprint, fragment)


def keep_rows(task: KeptTask) -> Work:
    """Write the embeddings of a fragment that stay, and the links of those that go, which come first. Memory: the
    fragment."""
    started = time.perf_counter()
    job, store = task.job, connect(task.job.source.root)
    embedded, passages = read_rows(store, job.source, task.pair, 0, HASH_SPACE - 1)
    hashes = embedded.column("row_hash").to_numpy()
    dealt = read_dealt(store, job.removal, task.pair.embeddings)
    kept_hash, similarity = np.zeros(len(hashes), np.uint64), np.zeros(len(hashes), np.float32)
    goes = np.zeros(len(hashes), bool)
    if job.documents is not None:
        rows = embedded.select(["row_hash", "text_hash"]).append_column("document_hash", passages["document_hash"])
        path = decided_path(job.fingerprint, task.name)
        goes = keep_documents(store, job.documents, task.pair.embeddings, path, rows, dealt)
    for table in _gone(store, job, task.pair.embeddings, dealt):
        here, place = places_among(table.column("removed").to_numpy(), hashes)
        goes[here] = True
        kept_hash[here] = table.column("kept").to_numpy()[place]
        similarity[here] = table.column("similarity").to_numpy()[place]
    linked = similarity > 0
    group = hashes.copy()
    here, place = places_among(dealt.column("row_hash").to_numpy(), hashes)
    group[here] = dealt.column("group").to_numpy()[place]
    links = pa.table(
        [
            pa.array(hashes[goes]),
            embedded.column("passage_id").filter(pa.array(goes)),
            passages.column("document_id").filter(pa.array(goes)),
            pa.array(kept_hash[goes], mask=~linked[goes]),
            pa.array(similarity[goes], mask=~linked[goes]),
            pa.array(group[goes]),
        ],
        schema=LINK_SCHEMA,
    )
    write_fragment(store, links_path(job.fingerprint, task.name), links)
    return _write_kept(store, task, embedded.filter(pa.array(~goes)), int(goes.sum()), started)


def _gone(store: Store, job: KeptJob, fragment: str, dealt: pa.Table) -> Iterator[pa.Table]:
    """What goes of the fragment for another row (REMOVED_SCHEMA, by removed row), by earlier decisions and this one."""
    if job.removal.standing:
        yield decisions_on(store, job.removal.standing, fragment)[1].rename_columns(REMOVED_SCHEMA.names)
    gone = dealt.filter(pc.is_valid(dealt.column("kept")))
    yield gone.select(["row_hash", "kept", SIMILARITY]).rename_columns(REMOVED_SCHEMA.names)


def _write_kept(store: Store, task: KeptTask, embedded: pa.Table, went: int, started: float) -> Work:
    name = task.name
    dropped = {DUPLICATE_MEANING: went} if went else {}
    receipt = Receipt(name, embedded.num_rows + went, embedded.num_rows, dropped)
    written = write_fragment(store, fragment_path(EMBEDDINGS, task.job.fingerprint, name), embedded, receipt)
    busy_s = time.perf_counter() - started
    return Work(receipt, busy_s=busy_s, bytes_read=embedded.nbytes, bytes_written=written)
