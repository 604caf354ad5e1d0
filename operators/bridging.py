"""Choose an adapter by what it finds, and judge whether it may stand in for embedding again.

Candidates are fitted to pairs and compared on held-out pairs by the share of the true ten nearest neighbours that they
find; nothing is fixed beforehand, as affine maps win with many pairs and fail with few. The chosen one is published only
if it recovers enough of a reference, with a lower confidence bound, and finds more than one that was fitted to shuffled
pairs, which say nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self, assert_never

import numpy as np
import pyarrow as pa

from penstock.operators.adapter_fitting import Pairs, fit_adapter
from penstock.operators.adapters import (
    Adapter,
    LowRank,
    Method,
    Procrustes,
    ResidualMlp,
    Ridge,
    method_from_json,
    method_to_json,
)
from penstock.operators.confidence import Interval, mean_interval, ratio_interval
from penstock.operators.encoding import Encoder
from penstock.operators.evaluation import TIE_ROOM, exact_neighbours, recall_at_k
from penstock.operators.indexing import Metric

K = 10
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RANKS = (64, 128)
HIDDEN = 256  # with it a vector of 384 dimensions takes 40 microseconds, on one core of an AMD EPYC
LEAST_RECOVERY = 0.9
RECORD_VERSION = 1


class Direction(StrEnum):
    """What an adapter maps: new queries into the old space, to search the old index; or old documents into the new
    space, where they are compared with documents that were embedded again."""

    QUERIES_TO_OLD = "queries_to_old"
    DOCUMENTS_TO_NEW = "documents_to_new"


class WrongSpace(Exception):
    """An adapter was about to be used between other spaces than those it was fitted to."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Held-out pairs and the vectors of the target space that they are compared with, float32 (m, d_target).

    QUERIES_TO_OLD: pairs are queries, compared with documents of the old index. DOCUMENTS_TO_NEW: pairs are documents,
    compared with queries of the new model.
    """

    direction: Direction
    pairs: Pairs
    compared: np.ndarray


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method and the share of the true ten neighbours that it found: float64 (q,), one for each query."""

    method: Method
    agreement: np.ndarray


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
        pairs_hash: `pairs_hash` of those it was fitted to.
        candidates: agreement@10 on held-out pairs of each method tried, in the order tried.
        adapter_hash: Adapter.content_hash of the chosen one.
    """

    direction: Direction
    source: SpaceIdentity
    target: SpaceIdentity
    pairs: int
    pairs_hash: str
    seed: int
    method: Method
    candidates: tuple[tuple[Method, Interval], ...]
    adapter_hash: str
    verdict: Verdict

    def refuse_other(self, adapter: Adapter, source_space: str, target_space: str) -> None:
        """Refuses to map between other spaces than the recorded, or by another adapter.

        Raises:
            WrongSpace: naming what was recorded and what is asked for.
        """
        for side, recorded, asked in (("from", self.source, source_space), ("to", self.target, target_space)):
            if recorded.space != asked:
                raise WrongSpace(
                    f"adapter ({self.adapter_hash[:16]}) leads {side} space {recorded.space} of {recorded.model}, asked "
                    f"for {asked}; fit one for this pair of models"
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
            "pairs": self.pairs,
            "pairs_hash": self.pairs_hash,
            "seed": self.seed,
            "method": method_to_json(self.method),
            "candidates": [
                {"method": method_to_json(method), "agreement_at_10": found.to_json()}
                for method, found in self.candidates
            ],
            "adapter_hash": self.adapter_hash,
            "verdict": self.verdict.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of to_json.

        Raises:
            ValueError: a record of another version.
        """
        if value.get("version") != RECORD_VERSION:
            raise ValueError(
                f"version of an adapter's record ({value.get('version')}) must be {RECORD_VERSION}; fit the adapter again"
            )
        verdict = value["verdict"]
        return cls(
            Direction(value["direction"]),
            SpaceIdentity(**value["source"]),
            SpaceIdentity(**value["target"]),
            value["pairs"],
            value["pairs_hash"],
            value["seed"],
            method_from_json(value["method"]),
            tuple((method_from_json(one["method"]), Interval(**one["agreement_at_10"])) for one in value["candidates"]),
            value["adapter_hash"],
            Verdict(
                Interval(**verdict["recovery"]), Interval(**verdict["over_control"]), verdict["least_recovery"]
            ),
        )


def choose_adapter(fitting: Pairs, trial: Trial, metric: Metric, seed: int) -> tuple[Adapter, list[Candidate]]:
    """The method that finds the most true neighbours of held-out pairs, fitted to all pairs; and all that were tried.

    Low ranks and the network are tried upon the best penalty of Ridge. Of equals the first tried wins, the simpler.
    As the winner is chosen on `trial`, judge it on other queries.
    """
    tried = [_candidate(method, fitting, trial, metric) for method in [Procrustes(), *map(Ridge, PENALTIES)]]
    penalty = next(one.method.penalty for one in sorted(tried, key=_worst_last) if isinstance(one.method, Ridge))
    smaller = min(fitting.source.shape[1], fitting.target.shape[1])
    later: list[Method] = [LowRank(rank, penalty) for rank in RANKS if rank < smaller]
    later.append(ResidualMlp(HIDDEN, penalty, seed))
    tried += [_candidate(method, fitting, trial, metric) for method in later]
    best = min(tried, key=_worst_last)
    return fit_adapter(best.method, joined(fitting, trial.pairs), metric), tried


def agreement(adapter: Adapter, trial: Trial) -> np.ndarray:
    """The share of the ten nearest neighbours in the target space that the mapped vectors find: float64 (q,).

    Queries are those of the pairs, or those that mapped documents are compared with. Neighbours are exact.
    """
    mapped = adapter.apply(trial.pairs.source)
    metric = adapter.metric
    match trial.direction:
        case Direction.QUERIES_TO_OLD:
            return neighbour_agreement((trial.pairs.target, trial.compared), (mapped, trial.compared), metric)
        case Direction.DOCUMENTS_TO_NEW:
            return neighbour_agreement((trial.compared, trial.pairs.target), (trial.compared, mapped), metric)
        case _:
            assert_never(trial.direction)


def neighbour_agreement(
    truth: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], metric: Metric, k: int = K
) -> np.ndarray:
    """The share of the k nearest documents of each query in one space that are the k nearest in another: float64 (q,).

    Args:
        truth, found: queries (q, d) and documents (n, d), the same ones in both.
    """
    expected, got = (
        exact_neighbours(queries, [(_row_names(len(documents)), documents)], wanted, metric, [None] * len(queries))
        for (queries, documents), wanted in ((truth, k + TIE_ROOM), (found, k))
    )
    return recall_at_k(got.ids, expected, k)


def judge_bridge(
    bridged: np.ndarray, reference: np.ndarray, control: np.ndarray, seed: int, least_recovery: float = LEAST_RECOVERY
) -> Verdict:
    """The gate of an adapter, from a figure for each of the same queries, float64 (q,); none of them chose the adapter.

    Args:
        bridged: quality of answers through the adapter: recall or nDCG by judgements, else agreement.
        reference: quality of the old model in its own index by the same figure; ones for agreement.
        control: quality through an adapter of the same method that was fitted to `Pairs.shuffled`.
    """
    return Verdict(
        ratio_interval(bridged, reference, seed), mean_interval(bridged - control, seed), least_recovery
    )


def record_bridge(
    direction: Direction,
    identities: tuple[SpaceIdentity, SpaceIdentity],
    pairs: Pairs,
    chosen: tuple[Adapter, Sequence[Candidate]],
    verdict: Verdict,
    seed: int,
) -> BridgeRecord:
    """The record of what choose_adapter gave; `identities` are those of the source and of the target, `pairs` all that
    the adapter was fitted to."""
    adapter, candidates = chosen
    figures = tuple((one.method, mean_interval(one.agreement, seed)) for one in candidates)
    return BridgeRecord(
        direction,
        *identities,
        len(pairs),
        pairs_hash(pairs),
        seed,
        adapter.method,
        figures,
        adapter.content_hash(),
        verdict,
    )


def joined(one: Pairs, other: Pairs) -> Pairs:
    """All pairs of both."""
    weights = None
    if one.weights is not None or other.weights is not None:
        weights = np.concatenate([_weights(one), _weights(other)])
    source, target = (np.concatenate([getattr(part, side) for part in (one, other)]) for side in ("source", "target"))
    return Pairs(source, target, weights)


def pairs_hash(pairs: Pairs) -> str:
    """sha256 of the vectors and weights as float32, in hexadecimal digits."""
    digest = hashlib.sha256()
    for array in (pairs.source, pairs.target, _weights(pairs)):
        digest.update(f"{array.shape} ".encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def _candidate(method: Method, fitting: Pairs, trial: Trial, metric: Metric) -> Candidate:
    return Candidate(method, agreement(fit_adapter(method, fitting, metric), trial))


def _worst_last(candidate: Candidate) -> float:
    return -float(candidate.agreement.mean())


def _weights(pairs: Pairs) -> np.ndarray:
    return np.ones(len(pairs)) if pairs.weights is None else pairs.weights


def _row_names(rows: int) -> pa.Array:
    return pa.array([str(row) for row in range(rows)])
