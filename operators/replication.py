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
# Pairs reach a floor in float32, in which 1 - 6e-8 comes before 1: those of a little less do as well.
SIMILARITY_ROUNDING = 1e-7
BATCH_ROWS, EXACT_ROWS = 2_048, 16_384
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

    Memory: 50 bytes for each of BATCH_ROWS rows and cell, and 8 for each pair of cells.

    Args:
        vectors: float32 (n, d) of unit length.
        centroids: floating point (k, d) of any length; a row belongs to the one that is nearest by Euclidean distance,
            for centroids of unit length as well the one with the largest inner product.
        part_of_cell: int64 (k,), parts being 0..their largest.
        most: copies of a row, into the nearest parts; pairs can be lost then. Which these are depends on the row alone.
    """
    by_part = np.argsort(part_of_cell, kind="stable")
    planes = _Planes(centroids[by_part].astype(np.float32), part_of_cell[by_part].astype(np.int64))
    reach = near_distance(floor - SIMILARITY_ROUNDING) + MARGIN
    cells, rows, parts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first in range(0, len(vectors), BATCH_ROWS):
        batch = vectors[first : first + BATCH_ROWS]
        nearest, lead = planes.leads(batch)
        if most is None:
            reached = planes.reached(nearest, lead, reach)
        else:
            reached = planes.nearest_parts(batch, nearest, lead, reach, most)
        row, column = np.nonzero(reached)
        cells.append(by_part[nearest])
        rows.append(first + row)
        parts.append(planes.parts[column])
    cell = np.concatenate(cells)
    return Copies(cell, part_of_cell[cell].astype(np.int64), np.concatenate(rows), np.concatenate(parts))


class _Planes:
    """The planes halfway between each two of some centroids, which are sorted by part.

    Attributes:
        parts: int64 (p,), those that have cells, ascending.
    """

    def __init__(self, centroids: np.ndarray, part_of_cell: np.ndarray) -> None:
        self._centroids = centroids
        self.parts, self._starts, self._column = np.unique(part_of_cell, return_index=True, return_inverse=True)
        self._exact = exact = centroids.astype(np.float64)
        self._squares = squares = np.einsum("ij,ij->i", exact, exact)
        self._half_squares = (squares / 2).astype(np.float32)
        apart = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * exact @ exact.T, 0))
        self._apart = np.maximum(apart, LEAST_APART)

    def leads(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid of each row, int64 (n,), and by how much it is nearer than each, float32 (n, k): the
        difference of half the squared distances, within MARGIN."""
        nearness = vectors @ self._centroids.T - self._half_squares
        nearest = self._nearest(vectors, nearness)
        return nearest, np.take_along_axis(nearness, nearest[:, None], axis=1) - nearness

    def reached(self, nearest: np.ndarray, lead: np.ndarray, reach: float) -> np.ndarray:
        """Which parts that are later than that of a row's nearest centroid have a plane within reach of it, bool
        (n, p): those that may, as float32 tells."""
        found: np.ndarray = self._by_part(nearest, np.maximum(lead - MARGIN, 0) / self._apart[nearest]) <= reach
        return found

    def nearest_parts(
        self, vectors: np.ndarray, nearest: np.ndarray, lead: np.ndarray, reach: float, most: int
    ) -> np.ndarray:
        """Of the later parts within reach those `most` that are the nearest, bool (n, p): distances of the cells that
        may be the nearest of such a part are computed again, in float64 and row by row."""
        apart = self._apart[nearest]
        least, at_most = np.maximum(lead - 2 * MARGIN, 0) / apart, self._by_part(nearest, np.maximum(lead, 0) / apart)
        limit = np.minimum(at_most, np.minimum(reach, _nth(at_most, most)))
        later = self._column[None, :] > self._column[nearest][:, None]
        row, cell = np.nonzero(later & (least <= limit[:, self._column]))
        distances = np.full(at_most.shape, np.inf)
        np.minimum.at(distances, (row, self._column[cell]), self._exactly(vectors, nearest, row, cell))
        first = np.argsort(distances, axis=1, kind="stable")[:, :most]
        chosen = np.zeros(distances.shape, bool)
        np.put_along_axis(chosen, first, True, axis=1)
        result: np.ndarray = chosen & (distances <= reach)
        return result

    def _by_part(self, nearest: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """The least distance to the cells of each later part, float64 (n, p); infinite for others."""
        least = np.minimum.reduceat(distances, self._starts, axis=1)
        least[np.arange(len(self.parts))[None, :] <= self._column[nearest][:, None]] = np.inf
        return least

    def _exactly(self, vectors: np.ndarray, nearest: np.ndarray, row: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Distances float64 (m,) of rows to the planes between their nearest centroid and a cell each."""
        home = nearest[row]
        lead = self._nearness(vectors, row, home) - self._nearness(vectors, row, cell)
        distances: np.ndarray = np.maximum(lead - MARGIN, 0) / self._apart[home, cell]
        return distances

    def _nearness(self, vectors: np.ndarray, row: np.ndarray, cell: np.ndarray) -> np.ndarray:
        result = np.empty(len(row))
        for first in range(0, len(row), EXACT_ROWS):
            part = slice(first, first + EXACT_ROWS)
            products = np.einsum("ij,ij->i", vectors[row[part]].astype(np.float64), self._exact[cell[part]])
            result[part] = products - self._squares[cell[part]] / 2
        return result

    def _nearest(self, vectors: np.ndarray, nearness: np.ndarray) -> np.ndarray:
        """The nearest centroid, which depends on the vector alone: float32 products also depend on what they are
        computed together with, and equal vectors belong to one cell."""
        nearest: np.ndarray = nearness.argmax(axis=1)
        near = nearness >= np.take_along_axis(nearness, nearest[:, None], axis=1) - MARGIN
        unsure = np.flatnonzero(near.sum(axis=1) > 1)
        place, cell = np.nonzero(near[unsure])
        order = np.lexsort((cell, -self._nearness(vectors, unsure[place], cell), place))
        nearest[unsure] = cell[order[np.flatnonzero(np.diff(place[order], prepend=-1))]]
        return nearest


def _nth(distances: np.ndarray, most: int) -> np.ndarray:
    """The distance (n, 1) to the part that is the last of the nearest `most`; below any where there are none."""
    if most == 0:
        return np.full((len(distances), 1), -1.0)
    last = min(most, distances.shape[1]) - 1
    return np.partition(distances, last, axis=1)[:, last, None]
