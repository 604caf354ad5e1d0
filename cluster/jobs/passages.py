"""Source files → passages: read a fragment's documents and cut them."""

import time
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from penstock.cluster.fragments import Receipt, Work, write_fragment
from penstock.cluster.layout import PASSAGES, dead_letter_path, documents_path, fragment_path
from penstock.cluster.node import connect, connect_corpus, tokenizer
from penstock.cluster.storage import Store
from penstock.operators.chunking import Chunker, PassageType, chunk_documents
from penstock.operators.deadletters import DeadLetter, dead_letter_table, reasons
from penstock.operators.documents import DocumentReader, Documents, SourcePart, documents_schema
from penstock.operators.identity import row_hashes
from penstock.operators.reading import read_documents

# A row's place in its file tells documents apart even where two have the same id.
DOCUMENT_COLUMNS = ["source", "position", "document_id", "text"]


class SourceChanged(Exception):
    """A source file is not what it was when the run was planned."""


@dataclass(frozen=True)
class FilePart:
    """A source file, or part of it: where it lies and which rows; `state` (ETag, or size and time) tells whether it was
    touched since it was planned, `content` (ETag or sha256) identifies its bytes."""

    store_url: str
    path: str
    part: SourcePart
    size_bytes: int
    bytes_to_read: int
    state: str
    content: str


@dataclass(frozen=True)
class PassageJob:
    """What all fragments of the stage share."""

    root: str
    stage_fingerprint: str
    reader: DocumentReader
    chunker: Chunker
    model: str
    tokenizer_hash: str


@dataclass(frozen=True)
class PassageTask:
    job: PassageJob
    fragment: str
    parts: tuple[FilePart, ...]


def make_passages(task: PassageTask) -> Work:
    """Read, cut and write one fragment; memory is bounded by its documents and passages."""
    started = time.perf_counter()
    job = task.job
    documents, dropped, rows_in = _read(task)
    passages, no_tokens = chunk_documents(documents, job.chunker, tokenizer(job.model, job.tokenizer_hash))
    passages = _with_document_hash(passages)
    dropped = pa.concat_tables([dropped, no_tokens])
    documents_out = documents.num_rows - no_tokens.num_rows
    receipt = Receipt(
        fragment=task.fragment,
        rows_in=rows_in,
        rows_out=documents_out,
        dropped=reasons(dropped),
        passages=passages.num_rows,
        tokens=int(sum(passages.column("tokens").to_pylist())),
    )
    store = connect(job.root)
    written = 0
    if dropped.num_rows:
        written += write_fragment(store, dead_letter_path(PASSAGES, job.stage_fingerprint, task.fragment), dropped)
    if job.chunker.kind is PassageType.LATE:
        path = documents_path(job.stage_fingerprint, task.fragment)
        written += write_fragment(store, path, documents.select(DOCUMENT_COLUMNS))
    written += write_fragment(store, fragment_path(PASSAGES, job.stage_fingerprint, task.fragment), passages, receipt)
    read = sum(part.bytes_to_read for part in task.parts)
    return Work(receipt, busy_s=time.perf_counter() - started, bytes_read=read, bytes_written=written)


def _read(task: PassageTask) -> tuple[pa.Table, pa.Table, int]:
    read = [_read_part(task.job.reader, part) for part in task.parts]
    documents = pa.concat_tables([documents_schema(task.job.reader).empty_table(), *(item.table for item in read)])
    dropped = pa.concat_tables([dead_letter_table([]), *(item.dropped for item in read)])
    return documents, dropped, sum(item.rows_in for item in read)


def _read_part(reader: DocumentReader, part: FilePart) -> Documents:
    store = connect_corpus(part.store_url)
    _refuse_changed(store, part)
    try:
        with store.open(part.path) as stream:
            documents = read_documents(reader, part.part, stream, part.size_bytes)
        _refuse_changed(store, part)
        return documents
    except PermissionError as error:
        letter = DeadLetter("documents", part.part.path, -1, "unreadable_file", str(error))
        return Documents(documents_schema(reader).empty_table(), dead_letter_table([letter]), 1)


def _refuse_changed(store: Store, part: FilePart) -> None:
    """Before and after reading: what was read must be what its identity says."""
    info = store.info(part.path)
    if info is None or source_state(info.etag, info.size_bytes, info.modified.timestamp()) != part.state:
        raise SourceChanged(
            f"source file ({part.part.path}) must stay as it is while a run reads it; it was changed or removed; "
            "run again"
        )


def source_state(etag: str | None, size_bytes: int, modified_s: float) -> str:
    """What tells cheaply that a file was not touched between planning and reading."""
    return etag or f"{size_bytes}:{modified_s:.6f}"


def _with_document_hash(passages: pa.Table) -> pa.Table:
    ids = passages.column("document_id").to_pylist()
    return passages.append_column("document_hash", pa.array(row_hashes(ids), pa.uint64()))


def merge_reasons(counts: list[dict[str, int]]) -> dict[str, int]:
    """Dropped rows by reason, added up."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))
