"""A built version against what should be in it: each row that stays exactly once, each file as the manifest says.

Rows are compared by their hashes, range by range of the hash space: what selection left of the passages, less dead
letters of the encoder and duplicates by meaning, with the ids of the shards, and these with the embeddings fragments of
one model.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import HASH_COLUMN, read_fragment, read_hash_range
from penstock.cluster.jobs.kept import links_path
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.jobs.shards import FileRecord, ShardRecord
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, dead_letter_path, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.published import open_ids
from penstock.cluster.storage import Store
from penstock.operators.coverage import RowCoverage, compare_rows, in_range
from penstock.operators.identity import row_hashes

BATCH_ROWS = 16_384


@dataclass(frozen=True)
class CoverageSource:
    """What a version is made of.

    Attributes:
        passages: the passages fragments of the whole corpus, and whether selection left any of their rows out.
        encoded: fingerprint of the embeddings stage; letters: its fragments with dead letters.
        embeddings: fingerprint and fragments that the shards are built from: those of the stage, or what deduplication
            by meaning left of them.
        kept: fingerprint and fragments of the links of rows that went as duplicates by meaning; None where none did.
    """

    root: str
    passages_fingerprint: str
    selection_fingerprint: str
    passages: tuple[tuple[str, bool], ...]
    encoded: str
    letters: tuple[str, ...]
    embeddings: tuple[str, tuple[str, ...]]
    kept: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class CoverageTask:
    """The rows of a version with hashes from `first` to `last`."""

    source: CoverageSource
    shards: tuple[ShardRecord, ...]
    first: int
    last: int


@dataclass(frozen=True)
class FileTask:
    """A file of a version, in its folder."""

    root: str
    folder: str
    file: FileRecord


def cover_rows(task: CoverageTask) -> RowCoverage:
    """Compare the rows of one range. Memory: about 50 bytes for each of them, and the ids of one shard."""
    store = connect(task.source.root)
    stay = _joined(_staying(store, task))
    left = _joined([*_dropped(store, task), *_removed(store, task)])
    expected = stay[~np.isin(stay, left)]
    found = compare_rows(expected, _joined(_built(store, task)), _joined(_embedded(store, task)))
    return found.named(_names(store, task, found.examples)) if found.examples else found


def damage_of(task: FileTask) -> str | None:
    """What is wrong with a file, read once as a stream; None where it has the size and the bytes that were stated."""
    store, place = connect(task.root), f"{task.folder}/{task.file.name}"
    info = store.info(place)
    if info is None:
        return f"{task.file.name} is missing"
    if info.size_bytes != task.file.size_bytes:
        return f"{task.file.name} has {info.size_bytes:,} bytes in place of {task.file.size_bytes:,}"
    with store.open(place) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    if found != task.file.sha256:
        return f"{task.file.name} has sha256 {found[:16]} in place of {task.file.sha256[:16]}"
    return None


def _staying(store: Store, task: CoverageTask) -> Iterator[np.ndarray]:
    """Hashes of the passages that selection left."""
    for fragment, has_exclusions in task.source.passages:
        yield _passages(store, task, fragment, has_exclusions).column(HASH_COLUMN).to_numpy()


def _passages(store: Store, task: CoverageTask, fragment: str, has_exclusions: bool) -> pa.Table:
    columns = [HASH_COLUMN, "passage_id", "source", "position"] if has_exclusions else [HASH_COLUMN]
    path = fragment_path(PASSAGES, task.source.passages_fingerprint, fragment)
    table = read_hash_range(store, path, task.first, task.last, columns)
    return kept_rows(store, table, task.source.selection_fingerprint, fragment) if has_exclusions else table


def _dropped(store: Store, task: CoverageTask) -> Iterator[np.ndarray]:
    """Hashes of the passages that the encoder gave no vector for."""
    for fragment in task.source.letters:
        table = read_fragment(store, dead_letter_path(EMBEDDINGS, task.source.encoded, fragment), ["passage_id"])
        yield in_range(row_hashes(table.column("passage_id").to_pylist()), task.first, task.last)


def _removed(store: Store, task: CoverageTask) -> Iterator[np.ndarray]:
    """Hashes of the rows that went as duplicates by meaning."""
    if task.source.kept is not None:
        fingerprint, fragments = task.source.kept
        for fragment in fragments:
            column = read_fragment(store, links_path(fingerprint, fragment), [HASH_COLUMN]).column(HASH_COLUMN)
            yield in_range(column.to_numpy(), task.first, task.last)


def _embedded(store: Store, task: CoverageTask) -> Iterator[np.ndarray]:
    fingerprint, fragments = task.source.embeddings
    for fragment in fragments:
        path = fragment_path(EMBEDDINGS, fingerprint, fragment)
        yield read_hash_range(store, path, task.first, task.last, [HASH_COLUMN]).column(HASH_COLUMN).to_numpy()


def _built(store: Store, task: CoverageTask) -> Iterator[np.ndarray]:
    """Hashes of the ids in the shards, whatever shard they should be in."""
    for shard in task.shards:
        for batch in open_ids(store, shard).to_batches(BATCH_ROWS):
            yield in_range(row_hashes(batch.column("id").to_pylist()), task.first, task.last)


def _names(store: Store, task: CoverageTask, hashes: tuple[int, ...]) -> dict[int, str]:
    """The passage ids behind a few hashes, from the passages, or from the shards where these have none."""
    wanted, names = pa.array(hashes, pa.uint64()), dict[int, str]()
    for fragment, _ in task.source.passages:
        path = fragment_path(PASSAGES, task.source.passages_fingerprint, fragment)
        table = read_hash_range(store, path, task.first, task.last, [HASH_COLUMN, "passage_id"])
        found = table.filter(pc.is_in(table.column(HASH_COLUMN), wanted))
        names |= dict(zip(found.column(HASH_COLUMN).to_pylist(), found.column("passage_id").to_pylist(), strict=True))
    for shard in task.shards if len(names) < len(hashes) else ():
        for batch in open_ids(store, shard).to_batches(BATCH_ROWS):
            ids = batch.column("id").to_pylist()
            own = row_hashes(ids)
            names |= {int(own[row]): ids[row] for row in np.flatnonzero(np.isin(own, np.array(hashes, np.uint64)))}
    return names


def _joined(parts: Iterator[np.ndarray] | list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *parts])
