import math

import pytest

from penstock.pipelines.config import PipelineFile
from penstock.pipelines.gate import Check, failed, gate_checks
from penstock.pipelines.loading import parse_pipeline

BASE = """
name: tiny
root: here
documents: {type: text, path: docs}
embedding: {model: mine}
"""
JUDGED = "evaluate: {k: 5, queries: queries.jsonl, relevance: qrels.tsv}\n"
MEASURED = {"recall": 0.97, "shard_recall": [0.97], "shard_neighbours": [2000], "ndcg": 0.6, "mrr": 0.5}


def _pipeline(text: str) -> PipelineFile:
    return parse_pipeline(BASE + text)[0]


@pytest.mark.parametrize(
    ("measured", "bound", "at_least", "passed"),
    [
        (0.97, 0.97, True, True),
        (math.nextafter(0.97, 0), 0.97, True, False),
        (math.nextafter(0.97, 1), 0.97, True, True),
        (0.01, 0.01, False, True),
        (math.nextafter(0.01, 1), 0.01, False, False),
        (0.0, 0.0, False, True),
        (0.0, 0.0, True, True),
        (1.0, 1.0, True, True),
        (math.nan, 0.0, True, False),
        (math.nan, 1.0, False, False),
    ],
)
def test_a_bound_itself_passes_and_what_is_no_number_does_not(
    measured: float, bound: float, at_least: bool, passed: bool
) -> None:
    check = Check("recall@10", measured, bound, at_least)
    assert check.passed is passed
    assert failed([check]) == ([] if passed else [check])
    assert check.to_json()["passed"] is passed


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (Check("recall@10", 0.95, 0.97), "recall@10 0.9500 ≥ 0.97: missed by 0.02"),
        (Check("recall@10", 0.96999, 0.97), "recall@10 0.9700 ≥ 0.97: missed by 1e-05"),
        (Check("recall@10", 0.97, 0.97), "recall@10 0.9700 ≥ 0.97: passed"),
        (Check("dropped fraction", 0.25, 0.01, at_least=False), "dropped fraction 0.2500 ≤ 0.01: missed by 0.24"),
    ],
)
def test_the_text_of_a_check_says_by_how_much(check: Check, text: str) -> None:
    assert str(check) == text


def test_a_pipeline_without_a_gate_has_no_checks() -> None:
    assert gate_checks(_pipeline(""), MEASURED, 0.0, 1.0, 3) == []


def test_the_recall_bound_is_the_index_s_unless_the_gate_has_its_own() -> None:
    own = gate_checks(_pipeline("index: {recall: 0.9}\ngate: {recall: 0.5}\n"), MEASURED, 1.0, 0.0, 0)
    inherited = gate_checks(_pipeline("index: {recall: 0.9}\ngate: {}\n"), MEASURED, 1.0, 0.0, 0)
    none = gate_checks(_pipeline("index: {recall: 0.9}\ngate: {recall: 0.0}\n"), MEASURED, 1.0, 0.0, 0)
    assert [checks[0].bound for checks in (own, inherited, none)] == [0.5, 0.9, 0.0]


def test_each_figure_meets_its_bound() -> None:
    gate = "gate: {recall: 0.9, ndcg: 0.7, mrr: 0.4, coverage: 0.99, max_dropped_fraction: 0.02}\n"
    checks = gate_checks(_pipeline(JUDGED + gate), MEASURED, 0.98, 0.03, 2)
    assert checks == [
        Check("recall@5", 0.97, 0.9),
        Check("ndcg@5", 0.6, 0.7),
        Check("mrr@5", 0.5, 0.4),
        Check("coverage", 0.98, 0.99),
        Check("dropped fraction", 0.03, 0.02, at_least=False),
        Check("lost files", 2, 0, at_least=False),
    ]
    assert [check.name for check in failed(checks)] == ["ndcg@5", "coverage", "dropped fraction", "lost files"]


def test_a_plain_gate_checks_recall_coverage_and_dropped_documents() -> None:
    checks = gate_checks(
        _pipeline("gate: {recall: 0.9}\n"),
        {"recall": 0.97, "shard_recall": [0.97], "shard_neighbours": [2000]},
        1.0,
        0.01,
        0,
    )
    assert [(check.name, check.bound, check.passed) for check in checks] == [
        ("recall@10", 0.9, True),
        ("coverage", 1.0, True),
        ("dropped fraction", 0.01, True),
        ("lost files", 0, True),
    ]


@pytest.mark.parametrize(
    ("gate", "neighbours", "bound", "passed"),
    [
        ("{recall: 0.95}", 500, 0.9 - 3 * 0.00975, False),
        ("{recall: 0.95}", 30, 0.9 - 3 * 0.03979, True),  # 24 of 30 where 28.5 are expected: chance
        ("{recall: 0.95, shard_recall: 0.7}", 500, 0.7, True),
        ("{recall: 0.95, shard_recall: 0.85}", 30, 0.85, False),
        ("{recall: 0.02}", 500, 0.0, True),
    ],
)
def test_the_worst_of_several_shards_has_a_bound_of_its_own(
    gate: str, neighbours: int, bound: float, passed: bool
) -> None:
    measured = {**MEASURED, "shard_recall": [0.99, None, 0.8, 0.95], "shard_neighbours": [500, 0, neighbours, 500]}
    checks = gate_checks(_pipeline(f"gate: {gate}\n"), measured, 1.0, 0.0, 0)
    (worst,) = (check for check in checks if check.name == "recall@10 of the worst shard")
    assert worst.measured == 0.8 and worst.bound == pytest.approx(bound, abs=1e-3) and worst.passed is passed
