"""Exact search among what stays, against sorting all rows for each removal."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.cluster import fragments
from penstock.cluster.fragments import Receipt, vector_column, write_fragment
from penstock.cluster.jobs.document_pairs import DocumentJob
from penstock.cluster.jobs.evaluation import Queries
from penstock.cluster.jobs.removal import REMOVED_SCHEMA, RemovalJob
from penstock.cluster.jobs.stay_search import (
    CountTask,
    RepresentedTask,
    StayFound,
    StayTask,
    count_gone,
    represented,
    search_stays,
)
from penstock.cluster.layout import DOCUMENT_PAIRS, EMBEDDINGS, REMOVAL, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store
from penstock.operators.identity import row_hashes
from penstock.operators.independent_set import Keep
from penstock.operators.indexing import Metric
from penstock.operators.similar_pairs import unit_rows

ROWS, BUCKETS, K = 252, 2, 7  # three fragments of whole documents
NAMES = np.array([f"d{row // 3}#{row % 3}" for row in range(ROWS)], dtype=object)
HASHES = row_hashes(NAMES.tolist())
VECTORS = unit_rows(np.random.default_rng(1).standard_normal((ROWS, 10))).astype(np.float16)
# The last takes what the first two do not take: fates are not nested.
GONE = [np.arange(0, ROWS, 2), np.arange(0, ROWS, 4), np.arange(1, ROWS, 5), np.arange(ROWS)]


def _task(root: Path) -> StayTask:
    store = LocalStore(root)
    names = []
    for number, part in enumerate(np.array_split(np.arange(ROWS), 3)):
        part = part[np.argsort(HASHES[part])]
        table = pa.table(
            {
                "row_hash": HASHES[part],
                "passage_id": pa.array(NAMES[part].tolist()),
                "embedding": vector_column(VECTORS[part]),
            }
        )
        names.append(f"{number:032x}")
        receipt = Receipt(names[-1], len(part), len(part))
        write_fragment(store, fragment_path(EMBEDDINGS, "e", names[-1]), table, receipt)
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
    return StayTask(str(root), "e", tuple(names), tuple(removals), queries, K, Metric.COSINE, documents)


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


def test_what_removals_took_is_read_once_for_all_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, opened = _task(tmp_path), Counter[str]()
    open_fragment = fragments.open_fragment

    def counted(store: Store, path: str) -> pq.ParquetFile:
        opened[path] += 1
        return open_fragment(store, path)

    monkeypatch.setattr(fragments, "open_fragment", counted)
    search_stays(task)
    removed = {path: times for path, times in opened.items() if "/removed-" in path}
    assert len(removed) == len(GONE) * BUCKETS and set(removed.values()) == {1}


def test_rows_that_went_name_what_represents_them(tmp_path: Path) -> None:
    task = _task(tmp_path)
    rows = np.sort(HASHES[:20])
    gone, kept = represented(RepresentedTask(task.removals[0], rows))
    assert sorted(gone.tolist()) == sorted(HASHES[:20:2].tolist()) and np.array_equal(kept, gone + np.uint64(1))


def test_more_removals_than_bits_are_refused(tmp_path: Path) -> None:
    task = _task(tmp_path)
    with pytest.raises(ValueError, match=r"removals \(64\) must be at most 63 in one pass; search in several"):
        search_stays(replace(task, removals=task.removals * 16))


def test_documents_that_went_take_all_their_passages_and_are_counted(tmp_path: Path) -> None:
    task, store = _task(tmp_path), LocalStore(tmp_path)
    names = [f"d{number}" for number in range(0, ROWS // 3, 2)]
    rows = RemovalJob(str(tmp_path), "rows", (), 0.9, Keep.RANDOM, BUCKETS)
    job = DocumentJob("documents", rows, 0.5)
    for bucket, part in enumerate(np.array_split(np.sort(row_hashes(names)), BUCKETS)):
        gone = [part, part + np.uint64(1), np.full(len(part), 0.75, np.float32)]
        path = fragment_path(REMOVAL, job.removal.fingerprint, f"removed-{bucket:05d}")
        write_fragment(store, path, pa.table(gone, schema=REMOVED_SCHEMA))
        linked = np.sort(HASHES[bucket::12][:5])
        links = [linked, linked + np.uint64(2), np.full(5, 0.9, np.float32)]
        write_fragment(
            store,
            fragment_path(DOCUMENT_PAIRS, "documents", f"links-{bucket:05d}"),
            pa.table(links, schema=REMOVED_SCHEMA),
        )
    near = search_stays(replace(task, removals=(task.removals[1], job))).neighbours
    went = np.isin([name.partition("#")[0] for name in NAMES], names)
    assert near[1].ids.tolist() == _nearest(task, np.setdiff1d(np.arange(ROWS), GONE[1]))
    assert near[2].ids.tolist() == _nearest(task, np.flatnonzero(~went))
    groups = (task.fragments[:2], task.fragments[2:])
    counts = [count_gone(CountTask(task.root, "e", group, (job,))) for group in groups]
    assert count_gone(CountTask(task.root, "e", task.fragments, (job,))).tolist() == sum(counts).tolist()
    assert sum(counts).tolist() == [[ROWS // 3, ROWS], [len(names), int(went.sum())]]
    gone, kept = represented(RepresentedTask(job, np.sort(row_hashes(names[:4])), whole=True))
    assert sorted(gone.tolist()) == sorted(row_hashes(names[:4]).tolist()) and np.array_equal(kept, gone + np.uint64(1))
    gone, kept = represented(RepresentedTask(job, np.sort(HASHES)))
    assert len(gone) == 10 and np.array_equal(kept, gone + np.uint64(2))
