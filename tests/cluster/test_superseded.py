"""What is left of an old version's shards, against a plain reading of the rules, on versions drawn at random."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.jobs.links import LINKS_SCHEMA
from penstock.cluster.jobs.shards import DUPLICATES, IDS, ROWS, ShardRecord, upload_file
from penstock.cluster.jobs.superseded import (
    SupersededShard,
    SupersededTask,
    mark_superseded,
    open_links,
    open_names,
    open_superseded,
)
from penstock.cluster.layout import shard_file
from penstock.cluster.local_store import LocalStore

SHARDS = 2
Version = dict[str, tuple[str, str | None]]  # passage id → its text, and the id of the row that represents it, if any


Marked = tuple[list[SupersededShard], set[str], dict[str, str], dict[str, str]]


def _version(texts: dict[str, str], order: int) -> Version:
    """Passages of which equal texts are represented by one: the first or the last id."""
    keepers: dict[str, str] = {}
    for name in sorted(texts, reverse=bool(order)):
        keepers.setdefault(texts[name], name)
    return {name: (text, None if keepers[text] == name else keepers[text]) for name, text in texts.items()}


def _shard_of(name: str) -> int:
    return sum(name.encode()) % SHARDS


def _write(store: LocalStore, folder: str, version: Version, place: Path) -> tuple[ShardRecord, ...]:
    """The ids, rows and links of a version as its shards have them."""
    records = []
    for shard in range(SHARDS):
        rows = [name for name, (_, keeper) in version.items() if keeper is None and _shard_of(name) == shard]
        linked = {name: keeper for name, (_, keeper) in version.items() if keeper is not None and keeper in rows}
        texts = [version[name][0] for name in rows]
        links = [
            list(linked),
            [name.rpartition("#")[0] for name in linked],
            list(linked.values()),
            [None] * len(linked),
        ]
        tables = {
            IDS: pa.table({"id": pa.array(rows, pa.string())}),
            ROWS: pa.table({"passage_id": pa.array(rows, pa.string()), "text": pa.array(texts, pa.string())}),
            DUPLICATES: pa.table(
                [pa.array(column, field.type) for column, field in zip(links, LINKS_SCHEMA, strict=True)],
                schema=LINKS_SCHEMA,
            ),
        }
        files = []
        for kind, table in tables.items():
            path = place / shard_file(shard, kind)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                if table.num_rows:
                    writer.write_table(table)
            files.append(upload_file(store, folder, path))
        records.append(ShardRecord(shard, len(rows), len(linked), folder, tuple(files)))
    return tuple(records)


def _marked(place: Path, old: Version, new: Version) -> Marked:
    """The records, the old rows that count by the ids that they go by, and represented passage → row, as a reader finds
    them."""
    store = LocalStore(place / "store")
    before, after = (_write(store, name, version, place) for name, version in (("old", old), ("new", new)))
    records, live, links, names = [], set(), {}, {}
    for shard in before:
        record = mark_superseded(SupersededTask(store.url, "mixed", shard, after))
        records.append(record)
        rows = [name for name, (_, keeper) in old.items() if keeper is None and _shard_of(name) == shard.shard]
        own = {name: keeper for name, (_, keeper) in old.items() if keeper in rows}
        if record.files:
            mask = open_superseded(store, "mixed", record.files[0])
            table = open_links(store, "mixed", record.files[1]).to_pylist()
            own = {str(one["id"]): str(one["represented_by"]) for one in table}
            named = open_names(store, "mixed", record.files[2]) if len(record.files) > 2 else ([], [])
            for row, name in zip(*named, strict=True):
                names[name] = rows[row]
                rows[row] = name
            rows = [name for name, gone in zip(rows, mask.tolist(), strict=True) if not gone]
        live |= set(rows)
        links |= own
    return records, live, links, names


def _document(name: str) -> str:
    return name.rpartition("#")[0]


texts = st.dictionaries(
    st.sampled_from([f"d{document}#{ordinal}" for document in range(5) for ordinal in range(2)]),
    st.sampled_from(["One", "two", "three", "four  words"]),
    min_size=1,
)


@settings(max_examples=60)
@given(texts, texts, st.sets(st.sampled_from([f"d{document}" for document in range(5)])), st.integers(0, 3))
def test_every_passage_is_answered_and_none_twice_without_need(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[str, str],
    changes: dict[str, str],
    documents: set[str],
    orders: int,
) -> None:
    """The new version has some of the documents, with texts that may have changed."""
    after = {name: changes.get(name, text) for name, text in before.items() if _document(name) in documents}
    old, new = _version(before, orders % 2), _version(after, orders // 2)
    done = {_document(name) for name in new}
    new_rows = {name for name, (_, keeper) in new.items() if keeper is None}
    records, live, links, names = _marked(tmp_path_factory.mktemp("superseded"), old, new)

    assert sum(record.superseded for record in records) == sum(keeper is None for _, keeper in old.values()) - len(live)
    assert sum(record.duplicates for record in records) == len(links)
    assert sum(record.documents for record in records) == len({name for name in old if name.endswith("#0")} & set(new))
    assert not live & set(new) and not set(links) & (live | set(new))
    row_texts = {name: old[names.get(name, name)][0] for name in live} | {name: new[name][0] for name in new_rows}
    for name, (text, _) in old.items():
        if _document(name) not in done:
            assert row_texts[links.get(name, name)] == text
    assert all(_document(name) not in done for name in live)
    assert sum(record.standing_in for record in records) == len(names)
    for name in live:  # whose text no row of the new version has, where that is known from one of its passages
        row = names.get(name, name)
        group = {row} | {other for other, (_, keeper) in old.items() if keeper == row}
        assert old[row][0] not in {new[other][0] for other in group & set(new)}


def test_a_version_that_shares_no_document_changes_nothing(tmp_path: Path) -> None:
    old = _version({"a#0": "one", "b#0": "one", "c#0": "two"}, 0)
    records, live, links, names = _marked(tmp_path, old, _version({"z#0": "one"}, 0))
    assert live == {"a#0", "c#0"} and links == {"b#0": "a#0"}
    assert all(record.files == () and record.superseded == 0 for record in records)


def test_ids_may_hold_the_sign_that_parts_them(tmp_path: Path) -> None:
    _, live, _, _ = _marked(tmp_path, _version({"a#1#0": "one", "a#0": "two"}, 0), _version({"a#1#0": "three"}, 0))
    assert live == {"a#0"}


def test_a_row_whose_document_changed_stays_for_what_it_represents(tmp_path: Path) -> None:
    records, live, links, names = _marked(
        tmp_path, _version({"a#0": "one", "b#0": "one"}, 0), {"a#0": ("changed", None)}
    )
    assert live == {"b#0"} and names == {"b#0": "a#0"} and not links
    assert sum(one.standing_in for one in records) == 1 and not any(one.superseded for one in records)


def test_similar_texts_are_never_taken_for_the_same(tmp_path: Path) -> None:
    old: Version = {"a#0": ("one", None), "b#0": ("one or so", "a#0"), "c#0": ("one", "a#0")}
    _, live, links, _ = _marked(tmp_path, old, {"b#0": ("one or so", None)})
    assert live == {"a#0"} and links == {"c#0": "a#0"}
