"""What passages tell of documents, dealt out once, against adding up all passages."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.cluster import fragments
from penstock.cluster.fragments import write_fragment
from penstock.cluster.jobs.document_facts import deal_facts, read_facts
from penstock.cluster.jobs.pair_ends import bucket_of
from penstock.cluster.jobs.removal import RemovalJob
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store
from penstock.operators.independent_set import Keep, random_keys

from .in_process import InProcess

PASSAGE_ROWS, DOCUMENTS, BUCKETS = 200, 40, 3
FRAGMENTS = ("a", "b", "c", "d")


def _passages(root: Path) -> pa.Table:
    """Written to fragments as they come, so that documents lie in several; returns all."""
    random, store = np.random.default_rng(1), LocalStore(root)
    document = random.integers(0, 2**64, DOCUMENTS, dtype=np.uint64)
    of = random.integers(0, DOCUMENTS, PASSAGE_ROWS)
    tables = []
    for fragment, part in zip(FRAGMENTS, np.array_split(np.arange(PASSAGE_ROWS), len(FRAGMENTS)), strict=True):
        columns = {
            "row_hash": np.sort(random.integers(0, 2**64, len(part), dtype=np.uint64)),
            "document_hash": document[of[part]],
            "tokens": random.integers(1, 9, len(part)),
            "source": [f"{row % 3}.txt" for row in of[part]],
            "position": of[part],
            "topic": pa.array([None if row % 4 == 0 else int(row) % 7 for row in of[part]], pa.int64()),
        }
        tables.append(pa.table(columns))
        write_fragment(store, fragment_path(PASSAGES, "p", fragment), tables[-1])
    return pa.concat_tables(tables)


@pytest.mark.parametrize("keep", list(Keep))
def test_facts_are_those_of_all_passages_which_are_read_once(
    tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages, opened = _passages(tmp_path), Counter[str]()
    open_fragment = fragments.open_fragment

    def counted(store: Store, path: str) -> pq.ParquetFile:
        opened[path] += 1
        return open_fragment(store, path)

    monkeypatch.setattr(fragments, "open_fragment", counted)
    job = RemovalJob(str(tmp_path), "r", (), 0.9, keep, BUCKETS, "p", FRAGMENTS, "topic", seed=4)
    for _ in range(2):  # the second time is done
        deal_facts(InProcess(), job, "documents")
    names, first, place = np.unique(passages.column("document_hash").to_numpy(), return_index=True, return_inverse=True)
    near, column = np.arange(len(names)), {name: passages.column(name).to_numpy() for name in ("tokens", "position")}
    expected = {
        Keep.LONGEST: np.bincount(place, column["tokens"]).astype(np.int64).tolist(),
        Keep.FIRST: [f"{row % 3}.txt\0{row:020d}" for row in column["position"][first]],
        Keep.COLUMN: passages.column("topic").take(pa.array(first)).to_pylist(),
        Keep.DENSEST: near.tolist(),
        Keep.RANDOM: random_keys(names, 4).tolist(),
    }[keep]
    for bucket in range(BUCKETS):
        own = np.flatnonzero(bucket_of(names, BUCKETS) == bucket)[::2]  # others have no pairs
        facts = read_facts(LocalStore(tmp_path), job, "documents", bucket, names[own])
        assert facts.passages.tolist() == np.bincount(place)[own].tolist()
        assert facts.keys(job, near[own]).to_pylist() == [expected[row] for row in own]
    read = {path: times for path, times in opened.items() if "/passages/" in path}
    assert len(read) == len(FRAGMENTS) and set(read.values()) == {1}
