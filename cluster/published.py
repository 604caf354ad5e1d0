"""Files of a published version as a reader opens them: fetched to this node if need be, and hashed before they are
used."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.ipc

from penstock.cluster.file_cache import FileCache, damaged, sha256_of
from penstock.cluster.jobs.placement import read_owners
from penstock.cluster.jobs.shards import DUPLICATES, IDS, ROWS, VECTORS, FileRecord, ShardRecord, index_kind
from penstock.cluster.layout import shard_file
from penstock.cluster.local_store import LocalStore
from penstock.cluster.node import cache_folder, cache_limit_bytes
from penstock.cluster.storage import Store, checked_path
from penstock.operators.entrance import Entrance
from penstock.operators.indexing import Family, Metric, open_shard
from penstock.operators.routing import Router
from penstock.operators.searching import ShardSearcher, open_vectors
from penstock.operators.transforms import Chain
from penstock.operators.vector_store import StoredVectors

_faiss: Any = faiss  # the type stubs of faiss 1.15 leave names out

OBJECTS = "objects"
TRANSFORMS_FILE, ROUTING_FILE, OWNERS_FILE = "transforms.safetensors", "routing.faiss", "owners.json"
VERSION_FILES = (TRANSFORMS_FILE, ROUTING_FILE, OWNERS_FILE)


@contextmanager
def hold_file(store: Store, folder: str, record: FileRecord) -> Iterator[Path]:
    """A local path of a published file whose sha256 was just checked: in place on a local store, else in the node's
    cache, where it stays until the block is left.

    Raises:
        DamagedFile: missing, or other bytes than were published.
    """
    place = f"{folder}/{record.name}"
    if isinstance(store, LocalStore):
        yield _checked(store.root / checked_path(place), place, record)
        return
    with FileCache(cache_folder() / OBJECTS, cache_limit_bytes()).hold(store, place, record) as path:
        yield path


@dataclass(frozen=True)
class VersionFiles:
    """The files of a version that are of no single shard, in its folder."""

    folder: str
    files: tuple[FileRecord, ...] = ()

    def open_entrance(self, store: Store) -> Entrance:
        """What queries pass before they reach the shards."""
        return Entrance(self.open_chain(store), self.open_router(store))

    def open_chain(self, store: Store) -> Chain | None:
        """The transforms of queries; None where there are none."""
        data = self._read(store, TRANSFORMS_FILE)
        return None if data is None else Chain.from_bytes(data)

    def open_router(self, store: Store) -> Router | None:
        """What finds the shards of a query; None where each needs all."""
        index, owners = self._read(store, ROUTING_FILE), self._read(store, OWNERS_FILE)
        if index is None or owners is None:
            return None
        return Router(_faiss.deserialize_index(np.frombuffer(index, np.uint8)), read_owners(owners))

    def _read(self, store: Store, name: str) -> bytes | None:
        """A file that was just hashed, or None where the version has no such."""
        record = next((file for file in self.files if file.name == name), None)
        if record is None:
            return None
        with hold_file(store, self.folder, record) as path:
            return path.read_bytes()


def open_searcher(
    store: Store, shard: ShardRecord, family: Family, metric: Metric, chain: Chain | None = None
) -> ShardSearcher:
    """A searcher over the files of one shard; the cache keeps them for as long as it lives."""
    with ExitStack() as files:

        def local(kind: str) -> Path:
            return files.enter_context(hold_file(store, shard.folder, _record(shard, kind)))

        index = open_shard(local(index_kind(family)), family, scratch=_scratch(family))
        ids = read_ipc(local(IDS)).column("id")
        has_vectors = any(record.name == shard_file(shard.shard, VECTORS) for record in shard.files)
        vectors = open_vectors(local(VECTORS)) if has_vectors else None
        searcher = ShardSearcher(index, ids, vectors, metric, shard.shard, chain)
        weakref.finalize(searcher, files.pop_all().close)
    return searcher


def open_ids(store: Store, shard: ShardRecord) -> pa.Table:
    """The passage ids (id) of the shard's rows, memory-mapped."""
    return _open_kind(store, shard, IDS)


def open_rows(store: Store, shard: ShardRecord) -> pa.Table:
    """The shard's rows (document_id, start, end, text, kept columns), memory-mapped."""
    return _open_kind(store, shard, ROWS)


def open_duplicates(store: Store, shard: ShardRecord) -> pa.Table:
    """The links (id, document_id, represented_by) to passages that rows of this shard represent, memory-mapped."""
    return _open_kind(store, shard, DUPLICATES)


def open_stored(store: Store, shard: ShardRecord) -> tuple[pa.ChunkedArray, StoredVectors]:
    """The ids of a shard's rows, and the vectors that are stored of them, both memory-mapped.

    For shards that have vectors; the ids stay mapped for as long as the vectors do.
    """
    with ExitStack() as files:
        ids, vectors = (
            files.enter_context(hold_file(store, shard.folder, _record(shard, kind))) for kind in (IDS, VECTORS)
        )
        opened = read_ipc(ids).column("id"), open_vectors(vectors)
        weakref.finalize(opened[1], files.pop_all().close)
    return opened


def read_ipc(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _scratch(family: Family) -> Path | None:
    """Where an index that has to be unpacked lies while it is opened: in the cache, which has room for such files."""
    if family is not Family.VAMANA:
        return None
    cache_folder().mkdir(parents=True, exist_ok=True)
    return cache_folder()


def _open_kind(store: Store, shard: ShardRecord, kind: str) -> pa.Table:
    with ExitStack() as files:
        table = read_ipc(files.enter_context(hold_file(store, shard.folder, _record(shard, kind))))
        weakref.finalize(table, files.pop_all().close)
    return table


def _record(shard: ShardRecord, kind: str) -> FileRecord:
    return next(record for record in shard.files if record.name == shard_file(shard.shard, kind))


def _checked(path: Path, place: str, record: FileRecord) -> Path:
    try:
        with path.open("rb") as file:
            found = sha256_of(file)
    except FileNotFoundError as error:
        raise damaged(place, record, "no file") from error
    if found != record.sha256:
        raise damaged(place, record, found)
    return path
