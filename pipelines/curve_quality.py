"""What thresholds of deduplication by meaning do to the answers to evaluation queries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.cluster.jobs.document_pairs import DocumentJob
from penstock.cluster.jobs.evaluation import EncodeQueriesTask, Queries, QueriesInvalid, encode_queries
from penstock.cluster.jobs.removal import RemovalJob
from penstock.cluster.jobs.stay_search import RepresentedTask, StayFound, StayTask, represented, search_stays
from penstock.cluster.session import Session
from penstock.operators.duplicate_quality import relevant_share, with_represented
from penstock.operators.evaluation import Neighbours, ndcg_at_k
from penstock.operators.identity import row_hashes
from penstock.pipelines.evaluating import EXACT_FRAGMENTS, PASSAGES_PER_DOCUMENT, document_of, judged_queries, place_of
from penstock.pipelines.planning import Embedded, Resolved, split_path
from penstock.pipelines.progress import Reporter

# Neighbours of them are held once for each group of rows that the same thresholds remove.
MOST_QUERIES = 2_000


@dataclass(frozen=True)
class CurveQuality:
    """Recall@k of the queries at each threshold, by exact search among the passages that stay, and nDCG@k where they
    are judged.

    Relevant are the documents that are judged so; without judgements, the k nearest passages before anything goes.
    """

    session: Session
    resolved: Resolved
    embedded: Embedded
    reporter: Reporter
    root: str

    def measure(self, removals: Sequence[RemovalJob | DocumentJob]) -> dict[str, Any]:
        """The figures `before`, and `after` each of the removals, which are done.

        Names with `_represented` also count what went where that which represents it is found: of judged documents
        that went whole, any passage of the document that each went for.
        """
        queries, relevance = self._queries()
        judged = relevance is not None
        found = self._search(queries, relevance, removals)
        first, k = found.neighbours[0], self.resolved.pipeline.evaluate.k
        truth = _nearest(first, k) if relevance is None else relevance
        wanted = sorted({*found.passages, *(() if judged else (name for names in truth for name in names))})
        whole = judged and any(isinstance(removal, DocumentJob) for removal in removals)
        twins = _Twins(wanted, whole, judged)
        before = self._figures(first, {}, truth, judged)
        after = []
        for removal, near in zip(removals, found.neighbours[1:], strict=True):
            gone, kept = self.session.run(represented, RepresentedTask(removal, twins.rows, whole))
            after.append(self._figures(near, twins.standing(near, gone, kept), truth, judged))
        return {
            "k": k,
            "queries": len(queries.ids),
            "relevant": "judged" if judged else "nearest",
            "before": {name: value for name, value in before.items() if not name.endswith("_represented")},
            "after": after,
        }

    def _queries(self) -> tuple[Queries, list[dict[str, float]] | None]:
        """The first MOST_QUERIES queries of the file, of those that are judged if any are, with the judgements.

        Raises:
            QueriesInvalid: no document is judged relevant to any.
        """
        evaluate = self.resolved.pipeline.evaluate
        store, path = split_path(str(evaluate.queries))
        queries = self.session.run(encode_queries, EncodeQueriesTask(store.url, path, self.resolved.query_encoder))
        rows, relevance = list(range(len(queries.ids))), None
        if evaluate.relevance:
            rows, relevance = judged_queries(*place_of(evaluate.relevance), queries.ids)
            relevance = relevance[:MOST_QUERIES]
            if not any(value > 0 for judged in relevance for value in judged.values()):
                raise QueriesInvalid(
                    f"evaluate.relevance ({evaluate.relevance}) must judge a document relevant (above 0) for some of "
                    f"the {len(relevance):,} queries, it does for none: there is no answer to lose"
                )
        rows = rows[:MOST_QUERIES]
        chosen = Queries(tuple(queries.ids[row] for row in rows), queries.vectors[rows], (None,) * len(rows))
        return chosen, relevance

    def _search(
        self, queries: Queries, relevance: list[dict[str, float]] | None, removals: Sequence[RemovalJob | DocumentJob]
    ) -> StayFound:
        k = self.resolved.pipeline.evaluate.k * (1 if relevance is None else PASSAGES_PER_DOCUMENT)
        documents = frozenset(name for judged in relevance or () for name, value in judged.items() if value > 0)
        fragments, embeddings = sorted(self.embedded.embeddings.values()), self.embedded.embeddings_fingerprint
        groups = [tuple(fragments[i : i + EXACT_FRAGMENTS]) for i in range(0, len(fragments), EXACT_FRAGMENTS)]
        metric = self.resolved.metric
        tasks = [
            StayTask(self.root, embeddings, group, tuple(removals), queries, k, metric, documents) for group in groups
        ]
        best: StayFound | None = None
        with self.reporter.stage("answers", len(tasks), "tasks") as advance:
            for part in self.session.stream(search_stays, tasks):
                best = part if best is None else best.merged(part, k)
                advance(1, f"{len(queries.ids):,} queries")
        if best is None:
            raise ValueError("embeddings (no fragments) must be at least one to ask queries of")
        return best

    def _figures(
        self, near: Neighbours, standing: Mapping[str, list[str]], truth: list[dict[str, float]], judged: bool
    ) -> dict[str, float]:
        """Figures of what was found, where passages stand for others."""
        k = self.resolved.pipeline.evaluate.k
        name_of = document_of if judged else str
        found, credited = [], []
        for row, relevant in zip(near.ids, truth, strict=True):
            passages = [(name, name_of(name)) for name in row if name is not None]
            names, more = with_represented(passages, standing, relevant, k)
            found.append(names)
            credited.append(more)
        values = {"recall": relevant_share(found, truth), "recall_represented": relevant_share(credited, truth)}
        if judged:
            values |= {"ndcg": ndcg_at_k(found, truth, k), "ndcg_represented": ndcg_at_k(credited, truth, k)}
        return {name: round(float(np.nanmean(value)), 6) for name, value in values.items()}


def _nearest(near: Neighbours, k: int) -> list[dict[str, float]]:
    """The k nearest passages of each query, as judgements."""
    return [{name: 1.0 for name in row[:k] if name is not None} for row in near.ids]


class _Twins:
    """The wanted passages, or their documents where documents go whole, of which to learn what represents each.

    Attributes:
        rows: their hashes, ascending uint64 (n,).
    """

    def __init__(self, wanted: Sequence[str], whole: bool, judged: bool) -> None:
        self._key = document_of if whole else str
        names = sorted({self._key(name) for name in wanted})
        self._names = dict(zip(row_hashes(names).tolist(), names, strict=True))
        self.rows = np.array(sorted(self._names), np.uint64)
        self._shown = document_of if judged and not whole else str

    def standing(self, near: Neighbours, gone: np.ndarray, kept: np.ndarray) -> dict[str, list[str]]:
        """The wanted passages (or their documents, where these are judged) that each found passage represents, by the
        hashes of what is gone and what is kept instead."""
        found = sorted({name for name in near.ids.ravel() if name is not None})
        passages: dict[int, list[str]] = {}
        for hashed, name in zip(row_hashes([self._key(name) for name in found]).tolist(), found, strict=True):
            passages.setdefault(hashed, []).append(name)
        standing: dict[str, list[str]] = {}
        for row, instead in zip(gone.tolist(), kept.tolist(), strict=True):
            for passage in passages.get(instead, ()):
                standing.setdefault(passage, []).append(self._shown(self._names[row]))
        return standing
