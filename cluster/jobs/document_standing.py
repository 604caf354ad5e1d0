"""Earlier decisions on whole documents, and a corpus that has changed since → what stands of their passages.

A document is carried over as a row of its own, of which the text is all that its passages say: it keeps its decision as
long as it has the same passages and, where it went, the document that represents it still stays. Its passages stand,
are gone or are open as it is. What they are linked to is carried over as it is of passages that go by themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import Receipt, read_fragment, read_receipt, write_fragment
from penstock.cluster.jobs.document_pairs import DocumentJob
from penstock.cluster.jobs.standing import (
    Carried,
    StandingJob,
    carry_decisions,
    decisions_on,
    write_decisions,
)
from penstock.cluster.layout import EMBEDDINGS, KEPT, PASSAGES, STANDING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.document_identity import document_hashes
from penstock.operators.identity import TEXT_HASH_TYPE, fingerprint
from penstock.operators.sorted_places import places_among

# By row_hash, which is that of a document here. kept_hash is its own where it stays, and similarity the share of its
# passages that are in the one that stays for it.
DECIDED_SCHEMA = pa.schema(
    [
        ("row_hash", pa.uint64()),
        ("text_hash", TEXT_HASH_TYPE),
        ("kept_hash", pa.uint64()),
        ("similarity", pa.float32()),
    ]
)


@dataclass(frozen=True)
class DocumentStanding(StandingJob):
    """Carry earlier decisions on documents over, fragment by fragment of their passages."""

    def now(self, fragment: str) -> str:
        return fragment_path(STANDING, self.fingerprint, f"rows-{fragment}")

    def then(self, fragment: str) -> str:
        return decided_path(self.earlier, self.links[fragment])

    def gone(self, fragment: str) -> str:
        return decided_path(self.earlier, self.links[fragment])


@dataclass(frozen=True)
class DocumentCarry:
    """Carry decisions over as documents stand.

    Attributes:
        job: as for passages that go by themselves; its fingerprint is that of what is decided on those of documents.
        passages: the passages fragment of each embeddings fragment.
    """

    job: StandingJob
    passages_fingerprint: str
    passages: Mapping[str, str]

    @property
    def rows(self) -> StandingJob:
        """Passages by themselves."""
        return replace(self.job, fingerprint=fingerprint(stage=STANDING, rows_of=self.job.fingerprint))

    @property
    def documents(self) -> DocumentStanding:
        job = replace(self.job, fingerprint=standing_documents(self.job.fingerprint))
        return DocumentStanding(**{field.name: getattr(job, field.name) for field in fields(job)})


@dataclass(frozen=True)
class DocumentCarryTask:
    carry: DocumentCarry
    fragment: str


def standing_documents(standing: str) -> str:
    """The fingerprint of the documents of passages that stand."""
    return fingerprint(stage=STANDING, documents_of=standing)


def decided_path(kept: str, fragment: str) -> str:
    """What was decided (DECIDED_SCHEMA) of the documents of a fragment of what stays."""
    return fragment_path(KEPT, kept, f"documents-{fragment}")


def carry_documents(
    session: Session, carry: DocumentCarry, on_fragment: Callable[[Receipt], None]
) -> tuple[Carried, Carried]:
    """Carries over what is not carried yet, telling of each fragment; returns what was carried of passages and of
    documents."""
    job, documents = carry.job, carry.documents
    store = connect(job.root)
    present = set(store.names(stage_folder(STANDING, documents.fingerprint)))
    arrived = [
        DocumentCarryTask(carry, fragment)
        for fragment in job.fragments
        if fragment not in job.links and f"rows-{fragment}.parquet" not in present
    ]
    for _ in session.stream(write_documents, arrived):
        pass
    carry_decisions(session, carry.rows, lambda _: None)
    whole, carried = carry_decisions(session, documents, lambda _: None), Carried()
    for receipt in session.stream(carry_passages, [DocumentCarryTask(carry, fragment) for fragment in job.fragments]):
        carried = carried.adding(receipt)
        on_fragment(receipt)
    return carried, whole


def write_documents(task: DocumentCarryTask) -> int:
    """Write the documents of a fragment that came as rows (row_hash, text_hash); returns their number."""
    carry, store = task.carry, connect(task.carry.job.root)
    path = fragment_path(EMBEDDINGS, carry.job.embeddings_fingerprint, task.fragment)
    rows = read_fragment(store, path, ["row_hash", "text_hash"])
    hashes = rows.column("row_hash").to_numpy()
    own, texts = document_hashes(_documents_of(store, task, hashes), hashes, rows.column("text_hash"))
    write_fragment(store, carry.documents.now(task.fragment), pa.table({"row_hash": own, "text_hash": texts}))
    return len(own)


def carry_passages(task: DocumentCarryTask) -> Receipt:
    """Write the decisions (STANDING_SCHEMA) on passages of a fragment whose documents are not open. Memory: the hashes
    of the fragment."""
    carry, store = task.carry, connect(task.carry.job.root)
    name = task.fragment
    path = fragment_path(STANDING, carry.job.fingerprint, name)
    if f"{name}.parquet" in store.names(stage_folder(STANDING, carry.job.fingerprint)):
        return read_receipt(store, path)
    single = fragment_path(STANDING, carry.rows.fingerprint, name)
    rows = read_fragment(store, single).replace_schema_metadata()
    decided = read_fragment(store, fragment_path(STANDING, carry.documents.fingerprint, name), ["row_hash"])
    documents = _documents_of(store, task, rows.column("row_hash").to_numpy())
    rows = rows.filter(pa.array(np.isin(documents, decided.column("row_hash").to_numpy())))
    return write_decisions(store, path, name, rows, read_receipt(store, single).rows_in)


def keep_documents(
    store: Store, job: DocumentJob, fragment: str, path: str, rows: pa.Table, dealt: pa.Table
) -> np.ndarray:
    """Write to `path` what is decided (DECIDED_SCHEMA) of the documents of an embeddings fragment, of which `rows` are
    row_hash, text_hash and document_hash of the passages (n), and `dealt` is what read_dealt gives; returns which of
    the passages go, bool (n,)."""
    document = rows.column("document_hash").to_numpy()
    own, texts = document_hashes(document, rows.column("row_hash").to_numpy(), rows.column("text_hash"))
    kept, share = own.copy(), np.ones(len(own), np.float32)
    if job.standing is not None:
        table = decisions_on(store, job.standing, fragment)[1]
        here, place = places_among(own, table.column("row_hash").to_numpy())
        kept[place] = table.column("kept_hash").to_numpy()[here]
        share[place] = table.column("similarity").to_numpy()[here]
    went = dealt.filter(pc.is_valid(dealt.column("kept_document")))  # of each document that goes some passages
    here, row = places_among(went.column("row_hash").to_numpy(), rows.column("row_hash").to_numpy())
    place = np.searchsorted(own, document[here])
    kept[place] = went.column("kept_document").to_numpy()[row]
    share[place] = went.column("share").to_numpy()[row]
    write_fragment(store, path, pa.table([own, texts, kept, share], schema=DECIDED_SCHEMA))
    goes: np.ndarray = (kept != own)[np.searchsorted(own, document)]
    return goes


def _documents_of(store: Store, task: DocumentCarryTask, hashes: np.ndarray) -> np.ndarray:
    """The documents uint64 (n,) of some passages of a fragment, uint64 (n,)."""
    path = fragment_path(PASSAGES, task.carry.passages_fingerprint, task.carry.passages[task.fragment])
    table = read_fragment(store, path, ["row_hash", "document_hash"])
    place = np.searchsorted(table.column("row_hash").to_numpy(), hashes)
    documents: np.ndarray = table.column("document_hash").to_numpy()[place]
    return documents
