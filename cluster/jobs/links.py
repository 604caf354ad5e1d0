"""Links from the passages that stayed out to the row of a shard that represents each.

Links lie with what stayed out: texts with a selection, and what went by meaning with the fragment it was of. They are
dealt out once by the hash of what represents them, so that a shard reads the links to its own rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from penstock.cluster.fragments import read_hash_range, write_fragment
from penstock.cluster.jobs.kept import LINK_SCHEMA, links_path
from penstock.cluster.jobs.selection import DUPLICATE_TEXT, exclusion_files
from penstock.cluster.layout import SHARDS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.identity import row_hashes
from penstock.operators.sharding import shard_range
from penstock.operators.sorted_places import places_among

# similarity is null where the normalised texts are the same.
LINKS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("represented_by", pa.string()),
        ("similarity", pa.float32()),
    ]
)
# row_hash is that of what represents the passage.
DEALT_SCHEMA = pa.schema(
    [("row_hash", pa.uint64()), ("id", pa.string()), ("document_id", pa.string()), ("similarity", pa.float32())]
)
_FACTS_SCHEMA = pa.schema([DEALT_SCHEMA.field(name) for name in ("row_hash", "id", "document_id")])
BATCH_ROWS = 65_536
RANGE_LINKS = 2_000_000  # of one range: 12 bytes and two ids each


@dataclass(frozen=True)
class LinkSource:
    """Which passages stayed out: those of a selection, of all passages fragments or of `fragments` alone, and those
    that went by meaning, from fragments of a stage."""

    selection_fingerprint: str
    kept_fingerprint: str | None = None
    kept_fragments: tuple[str, ...] = ()
    fragments: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LinksJob:
    """Links of a corpus in ranges of the hashes of what represents them; `fingerprint` is that of the shards to
    build."""

    root: str
    fingerprint: str
    source: LinkSource
    ranges: int


@dataclass(frozen=True)
class TextsTask:
    """The exclusions file of a number."""

    job: LinksJob
    number: int
    path: str


@dataclass(frozen=True)
class RangeTask:
    job: LinksJob
    range: int


def link_ranges(links: int) -> int:
    return max(1, -(-links // RANGE_LINKS))


def deal_links(session: Session, job: LinksJob) -> None:
    """Deal all links out by what represents them. What is done is not done again."""
    files = exclusion_files(connect(job.root), job.source.selection_fingerprint)
    for _ in session.stream(deal_texts, [TextsTask(job, number, path) for number, path in enumerate(files)]):
        pass
    for _ in session.stream(resolve_links, [RangeTask(job, number) for number in range(job.ranges)]):
        pass


def deal_texts(task: TextsTask) -> int:
    """Write the passages of a file that another one of the corpus represents by its text, by the hash of that one;
    returns their number."""
    job, store = task.job, connect(task.job.root)
    path = _path(job.fingerprint, f"texts-{task.number:05d}")
    if store.info(path) is not None:
        return 0
    tables = [_FACTS_SCHEMA.empty_table()]
    for table in _by_text(store, task.path, job.source.fragments):
        keepers = pa.array(row_hashes(table.column("represented_by").to_pylist()))
        tables.append(
            pa.table([keepers, table.column("passage_id"), table.column("document_id")], schema=_FACTS_SCHEMA)
        )
    texts = pa.concat_tables(tables).sort_by([("row_hash", "ascending"), ("id", "ascending")])
    write_fragment(store, path, texts)
    return len(texts)


def resolve_links(task: RangeTask) -> int:
    """Write the links (DEALT_SCHEMA, by the hash of what represents them) of passages that were represented by a row of
    a range by their text, and of the rows of the range that went by meaning; returns their number.

    A passage whose text is that of one that went by meaning is represented by what represents this one. Memory: these
    links.
    """
    job, store = task.job, connect(task.job.root)
    path = _path(job.fingerprint, f"links-{task.range:05d}")
    if store.info(path) is not None:
        return 0
    first, last = shard_range(task.range, job.ranges)
    went = _went(store, job.source, first, last).sort_by("row_hash")
    files = range(len(exclusion_files(store, job.source.selection_fingerprint)))
    texts = pa.concat_tables(
        [
            _FACTS_SCHEMA.empty_table(),
            *(
                read_hash_range(store, _path(job.fingerprint, f"texts-{number:05d}"), first, last, _FACTS_SCHEMA.names)
                for number in files
            ),
        ]
    )
    keepers = texts.column("row_hash").to_numpy().copy()
    moved, place = places_among(went.column("row_hash").to_numpy(), keepers)
    keepers[moved] = went.column("kept_hash").to_numpy()[place]
    similarity = pa.nulls(len(texts), pa.float32())
    columns = [pa.array(keepers), texts.column("id"), texts.column("document_id"), similarity]
    names = ["kept_hash", *DEALT_SCHEMA.names[1:]]
    links = pa.concat_tables(
        [
            pa.table(columns, schema=DEALT_SCHEMA),
            went.select(names).rename_columns(DEALT_SCHEMA.names).cast(DEALT_SCHEMA),
        ]
    )
    write_fragment(store, path, links.sort_by([("row_hash", "ascending"), ("id", "ascending")]))
    return len(links)


def shard_links(
    store: Store, fingerprint: str, ranges: int, hashes: tuple[int, int], ids_path: Path
) -> Iterator[pa.Table]:
    """Links (LINKS_SCHEMA) to the rows of a shard, whose ids lie in an IPC file and whose hashes from a first to a last
    one. Reads the links to such rows alone. Memory: 16 bytes for each row, and the links of a range."""
    own = _OwnRows(ids_path)
    for number in range(ranges):
        path = _path(fingerprint, f"links-{number:05d}")
        table = read_hash_range(store, path, *hashes, DEALT_SCHEMA.names).replace_schema_metadata()
        rows = own.find(table.column("row_hash").to_numpy())
        here = table.filter(pa.array(rows >= 0))
        yield _links(here, own.ids(rows[rows >= 0]), here.column("similarity"))


class _OwnRows:
    """The rows of a shard by hash, which are computed when a link first asks for them."""

    def __init__(self, path: Path) -> None:
        self._ids = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("id")

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The row, int64 (n,), of each row hash uint64 (n,); -1 where the shard has none."""
        rows = np.full(len(hashes), -1, np.int64)
        if len(hashes):
            ascending, number = self._by_hash
            found, place = places_among(ascending, hashes)
            rows[found] = number[place]
        return rows

    def ids(self, rows: np.ndarray) -> pa.ChunkedArray:
        return self._ids.take(pa.array(rows))

    @cached_property
    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes uint64 (n,), ascending, and the row of each, int64 (n,)."""
        hashes = [row_hashes(chunk.to_pylist()) for chunk in self._ids.chunks]
        whole = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = np.argsort(whole, kind="stable")
        return whole[order], order


def represented_by_text(store: Store, selection: str, fragments: Sequence[str] | None) -> Iterator[pa.Table]:
    """The passages (EXCLUSION_SCHEMA) that another one of the corpus represents by its text, those of some passages
    fragments or (None) of all, piece by piece."""
    for name in exclusion_files(store, selection):
        yield from _by_text(store, name, fragments)


def _by_text(store: Store, path: str, fragments: Sequence[str] | None) -> Iterator[pa.Table]:
    """Those of one exclusions file."""
    with store.open(path) as stream:
        for batch in pa.parquet.ParquetFile(stream).iter_batches(BATCH_ROWS):
            table = pa.Table.from_batches([batch])
            table = table.filter(pc.equal(table.column("reason"), DUPLICATE_TEXT))
            if fragments is not None:
                table = table.filter(pc.is_in(table.column("fragment"), pa.array(fragments, pa.string())))
            yield table


def _went(store: Store, source: LinkSource, first: int, last: int) -> pa.Table:
    """The links (LINK_SCHEMA, but for groups) of rows of a range that went by meaning and are represented by one."""
    names = [name for name in LINK_SCHEMA.names if name != "group"]
    tables = [pa.schema([LINK_SCHEMA.field(name) for name in names]).empty_table()]
    for fragment in source.kept_fragments:
        path = links_path(str(source.kept_fingerprint), fragment)
        tables.append(read_hash_range(store, path, first, last, names).replace_schema_metadata().select(names))
    went = pa.concat_tables(tables)
    return went.filter(pc.is_valid(went.column("kept_hash")))


def _path(fingerprint: str, name: str) -> str:
    return fragment_path(SHARDS, fingerprint, name)


def _links(table: pa.Table, represented_by: pa.ChunkedArray, similarity: pa.ChunkedArray | pa.Array) -> pa.Table:
    return pa.table(
        [table.column("id"), table.column("document_id"), represented_by, similarity], names=LINKS_SCHEMA.names
    ).cast(LINKS_SCHEMA)
