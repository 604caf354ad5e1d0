"""The gate: the checks that a version must pass before an alias may point to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.pipelines.config import PipelineFile


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
        evaluation: figures `recall` and, with judgements, `ndcg` and `mrr`.
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
    checks += [Check(f"ndcg@{k}", evaluation["ndcg"], gate.ndcg)] if gate.ndcg is not None else []
    checks += [Check(f"mrr@{k}", evaluation["mrr"], gate.mrr)] if gate.mrr is not None else []
    checks.append(Check("coverage", coverage, gate.coverage))
    checks.append(Check("dropped fraction", dropped, gate.max_dropped_fraction, at_least=False))
    checks.append(Check("lost files", lost_files, gate.max_lost_files, at_least=False))
    return checks


def failed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]
