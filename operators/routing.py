"""Which shards a query needs where each owns whole cells of an IVF index, and how to search given cells.

All shards are built from one trained index, of which each keeps its own cells. A query's cells are found once, in the
trained index, and each shard that owns any of them is searched in exactly these: together they give what one index with
all rows gives, to the bit but for two things: transforms that are products of matrices round a row otherwise in another
batch (similarities then differ by about 1e-7), and RaBitQ fast-scan rounds its tables by all cells that are searched
together (its estimates differ by less than 0.01).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np

from penstock.operators.clustering import centroids_of, nearest_cells
from penstock.operators.indexing import AnyIndex, FaissObject, core_index, faiss_threads
from penstock.operators.search_parameters import SearchParameters, with_defaults

_faiss: Any = faiss  # the type stubs of faiss 1.15 leave names out


@dataclass(frozen=True, eq=False)
class CellOwners:
    """Which shard owns each cell: int32 (k,), the shards being 0..count - 1. Within a shard, its cells are numbered in
    ascending order."""

    shard_of_cell: np.ndarray
    count: int

    def cells_of(self, shard: int) -> np.ndarray:
        """The cells of a shard, ascending, int64 (n,)."""
        return np.flatnonzero(self.shard_of_cell == shard)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number of each cell among those of its shard, int64 (k,)."""
        order = np.argsort(self.shard_of_cell, kind="stable")
        owners = self.shard_of_cell[order]
        numbers = np.empty(len(order), np.int64)
        numbers[order] = np.arange(len(order)) - np.searchsorted(owners, owners)
        return numbers


@dataclass(frozen=True, eq=False)
class Probes:
    """Cells of one shard to search for q queries.

    Attributes:
        vectors: float32 (q, d), the queries behind the transforms of the index.
        cells: int64 (q, n), numbers of the cells within the shard, -1 where there is none.
        distances: float32 (q, n), what faiss measured to their centroids.
    """

    vectors: np.ndarray
    cells: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True, eq=False)
class Routing:
    """Where q queries are answered.

    Attributes:
        vectors: float32 (q, d), the queries behind the transforms of the index.
        cells: int64 (q, nprobe), the cells to search, nearest first; -1 in the place of those that are left out.
        distances: float32 (q, nprobe), what faiss measured to their centroids.
        shards: bool (q, S), the shards that own any of these cells.
    """

    vectors: np.ndarray
    cells: np.ndarray
    distances: np.ndarray
    shards: np.ndarray
    owners: CellOwners

    def mean_shards(self) -> float:
        """Shards that a query touches, on average."""
        return float(self.shards.sum(axis=1).mean())

    def probes(self, shard: int, queries: np.ndarray) -> Probes:
        """What to search in a shard that holds its own cells alone, for some of the queries, int64 (n,)."""
        cells, distances = self.cells[queries], self.distances[queries]
        own = (cells >= 0) & (self.owners.shard_of_cell[cells] == shard)
        width = max(1, int(own.sum(axis=1).max(initial=0)))
        first = np.argsort(~own, axis=1, kind="stable")[:, :width]  # its cells, nearest first, then others
        cells, own, distances = (np.take_along_axis(part, first, axis=1) for part in (cells, own, distances))
        return Probes(self.vectors[queries], np.where(own, self.owners.numbers[cells], -1), distances)


@dataclass(frozen=True, eq=False)
class NearCells:
    """The cells of q queries, nearest first: queries behind the transforms of the index float32 (q, d), cells int64
    (q, nprobe), and what faiss measured to their centroids, float32 (q, nprobe)."""

    vectors: np.ndarray
    cells: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True, eq=False)
class Router:
    """Finds the shards and cells of queries in the trained index, with all cells, that shards were built from.

    Raises:
        ValueError: an index without cells, or owners of another number of them.
    """

    index: faiss.Index
    owners: CellOwners

    def __post_init__(self) -> None:
        cells = _ivf(self.index).nlist
        if self.owners.shard_of_cell.shape != (cells,):
            raise ValueError(
                f"owners of cells (shape {self.owners.shard_of_cell.shape}) must name a shard for each of {cells} cells"
            )

    def route(self, queries: np.ndarray, parameters: SearchParameters) -> Routing:
        """For queries float32 (q, d) behind the chain of transforms, as an operating point says."""
        return self.choose(self.near_cells(queries, parameters), parameters)

    def near_cells(self, queries: np.ndarray, parameters: SearchParameters) -> NearCells:
        """As many cells of queries float32 (q, d) as an operating point says; all of them where there are fewer."""
        core = _ivf(self.index)
        nprobe = min(with_defaults(core, parameters).nprobe or 1, core.nlist)
        vectors = transformed(self.index, queries)
        distances, cells = _quantizer(core).search(vectors, nprobe)
        return NearCells(vectors, cells, distances)

    def choose(self, near: NearCells, parameters: SearchParameters) -> Routing:
        """The shards to ask for the cells, and what to search there.

        With `coverage` below 1, a query leaves out the shards that matter least to it: its cells weigh 1 / rank, its
        shards what their cells weigh together, and the heaviest shards are taken until they hold this share of the
        whole weight. On 39,000 titles in 1,024 cells and 16 shards, recall@10 of 0.95 takes 50 cells in 6.5 shards
        with coverage 1, and up to 100 cells in 3.4 shards with coverage 0.88 (8.2 % of the rows compared instead of
        5.3 %).
        """
        weights, coverage = _shard_weights(near.cells, self.owners), parameters.coverage
        shards = weights > 0 if coverage is None or coverage == 1 else _heaviest(weights, coverage)
        chosen = np.take_along_axis(shards, self.owners.shard_of_cell[near.cells], axis=1)
        return Routing(near.vectors, np.where(chosen, near.cells, -1), near.distances, shards, self.owners)


def search_cells(index: AnyIndex, probes: Probes, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows in some cells of an index: float32 (q, k) as faiss measures them, and int64 (q, k) rows, -1
    where there are none."""
    core = _ivf(index)
    vectors, cells, distances = (
        np.ascontiguousarray(part) for part in (probes.vectors, probes.cells, probes.distances)
    )
    near, rows = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
    pointers = (faiss.swig_ptr(part) for part in (cells, distances, near, rows))
    parameters = _faiss.SearchParametersIVF(nprobe=cells.shape[1])
    core.search_preassigned_c(len(vectors), faiss.swig_ptr(vectors), k, *pointers, False, parameters)
    return near, rows


def index_cells(index: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """The cell, int32 (n,), of each floating point (n, d) row in a trained IVF index."""
    return nearest_cells(_quantizer(_ivf(index)), transformed(index, vectors))[0].astype(np.int32)


def nearest_of_index(index: faiss.Index, vectors: np.ndarray, count: int) -> np.ndarray:
    """The nearest cells, int64 (n, count), of each floating point (n, d) row, nearest first."""
    cells: np.ndarray = _quantizer(_ivf(index)).search(transformed(index, vectors), count)[1]
    return cells


def index_centroids(index: faiss.Index) -> np.ndarray:
    """The centroids float32 (k, d) of the cells of a trained IVF index, behind its transforms."""
    return centroids_of(_quantizer(_ivf(index)))


def plant_centroids(index: faiss.Index, centroids: np.ndarray, sample: np.ndarray) -> None:
    """Gives an untrained IVF index its centroids, so that index.train() leaves them as they are.

    Transforms before the cells are trained on the sample, float32 (n, d), where they learn anything; centroids float32
    (k, d) pass through them: exact where transforms are linear, as the mean of a cell then is.
    """
    core = _ivf(index)
    if centroids.shape != (core.nlist, index.d):
        raise ValueError(f"centroids (shape {centroids.shape}) must be {core.nlist} of {index.d} components")
    quantizer = _quantizer(core)
    vectors = np.ascontiguousarray(sample, np.float32)
    for transform in _transforms(index):
        if not transform.is_trained:
            transform.train(vectors)
        vectors, centroids = transform.apply(vectors), transform.apply(np.ascontiguousarray(centroids, np.float32))
    quantizer.train(centroids)
    quantizer.add(centroids)


def only_cells(trained: bytes, cells: np.ndarray) -> bytes:
    """A trained empty IVF index with some of its cells alone, ascending int64 (n,): what their shard is built from.

    A row goes to the nearest of these centroids, which for a row of one of the cells is its own.
    """
    index = _faiss.deserialize_index(np.frombuffer(trained, np.uint8))
    core = _ivf(index)
    quantizer = _faiss.IndexFlat(core.d, core.quantizer.metric_type)
    with faiss_threads(1):
        quantizer.add(index_centroids(index)[cells])
    replaced, lists = core.quantizer, _empty_lists(core, len(cells))
    core.quantizer, core.nlist = quantizer, len(cells)
    core.replace_invlists(lists, False)
    found: bytes = _faiss.serialize_index(index).tobytes()
    core.quantizer, core.own_invlists = replaced, False  # each is freed by its owner
    return found


def transformed(index: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """Floating point (n, d) rows behind the transforms of an index, float32."""
    rows = np.ascontiguousarray(vectors, np.float32)
    for transform in _transforms(index):
        rows = transform.apply(rows)
    return rows


def _transforms(index: faiss.Index) -> list[FaissObject]:
    outer = _faiss.downcast_index(index)
    if not isinstance(outer, _faiss.IndexPreTransform):
        return []
    return [_faiss.downcast_VectorTransform(outer.chain.at(number)) for number in range(outer.chain.size())]


def _empty_lists(core: FaissObject, count: int) -> FaissObject:
    """Inverted lists for codes of an index: plain, or in blocks where codes are scanned in blocks."""
    if not isinstance(core, _faiss.IndexIVFFastScan):
        return _faiss.ArrayInvertedLists(count, core.code_size)
    packer = core.get_CodePacker()
    lists = _faiss.BlockInvertedLists(count, packer)
    packer.this.disown()  # the lists free it
    return lists


def _ivf(index: AnyIndex) -> FaissObject:
    core = core_index(index)
    if not isinstance(core, faiss.IndexIVF):
        raise ValueError(f"index ({type(core).__name__}) has no cells; cluster sharding needs family ivf")
    return core


def _quantizer(core: FaissObject) -> FaissObject:
    quantizer = _faiss.downcast_index(core.quantizer)
    _faiss.add_to_referenced_objects(quantizer, core)  # the C++ object dies with its owner
    return quantizer


def _shard_weights(cells: np.ndarray, owners: CellOwners) -> np.ndarray:
    """float64 (q, S): the sum of 1 / rank over the cells of a query, int64 (q, nprobe), that a shard owns."""
    weights = np.zeros((len(cells), owners.count))
    query, place = np.nonzero(cells >= 0)
    np.add.at(weights, (query, owners.shard_of_cell[cells[query, place]]), 1 / (1 + place))
    return weights


def _heaviest(weights: np.ndarray, coverage: float) -> np.ndarray:
    """bool (q, S): the fewest shards of each query whose weights make up the coverage."""
    order = np.argsort(-weights, axis=1, kind="stable")
    descending = np.take_along_axis(weights, order, axis=1)
    heavier = np.cumsum(descending, axis=1) - descending
    shards = np.zeros(weights.shape, bool)
    np.put_along_axis(shards, order, heavier < coverage * weights.sum(axis=1, keepdims=True), axis=1)
    return shards
