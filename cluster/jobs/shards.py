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
import pyarrow.ipc

from penstock.cluster.fragments import vectors_of
from penstock.cluster.jobs.links import LINKS_SCHEMA, shard_links
from penstock.cluster.jobs.placement import owners_path, read_owners, read_placed
from penstock.cluster.jobs.shard_rows import FragmentPair as FragmentPair
from penstock.cluster.jobs.shard_rows import RowSource as RowSource
from penstock.cluster.jobs.shard_rows import read_slices
from penstock.cluster.jobs.training import read_mean, read_trained
from penstock.cluster.jobs.transforms import read_chain
from penstock.cluster.layout import SHARDS, shard_file, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.indexing import Family, IndexSpec, shard_builder
from penstock.operators.routing import only_cells
from penstock.operators.sharding import HASH_SPACE, Sharding, shard_range
from penstock.operators.vector_codecs import VectorCodec, is_lvq
from penstock.operators.vector_store import VectorWriter

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
class ShardJob:
    """What all shards share. Fragments are in the order in which their rows are added.

    Attributes:
        spec: of the index, behind the transforms.
        dimension: of the embeddings.
        sharding: what decides to which shard a row goes; with `cluster`, rows are placed before shards are built.
        transforms: fingerprint of the transforms before the index, if there are any.
        link_ranges: in which the links to its rows were dealt out (deal_links).
        stored: codec of the vectors stored for re-ranking, or None.
    """

    source: RowSource
    fingerprint: str
    folder: str
    training_fingerprint: str
    fragments: tuple[FragmentPair, ...]
    shards: int
    spec: IndexSpec
    dimension: int
    stored: VectorCodec | None
    sharding: Sharding = Sharding.HASH
    transforms: str | None = None
    link_ranges: int = 1


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
    job, store = task.job, connect(task.job.source.root)
    with tempfile.TemporaryDirectory(prefix="penstock-shard-") as place:
        folder = Path(place)
        rows, bytes_read = _write_rows(task, store, folder)
        duplicates = _write_duplicates(task, store, folder)
        files = tuple(upload_file(store, job.folder, path) for path in sorted(folder.iterdir()))
    busy_s = time.perf_counter() - started
    record = ShardRecord(task.shard, rows, duplicates, job.folder, files, busy_s, bytes_read)
    store.write(shard_record_path(job.fingerprint, task.shard), record.to_json())
    return record


def _write_rows(task: ShardTask, store: Store, folder: Path) -> tuple[int, int]:
    """The index file, ids, rows and (for re-ranking) vectors, row i of each being the same passage; rows and bytes
    read."""
    job, bytes_read = task.job, 0
    builder = shard_builder(job.spec, _trained(task, store))
    chain = read_chain(store, job.transforms)
    vectors = _vector_writer(task, store, folder)
    ids_writer: pa.ipc.RecordBatchFileWriter | None = None
    rows_writer: pa.ipc.RecordBatchFileWriter | None = None
    for embedded, passages in _slices(task, store):
        bytes_read += embedded.nbytes + passages.nbytes
        batch = vectors_of(embedded.column("embedding"))
        builder.add(chain.apply_documents(batch) if chain else batch.astype(np.float32))
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


def _trained(task: ShardTask, store: Store) -> bytes:
    """The empty index to fill: with the shard's own cells alone, where it owns cells."""
    job, trained = task.job, read_trained(store, task.job.training_fingerprint)
    if job.sharding is Sharding.HASH:
        return trained
    owners = read_owners(store.read(owners_path(job.fingerprint)))
    return only_cells(trained, owners.cells_of(task.shard))


def _vector_writer(task: ShardTask, store: Store, folder: Path) -> VectorWriter | None:
    job = task.job
    if job.stored is None:
        return None
    mean = read_mean(store, job.training_fingerprint) if is_lvq(job.stored) else None
    return VectorWriter(folder / shard_file(task.shard, VECTORS), job.dimension, job.stored, mean)


def _slices(task: ShardTask, store: Store) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(embeddings, passages) of the shard's rows, aligned, fragment by fragment."""
    job = task.job
    if job.sharding is Sharding.CLUSTER:
        return read_placed(store, job.fingerprint, job.fragments, task.shard)
    return read_slices(store, job.source, job.fragments, *shard_range(task.shard, job.shards))


def _write_duplicates(task: ShardTask, store: Store, folder: Path) -> int:
    """Links of the passages that a row of this shard represents (LINKS_SCHEMA)."""
    rows, job = 0, task.job
    # A shard that owns cells has rows all over the hashes.
    hashes = shard_range(task.shard, job.shards) if job.sharding is Sharding.HASH else (0, HASH_SPACE - 1)
    with _ipc_writer(folder / shard_file(task.shard, DUPLICATES), LINKS_SCHEMA) as writer:
        ids_path = folder / shard_file(task.shard, IDS)
        for links in shard_links(store, job.fingerprint, job.link_ranges, hashes, ids_path):
            writer.write_table(links)
            rows += links.num_rows
    return rows


def _ipc_writer(path: Path, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
    return pa.ipc.new_file(str(path), schema.remove_metadata())


def upload_file(store: Store, folder: str, path: Path) -> FileRecord:
    """Put a local file into a folder of the store under its own name."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    store.upload(path, f"{folder}/{path.name}")
    return FileRecord(path.name, path.stat().st_size, digest)
