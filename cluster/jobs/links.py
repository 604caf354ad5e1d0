"""Links from the passages that stayed out to the row of a shard that represents each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from penstock.cluster.jobs.kept import merged_links
from penstock.cluster.jobs.selection import DUPLICATE_TEXT, exclusion_files
from penstock.cluster.storage import Store
from penstock.operators.identity import row_hashes

# similarity is null where the normalised texts are the same.
LINKS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("represented_by", pa.string()),
        ("similarity", pa.float32()),
    ]
)
BATCH_ROWS = 65_536


@dataclass(frozen=True)
class LinkSource:
    """Which passages stayed out: those of a selection, of all passages fragments or of `fragments` alone, and those
    that went by meaning, from fragments of a stage."""

    selection_fingerprint: str
    kept_fingerprint: str | None = None
    kept_fragments: tuple[str, ...] = ()
    fragments: tuple[str, ...] | None = None


def shard_links(store: Store, source: LinkSource, ids_path: Path) -> Iterator[pa.Table]:
    """Links (LINKS_SCHEMA) to the rows of a shard, whose ids lie in an IPC file. Memory: 16 bytes for each row, and 16
    for each passage that one of them represents by meaning.

    A passage whose text is that of one that went by meaning is represented by what represents this one.
    """
    own, moved = _OwnRows(ids_path), _Moved()
    if source.kept_fingerprint is not None:
        for table in merged_links(store, source.kept_fingerprint, source.kept_fragments):
            rows = own.find(table.column("kept_hash").to_numpy())
            here = table.filter(pa.array(rows >= 0))
            moved.add(here.column("row_hash").to_numpy(), rows[rows >= 0])
            yield _links(here, own.ids(rows[rows >= 0]), here.column("similarity"))
    for table in represented_by_text(store, source.selection_fingerprint, source.fragments):
        keepers = row_hashes(table.column("represented_by").to_pylist())
        rows = own.find(keepers)
        rows = np.where(rows >= 0, rows, moved.find(keepers))
        here = table.filter(pa.array(rows >= 0)).rename_columns({"passage_id": "id"})
        yield _links(here, own.ids(rows[rows >= 0]), pa.nulls(here.num_rows, pa.float32()))


class _OwnRows:
    """The rows of a shard by hash, which are computed when a link first asks for them."""

    def __init__(self, path: Path) -> None:
        self._ids = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("id")

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The row, int64 (n,), of each row hash uint64 (n,); -1 where the shard has none."""
        return _find(*self._by_hash, hashes) if len(hashes) else np.empty(0, np.int64)

    def ids(self, rows: np.ndarray) -> pa.ChunkedArray:
        return self._ids.take(pa.array(rows))

    @cached_property
    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes uint64 (n,), ascending, and the row of each, int64 (n,)."""
        hashes = [row_hashes(chunk.to_pylist()) for chunk in self._ids.chunks]
        whole = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = np.argsort(whole, kind="stable")
        return whole[order], order


class _Moved:
    """Row hashes of passages that went by meaning, and the row of the shard that represents each."""

    def __init__(self) -> None:
        self._hashes, self._rows = np.empty(0, np.uint64), np.empty(0, np.int64)

    def add(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        together = np.concatenate([self._hashes, hashes])
        order = np.argsort(together, kind="stable")
        self._hashes, self._rows = together[order], np.concatenate([self._rows, rows])[order]

    def find(self, hashes: np.ndarray) -> np.ndarray:
        return _find(self._hashes, self._rows, hashes)


def _find(ascending: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of the `wanted` (n,) the value beside its equal among the ascending ones; -1 where there is none."""
    if len(ascending) == 0:
        return np.full(len(wanted), -1, np.int64)
    place = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return np.where(ascending[place] == wanted, values[place], -1)


def represented_by_text(store: Store, selection: str, fragments: Sequence[str] | None) -> Iterator[pa.Table]:
    """The passages (EXCLUSION_SCHEMA) that another one of the corpus represents by its text, those of some passages
    fragments or (None) of all, piece by piece."""
    for name in exclusion_files(store, selection):
        with store.open(name) as stream:
            for batch in pa.parquet.ParquetFile(stream).iter_batches(BATCH_ROWS):
                table = pa.Table.from_batches([batch])
                table = table.filter(pc.equal(table.column("reason"), DUPLICATE_TEXT))
                if fragments is not None:
                    table = table.filter(pc.is_in(table.column("fragment"), pa.array(fragments, pa.string())))
                yield table


def _links(table: pa.Table, represented_by: pa.ChunkedArray, similarity: pa.ChunkedArray | pa.Array) -> pa.Table:
    return pa.table(
        [table.column("id"), table.column("document_id"), represented_by, similarity], names=LINKS_SCHEMA.names
    ).cast(LINKS_SCHEMA)
