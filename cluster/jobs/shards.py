"""Embeddings → the files of one shard: the index, ids, rows, vectors for re-ranking, and duplicates' links."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from penstock.cluster.fragments import read_hash_range, vectors_of
from penstock.cluster.jobs.selection import DUPLICATE_TEXT, exclusion_files, kept_rows
from penstock.cluster.jobs.training import read_trained
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, SHARDS, fragment_path, shard_file, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.identity import row_hashes
from penstock.operators.indexing import Family, IndexSpec, shard_builder
from penstock.operators.searching import VectorWriter
from penstock.operators.sharding import shard_of, shard_range

SVS = "svs.tar"
FAISS, IDS, ROWS, VECTORS, DUPLICATES = "faiss", "ids.arrow", "rows.arrow", "vectors.arrow", "duplicates.arrow"
INTERNAL_COLUMNS = {"ordinal", "tokens", "row_hash", "text_hash", "normal_hash", "document_hash", "source", "position"}


@dataclass(frozen=True)
class FileRecord:
    """A published file: its size and the sha256 that a reader checks before it opens it."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: where its files are, and how many rows they hold."""

    shard: int
    rows: int
    duplicates: int
    folder: str
    files: tuple[FileRecord, ...]
    busy_s: float = field(default=0.0, compare=False)
    bytes_read: int = field(default=0, compare=False)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> "ShardRecord":
        fields = json.loads(data)
        return ShardRecord(**{**fields, "files": tuple(FileRecord(**item) for item in fields["files"])})


@dataclass(frozen=True)
class FragmentPair:
    """An embeddings fragment, the passages fragment it was made of, and whether any of its passages are excluded."""

    passages: str
    embeddings: str
    has_exclusions: bool


@dataclass(frozen=True)
class ShardJob:
    """What all shards share. Fragments are in the order in which their rows are added."""

    root: str
    fingerprint: str
    folder: str
    passages_fingerprint: str
    selection_fingerprint: str
    embeddings_fingerprint: str
    training_fingerprint: str
    fragments: tuple[FragmentPair, ...]
    shards: int
    spec: IndexSpec
    rerank: bool


@dataclass(frozen=True)
class ShardTask:
    job: ShardJob
    shard: int


def shard_record_path(fingerprint: str, shard: int) -> str:
    return f"{stage_folder(SHARDS, fingerprint)}/{shard_file(shard, 'json')}"


def index_kind(family: Family) -> str:
    """The kind of a shard's index file: what faiss writes, or the folders of svs as one file."""
    return SVS if family is Family.VAMANA else FAISS


def build_shard(task: ShardTask) -> ShardRecord:
    """Stream the shard's rows into its files, upload them, then write the record that says it is done.

    Memory: the finished index, plus one fragment's slice; with family vamana, what VamanaBuilder takes.
    """
    started = time.perf_counter()
    job, store = task.job, connect(task.job.root)
    with tempfile.TemporaryDirectory(prefix="penstock-shard-") as place:
        folder = Path(place)
        rows, bytes_read = _write_rows(task, store, folder)
        duplicates = _write_duplicates(task, store, folder / shard_file(task.shard, DUPLICATES))
        files = tuple(_upload(store, job.folder, path) for path in sorted(folder.iterdir()))
    busy_s = time.perf_counter() - started
    record = ShardRecord(task.shard, rows, duplicates, job.folder, files, busy_s, bytes_read)
    store.write(shard_record_path(job.fingerprint, task.shard), record.to_json())
    return record


def _write_rows(task: ShardTask, store: Store, folder: Path) -> tuple[int, int]:
    """The index file, ids, rows and (for re-ranking) vectors, row i of each being the same passage; rows and bytes
    read."""
    job, bytes_read = task.job, 0
    builder = shard_builder(job.spec, read_trained(store, job.training_fingerprint))
    vectors_path = folder / shard_file(task.shard, VECTORS)
    vectors = VectorWriter(vectors_path, job.spec.dimension, np.float16) if job.rerank else None
    ids_writer: pa.ipc.RecordBatchFileWriter | None = None
    rows_writer: pa.ipc.RecordBatchFileWriter | None = None
    for embedded, passages in _slices(task, store):
        bytes_read += embedded.nbytes + passages.nbytes
        batch = vectors_of(embedded.column("embedding"))
        builder.add(batch.astype(np.float32))
        if vectors:
            vectors.add(batch)
        ids = embedded.select(["passage_id"]).rename_columns(["id"])
        rows = passages.drop_columns([name for name in passages.column_names if name in INTERNAL_COLUMNS])
        ids_writer = ids_writer or _ipc_writer(folder / shard_file(task.shard, IDS), ids.schema)
        rows_writer = rows_writer or _ipc_writer(folder / shard_file(task.shard, ROWS), rows.schema)
        ids_writer.write_table(ids)
        rows_writer.write_table(rows)
    for writer in (ids_writer, rows_writer, vectors):
        if writer is not None:
            writer.close()
    builder.write(folder / shard_file(task.shard, index_kind(job.spec.family)))
    return builder.ntotal, bytes_read


def _slices(task: ShardTask, store: Store) -> Iterator[tuple[pa.Table, pa.Table]]:
    """For each fragment, its rows of this shard: (embeddings, passages), aligned. An empty shard yields one empty
    pair."""
    job = task.job
    first, last = shard_range(task.shard, job.shards)
    empty: tuple[pa.Table, pa.Table] | None = None
    found = False
    for pair in job.fragments:
        path = fragment_path(EMBEDDINGS, job.embeddings_fingerprint, pair.embeddings)
        embedded = read_hash_range(
            store, path, first, last, ["passage_id", "text_hash", "embedding"]
        ).replace_schema_metadata()
        passages = _passages(store, job, pair, first, last)
        if embedded.num_rows:
            found = True
            yield embedded.combine_chunks(), _aligned(passages, embedded)
        elif empty is None:
            empty = embedded, passages.slice(0, 0)
    if not found and empty is not None:
        yield empty


def _passages(store: Store, job: ShardJob, pair: FragmentPair, first: int, last: int) -> pa.Table:
    """The passages of a fragment in the shard's range that stay, with all their columns."""
    path = fragment_path(PASSAGES, job.passages_fingerprint, pair.passages)
    with store.open(path) as stream:
        columns = pa.parquet.read_schema(stream).names
    table = read_hash_range(store, path, first, last, columns).replace_schema_metadata()
    return kept_rows(store, table, job.selection_fingerprint, pair.passages) if pair.has_exclusions else table


def _aligned(passages: pa.Table, embedded: pa.Table) -> pa.Table:
    """The passages of the embedded rows, in their order; both are sorted the same way, the passages may be more."""
    kept = passages.filter(pc.is_in(passages.column("passage_id"), embedded.column("passage_id").combine_chunks()))
    if any(not kept.column(name).equals(embedded.column(name)) for name in ("passage_id", "text_hash")):
        raise ValueError(
            "embeddings and passages of a fragment must agree row by row; they do not: rebuild the fragment"
        )
    return kept.combine_chunks()


def _write_duplicates(task: ShardTask, store: Store, path: Path) -> int:
    """Links of the passages that another one of this shard represents: id, document_id, represented_by."""
    job, rows = task.job, 0
    schema = pa.schema([("id", pa.string()), ("document_id", pa.string()), ("represented_by", pa.string())])
    with _ipc_writer(path, schema) as writer:
        for name in exclusion_files(store, job.selection_fingerprint):
            with store.open(name) as stream:
                for batch in pa.parquet.ParquetFile(stream).iter_batches(65_536):
                    links = _links(pa.Table.from_batches([batch]), task.shard, job.shards)
                    writer.write_table(links.cast(schema))
                    rows += links.num_rows
    return rows


def _links(exclusions: pa.Table, shard: int, shards: int) -> pa.Table:
    texts = exclusions.filter(pc.equal(exclusions.column("reason"), DUPLICATE_TEXT))
    keepers = texts.column("represented_by").to_pylist()
    here = shard_of(row_hashes(keepers), shards) == shard
    return (
        texts.filter(pa.array(here))
        .select(["passage_id", "document_id", "represented_by"])
        .rename_columns(["id", "document_id", "represented_by"])
    )


def _ipc_writer(path: Path, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
    return pa.ipc.new_file(str(path), schema.remove_metadata())


def _upload(store: Store, folder: str, path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    store.upload(path, f"{folder}/{path.name}")
    return FileRecord(path.name, path.stat().st_size, digest)
