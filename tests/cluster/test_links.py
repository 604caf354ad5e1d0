"""Links dealt out to shards by what represents them, against all links in one process."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from penstock.cluster.fragments import write_fragment
from penstock.cluster.jobs.kept import LINK_SCHEMA, links_path
from penstock.cluster.jobs.links import LinksJob, LinkSource, deal_links, link_ranges, shard_links
from penstock.cluster.jobs.selection import DUPLICATE_ID, DUPLICATE_TEXT, EXCLUSION_SCHEMA
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import row_hashes
from penstock.operators.sharding import HASH_SPACE, shard_of, shard_range

from .in_process import InProcess

PASSAGES, STAY, SHARDS = 3_000, 1_000, 4
FRAGMENTS = ("a" * 32, "b" * 32)


def _exclusions(store: LocalStore, keepers: dict[str, str]) -> None:
    """Two files of passages with the text of another one, and one of a document with the id of another."""
    for number, names in enumerate([sorted(keepers)[::2], sorted(keepers)[1::2]]):
        rows = [
            {"fragment": FRAGMENTS[int(name) % 2], "passage_id": name, "document_id": f"d{name}"}
            | {"row_hash": int(row_hashes([name])[0]), "source": "s", "position": 0, "tokens": 1}
            | {"reason": DUPLICATE_TEXT, "represented_by": keepers[name]}
            for name in names
        ]
        rows[0] |= {"reason": DUPLICATE_ID, "represented_by": None}
        table = pa.Table.from_pylist(rows, EXCLUSION_SCHEMA)
        write_fragment(store, f"stages/selection/s/exclusions-{number:05d}.parquet", table)


def _removed(store: LocalStore, links: dict[str, str | None]) -> None:
    """What went by meaning, of two fragments, with what represents it."""
    for number, fragment in enumerate(FRAGMENTS):
        names = sorted(sorted(links)[number::2], key=lambda name: int(row_hashes([name])[0]))
        kept = [None if links[name] is None else int(row_hashes([str(links[name])])[0]) for name in names]
        similarity = [None if hash_ is None else 0.95 for hash_ in kept]
        documents = [f"d{name}" for name in names]
        columns = [row_hashes(names), names, documents, kept, similarity, row_hashes(names)]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, LINK_SCHEMA, strict=True)]
        write_fragment(store, links_path("k", fragment), pa.table(arrays, schema=LINK_SCHEMA))


def _ids(folder: Path, names: list[str], shard: int) -> Path:
    path = folder / f"ids-{shard}.arrow"
    own = [name for name, place in zip(names, shard_of(row_hashes(names), SHARDS), strict=True) if place == shard]
    table = pa.table({"id": pa.array(own, pa.string())})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("part", [None, FRAGMENTS[:1]])
def test_shards_have_the_links_to_their_rows(
    tmp_path: Path, part: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.fragments.ROW_GROUP_ROWS", 32)
    store, random = LocalStore(tmp_path), np.random.default_rng(2)
    names = [str(number) for number in range(PASSAGES)]
    stay, went, texts = names[:STAY], names[STAY : 2 * STAY], names[2 * STAY :]
    removed: dict[str, str | None] = {name: random.choice(stay) for name in went}
    removed[went[0]] = None  # went with its document
    keepers = {name: random.choice(stay + went) for name in texts}
    _removed(store, removed)
    _exclusions(store, keepers)
    expected = {name: (kept, np.float32(0.95)) for name, kept in removed.items() if kept is not None}
    for name, keeper in keepers.items():
        known = name not in (sorted(keepers)[0], sorted(keepers)[1])  # which have the id of another
        final = removed.get(keeper, keeper)
        if known and final is not None and (part is None or FRAGMENTS[int(name) % 2] in part):
            expected[name] = (final, None)
    source = LinkSource("s", "k", FRAGMENTS, part)
    deal_links(InProcess(), LinksJob(str(tmp_path), "shards", source, 3))
    read = _counted(monkeypatch)
    for whole in (False, True):  # a shard that owns cells has rows all over the hashes
        found = {}
        for shard in range(SHARDS):
            hashes = (0, HASH_SPACE - 1) if whole else shard_range(shard, SHARDS)
            ids = _ids(tmp_path, stay, shard)
            for row in pa.concat_tables(shard_links(store, "shards", 3, hashes, ids)).to_pylist():
                assert row["document_id"] == f"d{row['id']}" and row["id"] not in found
                assert shard_of(row_hashes([row["represented_by"]]), SHARDS) == [shard]
                found[row["id"]] = (row["represented_by"], row["similarity"])
        assert found == expected
        if not whole:
            assert len(expected) <= sum(read) <= len(expected) + 2 * 32 * SHARDS * 3 + 1


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each read of row groups from now on."""
    read: list[int] = []
    whole = pq.ParquetFile.read_row_groups

    def counted(self: pq.ParquetFile, groups: list[int], *args: object, **options: object) -> pa.Table:
        table = whole(self, groups, *args, **options)
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    return read


def test_links_need_no_deduplication_by_meaning(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    _exclusions(store, {"2": "1", "3": "1", "4": "1", "5": "0", "6": "0"})
    job = LinksJob(str(tmp_path), "shards", LinkSource("s"), 1)
    deal_links(InProcess(), job)
    deal_links(InProcess(), job)  # nothing is done twice
    ids = _ids(tmp_path, ["0", "1"], int(shard_of(row_hashes(["1"]), SHARDS)[0]))
    links = pa.concat_tables(shard_links(store, "shards", 1, (0, HASH_SPACE - 1), ids)).to_pylist()
    assert {(row["id"], row["similarity"]) for row in links if row["represented_by"] == "1"} == {("4", None)}
    assert link_ranges(0) == link_ranges(2_000_000) == 1 and link_ranges(2_000_001) == 2
