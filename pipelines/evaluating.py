"""Measure a built index: recall at operating points against exact search, and ranking quality against judgements."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.cluster.jobs.evaluation import (
    EncodeQueriesTask,
    ExactTask,
    Measured,
    MeasureTask,
    Queries,
    QueriesInvalid,
    SampleTask,
    encode_queries,
    find_exact,
    measure_shard,
    read_relevance,
    sample_queries,
)
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.session import Session
from penstock.operators.evaluation import (
    TIE_ROOM,
    MeasuredPoint,
    Neighbours,
    accepted_neighbours,
    choose_operating_point,
    merge_neighbours,
    mrr_at_k,
    ndcg_at_k,
    operating_points,
    recall_at_k,
)
from penstock.operators.identity import row_hashes
from penstock.operators.searching import Hits, SearchParameters, merge_hits
from penstock.operators.sharding import shard_of
from penstock.pipelines.planning import Chain, Resolved, chosen_family, split_path
from penstock.pipelines.progress import Advance

# Operating points are compared on this many queries at most; the chosen one is then measured on all.
SWEEP_QUERIES = 500
# Fragments that one task searches exactly.
EXACT_FRAGMENTS = 16
# Passages searched for each of k documents, since a document may answer with several.
PASSAGES_PER_DOCUMENT = 5


def evaluate(
    session: Session, resolved: Resolved, chain: Chain, shards: Sequence[ShardRecord], root: str, advance: Advance
) -> dict[str, Any]:
    """The evaluation record: recall, ranking quality, all measured operating points and the default among them."""
    pipeline = resolved.pipeline
    k = pipeline.evaluate.k
    queries = _queries(session, resolved, chain, root)
    truth = _truth(session, resolved, chain, root, queries, k + TIE_ROOM, advance)
    points = operating_points(
        chain.spec, max(1, chain.rows // len(shards)), pipeline.index.rerank, resolved.tuned_point
    )
    few = _first(queries, SWEEP_QUERIES)
    measured = _measure(session, resolved, shards, root, few, k, points, timed=True, advance=advance)
    exact_similarities = pipeline.index.rerank
    table = [
        MeasuredPoint(point, _recall(_merged(measured, i, k, few), truth, k, exact_similarities), _latency(measured, i))
        for i, point in enumerate(points)
    ]
    chosen = choose_operating_point(table, pipeline.index.recall)
    depth = k * PASSAGES_PER_DOCUMENT if pipeline.evaluate.relevance else k
    final = _measure(session, resolved, shards, root, queries, depth, [chosen.parameters], timed=False, advance=advance)
    found = _merged(final, 0, depth, queries)
    record: dict[str, Any] = {
        "k": k,
        "queries": len(queries.ids),
        "queries_from": pipeline.evaluate.queries if isinstance(pipeline.evaluate.queries, str) else "passages",
        "recall": _recall(found, truth, k, exact_similarities),
        **_shard_recall(final, truth, queries, k, exact_similarities),
        "default": _point_json(chosen),
        "points": [_point_json(point) for point in table],
    }
    if pipeline.evaluate.relevance:
        record |= _judged(pipeline.evaluate.relevance, queries, found, k)
    return record


def _queries(session: Session, resolved: Resolved, chain: Chain, root: str) -> Queries:
    evaluate = resolved.pipeline.evaluate
    if isinstance(evaluate.queries, str):
        store, path = split_path(evaluate.queries)
        return session.run(encode_queries, EncodeQueriesTask(store.url, path, resolved.query_encoder))
    fragments = tuple(sorted(chain.embeddings.values()))
    metric = resolved.metric
    task = SampleTask(
        root, chain.embeddings_fingerprint, fragments, chain.rows, evaluate.queries, evaluate.seed, metric
    )
    return session.run(sample_queries, task)


def _truth(
    session: Session, resolved: Resolved, chain: Chain, root: str, queries: Queries, k: int, advance: Advance
) -> Neighbours:
    fragments = sorted(chain.embeddings.values())
    groups = [tuple(fragments[i : i + EXACT_FRAGMENTS]) for i in range(0, len(fragments), EXACT_FRAGMENTS)]
    metric = resolved.metric
    tasks = [ExactTask(root, chain.embeddings_fingerprint, group, queries, k, metric) for group in groups]
    best: Neighbours | None = None
    for part in session.stream(find_exact, tasks):
        best = part if best is None else merge_neighbours([best, part], k)
        advance(0, "exact neighbours")
    if best is None:
        raise ValueError("an index to evaluate needs at least one embeddings fragment, got none")
    return best


def _measure(
    session: Session,
    resolved: Resolved,
    shards: Sequence[ShardRecord],
    root: str,
    queries: Queries,
    k: int,
    points: Sequence[SearchParameters],
    *,
    timed: bool,
    advance: Advance,
) -> list[Measured]:
    family = chosen_family(resolved)
    # One more than k: a query that is itself a passage finds itself first.
    tasks = [
        MeasureTask(root, shard, family, resolved.metric, queries.vectors, k + 1, tuple(points), timed)
        for shard in shards
    ]
    measured = []
    for one in session.stream(measure_shard, tasks):
        measured.append(one)
        advance(1, f"shard {one.shard}")
    return sorted(measured, key=lambda one: one.shard)


def _first(queries: Queries, count: int) -> Queries:
    return Queries(queries.ids[:count], queries.vectors[:count], queries.exclude[:count])


def _merged(measured: Sequence[Measured], point: int, k: int, queries: Queries) -> Hits:
    merged = merge_hits([one.hits[point] for one in measured], k + 1)
    return _without_self(merged, queries.exclude, k)


def _without_self(hits: Hits, exclude: Sequence[str | None], k: int) -> Hits:
    """The first k hits of each query but for the passage that the query is."""
    own = hits.ids == np.array(exclude, dtype=object)[:, None]
    own &= np.array([name is not None for name in exclude])[:, None]
    keep = np.argsort(own, axis=1, kind="stable")[:, :k]
    columns = (
        np.take_along_axis(getattr(hits, name), keep, axis=1) for name in ("ids", "similarities", "shards", "rows")
    )
    return Hits(*columns)


def _recall(found: Hits, truth: Neighbours, k: int, exact_similarities: bool) -> float:
    """Mean recall over the queries that have neighbours; 1 when there is nothing to find (a corpus of one passage)."""
    queries = len(found.ids)
    first = Neighbours(truth.ids[:queries], truth.similarities[:queries])
    recall = recall_at_k(found.ids, first, k, found.similarities if exact_similarities else None)
    return 1.0 if np.isnan(recall).all() else float(np.nanmean(recall))


def _shard_recall(
    measured: Sequence[Measured], truth: Neighbours, queries: Queries, k: int, exact_similarities: bool
) -> dict[str, list[Any]]:
    """For each shard, the share of the true neighbours that lie in it which it finds by itself (None where none does),
    and how many lie in it. As for the whole index, a row that is as similar as the k-th neighbour counts like it."""
    found, lying = np.zeros(len(measured), np.int64), np.zeros(len(measured), np.int64)
    for row, names in enumerate(truth.ids):
        count, floor, accepted = accepted_neighbours(truth, row, k)
        if count == 0:
            continue
        owners = np.bincount(shard_of(row_hashes(names[:count].tolist()), len(measured)), minlength=len(measured))
        lying += owners
        for shard, one in enumerate(measured):
            hits = one.hits[0]
            own = [place for place, name in enumerate(hits.ids[row, : k + 1]) if name != queries.exclude[row]]
            ties = hits.similarities[row] >= floor if exact_similarities else np.zeros(hits.ids.shape[1], bool)
            good = sum(hits.ids[row, place] in accepted or bool(ties[place]) for place in own)
            found[shard] += min(good, int(owners[shard]))
    shares = [round(float(hits / all_), 6) if all_ else None for hits, all_ in zip(found, lying, strict=True)]
    return {"shard_recall": shares, "shard_neighbours": lying.tolist()}


def _latency(measured: Sequence[Measured], point: int) -> float:
    """Shards are searched side by side: the slowest decides."""
    return max(one.latency_ms[point] for one in measured)


def _point_json(point: MeasuredPoint) -> dict[str, Any]:
    return {
        "parameters": point.parameters.to_json(),
        "recall": round(point.recall, 6),
        "latency_ms": round(point.latency_ms, 4),
    }


def _judged(path: str, queries: Queries, found: Hits, k: int) -> dict[str, float]:
    """nDCG@k and MRR@k of documents, ranked by their best passage, over the judged queries."""
    store, name = split_path(path)
    relevance = read_relevance(store.url, name)
    rows = [row for row, query in enumerate(queries.ids) if query in relevance]
    if not rows:
        raise QueriesInvalid(
            f"evaluate.relevance ({path}) must judge some of the {len(queries.ids)} queries, it judges none: their ids "
            f"(as {queries.ids[0]!r}) are not among its own (as {next(iter(relevance), '')!r})"
        )
    judged = [relevance[queries.ids[row]] for row in rows]
    ranked = [_documents(found.ids[row], k) for row in rows]
    ndcg, mrr = ndcg_at_k(ranked, judged, k), mrr_at_k(ranked, judged, k)
    return {"judged_queries": len(rows), "ndcg": _mean(ndcg), "mrr": _mean(mrr)}


def _documents(passage_ids: Sequence[str | None], k: int) -> list[str]:
    names = [str(name).rpartition("#")[0] for name in passage_ids if name is not None]
    return list(dict.fromkeys(names))[:k]


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))
