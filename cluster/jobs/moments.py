"""Embeddings fragments → the moments of their vectors: one pass, a small partial result per task, merged as they
come."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import ROW_GROUP_ROWS, open_fragment, read_hash_range, vectors_of
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.operators.moments import Moments, moments_of
from penstock.operators.sharding import hash_range

# A partial result is 8 d^2 bytes, 8 MiB at 1,024 dimensions, which all pass through the driver: few and even tasks,
# cut by the number of fragments and not by that of workers, so that the sums are the same on any cluster.
MOST_TASKS = 256


@dataclass(frozen=True)
class MomentsJob:
    """Sum the vectors of all fragments, or of a seeded share of the hash space: the same rows for any cut.

    Raises:
        ValueError: there are no fragments.
    """

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.fragments:
            raise ValueError("fragments (none) must hold at least one to take moments of; embed documents first")
        hash_range(self.share, self.seed)


@dataclass(frozen=True, eq=False)
class MomentsTask:
    """The part of a job's fragments that has a number, of `task_count` parts."""

    job: MomentsJob
    number: int
    pilot: np.ndarray


@dataclass(frozen=True, eq=False)
class PartialMoments:
    number: int
    moments: Moments


def embedding_moments(session: Session, job: MomentsJob) -> Moments:
    """The moments of the job's vectors. Deterministic for the same fragments and kind of machine; memory in the driver:
    about one partial result per task in flight."""
    pilot = session.run(pilot_mean, job)
    count = task_count(job)
    tasks = (MomentsTask(job, number, pilot) for number in range(count))
    return merge_in_tree(session.stream(partial_moments, tasks), count)


def task_count(job: MomentsJob) -> int:
    return min(len(job.fragments), MOST_TASKS)


def pilot_mean(job: MomentsJob) -> np.ndarray:
    """The mean of the first ROW_GROUP_ROWS rows, float64 (d,): near enough to the mean of all to sum relative to.

    Raises:
        ValueError: no fragment holds a row.
    """
    store = connect(job.root)
    for fragment in job.fragments:
        with open_fragment(store, fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment)) as file:
            for batch in file.iter_batches(ROW_GROUP_ROWS, columns=["embedding"]):
                if batch.num_rows:
                    return _mean(batch)
    raise ValueError(f"fragments ({len(job.fragments)}) must hold at least one row to take moments of; embed documents")


def partial_moments(task: MomentsTask) -> PartialMoments:
    """The moments of the task's fragments, read one by one. Memory: one fragment, and two matrices (d, d)."""
    job, store = task.job, connect(task.job.root)
    total = Moments.nothing(task.pilot)
    for fragment in _fragments_of(task):
        path = fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment)
        for first, last in hash_range(job.share, job.seed):
            table = read_hash_range(store, path, first, last, ["embedding"])
            if table.num_rows:
                total = total.merged(moments_of(vectors_of(table.column("embedding")), task.pilot))
    return PartialMoments(task.number, total)


def merge_in_tree(parts: Iterable[PartialMoments], count: int) -> Moments:
    """Merges `count` parts in pairs by number, in whatever order they come: the same bytes for any order.

    Memory: the parts that wait for their neighbour, which are few where parts come about in order of number.

    Raises:
        ValueError: a part is missing.
    """
    waiting: dict[tuple[int, int], Moments] = {}
    for part in parts:
        width, level, number, moments = count, 0, part.number, part.moments
        while width > 1:
            neighbour = number ^ 1
            if neighbour < width:  # the last of an odd number has none, and rises alone
                if (level, neighbour) not in waiting:
                    break
                moments = moments.merged(waiting.pop((level, neighbour)))
            width, level, number = (width + 1) // 2, level + 1, number // 2
        waiting[level, number] = moments
    top = (max(count - 1, 0).bit_length(), 0)
    if top not in waiting:
        raise ValueError(f"parts of moments (waiting: {sorted(waiting)}) must be all of {count}; some are missing")
    return waiting[top]


def _fragments_of(task: MomentsTask) -> tuple[str, ...]:
    fragments, count = task.job.fragments, task_count(task.job)
    return fragments[len(fragments) * task.number // count : len(fragments) * (task.number + 1) // count]


def _mean(batch: pa.RecordBatch) -> np.ndarray:
    vectors = vectors_of(pa.Table.from_batches([batch]).column("embedding"))
    mean: np.ndarray = vectors.mean(axis=0, dtype=np.float64)
    return mean
