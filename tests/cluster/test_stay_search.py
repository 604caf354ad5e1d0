"""Exact search among what stays, against sorting all rows for each removal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, vector_column, write_fragment
from penstock.cluster.jobs.evaluation import Queries
from penstock.cluster.jobs.removal import REMOVED_SCHEMA, RemovalJob
from penstock.cluster.jobs.stay_search import (
    RepresentedTask,
    StayFound,
    StayTask,
    represented,
    search_stays,
)
from penstock.cluster.layout import EMBEDDINGS, REMOVAL, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import row_hashes
from penstock.operators.independent_set import Keep
from penstock.operators.indexing import Metric
from penstock.operators.similar_pairs import unit_rows

ROWS, BUCKETS, K = 240, 2, 7
NAMES = np.array([f"d{row // 3}#{row % 3}" for row in range(ROWS)], dtype=object)
HASHES = row_hashes(NAMES.tolist())
VECTORS = unit_rows(np.random.default_rng(1).standard_normal((ROWS, 10))).astype(np.float16)
# The last takes what the first two do not take: fates are not nested.
GONE = [np.arange(0, ROWS, 2), np.arange(0, ROWS, 4), np.arange(1, ROWS, 5), np.arange(ROWS)]


def _task(root: Path) -> StayTask:
    store = LocalStore(root)
    fragments = []
    for number, part in enumerate(np.array_split(np.arange(ROWS), 3)):
        part = part[np.argsort(HASHES[part])]
        table = pa.table(
            {
                "row_hash": HASHES[part],
                "passage_id": pa.array(NAMES[part].tolist()),
                "embedding": vector_column(VECTORS[part]),
            }
        )
        fragments.append(f"{number:032x}")
        receipt = Receipt(fragments[-1], len(part), len(part))
        write_fragment(store, fragment_path(EMBEDDINGS, "e", fragments[-1]), table, receipt)
    removals = []
    for number, rows in enumerate(GONE):
        job = RemovalJob(str(root), f"r{number}", (), 0.9, Keep.RANDOM, BUCKETS)
        removals.append(job)
        for bucket, part in enumerate(np.array_split(rows, BUCKETS)):
            gone = np.sort(HASHES[part])
            table = pa.table([gone, gone + np.uint64(1), np.ones(len(gone), np.float32)], schema=REMOVED_SCHEMA)
            write_fragment(store, fragment_path(REMOVAL, job.fingerprint, f"removed-{bucket:05d}"), table)
    asked = unit_rows(np.random.default_rng(2).standard_normal((9, 10)))
    queries = Queries(tuple(f"q{number}" for number in range(9)), asked, (None,) * 9)
    documents = frozenset(("d3", "d7", "no such"))
    return StayTask(str(root), "e", tuple(fragments), tuple(removals), queries, K, Metric.COSINE, documents)


def _nearest(task: StayTask, rows: np.ndarray) -> list[list[str]]:
    near = task.queries.vectors.astype(np.float64) @ VECTORS[rows].T.astype(np.float64)
    return NAMES[rows][np.argsort(-near, axis=1)[:, :K]].tolist() if len(rows) else [[None] * K] * 9


def test_neighbours_are_those_of_the_rows_that_stay(tmp_path: Path) -> None:
    task = _task(tmp_path)
    parts = [search_stays(replace(task, fragments=group)) for group in (task.fragments[:2], task.fragments[2:])]
    for found in (search_stays(task), parts[0].merged(parts[1], K)):
        assert isinstance(found, StayFound) and len(found.neighbours) == 1 + len(GONE)
        assert sorted(found.passages) == [f"{name}#{part}" for name in ("d3", "d7") for part in range(3)]
        for near, gone in zip(found.neighbours, [np.empty(0, np.int64), *GONE], strict=True):
            assert near.ids.tolist() == _nearest(task, np.setdiff1d(np.arange(ROWS), gone))


def test_rows_that_went_name_what_represents_them(tmp_path: Path) -> None:
    task = _task(tmp_path)
    rows = np.sort(HASHES[:20])
    gone, kept = represented(RepresentedTask(task.removals[0], rows))
    assert sorted(gone.tolist()) == sorted(HASHES[:20:2].tolist()) and np.array_equal(kept, gone + np.uint64(1))


def test_more_removals_than_bits_are_refused(tmp_path: Path) -> None:
    task = _task(tmp_path)
    with pytest.raises(ValueError, match=r"removals \(64\) must be at most 63 in one pass; search in several"):
        search_stays(replace(task, removals=task.removals * 16))
