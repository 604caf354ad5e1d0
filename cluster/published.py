"""Files of a published version as a reader opens them: fetched to this node if need be, and hashed before they are
used."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from penstock.cluster.jobs.shards import DUPLICATES, FAISS, IDS, ROWS, VECTORS, FileRecord, ShardRecord
from penstock.cluster.layout import shard_file
from penstock.cluster.local_store import LocalStore
from penstock.cluster.node import cache_folder
from penstock.cluster.storage import Store, checked_path
from penstock.operators.indexing import Family, Metric, open_index
from penstock.operators.searching import ShardSearcher, open_vectors


class DamagedFile(Exception):
    """A published file is not what its manifest says."""


def verified_file(store: Store, folder: str, record: FileRecord) -> Path:
    """A local path of a published file whose sha256 was just checked: in place on a local store, else in the node's
    cache.

    Raises:
        DamagedFile: missing, or other bytes than were published.
    """
    place = f"{folder}/{record.name}"
    if isinstance(store, LocalStore):
        path = store.root / checked_path(place)
    else:
        path = cache_folder() / "objects" / record.sha256
        if _sha256(path) != record.sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            store.download(place, path)
    found = _sha256(path)
    if found != record.sha256:
        if not isinstance(store, LocalStore):
            path.unlink(missing_ok=True)
        raise DamagedFile(
            f"published file ({place}) must have sha256 {record.sha256[:16]}, got {found[:16]}; "
            "restore it from a copy, or roll the alias back and run the pipeline again"
        )
    return path


def open_searcher(store: Store, shard: ShardRecord, family: Family, metric: Metric) -> ShardSearcher:
    """A searcher over the files of one shard."""
    files = {record.name: record for record in shard.files}

    def local(kind: str) -> Path:
        return verified_file(store, shard.folder, files[shard_file(shard.shard, kind)])

    index = open_index(local(FAISS), family)
    ids = read_ipc(local(IDS)).column("id")
    has_vectors = shard_file(shard.shard, VECTORS) in files
    vectors = open_vectors(local(VECTORS)) if has_vectors else None
    return ShardSearcher(index, ids, vectors, metric, shard.shard)


def open_rows(store: Store, shard: ShardRecord) -> pa.Table:
    """The shard's rows (document_id, start, end, text, kept columns), memory-mapped."""
    return _open_kind(store, shard, ROWS)


def open_duplicates(store: Store, shard: ShardRecord) -> pa.Table:
    """The links (id, document_id, represented_by) to passages that rows of this shard represent, memory-mapped."""
    return _open_kind(store, shard, DUPLICATES)


def read_ipc(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _open_kind(store: Store, shard: ShardRecord, kind: str) -> pa.Table:
    record = next(record for record in shard.files if record.name == shard_file(shard.shard, kind))
    return read_ipc(verified_file(store, shard.folder, record))


def _sha256(path: Path) -> str:
    if not path.exists():
        return "no file"
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
