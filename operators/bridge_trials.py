"""Bridges between two sampled spaces: fitted and chosen on one half of the queries, judged on the other.

New queries to the old index are judged by what they find there, against what the old model finds. Old documents in the
new space are judged where that is hardest: among documents that were embedded again, so that a document which is only
mapped has to be found beside them. Documents that are judged lie in no fit.

Adapters of documents are chosen by the same measure, not by neighbours alone: from a static table to all-MiniLM-L6-v2,
on 4,000 scientific abstracts, the rotation that agrees best with true neighbours recovers 0.05 of the old model's
recall, the network that finds most relevant documents 0.81; from its first 3 layers to it, on 2,000 abstracts and
their titles, 1.08 and 1.52.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, assert_never

import numpy as np

from penstock.operators.adapter_fitting import Pairs
from penstock.operators.adapters import Adapter
from penstock.operators.bridging import (
    LEAST_RECOVERY,
    BridgeRecord,
    Direction,
    Quality,
    Sample,
    Trial,
    agreement,
    choose_fit,
    judge_bridge,
    mean_cosine,
    record_bridge,
)
from penstock.operators.confidence import mean_interval
from penstock.operators.paired_samples import (
    PairedSample,
    SampledSpace,
    answered,
    answers_of,
    pairing,
    ranked_documents,
    relevant,
)

FEWEST_CHOOSING = 20  # judged queries of the first half whose documents are fitted to in turn
UNSEEN_SHARE = 4  # one document in so many is not fitted to, and judges


@dataclass(frozen=True)
class BridgeTask:
    """A bridge to fit to a sample, and the share of the reference that it must recover."""

    sample: PairedSample
    direction: Direction
    least_recovery: float = LEAST_RECOVERY


@dataclass(frozen=True, eq=False)
class FittedBridge:
    """An adapter with its record; `figures` of the judging queries, intervals by name as JSON."""

    record: BridgeRecord
    adapter: Adapter
    figures: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Setup:
    """How one direction is tried.

    Attributes:
        quality, fidelity: of held-out rows, for choose_fit.
        unseen: pairs that nothing is fitted to, for the mean cosine.
        judged: an adapter's figure for each judging query, and that of the reference: float64 (q,).
        figures: of an adapter, for people.
    """

    source: SampledSpace
    target: SampledSpace
    fitted: Sample
    quality: Quality
    fidelity: Quality | None
    unseen: Pairs
    judged: Callable[[Adapter], np.ndarray]
    reference: np.ndarray
    figures: Callable[[Adapter], dict[str, Any]]


def fit_bridge(task: BridgeTask) -> FittedBridge:
    """Choose, fit and judge an adapter of one direction. Some hundred searches of the sample, and networks of torch."""
    sample, direction = task.sample, task.direction
    setup = _setup(sample, direction)
    metric, seed = setup.target.metric, sample.seed
    chosen = choose_fit(direction, setup.fitted, setup.quality, metric, seed, setup.fidelity)
    adapter = chosen[0].adapter(setup.fitted, metric)
    control = chosen[0].adapter(setup.fitted.shuffled(seed), metric)
    verdict = judge_bridge(setup.judged(adapter), setup.reference, setup.judged(control), seed, task.least_recovery)
    identities = setup.source.identity, setup.target.identity
    record = record_bridge(direction, identities, setup.fitted, chosen, adapter, verdict, seed)
    record = replace(record, length=_length(adapter, setup.unseen))
    return FittedBridge(record, adapter, setup.figures(adapter))


def _setup(sample: PairedSample, direction: Direction) -> _Setup:
    match direction:
        case Direction.QUERIES_TO_OLD:
            return _queries_to_old(sample)
        case Direction.DOCUMENTS_TO_NEW:
            return _documents_to_new(sample)
        case _:
            assert_never(direction)


def _queries_to_old(sample: PairedSample) -> _Setup:
    old, new = sample.old, sample.new
    fitting, judging = sample.halves
    kept = ~sample.relevant_rows(judging)
    asked = Pairs(new.queries[fitting], old.queries[fitting])
    held_out = partial(agreement, trial=Trial(Direction.QUERIES_TO_OLD, asked, old.documents))
    unseen = Pairs(new.queries[judging], old.queries[judging])

    def quality(adapter: Adapter, rows: np.ndarray) -> np.ndarray:
        return answers_of(sample, adapter.apply(asked.source[rows]), old, fitting[rows]).ndcg

    def judged(adapter: Adapter) -> np.ndarray:
        if sample.relevance is None:
            return agreement(adapter, None, Trial(Direction.QUERIES_TO_OLD, unseen, old.documents))
        return answers_of(sample, adapter.apply(unseen.source), old, judging).recall

    reference = (
        np.ones(len(judging)) if sample.relevance is None else answers_of(sample, unseen.target, old, judging).recall
    )
    return _Setup(
        source=new,
        target=old,
        fitted=Sample(Pairs(new.documents[kept], old.documents[kept]), asked),
        quality=held_out if sample.relevance is None else quality,
        fidelity=None if sample.relevance is None else held_out,
        unseen=unseen,
        judged=judged,
        reference=reference,
        figures=lambda adapter: pairing(sample, adapter.apply(unseen.source), old),
    )


def _documents_to_new(sample: PairedSample) -> _Setup:
    old, new = sample.old, sample.new
    fitting, judging = sample.halves
    unseen_rows = _unseen_rows(sample, judging)
    rest = np.setdiff1d(np.arange(len(sample.document_ids)), unseen_rows)
    fitted = Sample(Pairs(old.documents[rest], new.documents[rest]))
    unseen = Pairs(old.documents[unseen_rows], new.documents[unseen_rows])
    held_out = partial(agreement, trial=Trial(Direction.DOCUMENTS_TO_NEW, fitted.documents, new.queries[fitting]))
    trial = Trial(Direction.DOCUMENTS_TO_NEW, unseen, new.queries[judging])
    choosing = len(_asking(sample, fitting, rest)) >= FEWEST_CHOOSING

    def quality(adapter: Adapter, rows: np.ndarray) -> np.ndarray:
        return _recall_of_mapped(sample, adapter, rest[rows], _asking(sample, fitting, rest[rows]))

    def judged(adapter: Adapter) -> np.ndarray:
        if sample.relevance is None:
            return agreement(adapter, None, trial)
        return _recall_of_mapped(sample, adapter, unseen_rows, judging)

    def figures(adapter: Adapter) -> dict[str, Any]:
        name = "agreement" if sample.relevance is None else "recall"
        return {name: mean_interval(judged(adapter), sample.seed).to_json()}

    return _Setup(
        source=old,
        target=new,
        fitted=fitted,
        quality=quality if choosing else held_out,
        fidelity=held_out if choosing else None,
        unseen=unseen,
        judged=judged,
        reference=np.ones(len(judging)) if sample.relevance is None else _old_recall(sample, unseen_rows),
        figures=figures,
    )


def _unseen_rows(sample: PairedSample, judging: np.ndarray) -> np.ndarray:
    """Passages that judge: those of documents relevant to judging queries, and some drawn at random."""
    drawn = np.random.default_rng(sample.seed).permutation(len(sample.document_ids))
    some = np.zeros(len(drawn), dtype=bool)
    some[drawn[: -(-len(drawn) // UNSEEN_SHARE)]] = True
    return np.flatnonzero(some | sample.relevant_rows(judging))


def _old_recall(sample: PairedSample, rows: np.ndarray) -> np.ndarray:
    """Recall of the old model among some passages, of the judging queries."""
    judging = sample.halves[1]
    names = [sample.document_ids[row] for row in rows.tolist()]
    ranked = ranked_documents(sample.old.queries[judging], sample.old.documents[rows], names, sample.k)
    return answered(ranked, sample.relevance_of(judging), sample.k).recall


def _asking(sample: PairedSample, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of some queries to which a document among some passages is relevant: int64, ascending."""
    if sample.relevance is None:
        return queries[:0]
    there = {sample.document_ids[row] for row in rows.tolist()}
    asks = [not there.isdisjoint(relevant(judged)) for judged in sample.relevance_of(queries)]
    asking: np.ndarray = queries[np.array(asks, dtype=bool)]
    return asking


def _recall_of_mapped(sample: PairedSample, adapter: Adapter, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The share of relevant documents, k at most, that queries find among some passages while these documents are
    mapped and every other one is embedded again: float64 (q,). Twice, so that each document is once among the mapped.
    """
    pairs = Pairs(sample.old.documents[rows], sample.new.documents[rows])
    names = [sample.document_ids[row] for row in rows.tolist()]
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    judged = [{name: one[name] for name in one if name in places} for one in sample.relevance_of(queries)]
    half = np.array([places[name] % 2 for name in names])
    shortened = adapter.apply(pairs.source) * np.float32(_length(adapter, pairs))
    hits = np.zeros(len(queries))
    for part in (0, 1):
        mixed = np.where((half == part)[:, None], shortened, pairs.target)
        ranked = ranked_documents(sample.new.queries[queries], mixed, names, sample.k)
        hits += [_hits(found, one, places, part) for found, one in zip(ranked, judged, strict=True)]
    most = np.array([max(1, min(sample.k, len(relevant(one)))) for one in judged])
    recall: np.ndarray = np.minimum(hits / most, 1.0)
    return recall


def _hits(found: list[str], judged: Mapping[str, float], places: Mapping[str, int], part: int) -> int:
    """How many of the found documents are relevant and of a half."""
    wanted = set(relevant(judged))
    return sum(name in wanted and places[name] % 2 == part for name in found)


def _length(adapter: Adapter, unseen: Pairs) -> float:
    """The mean cosine of images, which rounding may put above 1."""
    return min(1.0, mean_cosine(adapter, unseen))
