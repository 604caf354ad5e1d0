"""Measure a built index: recall at operating points against exact search, and ranking quality against judgements."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from penstock.cluster.published import VersionFiles
from penstock.cluster.session import Session
from penstock.operators.evaluation import (
    TIE_ROOM,
    MeasuredPoint,
    Neighbours,
    accepted_neighbours,
    choose_operating_point,
    choose_routed_point,
    merge_neighbours,
    mrr_at_k,
    ndcg_at_k,
    operating_points,
    recall_at_k,
    routed_points,
)
from penstock.operators.searching import Hits, SearchParameters, merge_hits
from penstock.operators.sharding import Sharding
from penstock.operators.vector_codecs import VectorCodec
from penstock.pipelines.planning import Chain, Resolved, chosen_family, searched_rows, split_path
from penstock.pipelines.progress import Advance

# Operating points are compared on this many queries at most; the chosen one is then measured on all.
SWEEP_QUERIES = 2_000
# Fragments that one task searches exactly.
EXACT_FRAGMENTS = 16
# Passages searched for each of k documents, since a document may answer with several.
PASSAGES_PER_DOCUMENT = 5


@dataclass(frozen=True)
class Measurement:
    """Measures the built shards of a version, with what they share."""

    session: Session
    resolved: Resolved
    chain: Chain
    shards: Sequence[ShardRecord]
    files: VersionFiles
    root: str

    @property
    def routed(self) -> bool:
        """Whether a query needs some of the shards only."""
        return self.resolved.pipeline.index.sharding is Sharding.CLUSTER

    @property
    def exact_similarities(self) -> bool:
        """Whether searches give the similarities of exact search: by vectors that are stored unchanged."""
        stored, store = self.resolved.stored, self.resolved.pipeline.embedding.store
        return stored is VectorCodec.FLOAT32 or (stored is VectorCodec.FLOAT16 and store == "float16")

    @property
    def rounds(self) -> int:
        """How often every shard is opened and searched."""
        return 3 if self.routed else 2

    def evaluate(self, advance: Advance) -> dict[str, Any]:
        """The evaluation record: recall, ranking quality, all measured operating points and the default among them."""
        pipeline = self.resolved.pipeline
        k = pipeline.evaluate.k
        queries = _queries(self.session, self.resolved, self.chain, self.root)
        truth = _truth(self.session, self.resolved, self.chain, self.root, queries, k + TIE_ROOM, advance)
        few = _first(queries, SWEEP_QUERIES)
        table, chosen = self._sweep(few, truth, k, advance)
        depth = k * PASSAGES_PER_DOCUMENT if pipeline.evaluate.relevance else k
        final = self._measure(queries, depth, [chosen.parameters], advance, truth=truth)
        found = _merged(final, 0, depth, queries)
        record: dict[str, Any] = {
            "k": k,
            "queries": len(queries.ids),
            "queries_from": pipeline.evaluate.queries if isinstance(pipeline.evaluate.queries, str) else "passages",
            "recall": _recall(found, truth, k, self.exact_similarities),
            **_shard_recall(final, truth, queries, k, self.exact_similarities),
            "default": _point_json(chosen),
            "points": [_point_json(point) for point in table],
        }
        if self.routed:
            record["shards_touched"] = _shards_touched(final, 0, len(queries.ids))
        if pipeline.evaluate.relevance:
            record |= _judged(pipeline.evaluate.relevance, queries, found, k)
        return record

    def _sweep(
        self, queries: Queries, truth: Neighbours, k: int, advance: Advance
    ) -> tuple[list[MeasuredPoint], MeasuredPoint]:
        """All operating points that were compared, and the one to take."""
        index, rows = self.resolved.pipeline.index, searched_rows(self.resolved, self.chain.rows)
        transformed = bool(index.transforms)
        points = operating_points(
            self.chain.spec, rows, index.rerank, self.resolved.tuned_point, transformed=transformed
        )
        table = self._compare(queries, truth, k, points, advance)
        chosen = choose_operating_point(table, index.recall)
        if not self.routed:
            return table, chosen
        routed = routed_points(self.chain.spec, chosen.parameters, index.rerank, transformed=transformed)
        table += self._compare(queries, truth, k, routed, advance)
        return table, choose_routed_point(table, index.recall)

    def _compare(
        self, queries: Queries, truth: Neighbours, k: int, points: Sequence[SearchParameters], advance: Advance
    ) -> list[MeasuredPoint]:
        measured = self._measure(queries, k, points, advance, timed=True)
        exact = self.exact_similarities
        return [
            MeasuredPoint(
                point,
                _recall(_merged(measured, i, k, queries), truth, k, exact),
                max(one.latency_ms[i] for one in measured),  # shards are searched side by side: the slowest decides
                _shards_touched(measured, i, len(queries.ids)) if self.routed else None,
            )
            for i, point in enumerate(points)
        ]

    def _measure(
        self,
        queries: Queries,
        k: int,
        points: Sequence[SearchParameters],
        advance: Advance,
        *,
        timed: bool = False,
        truth: Neighbours | None = None,
    ) -> list[Measured]:
        family, metric = chosen_family(self.resolved), self.resolved.metric
        ids = () if truth is None else tuple(sorted({name for name in truth.ids.ravel() if name is not None}))
        # One more than k: a query that is itself a passage finds itself first.
        tasks = [
            MeasureTask(self.root, shard, self.files, family, metric, queries.vectors, k + 1, tuple(points), timed, ids)
            for shard in self.shards
        ]
        measured = []
        for one in self.session.stream(measure_shard, tasks):
            measured.append(one)
            advance(1, f"shard {one.shard}")
        return sorted(measured, key=lambda one: one.shard)


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
    and how many lie in it, of the queries that are sent to it. As for the whole index, a row that is as similar as the
    k-th neighbour counts like it."""
    found, lying = np.zeros(len(measured), np.int64), np.zeros(len(measured), np.int64)
    for row, names in enumerate(truth.ids):
        count, floor, accepted = accepted_neighbours(truth, row, k)
        if count == 0:
            continue
        owners = np.array([one.asked[0][row] * sum(name in one.own_ids for name in names[:count]) for one in measured])
        lying += owners
        for shard, one in enumerate(measured):
            hits = one.hits[0]
            own = [place for place, name in enumerate(hits.ids[row, : k + 1]) if name != queries.exclude[row]]
            ties = hits.similarities[row] >= floor if exact_similarities else np.zeros(hits.ids.shape[1], bool)
            good = sum(hits.ids[row, place] in accepted or bool(ties[place]) for place in own)
            found[shard] += min(good, int(owners[shard]))
    shares = [round(float(hits / all_), 6) if all_ else None for hits, all_ in zip(found, lying, strict=True)]
    return {"shard_recall": shares, "shard_neighbours": lying.tolist()}


def _shards_touched(measured: Sequence[Measured], point: int, queries: int) -> float:
    """How many shards a query needs, on average."""
    return round(sum(int(one.asked[point].sum()) for one in measured) / max(queries, 1), 4)


def _point_json(point: MeasuredPoint) -> dict[str, Any]:
    return {
        "parameters": point.parameters.to_json(),
        "recall": round(point.recall, 6),
        "latency_ms": round(point.latency_ms, 4),
    } | ({} if point.shards is None else {"shards": point.shards})


def _judged(path: str, queries: Queries, found: Hits, k: int) -> dict[str, float]:
    """nDCG@k and MRR@k of documents, ranked by their best passage, over the judged queries."""
    rows, judged = judged_queries(*place_of(path), queries.ids)
    ranked = [ranked_documents(found.ids[row], k) for row in rows]
    ndcg, mrr = ndcg_at_k(ranked, judged, k), mrr_at_k(ranked, judged, k)
    return {"judged_queries": len(rows), "ndcg": _mean(ndcg), "mrr": _mean(mrr)}


def place_of(path: str) -> tuple[str, str]:
    """URL of the store and path within it, which any worker can read."""
    store, name = split_path(path)
    return store.url, name


def judged_queries(store_url: str, path: str, ids: Sequence[str]) -> tuple[list[int], list[dict[str, float]]]:
    """Which of the queries a file of judgements judges, and the judgements of each.

    Raises:
        QueriesInvalid: it judges none.
    """
    relevance = read_relevance(store_url, path)
    rows = [row for row, query in enumerate(ids) if query in relevance]
    if not rows:
        raise QueriesInvalid(
            f"evaluate.relevance ({path}) must judge some of the {len(ids)} queries, it judges none: their ids "
            f"(as {ids[0]!r}) are not among its own (as {next(iter(relevance), '')!r})"
        )
    return rows, [relevance[ids[row]] for row in rows]


def document_of(passage_id: str) -> str:
    """The document of a passage."""
    return passage_id.rpartition("#")[0]


def ranked_documents(passage_ids: Sequence[str | None], k: int) -> list[str]:
    """The documents of passages, most similar first, each by its best passage: k at most."""
    names = [document_of(str(name)) for name in passage_ids if name is not None]
    return list(dict.fromkeys(names))[:k]


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))
