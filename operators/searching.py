"""Search one shard, or its allowed rows alone, and merge the answers of many."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.operators.allowed_rows import search_allowed, search_every_code
from penstock.operators.indexing import AnyIndex, Metric, core_index, similarities
from penstock.operators.lengths import normalize as normalize
from penstock.operators.lengths import refuse_unfit_lengths as refuse_unfit_lengths
from penstock.operators.ranking import at_least_kth, exact_similarities, most_similar_by, nearest_rows
from penstock.operators.ranking import exact_inner_products as exact_inner_products
from penstock.operators.ranking import most_similar as most_similar
from penstock.operators.routing import Probes, search_cells
from penstock.operators.search_parameters import SearchParameters as SearchParameters
from penstock.operators.search_parameters import faiss_parameters, rows_compared, widened
from penstock.operators.transforms import Chain, Fidelity
from penstock.operators.vector_store import ArrayVectors
from penstock.operators.vector_store import StoredVectors as StoredVectors
from penstock.operators.vector_store import VectorWriter as VectorWriter
from penstock.operators.vector_store import open_vectors as open_vectors


@dataclass(frozen=True, eq=False)
class Hits:
    """The k nearest rows of q queries, most similar first, equals by ascending id; unfilled places come last.

    Attributes:
        ids: object (q, k) of str, None where there is none.
        similarities: float32 (q, k), NaN where there is none.
        shards: int32 (q, k), -1 where there is none.
        rows: int64 (q, k), the row within its shard, -1 where there is none.
    """

    ids: np.ndarray
    similarities: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


class ShardSearcher:
    """Searches one opened shard. Threads may share it: knobs are passed with each call, and nothing is changed.

    Args:
        index: an opened index, of faiss or svs.
        ids: pa.Array or pa.ChunkedArray of string, one for each row.
        vectors: (n, d) array or StoredVectors to compare candidates with, or None.
        metric: of the original vectors; cosine expects unit vectors and queries.
        shard: the number that hits carry.
        chain: what vectors were transformed by before they came into the index; stored ones are the originals.
    """

    def __init__(
        self,
        index: AnyIndex,
        ids: pa.Array | pa.ChunkedArray,
        vectors: np.ndarray | StoredVectors | None,
        metric: Metric,
        shard: int,
        chain: Chain | None = None,
    ) -> None:
        self._index, self._metric, self._shard = index, metric, shard
        self._chain = chain or Chain(index.d)
        self._core = core_index(index)
        self._ids = _IdColumn(ids)
        self._vectors = ArrayVectors(vectors) if isinstance(vectors, np.ndarray) else vectors
        self._refuse_mismatch()

    def search(
        self,
        queries: np.ndarray,
        k: int,
        parameters: SearchParameters,
        allowed: np.ndarray | None = None,
        probes: Probes | None = None,
    ) -> Hits:
        """The k most similar rows for each query, float32 (q, d).

        With stored vectors, k * rerank_factor candidates are ranked by their exact float32 inner product; without, the
        similarities are those that the codes give, of the original vectors unless the chain changes them. Which of
        several rows equal at the last place a shard offers is faiss' choice.

        Args:
            allowed: bool (rows,), the rows to search; None for all. Each query gets k hits, or all allowed rows where
                they are fewer. The knobs are widened as much as rows are fewer, and where the index would compare as
                many rows as are allowed, these are compared one by one instead.
            probes: the cells to search for the queries, where that was found before; with all rows allowed.
        """
        self._refuse_queries(queries, k, parameters)
        parameters_of_index = faiss_parameters(self._index, parameters)
        if len(queries) == 0 or self._count(allowed) == 0:
            return empty_hits(len(queries), k)
        asked = _Asked(np.ascontiguousarray(queries, dtype=np.float32), self._chain.apply_queries(queries))
        if allowed is not None:
            return self._hits(len(queries), k, self._search_allowed(asked, k, parameters, allowed))
        fetched = min(k * parameters.rerank_factor, self._index.ntotal)
        if probes is None:
            distances, rows = self._index.search(asked.transformed, fetched, params=parameters_of_index)
        else:
            distances, rows = search_cells(self._index, probes, fetched)
        return self._hits(len(queries), k, self._compared(asked, distances, rows, k))

    @property
    def vectors(self) -> StoredVectors | None:
        """The original vectors by row, where they are stored."""
        return self._vectors

    def own_ids(self, ids: Sequence[str]) -> frozenset[str]:
        """Those of the ids that are of rows of this shard."""
        return self._ids.own(ids)

    def _search_allowed(self, asked: "_Asked", k: int, parameters: SearchParameters, allowed: np.ndarray) -> "_Pairs":
        count = self._count(allowed)
        wide = widened(self._core, parameters, count / len(allowed))
        # On 30,000 clustered rows IVF,PQ and HNSW keep their recall down to a fifth of the rows, and lose 1 to 5 points
        # below a tenth, even widened; one by one is faster from a fifth on in batches. This rule turns in between.
        if count <= rows_compared(self._core, wide):
            return self._search_one_by_one(asked, k, allowed)
        fetched = min(k * parameters.rerank_factor, count)
        distances, rows = search_allowed(self._index, asked.transformed, fetched, wide, allowed)
        pairs = self._compared(asked, distances, rows, k)
        short = np.flatnonzero((rows >= 0).sum(axis=1) < min(k, count))
        if len(short):
            pairs = pairs.replaced(short, self._search_one_by_one(asked.only(short), k, allowed))
        return pairs

    def _search_one_by_one(self, asked: "_Asked", k: int, allowed: np.ndarray) -> "_Pairs":
        """Compares every allowed row: its stored vector, or its code where there is none."""
        if self._vectors is not None:
            return _Pairs(*nearest_rows(asked.queries, np.flatnonzero(allowed), k, self._vectors))
        fetched = min(k, self._count(allowed))
        distances, rows = search_every_code(self._index, asked.transformed, fetched, allowed)
        return self._compared(asked, distances, rows, k)

    def _compared(self, asked: "_Asked", distances: np.ndarray, rows: np.ndarray, k: int) -> "_Pairs":
        """What faiss found, by its exact similarity if vectors are stored: those that may be among the k nearest."""
        if self._vectors is not None:
            near = exact_similarities(asked.queries, rows, self._vectors)
        else:
            near = np.where(rows >= 0, self._restored(asked.queries, distances), -np.inf)
        kept = at_least_kth(near, k) & (rows >= 0)
        return _Pairs(np.nonzero(kept)[0], near[kept], rows[kept])

    def _restored(self, queries: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """Similarities of the original vectors from what faiss returns, as far as the chain lets them be restored."""
        near = similarities(distances, self._core.metric_type)
        if not self._chain.steps or self._chain.fidelity is Fidelity.CHANGED:
            return near
        restored: np.ndarray = near + self._chain.similarity_offsets(queries)[:, None]
        return restored

    def _hits(self, queries: int, k: int, pairs: "_Pairs") -> Hits:
        shards = np.full(len(pairs.rows), self._shard, np.int32)
        return _select(queries, k, pairs, shards, lambda positions: self._ids.take(pairs.rows[positions]))

    def _count(self, allowed: np.ndarray | None) -> int:
        """How many rows may be found."""
        rows = self._index.ntotal
        if allowed is None:
            return int(rows)
        if allowed.dtype != np.bool_ or allowed.shape != (rows,):
            raise ValueError(
                f"allowed rows of shard {self._shard} ({allowed.dtype} of shape {allowed.shape}) must be bool, one for "
                f"each of its {rows} rows"
            )
        return int(np.count_nonzero(allowed))

    def _refuse_mismatch(self) -> None:
        rows, dimension = self._index.ntotal, self._chain.input_dimension
        if self._chain.output_dimension != self._index.d:
            raise ValueError(
                f"transforms of shard {self._shard} (to {self._chain.output_dimension} dimensions) must give the "
                f"{self._index.d} of its index"
            )
        if len(self._ids) != rows:
            raise ValueError(f"ids of shard {self._shard} ({len(self._ids)}) differ from the {rows} rows of its index")
        if self._vectors is not None and (len(self._vectors), self._vectors.dimension) != (rows, dimension):
            raise ValueError(
                f"stored vectors of shard {self._shard} ({len(self._vectors)} of {self._vectors.dimension} dimensions) "
                f"differ from its index: {rows} of {dimension}"
            )
        if self._metric is Metric.INNER_PRODUCT and self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"index of shard {self._shard} (faiss metric type {self._index.metric_type}) holds distances, from "
                f"which no {self._metric} follows; build it for this metric"
            )

    def _refuse_queries(self, queries: np.ndarray, k: int, parameters: SearchParameters) -> None:
        dimension = self._chain.input_dimension
        if queries.ndim != 2 or queries.shape[1] != dimension:
            raise ValueError(f"queries (shape {queries.shape}) must have the index's {dimension} columns")
        if k < 1:
            raise ValueError(f"k ({k}) must be at least 1")
        if parameters.rerank_factor > 1 and self._vectors is None:
            raise ValueError(
                f"rerank_factor ({parameters.rerank_factor}) needs stored vectors, and shard {self._shard} has none; "
                "take 1, or build the index with them"
            )
        refuse_unfit_lengths(queries, self._metric, "query")


class _Asked(NamedTuple):
    """Queries float32 (q, d), and what the index is asked for them, float32 (q, d')."""

    queries: np.ndarray
    transformed: np.ndarray

    def only(self, some: np.ndarray) -> "_Asked":
        """Those at some places (n,)."""
        return _Asked(self.queries[some], self.transformed[some])


class _Pairs(NamedTuple):
    """Found rows: query int64 (n,), similarity float32 (n,) and row int64 (n,)."""

    query_of: np.ndarray
    near: np.ndarray
    rows: np.ndarray

    def replaced(self, queries: np.ndarray, others: "_Pairs") -> "_Pairs":
        """These pairs, but those of some queries (m,) from the others, who count queries 0..m-1."""
        kept = ~np.isin(self.query_of, queries)
        renumbered = others._replace(query_of=queries[others.query_of])
        return _Pairs(*(np.concatenate([mine[kept], other]) for mine, other in zip(self, renumbered, strict=True)))


class _IdColumn:
    """String ids by row, without joining the chunks of a memory-mapped column."""

    def __init__(self, ids: pa.Array | pa.ChunkedArray) -> None:
        self._chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def own(self, ids: Sequence[str]) -> frozenset[str]:
        wanted = pa.array(list(ids), pa.string())
        return frozenset(name for chunk in self._chunks for name in chunk.filter(pc.is_in(chunk, wanted)).to_pylist())

    def take(self, rows: np.ndarray) -> np.ndarray:
        taken = np.empty(len(rows), dtype=object)
        for chunk, places, local_rows in _by_piece(self._ends, rows):
            taken[places] = self._chunks[chunk].take(pa.array(local_rows)).to_numpy(zero_copy_only=False)
        return taken


def merge_hits(hits: Sequence[Hits], k: int) -> Hits:
    """The k most similar of all hits for each query: the same whatever the number and order of the shards."""
    counts = {len(part.ids) for part in hits}
    if len(counts) != 1:
        raise ValueError(f"hits to merge answer {sorted(counts)} queries; there must be some, for the same queries")
    ids, near, shards, rows = (
        np.concatenate([getattr(part, name) for part in hits], axis=1)
        for name in ("ids", "similarities", "shards", "rows")
    )
    kept = at_least_kth(np.where(rows >= 0, near, -np.inf), k) & (rows >= 0)
    pairs, kept_ids = _Pairs(np.nonzero(kept)[0], near[kept], rows[kept]), ids[kept]
    return _select(counts.pop(), k, pairs, shards[kept], lambda positions: kept_ids[positions])


def spread_hits(hits: Hits, queries: np.ndarray, count: int) -> Hits:
    """The hits of some queries, given by their places among `count`, as hits of all; the others have none."""
    if len(queries) == count:
        return hits

    def spread(values: np.ndarray, none: object) -> np.ndarray:
        whole = np.full((count, values.shape[1]), none, values.dtype)
        whole[queries] = values
        return whole

    return Hits(
        spread(hits.ids, None), spread(hits.similarities, np.nan), spread(hits.shards, -1), spread(hits.rows, -1)
    )


def _by_piece(ends: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each piece that holds any of the rows: its number, the places of these in `rows`, their rows within it."""
    piece_of = np.searchsorted(ends, rows, side="right")
    order = np.argsort(piece_of, kind="stable")
    pieces, starts = np.unique(piece_of[order], return_index=True)
    for piece, places in zip(pieces, np.split(order, starts)[1:], strict=True):
        first = ends[piece - 1] if piece else 0
        yield int(piece), places, rows[places] - first


def empty_hits(queries: int, k: int) -> Hits:
    """No hits: all places are unfilled."""
    shape = (queries, k)
    return Hits(
        np.full(shape, None, dtype=object),
        np.full(shape, np.nan, np.float32),
        np.full(shape, -1, np.int32),
        np.full(shape, -1, np.int64),
    )


def _select(
    queries: int, k: int, pairs: _Pairs, shards: np.ndarray, ids_at: Callable[[np.ndarray], np.ndarray]
) -> Hits:
    """Hits of the k most similar of n found pairs; shards int32 (n,), and ids looked up by position of a pair."""
    chosen, ranks = most_similar_by(pairs.query_of, pairs.near, ids_at, k)
    hits = empty_hits(queries, k)
    places = (pairs.query_of[chosen], ranks)
    hits.ids[places] = ids_at(chosen)
    hits.similarities[places] = pairs.near[chosen]
    hits.shards[places] = shards[chosen]
    hits.rows[places] = pairs.rows[chosen]
    return hits
