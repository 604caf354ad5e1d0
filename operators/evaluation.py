"""What an index finds, compared with what it should find, and the operating point chosen from that.

nDCG and MRR follow trec_eval as BEIR calls it: linear gain, a discount of log2(rank + 1), the ideal over all documents
that are judged relevant.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import assert_never

import numpy as np
import pyarrow as pa

from penstock.operators.indexing import Codec, Family, IndexSpec, Metric, nlist_of
from penstock.operators.search_parameters import HNSW_ROWS_PER_EF
from penstock.operators.searching import SearchParameters, exact_inner_products, most_similar, refuse_unfit_lengths

BLOCK_PAIRS = 2**22  # query times row pairs compared at once: 16 MiB of float32 similarities
RESCORED_VALUES = 2**21  # values of vectors summed again in float64 at once: 16 MiB for queries and rows each
# Two float32 sums of a product of unit vectors differ by a few 1e-7 for the order they are added in.
TIE_TOLERANCE = 1e-6
EF_SEARCH_GRID = (16, 32, 64, 128, 256, 512)
# Of svs, whose searches start at narrower windows: steps of a tenth, then of a fifth, then wider.
WINDOW_GRID = (10, 11, 12, 13, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 128, 192, 256, 512)
RERANK_GRID = (1, 2, 4, 8, 16, 32)
TIE_ROOM = 10  # truth keeps so many neighbours more than k, to know which rows tie with the k-th
# Shares of the weight of a query's cells, and multiples of the cells it needs, to try where shards own cells.
COVERAGES = (1.0, 0.95, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75)
WIDER_PROBES = (1, 1.4, 2, 3)
MORE_CANDIDATES = (1, 2, 4)
MEASURED_K = 10  # recall at 10 is what operating points are chosen by
# Nanoseconds to compare a query with one row of 384 dimensions on one core (AMD EPYC, 2026): codes in a scan of 30,000
# rows, stored float16 vectors one by one. What counts is how they compare, which orders the grid.
ROW_COST_NS: Mapping[Codec, float] = {
    Codec.NONE: 54,
    Codec.FP16: 20,
    Codec.SQ8: 18,
    Codec.SQ6: 40,
    Codec.SQ4: 40,
    Codec.PQ: 20,
    Codec.PQFS: 1.1,
    Codec.RABITQ: 15,
    Codec.RABITQFS: 11,
    **dict.fromkeys((Codec.LVQ8, Codec.LVQ4X4, Codec.LVQ4X8, Codec.LEANVEC4X8, Codec.LEANVEC8X8), 18),
}
RERANKED_ROW_COST_NS = 1000


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k most similar rows of q queries, best first, equals by ascending id; unfilled places come last.

    Attributes:
        ids: object (q, k) of str, None where there is none.
        similarities: float32 (q, k), NaN where there is none.
    """

    ids: np.ndarray
    similarities: np.ndarray


@dataclass(frozen=True)
class MeasuredPoint:
    """Search parameters with what was measured for them: recall, latency of one query, and how many shards a query
    needs on average, where not all."""

    parameters: SearchParameters
    recall: float
    latency_ms: float
    shards: float | None = None


def exact_neighbours(
    queries: np.ndarray,
    batches: Iterable[tuple[pa.Array, np.ndarray]],
    k: int,
    metric: Metric,
    exclude: Sequence[str | None],
) -> Neighbours:
    """The true k nearest rows by inner product, summed in float64: independent of batches and of their order.

    Args:
        queries: floating point (q, d). Under cosine these and all vectors are of unit length.
        batches: ids (n,) with vectors (n, d), streamed. Memory: one batch and some 100 MiB.
        exclude: for each query an id that does not count as its neighbour (its own), or None.
    """
    if len(exclude) != len(queries):
        raise ValueError(f"exclude ({len(exclude)} ids) must name one id or None for each of {len(queries)} queries")
    refuse_unfit_lengths(queries, metric, "query")
    wide = np.ascontiguousarray(queries, dtype=np.float64)
    best = _no_neighbours(len(queries), k)
    for ids, vectors in _blocks(batches, len(queries)):
        refuse_unfit_lengths(vectors, metric, f"in the batch that begins with {ids[0]}, vector")
        best = merge_neighbours([best, _block_neighbours(wide, ids, vectors, best, k, exclude)], k)
    return best


def merge_neighbours(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k nearest among the neighbours that were found in parts of the rows; associative."""
    ids, near = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("ids", "similarities"))
    filled = ~np.isnan(near)
    return _nearest(len(ids), k, np.nonzero(filled)[0], near[filled], ids[filled])


def without_ids(neighbours: Neighbours, exclude: Sequence[str | None], k: int) -> Neighbours:
    """The k nearest but for one id per query: ask for k + 1 of a passage that is its own nearest neighbour."""
    kept = ~np.isnan(neighbours.similarities) & (neighbours.ids != np.array(exclude, dtype=object)[:, None])
    near, ids = neighbours.similarities[kept], neighbours.ids[kept]
    return _nearest(len(neighbours.ids), k, np.nonzero(kept)[0], near, ids)


def recall_at_k(
    found_ids: np.ndarray, truth: Neighbours, k: int, exact_similarities: np.ndarray | None = None
) -> np.ndarray:
    """Share of the k true neighbours among the first k found, float64 (q,); NaN where a query has no true neighbour.

    A found row also counts when it is as similar as the k-th true one (within TIE_TOLERANCE, relative above 1), as
    which of several equal rows comes k-th is arbitrary. Equal rows are known from `truth`, if it holds more than k
    columns, and from `exact_similarities` (q, >= k) of what was found, which only a search with stored vectors gives.
    """
    recall = np.full(len(found_ids), np.nan)
    for query, found in enumerate(found_ids[:, :k]):
        true_count, floor, accepted = accepted_neighbours(truth, query, k)
        if true_count == 0:
            continue
        hit = np.array([row_id in accepted for row_id in found])
        if exact_similarities is not None:
            hit |= exact_similarities[query, : len(found)] >= floor
        recall[query] = min(int(hit.sum()), true_count) / true_count
    return recall


def accepted_neighbours(truth: Neighbours, query: int, k: int) -> tuple[int, float, set[str]]:
    """How many true neighbours a query has, k at most; the similarity from which on a row counts as one; and the ids
    that are known to reach it, ties with the k-th among them."""
    near = truth.similarities[query]
    count = int(np.count_nonzero(~np.isnan(near[:k])))
    if count == 0:
        return 0, np.inf, set()
    kth = float(near[count - 1])
    floor = kth - TIE_TOLERANCE * max(1.0, abs(kth))
    return count, floor, set(truth.ids[query, near >= floor])


def ndcg_at_k(ranked: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]], k: int) -> np.ndarray:
    """nDCG of the first k documents of each query, float64 (q,); 0 where nothing is judged relevant.

    Args:
        ranked: document ids of each query, best first, each once.
        relevance: judged documents of each query; 0 and below is not relevant, as is a document not judged.
    """
    _refuse_rankings(ranked, relevance)
    return np.array([_ndcg(documents, judged, k) for documents, judged in zip(ranked, relevance, strict=True)])


def judged_recall_at_k(ranked: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]], k: int) -> np.ndarray:
    """Share of the relevant documents among the first k of each query, float64 (q,), of k where more are relevant; 0
    where nothing is judged relevant."""
    _refuse_rankings(ranked, relevance)
    shares = []
    for documents, judged in zip(ranked, relevance, strict=True):
        relevant = {document for document, value in judged.items() if value > 0}
        shares.append(len(relevant & set(documents[:k])) / max(1, min(k, len(relevant))))
    return np.array(shares)


def mrr_at_k(ranked: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]], k: int) -> np.ndarray:
    """1 / rank of the first relevant one among the first k documents of each query, float64 (q,); 0 without one."""
    _refuse_rankings(ranked, relevance)
    return np.array(
        [
            next((1 / rank for rank, document in enumerate(documents[:k], start=1) if judged.get(document, 0) > 0), 0.0)
            for documents, judged in zip(ranked, relevance, strict=True)
        ]
    )


def operating_points(
    spec: IndexSpec,
    rows_per_shard: int,
    rerank: bool,
    tuned: SearchParameters | None = None,
    *,
    transformed: bool = False,
) -> list[SearchParameters]:
    """The search parameters to measure, cheapest first, those that tuning found among them.

    Cheap is what compares few rows, each at the cost of its codec and of re-ranking.

    Points that only repeat a cheaper one are left out: an ef or a rerank factor beyond one that already covers every
    row, and rerank factors of an index that stores the vectors themselves.

    Args:
        transformed: whether the index holds other vectors than those stored for re-ranking.
    """
    factors = RERANK_GRID if _reorders(spec, rerank, transformed) else RERANK_GRID[:1]
    kept_factors = _until_covering(factors, rows_per_shard / MEASURED_K)
    grid = [_with_factor(knob, factor) for knob, factor in product(_knobs(spec, rows_per_shard), kept_factors)]
    grid += [tuned] if tuned and tuned not in grid else []
    return sorted(grid, key=lambda point: _cost_ns(spec, point, rows_per_shard))


def choose_operating_point(measured: Sequence[MeasuredPoint], recall: float) -> MeasuredPoint:
    """The first point that reaches the recall, else the one with the highest recall (then the first).

    Points come cheapest first, by the rows they compare: latencies are measured and reported, but vary too much from
    run to run to decide what a version is searched with.
    """
    if not measured:
        raise ValueError("measured points (none) must hold at least one to choose from")
    reaching = [point for point in measured if point.recall >= recall]
    if reaching:
        return reaching[0]
    return max(measured, key=lambda point: point.recall)


def routed_points(
    spec: IndexSpec, least: SearchParameters, rerank: bool, *, transformed: bool = False
) -> list[SearchParameters]:
    """The search parameters to measure where shards own cells, from those that are the cheapest over all probed cells:
    more cells and candidates in the shards that matter most can replace the other shards. On 100,000 perturbed titles,
    1,024 cells and 16 shards, recall@10 of 0.95 took 5.2 shards with 4 times k candidates, 3.7 with 8 and 3.3 with 16.
    """
    if least.nprobe is None:
        raise ValueError(f"search parameters ({least.to_json()}) must name nprobe where shards own cells")
    nprobes = {min(nlist_of(spec), round(least.nprobe * more)) for more in WIDER_PROBES}
    more_candidates = MORE_CANDIDATES if _reorders(spec, rerank, transformed) else MORE_CANDIDATES[:1]
    factors = [min(RERANK_GRID[-1], least.rerank_factor * more) for more in more_candidates]
    grid = product(sorted(nprobes), sorted(set(factors)), COVERAGES)
    return [replace(least, nprobe=nprobe, rerank_factor=factor, coverage=part) for nprobe, factor, part in grid]


def _reorders(spec: IndexSpec, rerank: bool, transformed: bool) -> bool:
    """Whether stored vectors may order rows otherwise than the index does: it holds codes, or other vectors."""
    return rerank and (transformed or spec.codec is not Codec.NONE)


def choose_routed_point(measured: Sequence[MeasuredPoint], recall: float) -> MeasuredPoint:
    """The point that reaches the recall in the fewest shards, the first of equals; else the one with most recall."""
    reaching = [point for point in measured if point.recall >= recall]
    if reaching:
        return min(reaching, key=lambda point: point.shards or 0.0)
    return choose_operating_point(measured, recall)


def _blocks(batches: Iterable[tuple[pa.Array, np.ndarray]], queries: int) -> Iterator[tuple[pa.Array, np.ndarray]]:
    rows = max(1, BLOCK_PAIRS // max(1, queries))
    for ids, vectors in batches:
        if len(ids) != len(vectors):
            raise ValueError(f"ids ({len(ids)}) must be as many as the vectors ({len(vectors)}) of their batch")
        for first in range(0, len(vectors), rows):
            yield ids[first : first + rows], vectors[first : first + rows].astype(np.float32, copy=False)


def _block_neighbours(
    queries: np.ndarray,
    ids: pa.Array,
    vectors: np.ndarray,
    best: Neighbours,
    k: int,
    exclude: Sequence[str | None],
) -> Neighbours:
    query_of, rows = _candidates(queries.astype(np.float32), vectors, best, k)
    near = _exact_pairs(queries, vectors, query_of, rows)
    found = ids.take(pa.array(rows)).to_numpy(zero_copy_only=False)
    kept = found != np.array(exclude, dtype=object)[query_of]
    return _nearest(len(queries), k, query_of[kept], near[kept], found[kept])


def _candidates(queries: np.ndarray, vectors: np.ndarray, best: Neighbours, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(query, row) pairs that may belong to the k nearest: a float32 product, with a margin for its rounding."""
    near = queries @ vectors.T
    floor = np.nan_to_num(best.similarities[:, k - 1], nan=-np.inf)
    if len(vectors) > k:  # one more than k, as one of the rows may be excluded
        floor = np.maximum(floor, np.partition(near, len(vectors) - k - 1, axis=1)[:, len(vectors) - k - 1])
    lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(vectors, axis=1).max()
    margin = 4 * queries.shape[1] * np.finfo(np.float32).eps * lengths
    query_of, rows = np.nonzero(near >= (floor - margin)[:, None])
    return query_of, rows


def _exact_pairs(queries: np.ndarray, vectors: np.ndarray, query_of: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32 (n,) similarities of n pairs, rounded from float64 sums that depend on the pair alone."""
    near = np.empty(len(rows), np.float32)
    pairs = max(1, RESCORED_VALUES // queries.shape[1])
    for first in range(0, len(rows), pairs):
        part = slice(first, first + pairs)
        near[part] = exact_inner_products(queries[query_of[part]], vectors[rows[part]].astype(np.float64))
    return near


def _no_neighbours(queries: int, k: int) -> Neighbours:
    return Neighbours(np.full((queries, k), None, dtype=object), np.full((queries, k), np.nan, np.float32))


def _nearest(queries: int, k: int, query_of: np.ndarray, near: np.ndarray, ids: np.ndarray) -> Neighbours:
    chosen, ranks = most_similar(query_of, near, ids, k)
    neighbours = _no_neighbours(queries, k)
    neighbours.ids[query_of[chosen], ranks] = ids[chosen]
    neighbours.similarities[query_of[chosen], ranks] = near[chosen]
    return neighbours


def _ndcg(documents: Sequence[str], judged: Mapping[str, float], k: int) -> float:
    ideal = _discounted_gain(sorted(judged.values(), reverse=True)[:k])
    return _discounted_gain([judged.get(document, 0.0) for document in documents[:k]]) / ideal if ideal else 0.0


def _discounted_gain(gains: Sequence[float]) -> float:
    return sum(max(gain, 0.0) / float(np.log2(rank + 1)) for rank, gain in enumerate(gains, start=1))


def _refuse_rankings(ranked: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]]) -> None:
    if len(ranked) != len(relevance):
        raise ValueError(f"rankings ({len(ranked)}) must be as many as the judged queries ({len(relevance)})")
    for query, documents in enumerate(ranked):
        if len(set(documents)) != len(documents):
            raise ValueError(
                f"ranking {query} ({len(documents)} documents) names a document twice; keep the best passage of each"
            )


def _knobs(spec: IndexSpec, rows_per_shard: int) -> list[SearchParameters]:
    match spec.family:
        case Family.FLAT:
            return [SearchParameters()]
        case Family.HNSW:
            return [SearchParameters(ef_search=ef) for ef in _until_covering(EF_SEARCH_GRID, rows_per_shard)]
        case Family.VAMANA:
            return [SearchParameters(ef_search=ef) for ef in _until_covering(WINDOW_GRID, rows_per_shard)]
        case Family.IVF:
            lists = nlist_of(spec)
            powers = [2**power for power in range(lists.bit_length())]
            return [SearchParameters(nprobe=nprobe) for nprobe in _until_covering([*powers, lists], lists)]
        case _:
            assert_never(spec.family)


def _until_covering(grid: Sequence[int], enough: float) -> list[int]:
    """The grid's ascending values up to the first that is enough."""
    needed = sum(value < enough for value in grid)
    return list(grid[: needed + 1])


def _with_factor(knobs: SearchParameters, factor: int) -> SearchParameters:
    return SearchParameters(knobs.ef_search, knobs.nprobe, factor)


def _cost_ns(spec: IndexSpec, point: SearchParameters, rows_per_shard: int) -> float:
    """The cost of a query, which orders the grid."""
    scanned = ROW_COST_NS[spec.codec] * _rows_scanned(spec, point, rows_per_shard)
    return scanned + RERANKED_ROW_COST_NS * MEASURED_K * point.rerank_factor


def _rows_scanned(spec: IndexSpec, point: SearchParameters, rows_per_shard: int) -> float:
    """Rows whose codes a query is compared with."""
    match spec.family:
        case Family.FLAT:
            return rows_per_shard
        case Family.HNSW | Family.VAMANA:
            return HNSW_ROWS_PER_EF * (point.ef_search or 0)
        case Family.IVF:
            return rows_per_shard * (point.nprobe or 0) / nlist_of(spec)
        case _:
            assert_never(spec.family)
