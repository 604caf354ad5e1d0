"""Groups over files and buckets, and what is dealt out to fragments, against one process over all."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from penstock.cluster.fragments import read_fragment, write_fragment
from penstock.cluster.jobs import groups
from penstock.cluster.jobs.dealt_rows import DealTask, deal_bucket, deal_rows, read_dealt
from penstock.cluster.jobs.groups import group_rows, read_groups
from penstock.cluster.jobs.removal import REMOVED_SCHEMA, RemovalJob, remove_duplicates, removed_rows
from penstock.cluster.jobs.similarity import PAIR_SCHEMA
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.independent_set import Keep

from .in_process import InProcess


def _write_pairs(store: LocalStore, hashes: np.ndarray, pairs: np.ndarray, files: int) -> tuple[str, ...]:
    """Files of pairs of row numbers int64 (p, 2), all with similarity 0.9."""
    names = []
    for number, part in enumerate(np.array_split(pairs, files)):
        ends = np.sort(hashes[part.reshape(-1, 2)], axis=1)
        columns = [ends[:, 0], ends[:, 1], np.full(len(ends), 0.9, np.float32)]
        names.append(f"pairs/{number}.parquet")
        write_fragment(store, names[-1], pa.table(columns, schema=PAIR_SCHEMA))
    return tuple(names)


def _lowest(hashes: np.ndarray, pairs: np.ndarray) -> dict[int, int]:
    """The lowest hash that each row with pairs is linked to."""
    rows = np.unique(pairs)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(hashes), len(hashes)))
    labels = connected_components(graph, directed=False)[1]
    return {int(hashes[row]): int(hashes[labels == labels[row]].min()) for row in rows.tolist()}


def _grouped(store: LocalStore, job: RemovalJob) -> dict[int, int]:
    tables = [read_groups(store, job, bucket) for bucket in range(job.buckets)]
    return {row["row_hash"]: row["group"] for table in tables for row in table.to_pylist()}


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_groups_are_components_for_any_files_and_buckets(ends: list[tuple[int, int]], files: int, buckets: int) -> None:
    pairs = np.array([pair for pair in ends if pair[0] != pair[1]] or [(0, 1)])
    hashes = np.random.default_rng(len(ends)).integers(0, 2**64, 31, dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        job = RemovalJob(folder, "r", _write_pairs(store, hashes, pairs, files), 0.9, Keep.RANDOM, buckets)
        expected = _lowest(hashes, pairs)
        assert group_rows(InProcess(), job) == len(set(expected.values()))
        assert _grouped(store, job) == expected


@pytest.mark.parametrize("shape", ["chain", "star"])
def test_long_chains_and_large_stars_take_few_rounds(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "PAIRS_PER_FILE", 100)  # links are written to several files
    random, rows = np.random.default_rng(3), np.arange(999)
    pairs = np.stack([rows if shape == "chain" else np.zeros_like(rows), rows + 1], axis=1)
    hashes = random.integers(0, 2**64, 1_000, dtype=np.uint64)
    store = LocalStore(tmp_path)
    job = RemovalJob(
        str(tmp_path), "r", _write_pairs(store, hashes, random.permutation(pairs), 20), 0.9, Keep.RANDOM, 3
    )
    assert group_rows(InProcess(), job) == 1
    assert _grouped(store, job) == dict.fromkeys(hashes.tolist(), int(hashes.min()))
    rounds = {name.split("-")[1] for name in store.names("stages/removal/r") if name.startswith("higher-")}
    assert len(rounds) <= 12


def _dealt(root: Path, fragments: int = 5, rows: int = 4_000) -> tuple[LocalStore, RemovalJob, list[np.ndarray]]:
    """A decided removal of rows that lie in fragments by hash, and the rows of each fragment."""
    store, random = LocalStore(root), np.random.default_rng(6)
    hashes = random.integers(0, 2**64, rows, dtype=np.uint64)
    names = tuple(f"{number:032x}" for number in range(fragments))
    own = [np.sort(part) for part in np.array_split(hashes, fragments)]
    for name, part in zip(names, own, strict=True):
        write_fragment(store, fragment_path(EMBEDDINGS, "e", name), pa.table({"row_hash": part}))
    pairs = random.choice(rows, (rows, 2))
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    job = RemovalJob(str(root), "r", _write_pairs(store, hashes, pairs, 3), 0.9, Keep.RANDOM, 4, fragments=names)
    remove_duplicates(InProcess(), job)
    group_rows(InProcess(), job)
    return store, job, own


def test_each_fragment_is_dealt_what_was_found_of_its_rows(tmp_path: Path) -> None:
    store, job, own = _dealt(tmp_path)
    deal_rows(InProcess(), job, "e")
    removed = {row["removed"]: row for table in removed_rows(store, job) for row in table.to_pylist()}
    grouped = _grouped(store, job)
    assert 500 < len(removed) < len(grouped)
    seen = 0
    for name, rows in zip(job.fragments, own, strict=True):
        dealt = read_dealt(store, job, name).to_pylist()
        assert [row["row_hash"] for row in dealt] == [row for row in rows.tolist() if row in grouped]
        for row in dealt:
            gone = removed.get(row["row_hash"], dict.fromkeys(REMOVED_SCHEMA.names))
            assert (row["kept"], row["similarity"]) == (gone["kept"], gone["similarity"])
            assert row["group"] == grouped[row["row_hash"]]
        seen += len(dealt)
    assert seen == len(grouped)


def test_rows_of_no_fragment_are_refused(tmp_path: Path) -> None:
    _, job, _ = _dealt(tmp_path, rows=200)
    write_fragment(
        LocalStore(tmp_path),
        fragment_path(EMBEDDINGS, "e", job.fragments[0]),
        pa.table({"row_hash": pa.array([], pa.uint64())}),
    )
    with pytest.raises(ValueError, match=r"rows of removal r \(\d+ of \d+ in bucket 1\) must be of its fragments"):
        deal_bucket(DealTask(job, "e", 1))


def test_fragments_together_read_what_was_dealt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.cluster.fragments.ROW_GROUP_ROWS", 32)
    read: list[int] = []
    whole = pa.parquet.ParquetFile.read_row_groups

    def counted(self: pa.parquet.ParquetFile, groups: list[int], *args: object, **options: object) -> pa.Table:
        table = whole(self, groups, *args, **options)
        read.append(table.num_rows)
        return table

    store, job, _ = _dealt(tmp_path, fragments=6, rows=3_000)
    monkeypatch.setattr(pa.parquet.ParquetFile, "read_row_groups", counted)
    deal_rows(InProcess(), job, "e")
    by_buckets, dealt = sum(read), sum(len(read_fragment(store, _path(job, b))) for b in range(job.buckets))
    assert by_buckets < 3_000 + 2 * 32 * len(job.fragments) * job.buckets  # at most two groups more for each slice
    read.clear()
    for fragment in job.fragments:
        read_dealt(store, job, fragment)
    assert dealt <= sum(read) < dealt + 2 * 32 * len(job.fragments) * job.buckets < len(job.fragments) * dealt


def _path(job: RemovalJob, bucket: int) -> str:
    return fragment_path("removal", job.fingerprint, f"dealt-{bucket:05d}")
