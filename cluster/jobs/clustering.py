"""Embeddings → centroids by k-means over all fragments.

Each finished iteration is one stored object, from which the tasks of the next read the centroids: a run that crashed
goes on behind the last one, and ends with the same bytes.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from penstock.cluster.jobs.sampling import sample_vectors
from penstock.cluster.jobs.transforms import read_chain, vector_batches
from penstock.cluster.layout import CENTROIDS, EMBEDDINGS, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.clustering import (
    CellSums,
    ClusteringSpec,
    assignment_recall,
    build_quantizer,
    centroids_of,
    cluster_sample,
    has_settled,
    nearest_cells,
    on_gpus,
    updated_centroids,
)
from penstock.operators.indexing import FaissObject, faiss_threads

# Tasks of an iteration for each CPU: at its end workers wait for the last task, with 4 up to a quarter of their time;
# but each gives back the sums of all cells.
MOST_TASKS_PER_CPU, FEWEST_TASKS_PER_CPU = 16, 4
SUMS_BYTES_PER_CPU = 64 << 20
CHECKED_ROWS = 4_096  # a share of 0.99 is then known within 0.003, at two standard errors
RECORD_NAME = re.compile(r"centroids-(\d{5})\.json")
_faiss: Any = faiss  # the type stubs of faiss 1.15 leave names out


class DamagedCentroids(Exception):
    """Centroids that are not what clustering wrote, or not finished."""


@dataclass(frozen=True)
class ClusteringJob:
    """What to cluster: the embeddings fragments, about how many rows they hold, the GPUs that each task takes, and the
    fingerprint of the transforms that vectors pass first."""

    root: str
    fingerprint: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    spec: ClusteringSpec
    gpus: float = 0.0
    transforms: str | None = None


@dataclass(frozen=True)
class Iteration:
    """A finished iteration: what its centroids are, and what it measured of those before it.

    Attributes:
        rows: rows that the centroids are the means of; in iteration 0, those of the sample.
        objective: mean over the rows of the squared distance to their centroid before the iteration, or of the inner
            product with it where clustering is spherical. None in iteration 0.
        imbalance: rows of the largest cell in multiples of the mean. None in iteration 0.
        assignment_recall: share of sampled rows whose cell has the nearest centroid. In iteration 0 alone.
        last: whether no iteration follows.
    """

    number: int
    sha256: str
    rows: int
    last: bool
    objective: float | None = None
    imbalance: float | None = None
    assignment_recall: float | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> "Iteration":
        return Iteration(**json.loads(data))


@dataclass(frozen=True)
class SumsTask:
    """Fragments to sum up by the cells of an iteration's centroids."""

    job: ClusteringJob
    iteration: int
    sha256: str
    fragments: tuple[str, ...]


def centroids_path(fingerprint: str, iteration: int) -> str:
    """The centroids of an iteration, as the faiss index that finds the nearest of them."""
    return f"{stage_folder(CENTROIDS, fingerprint)}/centroids-{iteration:05d}.faiss"


def iteration_path(fingerprint: str, iteration: int) -> str:
    """The record of an iteration: written after its centroids, so that it says that the iteration is done."""
    return f"{stage_folder(CENTROIDS, fingerprint)}/centroids-{iteration:05d}.json"


def fit_centroids(
    session: Session, job: ClusteringJob, on_iteration: Callable[[Iteration], None] | None = None
) -> Iteration:
    """Cluster all rows, going on where an earlier run ended; returns the last iteration.

    `on_iteration` hears of each as it is finished. Memory of this process: the sums of all cells twice (8 bytes for
    each component of a centroid), and the centroids.
    """
    store = connect(job.root)
    iteration = last_iteration(store, job.fingerprint)
    if iteration is None:
        if job.spec.iterations:
            session.warm(sum_cells, min(len(job.fragments), int(session.resources().get("CPU", 1))) - 1)
        iteration = session.run(start_centroids, job, gpus=job.gpus)
        _tell(on_iteration, iteration)
    while not iteration.last:
        iteration = _iterate(session, store, job, iteration)
        _tell(on_iteration, iteration)
    return iteration


def start_centroids(job: ClusteringJob) -> Iteration:
    """Centroids of a sample as iteration 0. Memory: the sample in float32, twice."""
    store, spec = connect(job.root), job.spec
    paths = [fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment) for fragment in job.fragments]
    sample = sample_vectors(store, paths, job.rows, spec.training_rows, spec.seed)
    chain = read_chain(store, job.transforms)
    sample = chain.apply_documents(sample) if chain else sample
    quantizer = build_quantizer(cluster_sample(spec, sample), spec.spherical)
    recall = assignment_recall(quantizer, sample[:CHECKED_ROWS])
    digest = _store_quantizer(store, job.fingerprint, 0, quantizer)
    iteration = Iteration(0, digest, len(sample), last=spec.iterations == 0, assignment_recall=recall)
    store.write(iteration_path(job.fingerprint, 0), iteration.to_json())
    return iteration


def sum_cells(task: SumsTask) -> CellSums:
    """The sums of the rows of fragments by cell. Memory: these sums, the centroids, and one batch of rows."""
    job = task.job
    store = connect(job.root)
    quantizer = on_gpus(_kept_quantizer(job.root, job.fingerprint, task.iteration, task.sha256))
    sums, chain = CellSums.empty(job.spec), read_chain(store, job.transforms)
    with faiss_threads(1):
        for fragment in task.fragments:
            for vectors in vector_batches(
                store, fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment), chain
            ):
                sums.add(vectors, *nearest_cells(quantizer, vectors))
    return sums


def last_iteration(store: Store, fingerprint: str) -> Iteration | None:
    """The record of the last iteration that was finished; None when there is none."""
    names = store.names(stage_folder(CENTROIDS, fingerprint))
    numbers = [int(match[1]) for match in map(RECORD_NAME.fullmatch, names) if match]
    return Iteration.from_json(store.read(iteration_path(fingerprint, max(numbers)))) if numbers else None


def read_centroids(store: Store, fingerprint: str) -> np.ndarray:
    """The finished centroids float32 (k, d), their hash checked.

    Raises:
        DamagedCentroids: clustering did not end, or other bytes than it wrote.
    """
    iteration = last_iteration(store, fingerprint)
    if iteration is None or not iteration.last:
        number = "none" if iteration is None else iteration.number
        raise DamagedCentroids(
            f"centroids ({stage_folder(CENTROIDS, fingerprint)}) must be finished, got iteration {number} as the last "
            "one; run again, which goes on from there"
        )
    return centroids_of(_read_quantizer(store, fingerprint, iteration.number, iteration.sha256))


def _iterate(session: Session, store: Store, job: ClusteringJob, before: Iteration) -> Iteration:
    """One Lloyd iteration over all fragments."""
    groups = min(len(job.fragments), _tasks_per_cpu(job.spec) * max(1, int(session.resources().get("CPU", 1))))
    tasks = [SumsTask(job, before.number, before.sha256, job.fragments[group::groups]) for group in range(groups)]
    sums = CellSums.empty(job.spec)
    for part in session.stream(sum_cells, tasks, gpus=job.gpus):
        sums.merge(part)
    return _finish_iteration(store, job, before, sums)


def _tasks_per_cpu(spec: ClusteringSpec) -> int:
    sums_bytes = 8 * spec.centroids * spec.dimension
    return min(MOST_TASKS_PER_CPU, max(FEWEST_TASKS_PER_CPU, SUMS_BYTES_PER_CPU // sums_bytes))


def _finish_iteration(store: Store, job: ClusteringJob, before: Iteration, sums: CellSums) -> Iteration:
    spec, number, rows = job.spec, before.number + 1, int(sums.rows.sum())
    quantizer = build_quantizer(updated_centroids(spec, sums, number), spec.spherical)
    objective = float(sums.objective / rows)
    settled = before.objective is not None and has_settled(spec, before.objective, objective)
    iteration = Iteration(
        number=number,
        sha256=_store_quantizer(store, job.fingerprint, number, quantizer),
        rows=rows,
        last=settled or number == spec.iterations,
        objective=objective,
        imbalance=float(sums.rows.max() * spec.centroids / rows),
    )
    store.write(iteration_path(job.fingerprint, number), iteration.to_json())
    return iteration


def _store_quantizer(store: Store, fingerprint: str, iteration: int, quantizer: FaissObject) -> str:
    """Store centroids; returns the sha256 of what was stored."""
    data: bytes = _faiss.serialize_index(quantizer).tobytes()
    store.write(centroids_path(fingerprint, iteration), data)
    return hashlib.sha256(data).hexdigest()


def _read_quantizer(store: Store, fingerprint: str, iteration: int, sha256: str) -> FaissObject:
    path = centroids_path(fingerprint, iteration)
    data = store.read(path)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DamagedCentroids(
            f"centroids ({path}) must have sha256 {sha256[:16]}, got {found[:16]}; remove this object and its record "
            "(.json), and run again"
        )
    return _faiss.deserialize_index(np.frombuffer(data, np.uint8))


@functools.lru_cache(maxsize=1)
def _kept_quantizer(root: str, fingerprint: str, iteration: int, sha256: str) -> FaissObject:
    """The quantizer of the present iteration, once per process."""
    return _read_quantizer(connect(root), fingerprint, iteration, sha256)


def _tell(on_iteration: Callable[[Iteration], None] | None, iteration: Iteration) -> None:
    if on_iteration:
        on_iteration(iteration)
