"""Rounds of a removal over buckets: chains across them, what a round reads, and the end in one task."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.cluster import fragments
from penstock.cluster.fragments import write_fragment
from penstock.cluster.jobs import removal
from penstock.cluster.jobs.removal import RemovalJob, remove_duplicates, removed_rows
from penstock.cluster.jobs.similarity import PAIR_SCHEMA
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store
from penstock.operators.independent_set import Keep, ranks

from ..operators.whole_set import independent_set, neighbours_of
from .in_process import InProcess


class Rows:
    """Rows with hashes and tokens, by which the smallest is preferred, and pairs of them."""

    def __init__(self, root: Path, rows: int, left: np.ndarray, right: np.ndarray) -> None:
        random = np.random.default_rng(rows)
        self.root, self.store = root, LocalStore(root)
        self.hashes = random.integers(0, 2**64, rows, dtype=np.uint64)
        self.left, self.right = left, right
        self.similarity = random.uniform(0.9, 1.0, len(left)).astype(np.float32)
        ends = np.sort(np.stack([self.hashes[left], self.hashes[right]]), axis=0)
        pairs = pa.table([ends[0], ends[1], self.similarity], schema=PAIR_SCHEMA)
        write_fragment(self.store, "p/pairs.parquet", pairs)
        order = np.argsort(self.hashes)
        passages = pa.table({"row_hash": self.hashes[order], "tokens": np.arange(rows)[order]})
        write_fragment(self.store, fragment_path(PASSAGES, "p", "one"), passages)

    def job(self, name: str, buckets: int) -> RemovalJob:
        files = ("p/pairs.parquet",)
        return RemovalJob(str(self.root), name, files, 0.9, Keep.COLUMN, buckets, "p", ("one",), "tokens")

    def gone(self) -> set[int]:
        """What goes, decided row by row."""
        rank = ranks(np.arange(len(self.hashes)), self.hashes)
        stays = independent_set(neighbours_of(self.left, self.right, self.similarity, rank), rank)
        return set(self.hashes[~stays].tolist())

    def removed(self, job: RemovalJob) -> list[tuple[int, int, float]]:
        return sorted(tuple(row.values()) for table in removed_rows(self.store, job) for row in table.to_pylist())

    def files(self, job: RemovalJob) -> dict[str, bytes]:
        folder = self.root / "stages" / "removal" / job.fingerprint
        return {path.stem: path.read_bytes() for path in folder.glob("*.parquet")}


def _chain(root: Path, rows: int) -> Rows:
    return Rows(root, rows, np.arange(rows - 1), np.arange(1, rows))


def _web(root: Path, rows: int, pairs: int) -> Rows:
    """Rows of random pairs, and of a chain through all of them."""
    left, right = np.random.default_rng(3).integers(0, rows, (2, pairs))
    left, right = np.append(left, np.arange(rows - 1)), np.append(right, np.arange(1, rows))
    ends = np.unique(np.sort(np.stack([left, right])[:, left != right], axis=0), axis=1)
    return Rows(root, rows, ends[0], ends[1])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files of each kind are opened to be read."""
    count: Counter[str] = Counter()
    open_fragment = fragments.open_fragment

    def counted(store: Store, path: str) -> pq.ParquetFile:
        count[path.rpartition("/")[2].partition("-")[0]] += 1
        return open_fragment(store, path)

    monkeypatch.setattr(fragments, "open_fragment", counted)
    return count


def test_a_long_chain_across_buckets_takes_few_rounds(tmp_path: Path, opened: Counter[str]) -> None:
    rows, buckets = _chain(tmp_path, 1_000), 10
    job = rows.job("chain", buckets)
    assert remove_duplicates(InProcess(), job) == 500
    assert {row for row, _, _ in rows.removed(job)} == rows.gone() == set(rows.hashes[1::2].tolist())
    assert sum(name.startswith("decided-") for name in rows.files(job)) == buckets  # of one round
    assert opened["decided"] <= 2 * buckets**2 and sum(opened.values()) <= 6 * buckets**2


def test_a_round_reads_the_round_before_alone(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, buckets = _chain(tmp_path, 16), 3
    monkeypatch.setattr(removal, "FINISH_PAIRS", 0)
    job = rows.job("rounds", buckets)
    assert remove_duplicates(InProcess(), job) == 8
    assert {row for row, _, _ in rows.removed(job)} == rows.gone()
    names = rows.files(job)
    rounds = sum(name.startswith("decided-") for name in names) // buckets
    assert rounds > 5 and not any(name.startswith(("rest-", "open-")) for name in names)
    assert opened["decided"] == buckets**2 * rounds and opened["states"] == buckets * rounds


@pytest.mark.parametrize("finish_pairs", [0, 25, 10_000])
def test_what_goes_does_not_depend_on_where_rounds_end(
    tmp_path: Path, finish_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _web(tmp_path, 120, 160)
    alone = rows.job("alone", 1)
    remove_duplicates(InProcess(), alone)
    assert {row for row, _, _ in rows.removed(alone)} == rows.gone()
    monkeypatch.setattr(removal, "FINISH_PAIRS", finish_pairs)
    job = rows.job("buckets", 4)
    remove_duplicates(InProcess(), job)
    assert rows.removed(job) == rows.removed(alone)
    names = rows.files(job)
    assert any(name.startswith("rest-") for name in names) == (finish_pairs > 0)
    assert ("decided-00001-00000" in names) == (finish_pairs < 10_000)


@pytest.mark.parametrize(
    "lost", [("rest",), ("rest", "open-00003"), ("rest", "open", "decided-00001-00002"), ("removed",)]
)
def test_the_last_rounds_go_on_where_they_stopped(
    tmp_path: Path, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _web(tmp_path, 120, 160)
    monkeypatch.setattr(removal, "FINISH_PAIRS", 25)
    job = rows.job("stopped", 4)
    count, before = remove_duplicates(InProcess(), job), rows.files(job)
    gone = [name for name in before if name.startswith(lost)]
    assert len(gone) >= len(lost)
    rows.store.delete([fragment_path("removal", job.fingerprint, name) for name in gone])
    assert remove_duplicates(InProcess(), job) == count
    assert rows.files(job) == before
