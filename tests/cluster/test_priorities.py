"""What is known of fragments and their slices, against counting by hand."""

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import read_fragment, read_receipt, write_fragment
from penstock.cluster.jobs.priorities import PriorityJob, PriorityTask, UnitPriority, fragment_priorities
from penstock.cluster.jobs.selection import EXCLUSION_SCHEMA
from penstock.cluster.layout import PASSAGES, SELECTION, documents_path, fragment_path, stage_folder
from penstock.cluster.storage import Store, open_store
from penstock.operators.identity import row_hashes


def passages(store: Store, name: str, documents: list[str], visits: list[float | None]) -> None:
    ids = [f"{document}#{number}" for number, document in enumerate(documents)]
    table = pa.table(
        {
            "passage_id": ids,
            "row_hash": pa.array(row_hashes(ids), pa.uint64()),
            "text_hash": pa.array([name.encode() for name in ids], pa.binary()),
            "document_id": documents,
            "source": ["s"] * len(ids),
            "position": pa.array([ord(document) for document in documents], pa.int64()),
            "tokens": pa.array([5] * len(ids), pa.int32()),
            "visits": pa.array(visits, pa.float64()),
            "words": documents,
        }
    ).sort_by("row_hash")
    write_fragment(store, fragment_path(PASSAGES, "stage", name), table)
    texts = pa.table({"source": ["s"] * 5, "position": [ord(name) for name in "abcde"], "text": list("abcde")})
    write_fragment(store, documents_path("stage", name), texts)


@pytest.fixture
def store(tmp_path: object) -> Store:
    found = open_store(str(tmp_path))
    passages(found, "one", ["a", "a", "b"], [3.0, 3.0, None])
    passages(found, "two", ["c", "d", "e"], [1.0, -5.0, np.nan])
    return found


def priorities(store: Store, excluding: frozenset[str] = frozenset(), **values: object) -> list[UnitPriority]:
    job = PriorityJob(store.url, "stage", "selection", **values)  # type: ignore[arg-type]
    return fragment_priorities(PriorityTask(job, ("one", "two"), excluding))


def sliced(store: Store, unit: UnitPriority) -> list[str]:
    assert unit.slice is not None
    path = fragment_path(PASSAGES, "stage", unit.slice.name)
    table, receipt = read_fragment(store, path), read_receipt(store, path)
    assert (
        (receipt.passages, receipt.rows_out) == (table.num_rows, unit.slice.documents) == (unit.rows, receipt.rows_in)
    )
    assert unit.slice.tokens == 5 * unit.rows and table.column("row_hash").to_pylist() == sorted(
        table.column("row_hash").to_pylist()
    )
    found: list[str] = table.column("document_id").to_pylist()
    return found


def test_documents_with_traffic_make_a_slice_and_what_is_no_count_is_none(store: Store) -> None:
    first, rest, other, last = priorities(store, traffic="visits")
    assert sliced(store, first) == ["a", "a"] and sliced(store, other) == ["c"]
    assert (first.fragment, first.traffic) == ("one", 6.0) and (other.fragment, other.traffic) == ("two", 1.0)
    assert rest == UnitPriority("one", 1, 0.0, 0.0, None) and last == UnitPriority("two", 2, 0.0, 0.0, None)


def test_endless_traffic_is_much_traffic(store: Store) -> None:
    passages(store, "two", ["c", "d", "e"], [np.inf, np.inf, -np.inf])
    found = priorities(store, traffic="visits")
    assert [(one.fragment, one.traffic) for one in found[-2:]] == [("two", 1e15), ("two", 1e15)]


def test_documents_that_are_asked_for_count_for_each_passage(store: Store) -> None:
    found = priorities(store, asked={"a": 2.0, "d": 7.0}, found={"b": 20.0, "e": 19.0, "missing": 99.0})
    assert [(one.fragment, one.rows, one.traffic, one.occurrences) for one in found] == [
        ("one", 2, 4.0, 0.0),
        ("one", 1, 0.0, 20.0),
        ("two", 1, 7.0, 0.0),
        ("two", 2, 0.0, 0.0),
    ]


def test_residuals_are_means_over_the_documents_that_have_one(store: Store) -> None:
    one, two = priorities(store, residuals={"a": 0.5, "d": 0.25, "e": 0.75})
    assert (one.rows, one.residual, one.slice) == (3, 0.5, None) and (two.residual, two.slice) == (0.5, None)


def test_what_selection_leaves_out_neither_counts_nor_tears_a_document(store: Store) -> None:
    """A document without one of its passages waits for its fragment, which knows what represents that."""
    row = {"fragment": "one", "passage_id": "a#1", "row_hash": 1, "document_id": "a", "source": "s"}
    rows = [row | {"position": ord("a"), "tokens": 5, "reason": "duplicate_text", "represented_by": "z#0"}]
    path = f"{stage_folder(SELECTION, 'selection')}/exclusions-00000.parquet"
    write_fragment(store, path, pa.Table.from_pylist(rows, schema=EXCLUSION_SCHEMA))
    found = priorities(store, frozenset({"one"}), traffic="visits")
    assert found[0] == UnitPriority("one", 2, 3.0, 0.0, None)


def test_a_slice_has_the_documents_that_its_passages_are_embedded_within(store: Store) -> None:
    first = priorities(store, asked={"b": 1.0}, late=True)[0]
    assert sliced(store, first) == ["b"] and first.slice is not None
    assert read_fragment(store, documents_path("stage", first.slice.name)).column("text").to_pylist() == ["b"]
    assert priorities(store, asked={"b": 1.0})[0].slice != first.slice


def test_traffic_of_words_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"upgrade.traffic \(words\) must be a column of numbers, got string"):
        priorities(store, traffic="words")
