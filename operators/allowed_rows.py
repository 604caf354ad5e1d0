"""Search the allowed rows of an index: through the selectors of faiss, or past their lack."""

import math
from typing import Any

import faiss
import numpy as np

from penstock.operators.indexing import AnyIndex, FaissObject, core_index
from penstock.operators.search_parameters import SearchParameters, faiss_parameters, rows_compared, with_defaults
from penstock.operators.vamana import VamanaIndex

_faiss: Any = faiss
FETCHED_PAIRS = 2**22  # rows fetched at once over all queries: 48 MiB of ids and distances
FETCH_MARGIN = 2  # rows fetched for each allowed row wanted, beyond what the share of allowed rows asks for
FETCH_GROWTH = 4


def search_allowed(
    index: AnyIndex, queries: np.ndarray, fetched: int, parameters: SearchParameters, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows (q, fetched) as the index returns them, of allowed rows alone; -1 where it finds no more.

    Args:
        allowed: bool (rows,), of which at least `fetched` are True.
    """
    if isinstance(index, VamanaIndex):
        return _search_graph_and_drop(index, queries, fetched, parameters, allowed)
    if _takes_selectors(core_index(index)):
        selector = _faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        distances, rows = index.search(queries, fetched, params=faiss_parameters(index, parameters, selector))
        return distances, rows
    return _search_and_drop(index, queries, fetched, allowed)


def search_every_code(
    index: AnyIndex, queries: np.ndarray, fetched: int, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """search_allowed that compares the codes of all allowed rows, whatever lists or graph there are."""
    if isinstance(index, VamanaIndex):
        return index.search_rows(queries, fetched, np.flatnonzero(allowed))
    core = core_index(index)
    if isinstance(core, faiss.IndexIVF):
        return search_allowed(index, queries, fetched, SearchParameters(nprobe=core.nlist), allowed)
    if isinstance(core, faiss.IndexHNSW):
        storage = _faiss.downcast_index(core.storage)
        return search_allowed(storage, _transformed(index, queries), fetched, SearchParameters(), allowed)
    return search_allowed(index, queries, fetched, SearchParameters(), allowed)


def _takes_selectors(core: FaissObject) -> bool:
    """Whether faiss 1.15 restricts the search of this index: all do but flat PQ and the flat fast-scan ones."""
    return not isinstance(core, faiss.IndexPQ | faiss.IndexFastScan)


def _transformed(index: faiss.Index, queries: np.ndarray) -> np.ndarray:
    """Queries as the index behind the vector transforms is asked."""
    outer: FaissObject = _faiss.downcast_index(index)
    if not isinstance(outer, _faiss.IndexPreTransform):
        return queries
    for number in range(outer.chain.size()):
        queries = _faiss.downcast_VectorTransform(outer.chain.at(number)).apply(queries)
    return queries


def _search_and_drop(
    index: faiss.Index, queries: np.ndarray, wanted: int, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fetches more rows than wanted and drops what is not allowed, until there are enough for every query."""
    total, count = len(allowed), int(np.count_nonzero(allowed))
    distances, rows = np.zeros((len(queries), wanted), np.float32), np.full((len(queries), wanted), -1, np.int64)
    short, fetched = np.arange(len(queries)), min(total, math.ceil(FETCH_MARGIN * wanted * total / count))
    while len(short):
        together = max(1, FETCHED_PAIRS // fetched)
        for first in range(0, len(short), together):
            part = short[first : first + together]
            distances[part], rows[part] = _first_allowed(*index.search(queries[part], fetched), wanted, allowed)
        short = short[rows[short, -1] < 0] if fetched < total else short[:0]
        fetched = min(total, FETCH_GROWTH * fetched)
    return distances, rows


def _search_graph_and_drop(
    index: VamanaIndex, queries: np.ndarray, wanted: int, parameters: SearchParameters, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """_search_and_drop for a graph of svs, which takes no selectors: once, and where that would compare as many rows as
    are allowed, these alone."""
    total, count = len(allowed), int(np.count_nonzero(allowed))
    fetched = min(total, math.ceil(FETCH_MARGIN * wanted * total / count))
    window = max(fetched, with_defaults(index, parameters).ef_search or 0)
    if count <= rows_compared(index, SearchParameters(ef_search=window)):
        return search_every_code(index, queries, wanted, allowed)
    return _first_allowed(*index.search(queries, fetched, params=window), wanted, allowed)


def _first_allowed(
    distances: np.ndarray, rows: np.ndarray, wanted: int, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    kept = (rows >= 0) & allowed[rows]
    first = np.argsort(~kept, axis=1, kind="stable")[:, :wanted]
    found = np.where(np.take_along_axis(kept, first, axis=1), np.take_along_axis(rows, first, axis=1), -1)
    return np.take_along_axis(distances, first, axis=1), found
