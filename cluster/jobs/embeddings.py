"""Passages → embeddings: read, take the vectors that are known, encode the rest on a pool of workers, write.

A vector's identity is (encoder, hash of the passage text). Whatever an earlier fragment of the same encoder holds is
taken from
there by a join on that hash; only texts that nobody encoded before reach the model, each once per fragment.
"""

import ctypes
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.fragments import (
    Receipt,
    Work,
    read_fragment,
    vector_column,
    vectors_of,
    write_fragment,
)
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, dead_letter_path, fragment_path, run_folder
from penstock.cluster.node import connect, model_folder
from penstock.cluster.session import Session, reraise
from penstock.cluster.storage import Store
from penstock.operators.deadletters import DeadLetter, dead_letter_table, reasons
from penstock.operators.deduplication import bucket_of, hash_prefix
from penstock.operators.encoding import Encoder, EncoderWorker, vector_faults
from penstock.operators.identity import TEXT_HASH_TYPE

KNOWN_SCHEMA = pa.schema(
    [("fragment", pa.string()), ("text_hash", TEXT_HASH_TYPE), ("donor", pa.string()), ("donor_row", pa.int64())]
)
PASSAGE_COLUMNS = ["passage_id", "row_hash", "text_hash", "text", "source", "position", "document_id"]
# Reading and writing need little CPU, and must find a place beside encoders that fill all CPUs.
IO_CPUS = 0.01


class RowsLost(Exception):
    """A 1:1 stage gave back other rows than it was given."""


@dataclass(frozen=True)
class EmbeddingJob:
    """What all fragments of the stage share. `known` are the paths of tables of known vectors (KNOWN_SCHEMA)."""

    root: str
    passages_fingerprint: str
    selection_fingerprint: str
    fingerprint: str
    encoder: Encoder
    store_format: str
    threads: int
    device: str
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbeddingTask:
    """A passages fragment, the embeddings fragment to make of it, and whether any of its passages are excluded."""

    passages: str
    output: str
    has_exclusions: bool


@dataclass(frozen=True)
class KnownTask:
    """One bucket of the join of pending fragments with the embeddings that are there."""

    job: EmbeddingJob
    run_id: str
    pending: tuple[str, ...]
    donors: tuple[str, ...]
    bucket: int
    buckets: int


@dataclass(frozen=True)
class Pool:
    """Encoder workers: how many, and what each takes of the cluster."""

    count: int
    cpus: float
    gpus: float = 0.0


def find_known(task: KnownTask) -> tuple[str, int]:
    """Join this bucket of the pending passages' text hashes with the donors' and write what is known.

    Returns the table's path ("" when nothing is known) and its rows. Memory: 28 bytes for each donor row of the bucket.
    """
    store = connect(task.job.root)
    hashes, owners, rows = _donor_hashes(store, task)
    order = np.argsort(hashes, kind="stable")
    hashes, owners, rows = hashes[order], owners[order], rows[order]
    tables = [KNOWN_SCHEMA.empty_table()]
    for fragment in task.pending:
        column = read_fragment(
            store, fragment_path(PASSAGES, task.job.passages_fingerprint, fragment), ["text_hash"]
        ).column("text_hash")
        tables.append(_matches(task, fragment, column, hashes, owners, rows))
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        return "", 0
    path = f"{run_folder(task.run_id)}/known-{task.bucket:05d}.parquet"
    write_fragment(store, path, table)
    return path, table.num_rows


def load_passages(job: EmbeddingJob, task: EmbeddingTask) -> pa.Table:
    """The passages of a fragment that stay, with the vectors that are known; what travels to an encoder."""
    store = connect(job.root)
    path = fragment_path(PASSAGES, job.passages_fingerprint, task.passages)
    info = store.info(path)
    table = read_fragment(store, path, PASSAGE_COLUMNS)
    if task.has_exclusions:
        table = kept_rows(store, table, job.selection_fingerprint, task.passages)
    table = table.combine_chunks().append_column("vector", _known_vectors(store, job, task.passages, table))
    constants = {
        "output": pa.array([task.output] * table.num_rows),
        "ids_digest": pa.array([ids_digest(table)] * table.num_rows),
        "bytes_read": pa.array([info.size_bytes if info else 0] * table.num_rows),
    }
    for name, column in constants.items():
        table = table.append_column(name, column)
    return table


def encode_passages(job: EmbeddingJob, worker: EncoderWorker, table: pa.Table) -> pa.Table:
    """Fill in the vectors that are not known, encoding each text once; text goes, counts and faults come."""
    started = time.perf_counter()
    missing = np.flatnonzero(pc.is_null(table.column("vector")).to_numpy(zero_copy_only=False))
    hashes = np.array(table.column("text_hash").take(pa.array(missing)).to_pylist(), dtype=object)
    _, first, back = np.unique(hashes, return_index=True, return_inverse=True)
    unique_rows = missing[first]
    encoded = worker.encode(table.column("text").take(pa.array(unique_rows)).to_pylist())
    stored = np.dtype(job.store_format)
    vectors = _filled(table, job, missing, encoded.vectors, back)
    faults = {int(missing[i]): reason for i, reason in _faults_by_row(encoded.vectors, back, stored).items()}
    additions = {
        "vector": vector_column(vectors),
        "fault": pa.array([faults.get(row) for row in range(table.num_rows)], pa.string()),
        "tokens": _scattered(table.num_rows, unique_rows, encoded.tokens),
        "truncated_tokens": _scattered(table.num_rows, unique_rows, encoded.truncated_tokens),
        "encoded": pa.array(np.isin(np.arange(table.num_rows), unique_rows)),
        "encode_s": pa.array([time.perf_counter() - started] * table.num_rows),
    }
    table = table.drop_columns(["text", "vector"])
    for name, column in additions.items():
        table = table.append_column(name, column)
    return table


def store_embeddings(job: EmbeddingJob, table: pa.Table) -> Work:
    """Prove that the rows are those that were read, split off faulty ones and write the fragment."""
    output = table.column("output")[0].as_py()
    if ids_digest(table) != table.column("ids_digest")[0].as_py():
        raise RowsLost(
            f"embeddings fragment ({output}) must hold the passages it was read with, in their order; it does not"
        )
    faulty = pc.is_valid(table.column("fault"))
    letters = _dead_letters(table.filter(faulty))
    good = table.filter(pc.invert(faulty))
    receipt = Receipt(
        fragment=output,
        rows_in=table.num_rows,
        rows_out=good.num_rows,
        dropped=reasons(letters),
        passages=good.num_rows,
    )
    store = connect(job.root)
    written = 0
    if letters.num_rows:
        written += write_fragment(store, dead_letter_path(EMBEDDINGS, job.fingerprint, output), letters)
    columns = good.select(["passage_id", "row_hash", "text_hash", "vector"]).rename_columns(
        ["passage_id", "row_hash", "text_hash", "embedding"]
    )
    written += write_fragment(store, fragment_path(EMBEDDINGS, job.fingerprint, output), columns, receipt)
    return Work(
        Receipt(
            **{
                **vars(receipt),
                "tokens": _total(table, "tokens"),
                "truncated_tokens": _total(table, "truncated_tokens"),
            }
        ),
        encoded=_total(table, "encoded"),
        reused=table.num_rows - _total(table, "encoded"),
        busy_s=table.column("encode_s")[0].as_py(),
        bytes_read=table.column("bytes_read")[0].as_py(),
        bytes_written=written,
    )


class EncodeFragments:
    """The actor of the pool: loads the model once, then encodes one fragment per call."""

    def __init__(self, job: EmbeddingJob) -> None:
        self._job = job
        self._failure: Exception | None = None
        try:
            self._worker = EncoderWorker(job.encoder, model_folder(job.encoder.model), job.threads, job.device)
        except Exception as error:  # raised by the first call: an actor whose constructor raises loses the reason
            self._failure = error

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._failure is not None:
            raise self._failure
        encoded = encode_passages(self._job, self._worker, table)
        release_freed_memory()
        return encoded


def release_freed_memory() -> None:
    """Give back what the C library keeps of freed batches: 260 MiB after 1,600 texts in batches of many shapes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need it less
    if trim is not None:
        trim(0)


def embed_fragments(session: Session, job: EmbeddingJob, tasks: list[EmbeddingTask], pool: Pool) -> Iterator[Work]:
    """Stream fragments through read → encode → write; what was done for each comes back as it is written."""
    session.start()
    import ray.data
    import ray.exceptions

    def read(block: pa.Table) -> pa.Table:
        row = block.to_pylist()[0]
        return load_passages(job, EmbeddingTask(row["passages"], row["output"], row["has_exclusions"]))

    def write(block: pa.Table) -> pa.Table:
        work = store_embeddings(job, block)
        fields = {**vars(work), "receipt": work.receipt.to_json()}
        return pa.Table.from_pylist([fields])

    def encode_options() -> dict[str, Any]:
        options: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=pool.count), "num_cpus": pool.cpus}
        return options | ({"num_gpus": pool.gpus} if pool.gpus else {})

    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    data: ray.data.Dataset = ray.data.from_arrow([pa.Table.from_pylist([vars(task)]) for task in tasks])
    # One reader and one writer for each encoder keep it fed; every one more is a process that takes seconds to start.
    at_once = min(pool.count, len(tasks))
    data = data.map_batches(read, num_cpus=IO_CPUS, concurrency=at_once, **whole)
    data = data.map_batches(EncodeFragments, fn_constructor_args=(job,), **encode_options(), **whole)
    data = data.map_batches(write, num_cpus=IO_CPUS, concurrency=at_once, **whole)
    try:
        for batch in data.iter_batches(prefetch_batches=0, **whole):
            for fields in pa.table(batch).to_pylist():
                yield Work(**{**fields, "receipt": Receipt.from_json(fields["receipt"])})
    except (ray.exceptions.RayError, RuntimeError) as error:
        reraise(error)


def ids_digest(table: pa.Table) -> str:
    """Digest of the passages of a table, ids and texts, in their order: equal only when none was lost, added or
    moved."""
    digest = hashlib.blake2b(digest_size=16)
    for row_id, text_hash in zip(
        table.column("passage_id").to_pylist(), table.column("text_hash").to_pylist(), strict=True
    ):
        digest.update(row_id.encode() + b"\0" + text_hash)
    return digest.hexdigest()


def _donor_hashes(store: Store, task: KnownTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hashes, owners, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for number, donor in enumerate(task.donors):
        path = fragment_path(EMBEDDINGS, task.job.fingerprint, donor)
        values = hash_prefix(read_fragment(store, path, ["text_hash"]).column("text_hash"))
        inside = np.flatnonzero(bucket_of(values, task.buckets) == task.bucket)
        hashes.append(values[inside])
        owners.append(np.full(len(inside), number, np.int32))
        rows.append(inside)
    return np.concatenate(hashes), np.concatenate(owners), np.concatenate(rows)


def _matches(
    task: KnownTask, fragment: str, column: pa.ChunkedArray, hashes: np.ndarray, owners: np.ndarray, rows: np.ndarray
) -> pa.Table:
    """Rows of KNOWN_SCHEMA for one fragment. The join is on 64 bits; the reader compares all 128 before it takes a
    vector."""
    values = hash_prefix(column)
    inside = np.flatnonzero(bucket_of(values, task.buckets) == task.bucket)
    places = np.searchsorted(hashes, values[inside])
    hit = (
        (places < len(hashes)) & (hashes[np.minimum(places, len(hashes) - 1)] == values[inside]) if len(hashes) else []
    )
    inside, places = inside[hit], places[hit]
    return pa.table(
        {
            "fragment": pa.array([fragment] * len(inside), pa.string()),
            "text_hash": column.take(pa.array(inside)),
            "donor": pa.array([task.donors[owner] for owner in owners[places]], pa.string()),
            "donor_row": pa.array(rows[places]),
        },
        schema=KNOWN_SCHEMA,
    )


def _known_vectors(store: Store, job: EmbeddingJob, fragment: str, table: pa.Table) -> pa.Array:
    """The known vectors of a fragment's rows as a column with nulls for those that are not known."""
    found = _known_by_hash(store, job, fragment, set(table.column("text_hash").to_pylist()))
    dimension = job.encoder.dimension
    vectors = np.zeros((table.num_rows, dimension), dtype=job.store_format)
    unknown = np.ones(table.num_rows, dtype=bool)
    for row, text_hash in enumerate(table.column("text_hash").to_pylist()):
        vector = found.get(text_hash)
        if vector is not None:
            vectors[row], unknown[row] = vector, False
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension, mask=pa.array(unknown))


def _known_by_hash(store: Store, job: EmbeddingJob, fragment: str, wanted: set[bytes]) -> dict[bytes, np.ndarray]:
    found: dict[bytes, np.ndarray] = {}
    for path in job.known:
        with store.open(path) as stream:
            known = pq.read_table(stream, filters=[("fragment", "==", fragment)], page_checksum_verification=True)
        for donor in pc.unique(known.column("donor")).to_pylist():
            rows = known.filter(pc.equal(known.column("donor"), donor)).column("donor_row")
            held = read_fragment(store, fragment_path(EMBEDDINGS, job.fingerprint, donor), ["text_hash", "embedding"])
            held = held.take(rows.combine_chunks())
            for text_hash, vector in zip(
                held.column("text_hash").to_pylist(), vectors_of(held.column("embedding")), strict=True
            ):
                if text_hash in wanted:
                    found[text_hash] = vector
    return found


def _filled(table: pa.Table, job: EmbeddingJob, missing: np.ndarray, fresh: np.ndarray, back: np.ndarray) -> np.ndarray:
    column = table.column("vector").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    dimension = job.encoder.dimension
    start = column.offset * dimension
    flat = column.values.to_numpy(zero_copy_only=False)[start : start + len(column) * dimension]
    vectors: np.ndarray = flat.reshape(-1, dimension).copy()
    if len(missing):
        with np.errstate(over="ignore", invalid="ignore"):
            vectors[missing] = fresh[back].astype(job.store_format)
    return vectors


def _faults_by_row(vectors: np.ndarray, back: np.ndarray, stored: np.dtype[Any]) -> dict[int, str]:
    faults = vector_faults(vectors, stored) if len(vectors) else {}
    return {row: faults[int(unique)] for row, unique in enumerate(back) if int(unique) in faults}


def _scattered(rows: int, at: np.ndarray, values: np.ndarray) -> pa.Array:
    result = np.zeros(rows, dtype=np.int64)
    result[at] = values
    return pa.array(result)


def _total(table: pa.Table, column: str) -> int:
    return int(pc.sum(pc.cast(table.column(column), pa.int64())).as_py() or 0)


def _dead_letters(rows: pa.Table) -> pa.Table:
    letters = [
        DeadLetter(
            stage=EMBEDDINGS,
            source=row["source"],
            position=row["position"],
            reason=row["fault"],
            detail="the model's vector for this passage cannot be stored",
            document_id=row["document_id"],
            passage_id=row["passage_id"],
        )
        for row in rows.select(["source", "position", "fault", "document_id", "passage_id"]).to_pylist()
    ]
    return dead_letter_table(letters)
