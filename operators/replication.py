"""Which rows a part of the cells needs copies of, so that no similar pair is lost at the border between parts.

A row x of cell a may have a neighbour y within the Euclidean distance r in cell b only where x lies within r of the
plane halfway between the two centroids: y lies on the side of b, as b is its nearest centroid. Parts are made of whole
cells. A row is copied into every later part of which it may have a neighbour in some cell, and compared with the rows
there, so that each pair across a border is compared once.
"""

import math
from dataclasses import dataclass

import numpy as np

# Beyond r: float32 products of unit rows of a few thousand components are within 1e-6.
MARGIN = 1e-5
BATCH_ROWS = 2_048
LEAST_APART = 1e-9  # of equal centroids, which no plane separates


@dataclass(frozen=True, eq=False)
class Copies:
    """Where rows are needed.

    Attributes:
        cell: int64 (n,), the nearest centroid of each row.
        home: int64 (n,), the part of that cell.
        row: int64 (c,), a row to copy, ascending; `part` int64 (c,) is a part later than its home to copy it to.
    """

    cell: np.ndarray
    home: np.ndarray
    row: np.ndarray
    part: np.ndarray

    @property
    def factor(self) -> float:
        """Rows that are stored for each row."""
        return 1 + len(self.row) / max(1, len(self.home))


def near_distance(similarity: float) -> float:
    """The Euclidean distance of two unit vectors of a cosine similarity."""
    return math.sqrt(2 - 2 * similarity)


def copies_of(
    vectors: np.ndarray, centroids: np.ndarray, part_of_cell: np.ndarray, floor: float, most: int | None = None
) -> Copies:
    """Home and copies of rows that no pair with a cosine similarity of at least `floor` can be lost without.

    Memory: 16 bytes for each of BATCH_ROWS rows and cell, and 8 for each pair of cells.

    Args:
        vectors: float32 (n, d) of unit length.
        centroids: floating point (k, d) of any length; a row belongs to the one that is nearest by Euclidean distance,
            for centroids of unit length as well the one with the largest inner product.
        part_of_cell: int64 (k,), parts being 0..their largest.
        most: copies of a row, into the nearest parts; pairs can be lost then.
    """
    by_part = np.argsort(part_of_cell, kind="stable")
    planes = _Planes(centroids[by_part].astype(np.float32))
    sorted_parts = part_of_cell[by_part].astype(np.int64)
    present, starts = np.unique(sorted_parts, return_index=True)
    reach = near_distance(floor) + MARGIN
    cells, rows, parts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first in range(0, len(vectors), BATCH_ROWS):
        nearest, distances = planes.distances(vectors[first : first + BATCH_ROWS])
        by_distance = np.minimum.reduceat(distances, starts, axis=1)
        by_distance[present[None, :] <= sorted_parts[nearest][:, None]] = np.inf
        reached = by_distance <= (reach if most is None else np.minimum(reach, _nth(by_distance, most)))
        row, column = np.nonzero(reached)
        cells.append(by_part[nearest])
        rows.append(first + row)
        parts.append(present[column])
    cell = np.concatenate(cells)
    return Copies(cell, part_of_cell[cell].astype(np.int64), np.concatenate(rows), np.concatenate(parts))


class _Planes:
    """The planes halfway between each two of some centroids."""

    def __init__(self, centroids: np.ndarray) -> None:
        self._centroids = centroids
        self._exact = exact = centroids.astype(np.float64)
        self._squares = squares = np.einsum("ij,ij->i", exact, exact)
        self._half_squares = (squares / 2).astype(np.float32)
        apart = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * exact @ exact.T, 0))
        self._apart = np.maximum(apart, LEAST_APART)

    def distances(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid, int64 (n,), and from each row to the planes between this and each, float64 (n, k)."""
        nearness = vectors @ self._centroids.T - self._half_squares
        nearest = self._nearest(vectors, nearness)
        lead = np.take_along_axis(nearness, nearest[:, None], axis=1) - nearness
        return nearest, np.maximum(lead - MARGIN, 0) / self._apart[nearest]

    def _nearest(self, vectors: np.ndarray, nearness: np.ndarray) -> np.ndarray:
        """The nearest centroid, which depends on the vector alone: float32 products also depend on what they are
        computed together with, and equal vectors belong to one cell."""
        nearest: np.ndarray = nearness.argmax(axis=1)
        near = nearness >= np.take_along_axis(nearness, nearest[:, None], axis=1) - MARGIN
        unsure = np.flatnonzero(near.sum(axis=1) > 1)
        place, cell = np.nonzero(near[unsure])
        products = np.einsum("ij,ij->i", vectors[unsure[place]].astype(np.float64), self._exact[cell])
        order = np.lexsort((cell, self._squares[cell] / 2 - products, place))
        nearest[unsure] = cell[order[np.flatnonzero(np.diff(place[order], prepend=-1))]]
        return nearest


def _nth(distances: np.ndarray, most: int) -> np.ndarray:
    """The distance (n, 1) to the part that is the last of the nearest `most`; below any where there are none."""
    if most == 0:
        return np.full((len(distances), 1), -1.0)
    last = min(most, distances.shape[1]) - 1
    return np.partition(distances, last, axis=1)[:, last, None]
