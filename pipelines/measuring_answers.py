"""Quality of what a version answers, so that the steps of an upgrade can be compared query by query."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.evaluation import read_queries
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.operators.comparing import neighbour_churn
from penstock.operators.evaluation import judged_recall_at_k, ndcg_at_k
from penstock.operators.identity import row_hashes
from penstock.pipelines.evaluating import PASSAGES_PER_DOCUMENT, judged_queries, place_of, ranked_documents
from penstock.pipelines.planning import Resolved
from penstock.pipelines.reader import OpenIndex
from penstock.pipelines.version_samples import sampled_texts

# Figures of each query are kept in every record: 2,000 of them take 40 KB, and the mean of their differences has a
# confidence interval of about 0.01 where these spread by 0.25.
MOST_QUERIES = 2_000
DIGITS = 6


@dataclass(frozen=True)
class AnswersTask:
    """Ask a version: the texts of a file, or of as many passages. Files are a store's URL and a path within.

    Attributes:
        old: the version whose answers are compared with where there are no judgements.
    """

    root: str
    manifest: dict[str, Any]
    old: str
    k: int
    queries: tuple[str, str] | int
    relevance: tuple[str, str] | None
    trust_remote_code: bool


def measure_answers(
    session: Session, store_url: str, manifest: dict[str, Any], old: str, resolved: Resolved
) -> dict[str, Any]:
    """The quality of a version, mixed or not, by the queries of the new pipeline file, on a worker.

    With judgements `recall` and `ndcg` of documents at k; without, `overlap`: the share of the old version's first k
    answers that are still among the first k. Means, and under `per_query` the figure of each query in the same order at
    every step: `backfill_order.has_fallen` compares them.

    Args:
        manifest: of the version.
        old: the version that an upgrade began with.
        resolved: the new pipeline; its `evaluate` says what is asked.

    Raises:
        QueriesInvalid: a file of queries or judgements that cannot be used.
    """
    evaluate = resolved.pipeline.evaluate
    queries = place_of(evaluate.queries) if isinstance(evaluate.queries, str) else evaluate.queries
    relevance = None if evaluate.relevance is None else place_of(evaluate.relevance)
    trust = resolved.pipeline.embedding.trust_remote_code
    found = session.run(ask, AnswersTask(store_url, manifest, old, evaluate.k, queries, relevance, trust))
    return {
        "k": evaluate.k,
        "queries_from": evaluate.queries if isinstance(evaluate.queries, str) else "passages",
        "queries": len(next(iter(found.values()))),
        **{name: round(float(np.mean(values)), DIGITS) for name, values in found.items()},
        "per_query": found,
    }


def ask(task: AnswersTask) -> dict[str, list[float]]:
    """The figures of each query, by name. Memory: what a reader of the version takes, and the models."""
    catalog = Catalog(connect(task.root), task.manifest["index"])
    if task.relevance is None or isinstance(task.queries, int):
        return {"overlap": _rounded(_overlap(task, catalog))}
    ids, texts = read_queries(*task.queries)
    rows, judged = judged_queries(*task.relevance, ids)
    kept = _fewer([ids[row] for row in rows])
    answers = _ask(task, catalog, [texts[rows[place]] for place in kept], task.k * PASSAGES_PER_DOCUMENT)
    ranked = [ranked_documents(one, task.k) for one in answers]
    relevance = [judged[place] for place in kept]
    return {
        "recall": _rounded(judged_recall_at_k(ranked, relevance, task.k)),
        "ndcg": _rounded(ndcg_at_k(ranked, relevance, task.k)),
    }


def _overlap(task: AnswersTask, catalog: Catalog) -> np.ndarray:
    """The share of the old version's answers that the version gives, float64 (q,); 1 where there were none."""
    old = catalog.manifest(task.old)
    if isinstance(task.queries, int):
        texts = sampled_texts(catalog, old, min(task.queries, MOST_QUERIES))
    else:
        ids, read = read_queries(*task.queries)
        texts = [read[place] for place in _fewer(ids)]
    before = _ask(replace(task, manifest=old), catalog, texts, task.k)
    overlap: np.ndarray = 1 - np.nan_to_num(neighbour_churn(before, _ask(task, catalog, texts, task.k)))
    return overlap


def _ask(task: AnswersTask, catalog: Catalog, texts: Sequence[str], k: int) -> np.ndarray:
    with OpenIndex(catalog, "measured", task.manifest, task.trust_remote_code) as index:
        ids: np.ndarray = index.search(texts, k).ids
    return ids


def _fewer(ids: Sequence[str]) -> list[int]:
    """Places of MOST_QUERIES of the queries at most: those with the lowest hash of their id, as at every step."""
    places: list[int] = np.sort(np.argsort(row_hashes(ids), kind="stable")[:MOST_QUERIES]).tolist()
    return places


def _rounded(values: np.ndarray) -> list[float]:
    rounded: list[float] = np.round(values, DIGITS).tolist()
    return rounded
