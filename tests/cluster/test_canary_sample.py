"""The sample of passages that a new model is tried on, drawn from fragments by hash."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import read_fragment, read_receipt, write_fragment
from penstock.cluster.jobs.canary_sample import (
    CanarySampleJob,
    CanarySampleTask,
    SampledPassages,
    first_drawn,
    sample_passages,
    write_sample_fragments,
)
from penstock.cluster.jobs.selection import EXCLUSION_SCHEMA
from penstock.cluster.layout import PASSAGES, SELECTION, documents_path, fragment_path, stage_folder
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import hash_texts, row_hashes

ROWS, SEED = 3_000, 4
STAGE, SELECTED = "passages-stage", "selection-stage"


def passages() -> pa.Table:
    """Two passages of each document, sorted by row hash as fragments are."""
    ids = [f"d{row // 2}#{row % 2}" for row in range(ROWS)]
    documents = [name.partition("#")[0] for name in ids]
    table = pa.table(
        {
            "passage_id": ids,
            "row_hash": pa.array(row_hashes(ids), pa.uint64()),
            "text_hash": hash_texts(ids),
            "text": [f"text of {name}" for name in ids],
            "document_id": documents,
            "document_hash": pa.array(row_hashes(documents), pa.uint64()),
            "source": ["file"] * ROWS,
            "position": pa.array([row // 2 for row in range(ROWS)], pa.int64()),
            "tokens": pa.array([3] * ROWS, pa.int32()),
        }
    )
    return table.sort_by("row_hash")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def sampled(
    store: LocalStore, cut: int, excluded: bool = False, late: bool = False, wanted: int = 50
) -> SampledPassages:
    """What is drawn from the passages in `cut` fragments."""
    table = passages()
    names = [f"{cut}-{number}" for number in range(cut)]
    for number, name in enumerate(names):
        part = table.take(pa.array(np.flatnonzero(np.arange(ROWS) % cut == number)))
        write_fragment(store, fragment_path(PASSAGES, STAGE, name), part)
        places = part.select(["source", "position", "document_id", "text"])
        write_fragment(store, documents_path(STAGE, name), places)
    judged = frozenset({"d7", "d9", "unknown"})
    job = CanarySampleJob(store.url, STAGE, SELECTED, ROWS, wanted, SEED, judged, late)
    return SampledPassages.joined([sample_passages(CanarySampleTask(job, name, excluded)) for name in names])


def ids(table: pa.Table) -> list[str]:
    names: list[str] = table.column("passage_id").to_pylist()
    return names


def test_the_sample_is_the_same_for_any_cut(store: LocalStore) -> None:
    one, three = (sampled(store, cut) for cut in (1, 3))
    drawn = [ids(first_drawn(part.drawn, 50, SEED)) for part in (one, three)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 50
    assert sorted(ids(one.judged)) == sorted(ids(three.judged)) == ["d7#0", "d7#1", "d9#0", "d9#1"]
    assert one.drawn.num_rows < ROWS / 4  # little more than was asked for
    assert ids(first_drawn(one.drawn, 20, SEED)) == drawn[0][:20]
    assert one.drawn.column_names == passages().column_names


def test_all_passages_are_drawn_where_there_are_fewer(store: LocalStore) -> None:
    found = sampled(store, 3, wanted=10 * ROWS)
    assert sorted(ids(first_drawn(found.drawn, 10 * ROWS, SEED))) == sorted(ids(passages()))


def test_what_was_left_out_is_not_drawn(store: LocalStore) -> None:
    gone = [*ids(first_drawn(sampled(store, 1).drawn, 5, SEED)), "d7#1"]
    table = passages()
    rows = [
        {**{name: row.get(name) for name in EXCLUSION_SCHEMA.names}, "fragment": "1-0", "reason": "duplicate_text"}
        for row in table.to_pylist()
        if row["passage_id"] in gone
    ]
    exclusions = pa.Table.from_pylist(rows, schema=EXCLUSION_SCHEMA)
    write_fragment(store, f"{stage_folder(SELECTION, SELECTED)}/exclusions-00000.parquet", exclusions)
    found = sampled(store, 1, excluded=True)
    assert not set(gone) & {*ids(found.drawn), *ids(found.judged)}
    assert sorted(ids(found.judged)) == ["d7#0", "d9#0", "d9#1"]


def test_documents_come_along_where_passages_are_embedded_within_them(store: LocalStore) -> None:
    found = sampled(store, 3, late=True)
    assert found.documents is not None and sampled(store, 3).documents is None
    wanted = set(found.drawn.column("position").to_pylist()) | {7, 9}
    assert set(found.documents.column("position").to_pylist()) == wanted


def test_fragments_of_the_sample_are_named_by_what_they_hold(store: LocalStore) -> None:
    table = first_drawn(sampled(store, 3, wanted=1_500).drawn, 1_500, SEED)
    written = write_sample_fragments(store, STAGE, table, None)
    assert [fragment.passages for fragment in written] == [1_000, 500]
    assert [fragment.tokens for fragment in written] == [3_000, 1_500]
    reversed_rows = table.take(pa.array(np.arange(1_500)[::-1]))
    assert write_sample_fragments(store, "other-stage", reversed_rows, None) == written
    held: list[str] = []
    for fragment in written:
        one, other = (
            read_fragment(store, fragment_path(PASSAGES, stage, fragment.name)) for stage in (STAGE, "other-stage")
        )
        assert one.equals(other)
        hashes = one.column("row_hash").to_numpy()
        assert (np.diff(hashes.astype(object)) > 0).all()
        receipt = read_receipt(store, fragment_path(PASSAGES, STAGE, fragment.name))
        assert (receipt.fragment, receipt.passages) == (fragment.name, fragment.passages)
        held += ids(one)
    assert sorted(held) == sorted(ids(table))
    assert write_sample_fragments(store, STAGE, table, None) == written


def test_documents_lie_beside_fragments_that_need_them(store: LocalStore) -> None:
    found = sampled(store, 3, late=True)
    (fragment,) = write_sample_fragments(store, "late-stage", found.judged, found.documents)
    documents = read_fragment(store, documents_path("late-stage", fragment.name))
    assert set(documents.column("position").to_pylist()) == {7, 9}
    (plain,) = write_sample_fragments(store, "late-stage", found.judged, None)
    assert plain.name != fragment.name


def test_no_passages_are_no_fragments(store: LocalStore) -> None:
    assert write_sample_fragments(store, STAGE, sampled(store, 1).judged.slice(0, 0), None) == []
