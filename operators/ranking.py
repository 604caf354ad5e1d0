"""Which rows are the most similar: exact products, the nearest of given rows, and the order of equals."""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from penstock.operators.vector_store import StoredVectors

_faiss: Any = faiss  # for the functions on pointers that the type stubs of faiss 1.15 leave out
RERANKED_ROWS = 1_024  # rows compared at once: 1.5 MiB of 384 float32; 512 take a tenth longer
BLOCK_PAIRS = 2**22  # query times row pairs compared at once: 16 MiB of float32 similarities
BLOCK_ROWS = 4_096  # rows compared at once: 6 MiB of 384 float32
PRODUCT_PAIRS = 4_096  # pairs multiplied at once: 6 MiB of 384 float32


def exact_inner_products(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Inner products along the last axis of two arrays (..., d) that broadcast, as (...).

    The sum of a pair depends on that pair alone, which BLAS does not promise: equal vectors get equal similarities.
    """
    products: np.ndarray = np.einsum("...d,...d->...", queries, vectors)
    return products


def exact_similarities(queries: np.ndarray, rows: np.ndarray, vectors: StoredVectors) -> np.ndarray:
    """float32 (q, n) exact inner products with the rows (q, n), -inf where a row is -1.

    Every row is read once, in the order of the file, whatever queries it is a candidate of: in the order of the
    candidates, reading 100,000 of 99,000 mapped rows takes twice as long. Memory: RERANKED_ROWS vectors, and 50 bytes
    for each pair.

    Args:
        queries: contiguous float32 (q, d).
    """
    order = np.argsort(rows, axis=None)
    order = order[np.searchsorted(rows.reshape(-1)[order], 0) :]
    ascending, query_of = rows.reshape(-1)[order], order // max(1, rows.shape[1])
    begins = np.ones(len(order), bool)
    begins[1:] = ascending[1:] != ascending[:-1]
    starts, row_of = np.flatnonzero(begins), np.cumsum(begins) - 1
    occurrence, ends = np.arange(len(order)) - starts[row_of], np.append(starts, len(order))
    products = np.empty(len(order), np.float32)
    for first in range(0, len(starts), RERANKED_ROWS):
        last = min(first + RERANKED_ROWS, len(starts))
        part = slice(ends[first], ends[last])
        places = (row_of[part] - first, occurrence[part])
        asked = np.full((last - first, int(places[1].max()) + 1), -1, np.int64)
        asked[places] = query_of[part]
        products[part] = _products(vectors.take(ascending[starts[first:last]]), queries, asked)[places]
    near = np.full(rows.shape, -np.inf, np.float32)
    near.reshape(-1)[order] = products
    return near


def nearest_rows(
    queries: np.ndarray, rows: np.ndarray, k: int, vectors: StoredVectors
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k nearest of the given rows for each query, those equal to the k-th among them, and some that are farther.

    Candidates come from float32 matrix products, with a margin for their rounding. Memory: some 100 MiB.

    Args:
        queries: float32 (q, d), of any length. rows: int64 (n,).

    Returns:
        Pairs (n,) grouped by nothing: the query int64, its exact float32 inner product, and the row int64.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    step = max(1, min(BLOCK_ROWS, BLOCK_PAIRS // max(1, len(queries))))
    lengths = np.linalg.norm(queries, axis=1)
    pairs = [(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))]
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        compared = vectors.take(block)
        near = queries @ compared.T
        best = _largest(np.concatenate([best, _largest(near, k)], axis=1), k)
        # Either product errs by up to d * eps * |query| * |row|, and so does what it is compared with.
        margin = 4 * queries.shape[1] * np.finfo(np.float32).eps * lengths * np.linalg.norm(compared, axis=1).max()
        query_of, columns = np.nonzero(near >= (best.min(axis=1) - margin)[:, None])
        pairs.append((query_of, _pair_products(queries, compared, query_of, columns), block[columns]))
    query_of, near, found = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return query_of, near, found


def most_similar(query_of: np.ndarray, near: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Picks the k most similar of each query among n (query, row) pairs; equals by ascending id.

    Args:
        query_of: int64 (n,). near: float32 (n,) similarities, no NaN. ids: object (n,) of str.

    Returns:
        The positions of the chosen pairs, grouped by query and best first, and the 0-based rank of each: int64 both.
    """
    return most_similar_by(query_of, near, lambda positions: ids[positions], k)


def most_similar_by(
    query_of: np.ndarray, near: np.ndarray, ids_at: Callable[[np.ndarray], np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """most_similar, where ids are looked up only for the pairs that they decide between.

    Args:
        ids_at: the ids, object (m,) of str, at positions int64 (m,).
    """
    order = _by_similarity(query_of, near)
    grouped = query_of[order]
    places = np.arange(len(order))
    begins = np.ones(len(order), bool)
    begins[1:] = grouped[1:] != grouped[:-1]
    ranks = places - np.maximum.accumulate(np.where(begins, places, 0))
    tied = np.flatnonzero(_deciding_ties(grouped, near[order], ranks, k))  # equals lie side by side, all or none here
    if len(tied):
        pairs = order[tied]
        id_order = np.unique(ids_at(pairs), return_inverse=True)[1]
        order[tied] = pairs[np.lexsort((id_order, -near[pairs], query_of[pairs]))]
    return order[ranks < k], ranks[ranks < k]


def at_least_kth(near: np.ndarray, k: int) -> np.ndarray:
    """bool (q, n): what is not below the k-th largest of its row."""
    if near.shape[1] <= k:
        return np.ones(near.shape, dtype=bool)
    kept: np.ndarray = near >= _largest(near, k).min(axis=1, keepdims=True)
    return kept


def _by_similarity(query_of: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The order of n pairs by query, then most similar first; as they are, where one index found them so.

    To look costs a tenth of sorting 10,000 pairs, which takes a millisecond.
    """
    same = query_of[1:] == query_of[:-1]
    if bool(((query_of[1:] > query_of[:-1]) | (same & (near[1:] <= near[:-1]))).all()):
        return np.arange(len(near))
    return _by_query_and_similarity(query_of, near)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, in any order; all of a row that is no longer."""
    beyond = values.shape[1] - k
    return np.partition(values, beyond, axis=1)[:, beyond:] if beyond > 0 else values


def _pair_products(queries: np.ndarray, vectors: np.ndarray, query_of: np.ndarray, columns: np.ndarray) -> np.ndarray:
    near = np.empty(len(columns), np.float32)
    for first in range(0, len(columns), PRODUCT_PAIRS):
        part = slice(first, first + PRODUCT_PAIRS)
        near[part] = _products(vectors[columns[part]], queries, query_of[part, None])[:, 0]
    return near


def _products(vectors: np.ndarray, queries: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """float32 (n, m) inner products of vectors (n, d) with the queries that are asked for, int64 (n, m); -1 for none.

    The sum of a pair depends on that pair alone, which BLAS does not promise: equal vectors get equal similarities.
    """
    products = np.empty(asked.shape, np.float32)
    arrays = [products, *(np.ascontiguousarray(array) for array in (vectors, queries, asked))]  # faiss reads pointers
    _faiss.fvec_inner_products_by_idx(*(_faiss.swig_ptr(array) for array in arrays), vectors.shape[1], *asked.shape)
    return products


def _by_query_and_similarity(query_of: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The stable order of n pairs by query, most similar first.

    float32 similarities make one integer key with their query: sorting 10,000 pairs takes a tenth of the 1.1 ms that
    two keys take.
    """
    if near.dtype != np.float32:
        return np.lexsort((-near, query_of))
    bits = (near + np.float32(0)).view(np.uint32)  # the sum makes -0.0 the same as 0.0
    # Larger floats have larger bits, but for negative ones, whose bits descend.
    ascending = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    key = (query_of.astype(np.uint64) << np.uint64(32)) | ~ascending
    order: np.ndarray = np.argsort(key, kind="stable")
    return order


def _deciding_ties(query_of: np.ndarray, near: np.ndarray, ranks: np.ndarray, k: int) -> np.ndarray:
    """bool (n,): which of n pairs, sorted by query and similarity, equal another one and share a place below k."""
    equal = (query_of[1:] == query_of[:-1]) & (near[1:] == near[:-1])
    follows, precedes = np.zeros(len(near), bool), np.zeros(len(near), bool)
    follows[1:], precedes[:-1] = equal, equal
    first_ranks = ranks[~follows][np.cumsum(~follows) - 1]
    tied: np.ndarray = (follows | precedes) & (first_ranks < k)
    return tied
