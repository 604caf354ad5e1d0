"""The k-means by whose cells deduplication joins, and when its centroids serve the index too: cluster once, use twice.

Deduplication is done before the index is trained, on all rows; an index of family ivf would then find centroids of its
own on the rows that stay. Both are the same k-means, of unit centroids by inner product, where no transform lies
between them. So deduplication takes as many cells, and trains them on as many rows, as the index would, wherever so
many cells suit the join.
"""

from dataclasses import asdict, dataclass
from typing import Any

from penstock.cluster.jobs.similarity import JOIN_MEMORY_BYTES
from penstock.operators.clustering import ClusteringSpec
from penstock.operators.indexing import TRAINING_ROWS_PER_CENTROID, Family
from penstock.pipelines.config import Index

ROWS_PER_CELL = 500
MOST_CELLS = 4_096  # the planes between them take 8 bytes for each two
CELLS_PER_PART = 8
# Bytes of a component of the rows that k-means is trained on: as they are stored, in float32, and as faiss draws them.
SAMPLE_BYTES_PER_COMPONENT = 10
# Rows of a sample that faiss trains each centroid on, at most (ClusteringParameters). The 39 that suffice for a join
# cost searches 1.4 points of recall@10 at 1 and 0.7 at 16 of 400 cells (98,645 rows of 384 components); with 256,
# recall is that of centroids trained on the rows that stay.
MOST_TRAINING_ROWS_PER_CENTROID = 256
# 101,000 rows in 4 parts, exact at 0.9: 8.6 CPU seconds with 200 cells, 9.2 with 400, 9.8 with 800 and 12.7 with 1,600,
# for as many copies. What sharing saves are the 0.2 s of a k-means of 200 cells, so that about 270 break even; both
# sides grow with the square of the rows. With 50 cells, parts are as equal as with 100, and take as long.
FEWEST_ROWS_PER_SHARED_CELL = 375
MOST_ROWS_PER_SHARED_CELL, SHARED_CELLS_PER_PART = 2_000, 12
# Where groups of about 50 near copies made up 10 % of the rows, centroids of all rows gave the recall@10 of those of
# the others alone at 4 to 32 of 200 cells; with 40 %, they lost 2.0 points at 4 cells and 0.7 at 8.
MOST_REMOVED_SHARE = 0.1


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


def join_clustering(index: Index, rows: int, parts: int, dimension: int) -> Clustering:
    """What a join of so many rows in so many parts takes: the k-means of the index where that suits, else its own."""
    return shared_clustering(index, rows, parts, dimension) or own_clustering(rows, parts, dimension)


def shared_clustering(index: Index, rows: int, parts: int, dimension: int) -> Clustering | None:
    """The k-means of the index, where it suits a join of so many parts and its sample fits into memory. For one part,
    whatever of the index decides by which cells a join of any parts is done."""
    shared = index_clustering(index, rows)
    if shared is None or shared.training_rows > most_training_rows(dimension):
        return None
    return shared if suits_join(shared.cells, rows, parts) else None


def own_clustering(rows: int, parts: int, dimension: int) -> Clustering:
    """The k-means of a join that shares none: what the index is does not matter."""
    cells = max(1, min(rows, MOST_CELLS, max(CELLS_PER_PART * parts if parts > 1 else 1, rows // ROWS_PER_CELL)))
    sample = min(rows, TRAINING_ROWS_PER_CENTROID * cells, most_training_rows(dimension))
    return Clustering(cells, max(cells, sample))


def most_training_rows(dimension: int) -> int:
    """Rows of a sample that k-means takes in the memory of a join."""
    return JOIN_MEMORY_BYTES // (SAMPLE_BYTES_PER_COMPONENT * dimension)


def most_parts(rows: int) -> int:
    """Parts of a join, made of whole cells, that there are enough cells for."""
    return max(1, min(rows, MOST_CELLS) // CELLS_PER_PART)


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


def most_stay(before: int, after: int) -> bool:
    """Whether so few rows went that centroids of all are as good for those that stay."""
    return after >= (1 - MOST_REMOVED_SHARE) * before
