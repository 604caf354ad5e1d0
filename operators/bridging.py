"""Choose an adapter by what it finds, and judge whether it may stand in for embedding again.

Candidates are fitted to pairs and compared by how well they answer held-out queries; nothing is fixed beforehand, as
affine maps win with many pairs and fail with few. The chosen one is published only if it recovers enough of a
reference, with a lower confidence bound, and answers better than one that was fitted to shuffled pairs, which say
nothing.

Where documents are judged, choose by these judgements: what finds the most neighbours of the old model need not find
the most relevant documents. With all-MiniLM-L6-v2 as the new model and its first 3 layers as the old one, a rotation
finds 0.17 of the old neighbours of scientific claims and has a recall at 10 of 0.55, ridge 0.57 and 0.09, the old model
itself 1 and 0.16.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Self, TypeAlias, assert_never

import numpy as np

from penstock.operators.adapter_fitting import Pairs, fit_adapter, fit_linear
from penstock.operators.adapters import (
    Adapter,
    LowRank,
    Method,
    Procrustes,
    ResidualMlp,
    Ridge,
    WhitenedRidge,
    method_from_json,
    method_to_json,
)
from penstock.operators.confidence import Interval, mean_interval, ratio_interval
from penstock.operators.encoding import Encoder
from penstock.operators.indexing import Metric
from penstock.operators.moments import Moments, moments_of
from penstock.operators.searching import normalize
from penstock.operators.space_comparison import neighbour_agreement

PENALTIES = (1e-6, 1e-3, 1e-2, 1e-1)
WHITENED = tuple((penalty, power) for power in (0.5, 1.0) for penalty in (0.03, 0.3))
# Queries lie elsewhere than documents, and there are fewer of them. 4,000 abstracts and 809 claims: a claim that counts
# 4 documents finds 0.54 of the true neighbours of new claims, one that counts 1 finds 0.52, none at all 0.41.
QUERY_WEIGHTS = (1.0, 4.0, 0.0)
RANKS = (64, 128)
HIDDEN = 256  # with it a vector of 384 dimensions takes 40 microseconds, on one core of an AMD EPYC
LEAST_RECOVERY = 0.9
RECORD_VERSION = 1
FOLDS = 4

Quality: TypeAlias = Callable[[Adapter, np.ndarray], np.ndarray]


class Direction(StrEnum):
    """What an adapter maps: new queries into the old space, to search the old index; or old documents into the new
    space, where they are compared with documents that were embedded again."""

    QUERIES_TO_OLD = "queries_to_old"
    DOCUMENTS_TO_NEW = "documents_to_new"


class WrongSpace(Exception):
    """An adapter was about to be used between other spaces than those it was fitted to."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Pairs that an adapter was not fitted to, and the vectors of the target space that they are compared with, float32
    (m, d_target).

    QUERIES_TO_OLD: pairs are queries, compared with documents of the old index. DOCUMENTS_TO_NEW: pairs are documents,
    compared with queries of the new model.
    """

    direction: Direction
    pairs: Pairs
    compared: np.ndarray


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs to fit to: texts of documents, and of queries, None where there are none."""

    documents: Pairs
    queries: Pairs | None = None

    @property
    def held_out_from(self) -> Pairs:
        """The pairs that are held out in turn to choose a fit: queries, or documents where there are none."""
        return self.documents if self.queries is None else self.queries

    def without(self, rows: np.ndarray) -> "Sample":
        """This sample less some rows of `held_out_from`."""
        kept = self.held_out_from.take(np.setdiff1d(np.arange(len(self.held_out_from)), rows))
        return Sample(kept) if self.queries is None else Sample(self.documents, kept)

    def shuffled(self, seed: int) -> "Sample":
        """Each source vector with the target vector of another text, drawn at random: pairs that say nothing."""
        queries = None if self.queries is None else self.queries.shuffled(seed)
        return Sample(self.documents.shuffled(seed), queries)

    def weighed(self, query_weight: float) -> Pairs:
        """All pairs; each query counts `query_weight` documents."""
        if self.queries is None:
            return self.documents
        counts = np.repeat([1.0, query_weight], [len(self.documents), len(self.queries)])
        source, target = (
            np.concatenate([getattr(self.documents, side), getattr(self.queries, side)])
            for side in ("source", "target")
        )
        return Pairs(source, target, counts)

    def moments(self, query_weight: float) -> Moments:
        """Those of `weighed`; the sums over documents are made once."""
        if self.queries is None:
            return self._document_moments
        weights = np.full(len(self.queries), query_weight)
        return self._document_moments.merged(
            moments_of(self.queries.side_by_side(), self._document_moments.pilot, weights)
        )

    @cached_property
    def _document_moments(self) -> Moments:
        return self.documents.moments()


@dataclass(frozen=True)
class Fit:
    """How an adapter is fitted: the method, and how many documents a query counts."""

    method: Method
    query_weight: float = 1.0

    def adapter(self, sample: Sample, metric: Metric) -> Adapter:
        """This fit to a sample."""
        if isinstance(self.method, ResidualMlp):
            return fit_adapter(self.method, sample.weighed(self.query_weight), metric)
        return fit_linear(self.method, sample.moments(self.query_weight), sample.documents.source.shape[1], metric)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fit and the quality of its answers: float64 (q,), one figure for each held-out query; `fidelity` is the mean of
    the figure that decides between equals."""

    fit: Fit
    quality: np.ndarray
    fidelity: float = 0.0


@dataclass(frozen=True)
class SpaceIdentity:
    """Which model made a space: `space` is Encoder.space, of which no two that differ may be compared."""

    model: str
    space: str
    weights_hash: str
    dimension: int

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        return cls(encoder.model, encoder.space, encoder.weights_hash, encoder.dimension)


@dataclass(frozen=True)
class Verdict:
    """What the gate saw: the share of the reference that the adapter recovers, and how much more it finds than the
    control."""

    recovery: Interval
    over_control: Interval
    least_recovery: float

    @property
    def passes(self) -> bool:
        return self.recovery.low >= self.least_recovery and self.over_control.low > 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passes": self.passes}


@dataclass(frozen=True)
class BridgeRecord:
    """What lies beside an adapter: where it leads, what it was fitted to, and what was measured of it.

    Attributes:
        sample_hash: `sample_hash` of what it was fitted to, `documents` and `queries` how many pairs that were.
        candidates: the mean quality on held-out queries of each fit tried, in the order tried.
        adapter_hash: Adapter.content_hash of the chosen one.
        length: mean_cosine of pairs that it was not fitted to: of mapped documents, for `mixed_spaces.AdaptedVectors`.
    """

    direction: Direction
    source: SpaceIdentity
    target: SpaceIdentity
    documents: int
    queries: int
    sample_hash: str
    seed: int
    chosen: Fit
    candidates: tuple[tuple[Fit, Interval], ...]
    adapter_hash: str
    verdict: Verdict
    length: float = 1.0

    def refuse_other(self, adapter: Adapter, source_space: str, target_space: str) -> None:
        """Refuses to map between other spaces than the recorded, or by another adapter.

        Raises:
            WrongSpace: naming what was recorded and what is asked for.
        """
        for side, recorded, asked in (("from", self.source, source_space), ("to", self.target, target_space)):
            if recorded.space != asked:
                raise WrongSpace(
                    f"adapter ({self.adapter_hash[:16]}) leads {side} space {recorded.space} of {recorded.model}, "
                    f"asked for {asked}; fit one for this pair of models"
                )
        found = adapter.content_hash()
        if found != self.adapter_hash:
            raise WrongSpace(
                f"adapter ({found[:16]}) must be {self.adapter_hash[:16]}, which the record is of; fetch both again"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "version": RECORD_VERSION,
            "direction": self.direction.value,
            "source": asdict(self.source),
            "target": asdict(self.target),
            "documents": self.documents,
            "queries": self.queries,
            "sample_hash": self.sample_hash,
            "seed": self.seed,
            "chosen": _fit_to_json(self.chosen),
            "candidates": [_fit_to_json(fit) | {"quality": found.to_json()} for fit, found in self.candidates],
            "adapter_hash": self.adapter_hash,
            "verdict": self.verdict.to_json(),
            "length": self.length,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of to_json.

        Raises:
            ValueError: a record of another version.
        """
        if value.get("version") != RECORD_VERSION:
            raise ValueError(
                f"version of an adapter's record ({value.get('version')}) must be {RECORD_VERSION}; fit it again"
            )
        verdict = value["verdict"]
        return cls(
            Direction(value["direction"]),
            SpaceIdentity(**value["source"]),
            SpaceIdentity(**value["target"]),
            value["documents"],
            value["queries"],
            value["sample_hash"],
            value["seed"],
            _fit_from_json(value["chosen"]),
            tuple((_fit_from_json(one), Interval(**one["quality"])) for one in value["candidates"]),
            value["adapter_hash"],
            Verdict(Interval(**verdict["recovery"]), Interval(**verdict["over_control"]), verdict["least_recovery"]),
            value.get("length", 1.0),
        )


def choose_fit(
    direction: Direction,
    sample: Sample,
    quality: Quality,
    metric: Metric,
    seed: int,
    fidelity: Quality | None = None,
) -> tuple[Fit, list[Candidate]]:
    """The fit whose adapters answer held-out queries best, and all that were tried.

    Cross-validated: a FOLDS-th of the queries is held out in turn, in the order of the seed. Low ranks and the network
    are tried upon the best Ridge. With `fidelity`, its highest mean wins among the best and all that are within one
    standard error of it (of the paired difference), as judgements of few queries hardly tell these apart. Of equals
    the first tried wins, the simpler. Fit the winner to the whole sample, and judge it on other queries.

    Args:
        quality: of an adapter's answers, from the numbers of held-out rows of `sample.held_out_from`: floating point,
            the higher the better; recall or nDCG by judgements, else `agreement`.
        fidelity: likewise; `agreement` where quality is by judgements.

    Raises:
        ValueError: documents are to be mapped, and the sample holds queries.
    """
    if direction is Direction.DOCUMENTS_TO_NEW and sample.queries is not None:
        raise ValueError(
            f"sample for {direction} ({len(sample.queries)} pairs of queries) must hold documents alone, as these are "
            "mapped and held out; leave the queries out"
        )
    order = np.random.default_rng(seed).permutation(len(sample.held_out_from))
    folds = [(sample.without(rows), rows) for rows in np.array_split(order, FOLDS)]

    def tried(fit: Fit) -> Candidate:
        adapters = [(fit.adapter(kept, metric), rows) for kept, rows in folds]
        found = np.concatenate([quality(adapter, rows) for adapter, rows in adapters])
        if fidelity is None:
            return Candidate(fit, found)
        faithful = np.concatenate([fidelity(adapter, rows) for adapter, rows in adapters])
        return Candidate(fit, found, float(faithful.mean()))

    weights = QUERY_WEIGHTS if sample.queries is not None else (1.0,)
    candidates = [tried(Fit(method, weight)) for weight in weights for method in _linear_methods(direction)]
    ridge = min((one for one in candidates if isinstance(one.fit.method, Ridge)), key=_best_first).fit
    candidates += [tried(fit) for fit in _upon(ridge, sample, seed)]
    best = min(candidates, key=_best_first)
    equals = [one for one in candidates if fidelity is not None and _within_error(one, best)] or [best]
    return max(equals, key=lambda one: one.fidelity).fit, candidates


def agreement(adapter: Adapter, rows: np.ndarray | None, trial: Trial) -> np.ndarray:
    """The share of the ten nearest neighbours in the target space that the mapped vectors find: float64 (q,).

    Queries are those of the pairs; or documents are mapped, of which every other one is taken as embedded again
    already, so that mapped and embedded ones must be in order among each other. Neighbours are exact.

    Args:
        rows: the pairs that count; None for all.
    """
    pairs = trial.pairs if rows is None else trial.pairs.take(rows)
    mapped, metric = adapter.apply(pairs.source), adapter.metric
    match trial.direction:
        case Direction.QUERIES_TO_OLD:
            return neighbour_agreement((pairs.target, trial.compared), (mapped, trial.compared), metric)
        case Direction.DOCUMENTS_TO_NEW:
            mapped[1::2] = pairs.target[1::2]
            return neighbour_agreement((trial.compared, pairs.target), (trial.compared, mapped), metric)
        case _:
            assert_never(trial.direction)


def mean_cosine(adapter: Adapter, pairs: Pairs) -> float:
    """Of the images of pairs that the adapter was not fitted to with their targets; 0 where they point away."""
    images, targets = (normalize(vectors) for vectors in (adapter.apply(pairs.source), pairs.target))
    return max(0.0, float(np.einsum("nd,nd->n", images, targets).mean()))


def judge_bridge(
    bridged: np.ndarray, reference: np.ndarray, control: np.ndarray, seed: int, least_recovery: float = LEAST_RECOVERY
) -> Verdict:
    """The gate of an adapter, from a figure for each of the same queries, float64 (q,); none of them chose the adapter.

    Args:
        bridged: quality of answers through the adapter: recall or nDCG by judgements, else agreement.
        reference: quality of the old model in its own index by the same figure; ones for agreement.
        control: quality through an adapter of the same method that was fitted to `Pairs.shuffled`.
    """
    return Verdict(ratio_interval(bridged, reference, seed), mean_interval(bridged - control, seed), least_recovery)


def record_bridge(
    direction: Direction,
    identities: tuple[SpaceIdentity, SpaceIdentity],
    sample: Sample,
    chosen: tuple[Fit, Sequence[Candidate]],
    adapter: Adapter,
    verdict: Verdict,
    seed: int,
) -> BridgeRecord:
    """The record of an adapter.

    Args:
        identities: of the source and of the target.
        sample: what the adapter was fitted to.
        chosen: what choose_fit gave.
    """
    fit, candidates = chosen
    return BridgeRecord(
        direction,
        *identities,
        len(sample.documents),
        0 if sample.queries is None else len(sample.queries),
        sample_hash(sample),
        seed,
        fit,
        tuple((one.fit, mean_interval(one.quality, seed)) for one in candidates),
        adapter.content_hash(),
        verdict,
    )


def sample_hash(sample: Sample) -> str:
    """sha256 of the vectors as float32, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (sample.documents, sample.queries):
        for array in () if part is None else (part.source, part.target):
            digest.update(f"{array.shape} ".encode())
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def _linear_methods(direction: Direction) -> list[Method]:
    methods: list[Method] = [Procrustes(), *map(Ridge, PENALTIES)]
    match direction:
        case Direction.QUERIES_TO_OLD:
            return [*methods, *(WhitenedRidge(*parameters) for parameters in WHITENED)]
        case Direction.DOCUMENTS_TO_NEW:
            return methods
        case _:
            assert_never(direction)


def _upon(ridge: Fit, sample: Sample, seed: int) -> list[Fit]:
    """The fits that begin with the best Ridge."""
    if not isinstance(ridge.method, Ridge):
        raise TypeError(f"method to build upon ({ridge.method}) must be ridge")
    penalty = ridge.method.penalty
    smaller = min(sample.documents.source.shape[1], sample.documents.target.shape[1])
    ranks: list[Method] = [LowRank(rank, penalty) for rank in RANKS if rank < smaller]
    return [replace(ridge, method=method) for method in [*ranks, ResidualMlp(HIDDEN, penalty, seed)]]


def _best_first(candidate: Candidate) -> float:
    return -float(candidate.quality.mean())


def _within_error(one: Candidate, best: Candidate) -> bool:
    """Whether quality falls short of the best by no more than one standard error of the difference."""
    short = best.quality - one.quality
    return bool(short.mean() <= short.std() / np.sqrt(len(short)))


def _fit_to_json(fit: Fit) -> dict[str, Any]:
    return {"method": method_to_json(fit.method), "query_weight": fit.query_weight}


def _fit_from_json(value: Mapping[str, Any]) -> Fit:
    return Fit(method_from_json(value["method"]), value["query_weight"])
