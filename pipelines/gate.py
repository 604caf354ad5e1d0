"""The gate: the checks that a version must pass before an alias may point to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.pipelines.config import PipelineFile

# A shard's recall is measured on its share of the neighbours alone, and so varies more than that of the index.
SHARD_TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """One figure against its bound; `at_least` tells which side of the bound is good."""

    name: str
    measured: float
    bound: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "passed" if self.passed else f"missed by {abs(self.measured - self.bound):.3g}"
        return f"{self.name} {self.measured:.4f} {sign} {self.bound:g}: {verdict}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "passed": self.passed}


def gate_checks(
    pipeline: PipelineFile, evaluation: dict[str, Any], coverage: float, dropped: float, lost_files: int
) -> list[Check]:
    """The checks of a pipeline's gate on what was measured; none without a gate.

    Args:
        evaluation: figures `recall`, `shard_recall` and `shard_neighbours` by shard, and `ndcg` and `mrr` if judged.
        coverage: indexed passages as a share of those that should be.
        dropped: dead letters as a share of documents.
        lost_files: source files that could not be used as a whole, whatever they hold.
    """
    gate = pipeline.gate
    if gate is None:
        return []
    bound = gate.recall if gate.recall is not None else pipeline.index.recall
    k = pipeline.evaluate.k
    checks = [Check(f"recall@{k}", evaluation["recall"], bound)]
    checks += _worst_shard(evaluation, gate.shard_recall, bound, k)
    checks += [Check(f"ndcg@{k}", evaluation["ndcg"], gate.ndcg)] if gate.ndcg is not None else []
    checks += [Check(f"mrr@{k}", evaluation["mrr"], gate.mrr)] if gate.mrr is not None else []
    checks.append(Check("coverage", coverage, gate.coverage))
    checks.append(Check("dropped fraction", dropped, gate.max_dropped_fraction, at_least=False))
    checks.append(Check("lost files", lost_files, gate.max_lost_files, at_least=False))
    return checks


def _worst_shard(evaluation: dict[str, Any], least: float | None, bound: float, k: int) -> list[Check]:
    """The shard that is furthest below what it should recall; none where there is one shard.

    Without a bound of the file's own, a shard may fall short of the index's by SHARD_TOLERANCE, and by three standard
    deviations of a share that is measured on so few neighbours.
    """
    measured = [
        (recall, count)
        for recall, count in zip(evaluation["shard_recall"], evaluation["shard_neighbours"], strict=True)
        if recall is not None
    ]
    if len(measured) < 2:
        return []

    def bound_of(count: int) -> float:
        if least is not None:
            return least
        spread = 3 * math.sqrt(bound * (1 - bound) / count)
        return round(max(0.0, bound - SHARD_TOLERANCE - spread), 4)

    recall, count = min(measured, key=lambda one: one[0] - bound_of(one[1]))
    return [Check(f"recall@{k} of the worst shard", recall, bound_of(count))]


def failed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]
