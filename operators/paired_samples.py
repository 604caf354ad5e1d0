"""A sample of a corpus in the spaces of an old and a new model, and how well each pairing of the two answers.

Similarities of the two spaces never meet: pairings are compared by the documents that queries find.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from penstock.operators.bridging import SpaceIdentity
from penstock.operators.compatibility import Compatibility, measure_compatibility
from penstock.operators.confidence import mean_interval
from penstock.operators.evaluation import exact_neighbours, ndcg_at_k
from penstock.operators.indexing import Metric
from penstock.operators.space_comparison import flips, likeness, neighbour_agreement, neighbour_overlap, quality_change
from penstock.operators.space_report import space_report

PASSAGES_PER_DOCUMENT = 5  # searched for each of k documents, since a document may answer with several
MOST_ANCHORS = 300
ANCHOR_SHARE = 4  # at most one row in so many is an anchor, the others are compared
COMPARED_ROWS = 5_000  # neighbours of all rows among each other, and a matrix of them
SHOWN_QUERIES = 20


@dataclass(frozen=True, eq=False)
class SampledSpace:
    """A sample in one space, vectors of unit length under cosine.

    Attributes:
        documents: passages of documents, float32 (n, d).
        queries: float32 (q, d).
    """

    identity: SpaceIdentity
    metric: Metric
    documents: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True, eq=False)
class PairedSample:
    """The same passages and queries in both spaces.

    Attributes:
        document_ids: of each passage, the document that it is of.
        drawn: how many of the passages, the first ones, were drawn at random; the others were added, as they are of
            documents that are judged.
        query_ids: of each query.
        relevance: for each query its judged documents; None where there are no judgements.
        k: documents that an answer has.
        seed: of what is drawn here.
    """

    old: SampledSpace
    new: SampledSpace
    document_ids: tuple[str, ...]
    drawn: int
    query_ids: tuple[str, ...]
    relevance: tuple[Mapping[str, float], ...] | None
    k: int
    seed: int

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """The queries to fit and choose with, and those that chose nothing, which figures are of: int64 each."""
        order = np.random.default_rng(self.seed).permutation(len(self.query_ids))
        half = len(order) // 2
        return np.sort(order[:half]), np.sort(order[half:])

    def relevance_of(self, rows: np.ndarray) -> list[Mapping[str, float]]:
        """The judgements of some queries; for samples that have them."""
        if self.relevance is None:
            raise ValueError(f"judgements (none of {len(self.query_ids)} queries) must be given; compare agreement")
        return [self.relevance[row] for row in rows.tolist()]

    def relevant_rows(self, queries: np.ndarray) -> np.ndarray:
        """Whether each passage is of a document that is relevant to one of the queries: bool (n,)."""
        if self.relevance is None:
            return np.zeros(len(self.document_ids), dtype=bool)
        wanted = {name for judged in self.relevance_of(queries) for name in relevant(judged)}
        return np.array([name in wanted for name in self.document_ids])


@dataclass(frozen=True, eq=False)
class Answered:
    """Quality of the answers to q judged queries, float64 (q,) each: the share of the relevant documents, k at most,
    among the first k, and nDCG."""

    recall: np.ndarray
    ndcg: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether there is a relevant document among the first k: bool (q,)."""
        found: np.ndarray = self.recall > 0
        return found


def relevant(judged: Mapping[str, float]) -> list[str]:
    """The documents that are judged relevant."""
    return [name for name, relevance in judged.items() if relevance > 0]


def ranked_documents(queries: np.ndarray, documents: np.ndarray, ids: Sequence[str], k: int) -> list[list[str]]:
    """The first k documents of each query by their best passage, exact: inner products of (q, d) and (n, d).

    Args:
        ids: of each passage, the document that it is of.
    """
    batches = [(pa.array([str(row) for row in range(len(documents))]), documents)]
    depth = k * PASSAGES_PER_DOCUMENT
    found = exact_neighbours(queries, batches, depth, Metric.INNER_PRODUCT, [None] * len(queries)).ids
    return [list(dict.fromkeys(ids[int(row)] for row in rows if row is not None))[:k] for rows in found]


def answered(ranked: Sequence[Sequence[str]], judged: Sequence[Mapping[str, float]], k: int) -> Answered:
    """Quality of the first k documents of each query."""
    right = [set(relevant(one)) for one in judged]
    hits = np.array([len(set(found[:k]) & wanted) for found, wanted in zip(ranked, right, strict=True)])
    return Answered(hits / np.array([max(1, min(k, len(wanted))) for wanted in right]), ndcg_at_k(ranked, judged, k))


def answers_of(sample: PairedSample, queries: np.ndarray, space: SampledSpace, rows: np.ndarray) -> Answered:
    """Quality of the answers that queries (len(rows), d), those of some rows, find among all passages of a space."""
    ranked = ranked_documents(queries, space.documents, sample.document_ids, sample.k)
    return answered(ranked, sample.relevance_of(rows), sample.k)


def pairing(sample: PairedSample, queries: np.ndarray, space: SampledSpace) -> dict[str, Any]:
    """Figures of the judging queries, given as vectors of a space, searched in it; as `to_json` of their types.

    With judgements recall and nDCG, their paired change against the old model in its own index, and which queries
    change sides. Without, the share of the old model's ten nearest passages that are found.
    """
    rows = sample.halves[1]
    if sample.relevance is None:
        truth = sample.old.queries[rows], sample.old.documents
        found = neighbour_agreement(truth, (queries, space.documents), Metric.INNER_PRODUCT)
        return {"agreement": mean_interval(found, sample.seed).to_json()}
    before, after = _old_answers(sample), answers_of(sample, queries, space, rows)
    changed = flips(before.right, after.right, sample.seed).to_json()
    lost = [sample.query_ids[rows[number]] for number in changed.pop("negative_queries")[:SHOWN_QUERIES]]
    return {
        "recall": mean_interval(after.recall, sample.seed).to_json(),
        "ndcg": mean_interval(after.ndcg, sample.seed).to_json(),
        "recall_change": quality_change(before.recall, after.recall, sample.seed).difference.to_json(),
        "ndcg_change": quality_change(before.ndcg, after.ndcg, sample.seed).difference.to_json(),
        "flips": changed | {"negative_queries": lost},
    }


def comparable(sample: PairedSample) -> bool:
    """Whether vectors of one space can be compared with those of the other at all."""
    old, new = sample.old, sample.new
    return old.documents.shape[1] == new.documents.shape[1] and old.metric is new.metric


def sampled_compatibility(sample: PairedSample) -> Compatibility | None:
    """The criterion of compatible models by nDCG of the judging queries; None without judgements, or where the
    dimensions or metrics of the spaces differ."""
    if sample.relevance is None or not comparable(sample):
        return None
    rows = sample.halves[1]
    cross = answers_of(sample, sample.new.queries[rows], sample.old, rows)
    new = answers_of(sample, sample.new.queries[rows], sample.new, rows)
    return measure_compatibility(_old_answers(sample).ndcg, cross.ndcg, sample.seed, new.ndcg)


def compared_models(sample: PairedSample) -> dict[str, Any]:
    """What the sample says of the two models, without any adapter: pairings, likeness, and the health of both spaces.

    Spaces are compared on passages that were drawn at random, COMPARED_ROWS at most. Cost: n^2 d for neighbours, and
    4 n^2 bytes.
    """
    old, new, rows = sample.old, sample.new, sample.halves[1]
    drawn = [space.documents[: min(sample.drawn, COMPARED_ROWS)] for space in (old, new)]
    anchors = min(MOST_ANCHORS, len(drawn[0]) // ANCHOR_SHARE)
    alike = likeness(drawn, anchors)[0][1]
    overlap = neighbour_overlap(drawn[0], drawn[1], Metric.INNER_PRODUCT)
    pairings = {
        "old_to_old": pairing(sample, old.queries[rows], old),
        "new_to_new": pairing(sample, new.queries[rows], new),
    }
    if comparable(sample):
        pairings["new_to_old"] = pairing(sample, new.queries[rows], old)
    return {
        "pairings": pairings,
        "neighbour_overlap": mean_interval(overlap, sample.seed).to_json(),
        "likeness": {"mean_cosine": alike.mean_cosine, "matched": alike.matched, "anchors": anchors},
        "spaces": {
            name: space_report(vectors, space.metric, sample.seed).to_json()
            for name, vectors, space in zip(("old", "new"), drawn, (old, new), strict=True)
        },
    }


def _old_answers(sample: PairedSample) -> Answered:
    """Of the judging queries in the old model's own index."""
    rows = sample.halves[1]
    return answers_of(sample, sample.old.queries[rows], sample.old, rows)
