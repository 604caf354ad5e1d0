"""Centroids by k-means: on a sample in one process, then over all rows from partial sums.

Lloyd's iteration needs no more of the rows than the sum and the number of those in each cell, which many tasks can give
for a part each. Sums are taken as 64-bit integers in units of 2^-24: integers add up exactly, so that the centroids are
the same bytes however rows are dealt out to tasks and in whatever order the sums come back.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import faiss
import numpy as np

from penstock.operators.indexing import MOST_SEED, FaissObject, faiss_threads

_faiss: Any = faiss  # the type stubs of faiss 1.15 leave names out

# The spacing of the smallest float16 numbers, so that stored float16 add up without any rounding; float32 components
# are rounded to it, an error of at most 3e-8 that averages out in a cell.
UNITS_PER_ONE = 2**24
# Their product with the units is 2^63, where int64 ends.
MOST_COMPONENT = 2**12
MOST_CELL_ROWS = 2**27
# 4,096 centroids of 38,000 x 384 titles, one thread: 11 s and a mean inner product of 0.645 to held-out rows in one
# level, 0.7 s and 0.637 in two. From here on one level takes many minutes (39 rows for each of 16,384, 10 iterations).
TWO_LEVEL_CENTROIDS = 16_384
# Cells found per second by one thread among 384-dimensional centroids, exact against HNSW (share found right):
# 8,192: 14,200 against 13,100 (0.998); 16,384: 8,100 against 8,100 (0.994); 32,768: 4,000 against 6,900 (0.989).
HNSW_CENTROIDS = 32_768
HNSW_LINKS = 32
HNSW_EF_CONSTRUCTION = 100
HNSW_EF_SEARCH = 64


@dataclass(frozen=True)
class ClusteringSpec:
    """How to cluster: into how many cells, and from what.

    Attributes:
        spherical: centroids of unit length and cells by inner product, for indexes that rank by it; else Euclidean.
        training_rows: rows of the sample that the centroids are first trained on.
        sample_iterations: Lloyd iterations over the sample.
        iterations: the most Lloyd iterations over all rows; 0 where the sample suffices.
        least_gain: iterations end when one changes the objective by at most this share of it. On titles in 1,024
            cells an iteration gains 1e-3 around the 8th and 1.5e-4 after the 10th, of which held-out rows get little.

    Raises:
        ValueError: for a value outside its range.
    """

    centroids: int
    dimension: int
    spherical: bool
    training_rows: int
    seed: int
    sample_iterations: int = 10
    iterations: int = 0
    least_gain: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("centroids", "dimension", "sample_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("iterations", "least_gain"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed ({self.seed}) must lie in 0..{MOST_SEED}")
        if self.training_rows < self.centroids:
            raise ValueError(
                f"training_rows ({self.training_rows}) must be at least the {self.centroids} centroids; sample more "
                "rows, or take fewer centroids"
            )


@dataclass(eq=False)
class CellSums:
    """What Lloyd's iteration needs of some rows, for each of k cells; parts of the rows merge in any order.

    Attributes:
        sums: int64 (k, d), the sum of the rows of each cell in units of 1 / UNITS_PER_ONE.
        rows: int64 (k,), their number.
        objective: the sum over the rows of what faiss measured to their centroids: squared distances, or inner products
            where clustering is spherical.
    """

    sums: np.ndarray
    rows: np.ndarray
    objective: Fraction = field(default_factory=Fraction)

    @classmethod
    def empty(cls, spec: ClusteringSpec) -> "CellSums":
        """Of no rows. Memory: 8 bytes for each component of the centroids."""
        return cls(np.zeros((spec.centroids, spec.dimension), np.int64), np.zeros(spec.centroids, np.int64))

    def add(self, vectors: np.ndarray, cells: np.ndarray, distances: np.ndarray) -> None:
        """Adds floating point (n, d) rows, their cells (n,) and what was measured to the centroids, float32 (n,)."""
        if len(vectors) == 0:
            return
        order = np.argsort(cells, kind="stable")
        present, starts = np.unique(cells[order], return_index=True)
        self.sums[present] += np.add.reduceat(_in_units(vectors)[order], starts, axis=0)
        self.rows += np.bincount(cells, minlength=len(self.rows))
        self.objective += Fraction(float(distances.sum(dtype=np.float64)))

    def merge(self, other: "CellSums") -> None:
        """Adds the sums of other rows."""
        self.sums += other.sums
        self.rows += other.rows
        self.objective += other.objective


def cluster_sample(spec: ClusteringSpec, sample: np.ndarray, threads: int = 1) -> np.ndarray:
    """Centroids float32 (k, d) of a sample by faiss, on its GPUs where it has any; seeded.

    From TWO_LEVEL_CENTROIDS on, the sample is first cut into about sqrt(k) parts and these are clustered each on its
    own, which compares a row with about 2 sqrt(k) centroids instead of k. faiss starts from random rows: from k-means++
    it ends no better (0.6624 against 0.6626 in 1,024 cells of titles) and takes 1.7 times as long.

    Args:
        sample: floating point (n, d) in random order, of which the first `spec.training_rows` are read.
    """
    rows = np.ascontiguousarray(sample[: spec.training_rows], np.float32)
    if rows.ndim != 2 or rows.shape[1] != spec.dimension or len(rows) < spec.centroids:
        raise ValueError(
            f"sample (shape {rows.shape}) must hold at least {spec.centroids} rows of {spec.dimension} components, "
            "one row for each centroid; take fewer centroids"
        )
    options = {"seed": spec.seed, "spherical": spec.spherical, "min_points_per_centroid": 1, "gpu": gpus() > 0}
    with faiss_threads(threads):
        if spec.centroids >= TWO_LEVEL_CENTROIDS:
            return _two_levels(spec, rows, options)
        kmeans = _faiss.Kmeans(
            spec.dimension, spec.centroids, niter=spec.sample_iterations, max_points_per_centroid=len(rows), **options
        )
        kmeans.train(rows)
    centroids: np.ndarray = kmeans.centroids
    return centroids


def gpus() -> int:
    """GPUs that faiss can use here: none with faiss-cpu."""
    return int(_faiss.get_num_gpus())


def build_quantizer(centroids: np.ndarray, spherical: bool) -> FaissObject:
    """The faiss index that finds the cell of a row among centroids float32 (k, d): exact, or from HNSW_CENTROIDS on
    an HNSW graph, built in one thread so that it is the same each time."""
    metric = faiss.METRIC_INNER_PRODUCT if spherical else faiss.METRIC_L2
    dimension = centroids.shape[1]
    if len(centroids) < HNSW_CENTROIDS:
        quantizer = _faiss.IndexFlat(dimension, metric)
    else:
        quantizer = _faiss.IndexHNSWFlat(dimension, HNSW_LINKS, metric)
        quantizer.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        quantizer.hnsw.efSearch = HNSW_EF_SEARCH
    with faiss_threads(1):
        quantizer.add(np.ascontiguousarray(centroids, np.float32))
    return quantizer


def on_gpus(quantizer: FaissObject) -> FaissObject:
    """A copy on all GPUs, or the quantizer itself where there are none or it is a graph, which faiss keeps on CPUs."""
    if gpus() == 0 or not isinstance(quantizer, faiss.IndexFlat):
        return quantizer
    return _faiss.index_cpu_to_all_gpus(quantizer)


def centroids_of(quantizer: FaissObject) -> np.ndarray:
    """The centroids float32 (k, d) of a quantizer."""
    centroids: np.ndarray = quantizer.reconstruct_n(0, quantizer.ntotal)
    return centroids


def nearest_cells(quantizer: FaissObject, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell, int64 (n,), of each floating point (n, d) row, and what faiss measured to its centroid, float32 (n,).

    Raises:
        ValueError: naming the first row that no cell was found for, as its components are no numbers.
    """
    distances, cells = quantizer.search(np.ascontiguousarray(vectors, np.float32), 1)
    if cells.min(initial=0) < 0:
        row = int(np.argmax(cells[:, 0] < 0))
        raise ValueError(f"vector {row} (of {len(vectors)}) has no nearest centroid: it is not finite; drop the row")
    return cells[:, 0], distances[:, 0]


def updated_centroids(spec: ClusteringSpec, sums: CellSums, iteration: int) -> np.ndarray:
    """The means float32 (k, d) of the cells, normalized where clustering is spherical.

    An empty cell takes half of another, chosen at random in proportion to its rows and seeded by spec and iteration:
    both centroids move apart by 1/1024 (faiss, reassign_centroids).
    """
    if sums.rows.max() > MOST_CELL_ROWS:
        raise ValueError(
            f"cell {int(sums.rows.argmax())} ({sums.rows.max()} rows) must have at most {MOST_CELL_ROWS}, or its sum "
            "could overflow; take more centroids"
        )
    # imports scipy, which only this needs
    from faiss.contrib.clustering import reassign_centroids

    rows = sums.rows.copy()
    means = (sums.sums / (UNITS_PER_ONE * np.maximum(rows, 1))[:, None]).astype(np.float32)
    reassign_centroids(rows, means, np.random.default_rng([spec.seed, iteration]))  # type: ignore[no-untyped-call]
    return _unit_or_zero(means) if spec.spherical else means


def has_settled(spec: ClusteringSpec, before: float, after: float) -> bool:
    """Whether an iteration changed the objective by no more than `least_gain` of it."""
    return abs(after - before) <= spec.least_gain * abs(before)


def assignment_recall(quantizer: FaissObject, vectors: np.ndarray) -> float:
    """The share of the rows, floating point (n, d) and at least one, whose cell has the centroid that is nearest."""
    if isinstance(quantizer, faiss.IndexFlat):
        return 1.0
    exact = _faiss.IndexFlat(quantizer.d, quantizer.metric_type)
    exact.add(centroids_of(quantizer))
    return float(np.mean(nearest_cells(quantizer, vectors)[0] == nearest_cells(exact, vectors)[0]))


def _two_levels(spec: ClusteringSpec, rows: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    from faiss.contrib.clustering import two_level_clustering

    parts = round(spec.centroids**0.5)
    found: np.ndarray = two_level_clustering(  # type: ignore[no-untyped-call]
        rows, parts, spec.centroids, clustering_niter=spec.sample_iterations, **options
    )[0]
    return found


def _in_units(vectors: np.ndarray) -> np.ndarray:
    """Floating point (n, d) as int64 in units of 1 / UNITS_PER_ONE."""
    largest = np.abs(vectors).max()
    if not largest <= MOST_COMPONENT:
        row = int(np.argmin((np.abs(vectors) <= MOST_COMPONENT).all(axis=1)))
        raise ValueError(
            f"vector {row} (largest component {largest}) must have components within {MOST_COMPONENT}; drop the row, "
            "or normalize the embeddings"
        )
    return np.rint(vectors * np.float64(UNITS_PER_ONE)).astype(np.int64)


def _unit_or_zero(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: np.ndarray = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit
