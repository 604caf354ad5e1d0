"""The k-means by whose cells deduplication joins, and when its centroids serve the index too: cluster once, use twice.

Deduplication is done before the index is trained, on all rows; an index of family ivf would then find centroids of its
own on the rows that stay. Both are the same k-means, of unit centroids by inner product, where no transform lies
between them. So deduplication takes as many cells, and trains them on as many rows, as the index would, wherever so
many cells suit the join.
"""

from dataclasses import asdict, dataclass
from typing import Any

from penstock.operators.clustering import ClusteringSpec
from penstock.operators.indexing import TRAINING_ROWS_PER_CENTROID, Family
from penstock.pipelines.config import Index

ROWS_PER_CELL = 500
MOST_CELLS = 4_096  # the planes between them take 8 bytes for each two
CELLS_PER_PART = 8
# Rows of a training sample that faiss takes for each centroid at most (ClusteringParameters).
MOST_TRAINING_ROWS_PER_CENTROID = 256
"""PLACEHOLDER"""
FEWEST_ROWS_PER_SHARED_CELL, MOST_ROWS_PER_SHARED_CELL = 375, 2_000
SHARED_CELLS_PER_PART = 32


@dataclass(frozen=True)
class Clustering:
    """A k-means of a sample: its cells, and the rows of the sample."""

    cells: int
    training_rows: int

    @staticmethod
    def from_json(record: dict[str, Any] | None) -> "Clustering | None":
        return None if record is None else Clustering(**record)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    def spec(self, dimension: int, seed: int) -> ClusteringSpec:
        """Of unit centroids, by inner product."""
        return ClusteringSpec(self.cells, dimension, spherical=True, training_rows=self.training_rows, seed=seed)


def join_clustering(index: Index, rows: int, parts: int) -> Clustering:
    """What a join of so many rows in so many parts takes: the k-means of the index where that suits, else its own."""
    shared = index_clustering(index, rows)
    if shared is not None and suits_join(shared.cells, rows, parts):
        return shared
    cells = max(1, min(rows, MOST_CELLS, max(CELLS_PER_PART * parts if parts > 1 else 1, rows // ROWS_PER_CELL)))
    return Clustering(cells, max(cells, min(rows, TRAINING_ROWS_PER_CENTROID * cells)))


def index_clustering(index: Index, rows: int) -> Clustering | None:
    """The k-means that an index would do on `rows` rows, where it could as well take the centroids of deduplication:
    the file gives their number, and neither transforms nor iterations over all rows change them. None elsewhere."""
    if index.family != Family.IVF or index.nlist is None or index.transforms or index.iterations:
        return None
    training_rows = min(rows, index.training_rows, MOST_TRAINING_ROWS_PER_CENTROID * index.nlist)
    return Clustering(index.nlist, training_rows) if training_rows >= index.nlist else None


def suits_join(cells: int, rows: int, parts: int) -> bool:
    """Whether so many cells are neither too many for the time of a join nor too few to make equal parts of."""
    fewest = max(rows / MOST_ROWS_PER_SHARED_CELL, SHARED_CELLS_PER_PART * parts if parts > 1 else 1)
    return fewest <= cells <= min(MOST_CELLS, rows / FEWEST_ROWS_PER_SHARED_CELL)
