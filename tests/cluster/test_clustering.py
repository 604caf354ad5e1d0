"""k-means over fragments: the same bytes for any tasks, order or crash, and the cells of rows."""

import re
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, read_receipt, vector_column, write_fragment
from penstock.cluster.jobs import clustering
from penstock.cluster.jobs.cells import CellsJob, CellsTask, CountTask, count_cells, read_cells, write_cells
from penstock.cluster.jobs.clustering import (
    ClusteringJob,
    DamagedCentroids,
    Iteration,
    SumsTask,
    centroids_path,
    fit_centroids,
    iteration_path,
    last_iteration,
    read_centroids,
    start_centroids,
    sum_cells,
)
from penstock.cluster.jobs.training import TrainingTask, read_trained, train
from penstock.cluster.layout import CELLS, EMBEDDINGS, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.cluster.session import Session
from penstock.cluster.storage import Store, open_store
from penstock.operators.clustering import CellSums, ClusteringSpec, updated_centroids
from penstock.operators.indexing import Codec, Family, IndexSpec, Metric
from penstock.operators.routing import index_cells
from penstock.operators.searching import normalize

DIMENSION, CENTROIDS, ITERATIONS = 16, 12, 4
FRAGMENT_ROWS = (900, 0, 700, 1_100, 1)
FRAGMENTS = tuple(f"{number:032x}" for number in range(len(FRAGMENT_ROWS)))
ROWS = sum(FRAGMENT_ROWS)


def _vectors(fragment: int) -> np.ndarray:
    """Clustered unit rows float16 (n, d)."""
    random = np.random.default_rng(fragment)
    centres = np.random.default_rng(99).standard_normal((30, DIMENSION))
    rows = FRAGMENT_ROWS[fragment]
    noise = 0.5 * random.standard_normal((rows, DIMENSION))
    return normalize(centres[random.integers(0, 30, rows)] + noise).astype(np.float16)


def _embeddings(root: Path) -> Store:
    store = LocalStore(root)
    for number, fragment in enumerate(FRAGMENTS):
        vectors = _vectors(number)
        hashes = np.sort(np.random.default_rng(50 + number).integers(0, 2**63, len(vectors), dtype=np.uint64) * 2)
        table = pa.table({"row_hash": pa.array(hashes, pa.uint64()), "embedding": vector_column(vectors)})
        receipt = Receipt(fragment, len(vectors), len(vectors))
        write_fragment(store, fragment_path(EMBEDDINGS, "e", fragment), table, receipt)
    return store


def _job(root: Path, iterations: int = ITERATIONS, **changes: float) -> ClusteringJob:
    spec = ClusteringSpec(
        CENTROIDS,
        DIMENSION,
        True,
        300,
        7,
        1,
        iterations,
        **({"least_gain": 0.0} | changes),  # type: ignore[arg-type]
    )
    return ClusteringJob(str(root), "c", "e", FRAGMENTS, ROWS, spec)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as made:
        yield made


@pytest.fixture(scope="module")
def fitted(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Iteration]:
    """A folder with embeddings that were clustered without interruption."""
    root = tmp_path_factory.mktemp("fitted")
    _embeddings(root)
    return root, fit_centroids(session, _job(root))


def _final(root: Path) -> bytes:
    return open_store(str(root)).read(centroids_path("c", ITERATIONS))


class Killed(Exception):
    """Ends a run where a crash would."""


def test_every_iteration_is_kept_and_reads_all_rows(fitted: tuple[Path, Iteration]) -> None:
    root, last = fitted
    store = LocalStore(root)
    assert last.number == ITERATIONS and last.last and last.rows == ROWS
    assert last_iteration(store, "c") == last
    records = [Iteration.from_json(store.read(iteration_path("c", number))) for number in range(ITERATIONS + 1)]
    assert [record.rows for record in records] == [300] + [ROWS] * ITERATIONS
    assert [record.last for record in records] == [False] * ITERATIONS + [True]
    assert records[0].assignment_recall == 1.0 and records[0].objective is None
    objectives = [record.objective or 0.0 for record in records[1:]]
    assert objectives == sorted(objectives) and objectives[-1] > objectives[0]


def test_centroids_are_those_of_lloyd_in_one_process(fitted: tuple[Path, Iteration]) -> None:
    root, _ = fitted
    vectors = np.concatenate([_vectors(number) for number in range(len(FRAGMENTS))]).astype(np.float64)
    start = faiss.deserialize_index(np.frombuffer(LocalStore(root).read(centroids_path("c", 0)), np.uint8))
    expected = start.reconstruct_n(0, CENTROIDS).astype(np.float64)
    for _ in range(ITERATIONS):
        cells = (vectors @ expected.T).argmax(axis=1)
        assert len(np.unique(cells)) == CENTROIDS
        expected = normalize(np.stack([vectors[cells == cell].sum(axis=0) for cell in range(CENTROIDS)]))
    np.testing.assert_allclose(read_centroids(LocalStore(root), "c"), expected, atol=1e-5)


@pytest.mark.parametrize("killed_after", range(ITERATIONS))
def test_a_crash_goes_on_behind_the_last_iteration(
    session: Session, fitted: tuple[Path, Iteration], tmp_path: Path, killed_after: int
) -> None:
    def crash(iteration: Iteration) -> None:
        if iteration.number == killed_after:
            raise Killed

    store = _embeddings(tmp_path)
    with pytest.raises(Killed):
        fit_centroids(session, _job(tmp_path), crash)
    store.write(centroids_path("c", killed_after + 1), b"the crash came before the record")
    done: list[int] = []
    last = fit_centroids(session, _job(tmp_path), lambda iteration: done.append(iteration.number))
    assert done == list(range(killed_after + 1, ITERATIONS + 1))
    assert last == fitted[1] and _final(tmp_path) == _final(fitted[0])


@pytest.mark.parametrize("tasks_per_cpu", [1, 50])
def test_the_number_of_tasks_changes_nothing(
    session: Session,
    fitted: tuple[Path, Iteration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tasks_per_cpu: int,
) -> None:
    monkeypatch.setattr(clustering, "MOST_TASKS_PER_CPU", tasks_per_cpu)
    monkeypatch.setattr(clustering, "FEWEST_TASKS_PER_CPU", tasks_per_cpu)
    _embeddings(tmp_path)
    assert fit_centroids(session, _job(tmp_path)) == fitted[1]
    assert _final(tmp_path) == _final(fitted[0])


def test_the_order_of_arrival_changes_nothing(tmp_path: Path) -> None:
    _embeddings(tmp_path)
    job = _job(tmp_path)
    start = start_centroids(job)
    parts = [sum_cells(SumsTask(job, 0, start.sha256, (fragment,))) for fragment in FRAGMENTS]
    found = set()
    for order in permutations(range(len(parts)), len(parts)):
        sums = CellSums.empty(job.spec)
        for number in order:
            sums.merge(parts[number])
        found.add((updated_centroids(job.spec, sums, 1).tobytes(), sums.objective))
    assert len(found) == 1


def test_a_sample_may_suffice(session: Session, tmp_path: Path) -> None:
    store = _embeddings(tmp_path)
    with pytest.raises(DamagedCentroids, match=re.escape("must be finished, got iteration none as the last one")):
        read_centroids(store, "c")
    assert fit_centroids(session, _job(tmp_path, iterations=0)).rows == 300
    assert read_centroids(store, "c").shape == (CENTROIDS, DIMENSION)


def test_iterations_end_when_the_objective_settles(session: Session, tmp_path: Path) -> None:
    _embeddings(tmp_path)
    last = fit_centroids(session, _job(tmp_path, least_gain=0.5))
    assert last.last and last.number == 2


def test_centroids_that_are_not_finished_are_refused(tmp_path: Path) -> None:
    store = _embeddings(tmp_path)
    start_centroids(_job(tmp_path))
    message = "centroids (stages/centroids/c) must be finished, got iteration 0 as the last one; run again"
    with pytest.raises(DamagedCentroids, match=re.escape(message)):
        read_centroids(store, "c")


def test_damaged_centroids_are_refused_wherever_they_are_read(session: Session, tmp_path: Path) -> None:
    store = _embeddings(tmp_path)
    start_centroids(_job(tmp_path))
    path = centroids_path("c", 0)
    data = bytearray(store.read(path))
    data[-1] ^= 1
    store.write(path, bytes(data))
    message = re.escape(f"centroids ({path}) must have sha256 ")
    with pytest.raises(DamagedCentroids, match=message + ".*remove this object and its record"):
        fit_centroids(session, _job(tmp_path))
    store.write(iteration_path("c", 0), Iteration(0, "0" * 64, 300, last=True).to_json())
    with pytest.raises(DamagedCentroids, match=message + "0{16}, got"):
        read_centroids(store, "c")


# ---- cells


def test_the_cell_of_each_row_is_written(tmp_path: Path) -> None:
    store = _embeddings(tmp_path)
    spec = IndexSpec(Family.IVF, Codec.SQ8, Metric.COSINE, DIMENSION, f"IVF{CENTROIDS},SQ8", 500, 7)
    train(TrainingTask(str(tmp_path), "e", FRAGMENTS, ROWS, spec, "t"))
    index = faiss.deserialize_index(np.frombuffer(read_trained(store, "t"), np.uint8))
    job = CellsJob(str(tmp_path), "k", "e", "t", CENTROIDS)
    counted = np.zeros(CENTROIDS, np.int64)
    for number, fragment in enumerate(FRAGMENTS):
        work = write_cells(CellsTask(job, fragment))
        cells = read_cells(store, "k", fragment)
        assert cells.dtype == np.int32 and len(cells) == FRAGMENT_ROWS[number]
        assert np.array_equal(cells, index_cells(index, _vectors(number)))
        assert work.receipt == Receipt(fragment, len(cells), len(cells))
        assert read_receipt(store, fragment_path(CELLS, "k", fragment)) == work.receipt
        counted += np.bincount(cells, minlength=CENTROIDS)
    assert np.array_equal(count_cells(CountTask(job, FRAGMENTS)), counted) and counted.sum() == ROWS
