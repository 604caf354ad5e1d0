"""Moments of stored embeddings: of every row once, and the same bytes however the work was ordered."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import vector_column, write_fragment
from penstock.cluster.jobs.moments import (
    MOST_TASKS,
    MomentsJob,
    MomentsTask,
    PartialMoments,
    _fragments_of,
    embedding_moments,
    merge_in_tree,
    partial_moments,
    pilot_mean,
    task_count,
)
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.identity import row_hashes
from penstock.operators.moments import Moments, moments_of
from penstock.operators.searching import normalize
from penstock.operators.sharding import hash_range

DIMENSION, ROWS = 16, 3000
VECTORS = (normalize(np.random.default_rng(6).standard_normal((ROWS, DIMENSION))) + 0.1).astype(np.float16)
HASHES = row_hashes([f"row {number}" for number in range(ROWS)])
SIZES = [0, 700, 1, 1299, 0, 1000]


def stored_job(root: Path, **options: float) -> MomentsJob:
    store, edges, names = open_store(str(root)), np.cumsum([0, *SIZES]), []
    for number, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        order = first + np.argsort(HASHES[first:last])
        columns = {"row_hash": pa.array(HASHES[order]), "embedding": vector_column(VECTORS[order])}
        names.append(f"part-{number}")
        write_fragment(store, fragment_path(EMBEDDINGS, "abc", names[-1]), pa.table(columns))
    return MomentsJob(str(root), "abc", tuple(names), **options)  # type: ignore[arg-type]


def parts_of(job: MomentsJob) -> list[PartialMoments]:
    pilot = pilot_mean(job)
    return [partial_moments(MomentsTask(job, number, pilot)) for number in range(task_count(job))]


def assert_of(moments: Moments, rows: np.ndarray) -> None:
    wide = rows.astype(np.float64)
    assert moments.rows == len(rows)
    np.testing.assert_allclose(moments.mean(), wide.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(moments.covariance(), np.cov(wide.T, bias=True), rtol=1e-9, atol=1e-12)


def test_a_session_sums_every_row_once(tmp_path: Path) -> None:
    job = stored_job(tmp_path)
    with Session() as session:
        moments = embedding_moments(session, job)
    assert_of(moments, VECTORS)
    assert moments.to_bytes() == merge_in_tree(parts_of(job), len(SIZES)).to_bytes()


def test_any_order_of_results_gives_the_same_bytes(tmp_path: Path) -> None:
    parts = parts_of(stored_job(tmp_path))
    found = {merge_in_tree(order, len(parts)).to_bytes() for order in permutations(parts)}
    assert len(found) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_any_number_of_parts_is_one_whole(count: int) -> None:
    pilot = np.zeros(DIMENSION)
    parts = [
        PartialMoments(number, moments_of(rows, pilot)) for number, rows in enumerate(np.array_split(VECTORS, count))
    ]
    assert_of(merge_in_tree(reversed(parts), count), VECTORS)


def test_a_share_is_a_range_of_hashes(tmp_path: Path) -> None:
    moments = merge_in_tree(parts_of(stored_job(tmp_path, share=0.3, seed=7)), len(SIZES))
    inside = np.zeros(ROWS, dtype=bool)
    for first, last in hash_range(0.3, 7):
        inside |= (HASHES >= np.uint64(first)) & (HASHES <= np.uint64(last))
    assert_of(moments, VECTORS[inside])


def test_many_fragments_are_few_tasks_that_hold_each_once() -> None:
    job = MomentsJob("nowhere", "abc", tuple(str(number) for number in range(1000)))
    assert task_count(job) == MOST_TASKS
    held = [name for number in range(MOST_TASKS) for name in _fragments_of(MomentsTask(job, number, np.zeros(1)))]
    assert held == list(job.fragments)


def test_errors_name_the_value_and_the_rule(tmp_path: Path) -> None:
    parts = parts_of(stored_job(tmp_path))
    with pytest.raises(ValueError, match=r"parts of moments \(waiting: \[.*\]\) must be all of 6; some are missing"):
        merge_in_tree(parts[1:], len(parts))
    with pytest.raises(ValueError, match=r"fragments \(none\) must hold at least one"):
        MomentsJob("nowhere", "abc", ())
    with pytest.raises(ValueError, match=r"fraction \(2\) must be above 0"):
        MomentsJob("nowhere", "abc", ("a",), share=2)
    empty = MomentsJob(str(tmp_path), "abc", ("part-0", "part-4"))
    with pytest.raises(ValueError, match=r"fragments \(2\) must hold at least one row"):
        pilot_mean(empty)
