"""A version's rows and files against what its stages say, on stages written by hand."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, write_fragment
from penstock.cluster.jobs.coverage import CoverageSource, CoverageTask, FileTask, cover_rows, damage_of
from penstock.cluster.jobs.kept import LINK_SCHEMA, links_path
from penstock.cluster.jobs.selection import EXCLUSION_SCHEMA
from penstock.cluster.jobs.shards import IDS, FileRecord, ShardRecord, upload_file
from penstock.cluster.layout import (
    EMBEDDINGS,
    PASSAGES,
    SELECTION,
    dead_letter_path,
    fragment_path,
    shard_file,
    stage_folder,
)
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store
from penstock.operators.coverage import RowCoverage
from penstock.operators.deadletters import DeadLetter, dead_letter_table
from penstock.operators.identity import row_hashes
from penstock.operators.sharding import shard_range

LIVE = ["a#0", "a#1", "b#0", "c#0", "d#0"]
EXCLUDED, FAULTY, REMOVED = "e#0", "f#0", "g#0"


def passages(store: Store, name: str, ids: list[str]) -> None:
    columns = {"passage_id": ids, "row_hash": row_hashes(ids), "source": ["s"] * len(ids), "position": range(len(ids))}
    table = pa.table({name: pa.array(values) for name, values in columns.items()}).sort_by("row_hash")
    write_fragment(store, fragment_path(PASSAGES, "p", name), table, Receipt(name, len(ids), len(ids)))


def embeddings(store: Store, name: str, ids: list[str]) -> None:
    table = pa.table({"passage_id": ids, "row_hash": pa.array(row_hashes(ids))}).sort_by("row_hash")
    write_fragment(store, fragment_path(EMBEDDINGS, "k", name), table, Receipt(name, len(ids), len(ids)))


@pytest.fixture
def source(tmp_path: Path) -> CoverageSource:
    """Two passages fragments, of which one row each was excluded, had no vector, and went as a duplicate."""
    store = LocalStore(tmp_path / "root")
    passages(store, "one", [*LIVE[:3], EXCLUDED])
    passages(store, "two", [*LIVE[3:], FAULTY, REMOVED])
    row = {"fragment": "one", "passage_id": EXCLUDED, "row_hash": 1, "document_id": "e", "source": "s", "position": 3}
    row |= {"tokens": 5, "reason": "duplicate_text", "represented_by": "a#0"}
    exclusions = pa.Table.from_pylist([row], schema=EXCLUSION_SCHEMA)
    write_fragment(store, f"{stage_folder(SELECTION, 's')}/exclusions-00000.parquet", exclusions)
    letters = [DeadLetter(EMBEDDINGS, "s", 1, "reason", "detail", "f", FAULTY)]
    write_fragment(store, dead_letter_path(EMBEDDINGS, "e", "two-e"), dead_letter_table(letters))
    link = {"row_hash": int(row_hashes([REMOVED])[0]), "id": REMOVED, "document_id": "g", "kept_hash": 1}
    link |= {"similarity": 1.0, "group": 1}
    write_fragment(store, links_path("k", "two-k"), pa.Table.from_pylist([link], schema=LINK_SCHEMA))
    embeddings(store, "one-k", LIVE[:3])
    embeddings(store, "two-k", LIVE[3:])
    fragments = (("one", True), ("two", False))
    kept = ("k", ("two-k",))
    return CoverageSource(store.url, "p", "s", fragments, "e", ("two-e",), ("k", ("one-k", "two-k")), kept)


def covered(source: CoverageSource, place: Path, *shards: list[str], ranges: int = 1) -> RowCoverage:
    """What shards with these ids are found to hold, over so many ranges of hashes."""
    store, records = LocalStore(Path(source.root)), []
    for shard, ids in enumerate(shards):
        path = place / shard_file(shard, IDS)
        table = pa.table({"id": pa.array(ids, pa.string())})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        records.append(ShardRecord(shard, len(ids), 0, "version", (upload_file(store, "version", path),)))
    found = RowCoverage()
    for number in range(ranges):
        found = found.add(cover_rows(CoverageTask(source, tuple(records), *shard_range(number, ranges))))
    return found


@pytest.mark.parametrize("ranges", [1, 3])
def test_a_version_with_each_live_row_once_is_whole(source: CoverageSource, tmp_path: Path, ranges: int) -> None:
    found = covered(source, tmp_path, LIVE[:2], LIVE[2:], ranges=ranges)
    assert found == RowCoverage(expected=5, rows=5, of_model=5)


@pytest.mark.parametrize("ranges", [1, 3])
def test_a_missing_row_and_a_doubled_one_are_named_though_the_counts_agree(
    source: CoverageSource, tmp_path: Path, ranges: int
) -> None:
    found = covered(source, tmp_path, [*LIVE[:2], LIVE[0]], LIVE[3:], ranges=ranges)
    assert found.rows == found.expected == 5
    assert found.wrong() == {"missing": 1, "doubled": 1}
    assert set(found.names) == {"b#0", "a#0"}


@pytest.mark.parametrize("name", [EXCLUDED, FAULTY, REMOVED, "gone#0"])
def test_a_row_that_is_not_live_is_foreign(source: CoverageSource, tmp_path: Path, name: str) -> None:
    found = covered(source, tmp_path, [*LIVE, name])
    assert found.wrong() == {"foreign": 1, "without_vector": 1} and found.names == (name,)


def test_a_row_without_a_vector_in_the_space_is_told(source: CoverageSource, tmp_path: Path) -> None:
    embeddings(LocalStore(Path(source.root)), "two-k", LIVE[4:])
    found = covered(source, tmp_path, LIVE)
    assert found.wrong() == {"without_vector": 1} and found.names == ("c#0",) and found.of_model == 4


def test_files_are_whole_or_said_to_be_damaged(store: Store) -> None:
    data = b"shard" * 100_000
    record = FileRecord("shard-00000.faiss", len(data), hashlib.sha256(data).hexdigest())
    task = FileTask(store.url, "version", record)
    assert damage_of(task) == "shard-00000.faiss is missing"
    store.write("version/shard-00000.faiss", data)
    assert damage_of(task) is None
    store.write("version/shard-00000.faiss", data[:-1])
    assert damage_of(task) == "shard-00000.faiss has 499,999 bytes in place of 500,000"
    store.write("version/shard-00000.faiss", data[:-1] + b"D")
    found = damage_of(task) or ""
    assert found.startswith("shard-00000.faiss has sha256 ") and found.endswith(f"in place of {record.sha256[:16]}")
