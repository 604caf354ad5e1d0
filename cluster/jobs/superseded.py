"""Which rows of a version a newer one, of a part of the corpus, has taken over: one old shard at a time."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from penstock.cluster.jobs.links import LINKS_SCHEMA, represented_by_text
from penstock.cluster.jobs.shards import FileRecord, ShardRecord, upload_file
from penstock.cluster.layout import shard_file
from penstock.cluster.node import connect
from penstock.cluster.published import hold_file, open_duplicates, open_ids, open_rows, read_ipc
from penstock.cluster.storage import Store
from penstock.operators.chunking import normalise_for_comparison

SUPERSEDED, LINKS, NAMES = "superseded.arrow", "links.arrow", "names.arrow"
SUPERSEDED_SCHEMA = pa.schema([("superseded", pa.bool_())])
NAMES_SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string())])
FIRST_PASSAGE = "#0"  # how the id of a document's first passage ends


@dataclass(frozen=True)
class PartSource:
    """What a new version of a part of the corpus was made of: some passages fragments of a selection."""

    selection_fingerprint: str
    fragments: tuple[str, ...]


@dataclass(frozen=True)
class SupersededTask:
    """One shard of the old version, and all of the new one; `folder` is the mixed version's. `part` is None where the
    new version is of a whole corpus."""

    root: str
    folder: str
    old: ShardRecord
    new: tuple[ShardRecord, ...]
    part: PartSource | None = None


@dataclass(frozen=True)
class SupersededShard:
    """What is left of an old shard.

    Attributes:
        rows: of the shard; `superseded` of them count no more.
        standing_in: rows that count although their document is in the new version, as they represent passages of
            documents that are not, and no row of the new version has their text: they go by the id of one of these.
        documents: documents of the new version's fragments whose first passage is a row of this shard, or represented
            by one.
        duplicates: links to passages of documents that are not in the new version, and to waiting ones.
        files: `superseded` and `links`, where these are not those of the old version, and `names` where rows stand in.
    """

    shard: int
    rows: int
    superseded: int
    standing_in: int
    documents: int
    duplicates: int
    files: tuple[FileRecord, ...]


def mark_superseded(task: SupersededTask) -> SupersededShard:
    """Find the superseded rows of one shard, and what now represents the passages that they represented.

    A row is superseded if its document is in the new version, by a row or by a link. Where it represents passages of
    documents that are not, it is superseded if a row of the new version has the same text, which represents them from
    then on; and so is a row whose document is not in the new version, but a passage that it represents is.

    Passages of the part that wait count as before, whatever their document: the text of each is that of a passage which
    the selection kept in a fragment outside the part, so that no new row has it yet.

    Memory: the ids and links of the shard and of one new shard, with hash tables of these.
    """
    store = connect(task.root)
    ids, links = open_ids(store, task.old).column("id"), open_duplicates(store, task.old)
    waiting = _waiting(store, task, [ids, links.column("id")])
    done = _present(store, task.new, [_documents(ids), links.column("document_id")])
    group = _Group.of(ids, links, done, waiting)
    heirs = _heirs(store, task, ids, links, group)
    superseded = group.ended | ~_nulls(heirs)
    names = _names(links, group, group.own_done & ~superseded)
    left = _links_left(ids, links, group, (heirs, names))
    changed = bool(group.own_done.any() or group.link_done.any())
    files = _write(store, task, {SUPERSEDED: _column(superseded), LINKS: left, NAMES: names}) if changed else ()
    return SupersededShard(
        task.old.shard,
        len(ids),
        int(superseded.sum()),
        names.num_rows,
        _documents_begun([ids, links.column("id")], done, waiting),
        left.num_rows,
        files,
    )


def open_superseded(store: Store, folder: str, record: FileRecord) -> np.ndarray:
    """bool (rows,): which rows of an old shard count no more."""
    with hold_file(store, folder, record) as path:
        superseded: np.ndarray = read_ipc(path).column("superseded").to_numpy()
    return superseded


def open_names(store: Store, folder: str, record: FileRecord) -> tuple[np.ndarray, np.ndarray]:
    """The rows that go by another id, int64 (n,) ascending, and these, object (n,) of str."""
    with hold_file(store, folder, record) as path:
        table = pa.ipc.open_file(path.read_bytes()).read_all()
    return table.column("row").to_numpy(), table.column("id").to_numpy()


def open_links(store: Store, folder: str, record: FileRecord) -> pa.Table:
    """Links (LINKS_SCHEMA) to passages of documents that are not in the new version."""
    with hold_file(store, folder, record) as path:
        return pa.ipc.open_file(path.read_bytes()).read_all()


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of a shard, with the passages that they represent.

    Attributes:
        own_done: bool (rows,), whether the row's document is in the new version, and the row does not wait.
        link_done: bool (links,), whether the represented passage's document is, and that passage does not wait.
        keepers: int64 (links,), the row that represents each.
        ended: bool (rows,), rows of which all documents are in the new version.
        torn: bool (rows,), rows of which some documents are, and some are not.
    """

    own_done: np.ndarray
    link_done: np.ndarray
    keepers: np.ndarray
    ended: np.ndarray
    torn: np.ndarray

    @classmethod
    def of(cls, ids: pa.ChunkedArray, links: pa.Table, done: pa.Array, waiting: pa.Array) -> "_Group":
        own_done = _among(_documents(ids), done) & ~_among(ids, waiting)
        link_done = _among(links.column("document_id"), done) & ~_among(links.column("id"), waiting)
        keepers = _places(links.column("represented_by"), ids)
        started, lasting = own_done.copy(), ~own_done
        started[keepers[link_done]] = True
        lasting[keepers[~link_done]] = True
        return cls(own_done, link_done, keepers, started & ~lasting, started & lasting)


def _present(store: Store, new: Sequence[ShardRecord], wanted: Sequence[pa.ChunkedArray]) -> pa.Array:
    """Those of the documents of which a new shard has a passage, or a link to one."""
    documents = pc.unique(pa.chunked_array([chunk for column in wanted for chunk in column.chunks], pa.string()))
    found = np.zeros(len(documents), bool)
    for shard in new:
        for column in (
            _documents(open_ids(store, shard).column("id")),
            open_duplicates(store, shard).column("document_id"),
        ):
            found |= pc.is_in(documents, value_set=pc.unique(column)).to_numpy(zero_copy_only=False)
    return documents.filter(pa.array(found))


def _waiting(store: Store, task: SupersededTask, wanted: Sequence[pa.ChunkedArray]) -> pa.Array:
    """Those of the passages that are of the part and have neither a row nor a link there: what represents them in the
    corpus is not of the part."""
    if task.part is None:
        return pa.array([], pa.string())
    own = pa.concat_arrays([chunk for column in wanted for chunk in column.chunks] or [pa.array([], pa.string())])
    found = [pa.array([], pa.string())]
    for table in represented_by_text(store, task.part.selection_fingerprint, task.part.fragments):
        names = table.column("passage_id").combine_chunks()
        found.append(names.filter(pc.is_in(names, value_set=own)))
    waiting = pa.concat_arrays(found)
    for shard in task.new if len(waiting) else ():
        linked = open_duplicates(store, shard).column("id").combine_chunks()
        waiting = waiting.filter(pc.invert(pc.is_in(waiting, value_set=linked)))
    return waiting


def _heirs(store: Store, task: SupersededTask, ids: pa.ChunkedArray, links: pa.Table, group: _Group) -> pa.Array:
    """For each row that is torn the id of a new row with its text; null without one, and for others.

    Looked for under the ids of the row and of the passages that have its text: what became of these in the new version.
    """
    heirs = np.full(len(ids), None, dtype=object)
    if group.torn.any():
        exact = group.link_done & group.torn[group.keepers] & links.column("similarity").is_null().to_numpy()
        own = np.flatnonzero(group.torn & group.own_done)
        names = pa.concat_arrays([ids.take(own).combine_chunks(), links.column("id").filter(exact).combine_chunks()])
        rows = np.concatenate([own, group.keepers[exact]])
        texts = open_rows(store, task.old).column("text")
        for shard in task.new:
            for row, name in _same_texts(store, shard, names, rows, texts):
                heirs[row] = name
    return pa.array(heirs, pa.string())


def _same_texts(
    store: Store, shard: ShardRecord, names: pa.Array, rows: np.ndarray, texts: pa.ChunkedArray
) -> Iterator[tuple[int, str]]:
    """Old rows, and the id of the row of a new shard that has their text under one of the names."""
    ids, links = open_ids(store, shard).column("id"), open_duplicates(store, shard)
    represented = _places(names, links.column("id"))
    stands_for = links.column("represented_by").take(pa.array(np.maximum(represented, 0), mask=represented < 0))
    places = np.maximum(_places(names, ids), _places(stands_for, ids))
    found = np.flatnonzero(places >= 0)
    if not len(found):
        return
    new_texts = open_rows(store, shard).column("text").take(pa.array(places[found])).to_pylist()
    old_texts = texts.take(pa.array(rows[found])).to_pylist()
    new_ids = ids.take(pa.array(places[found])).to_pylist()
    for row, name, old, new in zip(rows[found].tolist(), new_ids, old_texts, new_texts, strict=True):
        if normalise_for_comparison(old) == normalise_for_comparison(new):
            yield row, name


def _names(links: pa.Table, group: _Group, standing_in: np.ndarray) -> pa.Table:
    """NAMES_SCHEMA: for each row that stands in the first id it represents of a document not in the new version."""
    chosen = np.flatnonzero(~group.link_done & standing_in[group.keepers])
    named = pa.table([pa.array(group.keepers[chosen]), links.column("id").take(pa.array(chosen))], schema=NAMES_SCHEMA)
    first = named.group_by("row").aggregate([("id", "min")]).sort_by("row")
    return pa.table([first.column("row"), first.column("id_min")], schema=NAMES_SCHEMA)


def _links_left(ids: pa.ChunkedArray, links: pa.Table, group: _Group, now: tuple[pa.Array, pa.Table]) -> pa.Table:
    """Links to the passages of documents that are not in the new version: of old rows, under the names that they go by
    now, or of their heirs."""
    heirs, names = now
    kept = links.filter(pa.array(~group.link_done))
    keepers = group.keepers[~group.link_done]
    place = pc.index_in(pa.array(keepers), value_set=names.column("row").combine_chunks())
    named = names.column("id").combine_chunks().take(place)
    represented_by = pc.coalesce(heirs.take(pa.array(keepers)), named, kept.column("represented_by").combine_chunks())
    left = kept.set_column(2, "represented_by", represented_by)
    left = left.filter(pc.not_equal(left.column("id"), left.column("represented_by")))
    moved = np.flatnonzero(~_nulls(heirs) & ~group.own_done)
    names = ids.take(pa.array(moved))
    rows = [names, _documents(names), heirs.take(pa.array(moved)), pa.nulls(len(moved), pa.float32())]
    return pa.concat_tables([left.cast(LINKS_SCHEMA), pa.table(rows, schema=LINKS_SCHEMA)])


def _column(superseded: np.ndarray) -> pa.Table:
    return pa.table([pa.array(superseded)], schema=SUPERSEDED_SCHEMA)


def _write(store: Store, task: SupersededTask, tables: dict[str, pa.Table]) -> tuple[FileRecord, ...]:
    """The files of what there is; names only where rows go by others."""
    with tempfile.TemporaryDirectory(prefix="penstock-superseded-") as place:
        records = []
        for kind, table in tables.items():
            if kind == NAMES and not table.num_rows:
                continue
            path = Path(place) / shard_file(task.old.shard, kind)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table.combine_chunks())
            records.append(upload_file(store, task.folder, path))
    return tuple(records)


def _documents(passage_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """The document of each passage id, which is what stands before its last `#`."""
    return pc.list_element(pc.split_pattern(passage_ids, "#", max_splits=1, reverse=True), 0)


def _places(wanted: pa.ChunkedArray | pa.Array, among: pa.ChunkedArray) -> np.ndarray:
    """int64 (n,): where each of the wanted stands; -1 where it does not, and for nulls."""
    places = pc.index_in(wanted, value_set=among.combine_chunks(), skip_nulls=True)
    found: np.ndarray = pc.fill_null(places, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _nulls(values: pa.Array) -> np.ndarray:
    nulls: np.ndarray = values.is_null().to_numpy(zero_copy_only=False)
    return nulls


def _among(values: pa.ChunkedArray, wanted: pa.Array) -> np.ndarray:
    among: np.ndarray = pc.is_in(values, value_set=wanted).to_numpy()
    return among


def _documents_begun(columns: Sequence[pa.ChunkedArray], done: pa.Array, waiting: pa.Array) -> int:
    """How many of the passages are the first of a document that is in the new version, or of which passages wait."""
    begun = pa.concat_arrays([done, _documents(pa.chunked_array([waiting])).combine_chunks()])
    first = (pc.ends_with(ids, FIRST_PASSAGE).to_numpy() & _among(_documents(ids), begun) for ids in columns)
    return sum(int(chosen.sum()) for chosen in first)
