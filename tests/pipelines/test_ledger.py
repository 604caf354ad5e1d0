import json
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.fragments import read_fragment
from penstock.cluster.layout import run_folder
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store
from penstock.pipelines.ledger import LedgerDisagrees, StageEntry, check_sums, dropped_fraction, write_ledger

RUN = "20260102-0a1b2c"
ENTRIES = [
    StageEntry("documents", 100, 97, {"empty_text": 2, "invalid_utf8": 1}, fragments=4, seconds=1.5, bytes_read=4096),
    StageEntry("selection", 250, 240, {"duplicate_text": 10}),
    StageEntry("embeddings", 240, 239, {"zero_vector": 1}, tokens=9000, truncated_tokens=3, encoded=200, reused=40),
    StageEntry("shards", 239, 239, bytes_written=123_456, busy_s=3.25, idle_s=0.5),
]


def test_sums_that_agree_pass() -> None:
    check_sums(ENTRIES)
    check_sums([])
    check_sums([StageEntry("documents", 0, 0), StageEntry("selection", 0, 0)])


@pytest.mark.parametrize(
    ("stage", "changes", "problem"),
    [
        (0, {"rows_out": 98}, r"stage documents: rows in \(100\) must equal rows out \(98\) plus dropped \(3\)"),
        (1, {"dropped": {}}, r"stage selection: rows in \(250\) must equal rows out \(240\) plus dropped \(0\)"),
        (2, {"dropped": {"a": 1, "b": 1}}, r"stage embeddings: .* \(239\) plus dropped \(2\); nothing was published"),
        (
            3,
            {"rows_in": 238, "rows_out": 238},
            r"stage shards: rows in \(238\) must equal rows out of embeddings \(239\); nothing was published",
        ),
        (2, {"rows_in": 241, "rows_out": 240}, r"stage embeddings: rows in \(241\) .* rows out of selection \(240\)"),
    ],
)
def test_sums_that_disagree_name_stage_and_figures(stage: int, changes: dict[str, object], problem: str) -> None:
    entries = list(ENTRIES)
    entries[stage] = replace(entries[stage], **changes)  # type: ignore[arg-type]
    with pytest.raises(LedgerDisagrees, match=problem):
        check_sums(entries)


def test_documents_and_passages_are_different_rows() -> None:
    check_sums([StageEntry("documents", 10, 10), StageEntry("selection", 37, 37)])


def test_dropped_fraction_counts_dead_letters_and_no_duplicates() -> None:
    assert dropped_fraction(ENTRIES) == (3 + 1) / 100
    assert dropped_fraction(ENTRIES[:2]) == 3 / 100
    assert dropped_fraction([StageEntry("documents", 0, 0)]) == 0.0


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return LocalStore(tmp_path)


def test_a_ledger_reads_back_as_it_was_written(local: Store) -> None:
    write_ledger(local, RUN, ENTRIES)
    table = read_fragment(local, f"{run_folder(RUN)}/ledger.parquet")
    rows = [{**row, "dropped": json.loads(row["dropped"])} for row in table.to_pylist()]
    assert [StageEntry(**row) for row in rows] == ENTRIES
    assert [entry.to_json() for entry in ENTRIES] == rows
