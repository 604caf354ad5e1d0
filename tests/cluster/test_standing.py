"""Earlier decisions carried over to other fragments, against sets in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, vector_column, write_fragment
from penstock.cluster.jobs.kept import LINK_SCHEMA, links_path
from penstock.cluster.jobs.standing import (
    RANGE_ROWS,
    Carried,
    StandingJob,
    carry_decisions,
    decisions_on,
    ranges_for,
)
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import TEXT_HASH_TYPE

from .in_process import InProcess

Rows = dict[int, int]  # row hash → text


def _embeddings(store: LocalStore, name: str, rows: Rows) -> None:
    hashes = sorted(rows)
    texts = pa.array([rows[row].to_bytes(16, "little") for row in hashes], TEXT_HASH_TYPE)
    vectors = vector_column(np.ones((len(rows), 2), np.float16))
    table = pa.table({"row_hash": pa.array(hashes, pa.uint64()), "text_hash": texts, "embedding": vectors})
    write_fragment(store, fragment_path(EMBEDDINGS, "e", name), table, Receipt(name, len(rows), len(rows)))


def _links(store: LocalStore, name: str, kept: Rows, rows: Rows) -> None:
    gone = sorted(row for row in rows if kept[row] != row)
    keepers = [kept[row] for row in gone]
    columns = [gone, [str(row) for row in gone], ["d"] * len(gone), keepers, [0.95] * len(gone), keepers]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, LINK_SCHEMA, strict=True)]
    write_fragment(store, links_path("k", f"links-{name}"), pa.table(arrays, schema=LINK_SCHEMA))


def _cut(rows: Rows, cuts: list[list[int]]) -> dict[str, Rows]:
    return {
        f"{len(cut)}-{hash(tuple(sorted((row, rows[row]) for row in cut)))}": {row: rows[row] for row in cut}
        for cut in cuts
    }


@pytest.mark.parametrize("ranges", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_carried_is_what_sets_say(tmp_path: Path, seed: int, ranges: int) -> None:
    random, store = np.random.default_rng(seed), LocalStore(tmp_path)
    hashes = random.integers(0, 2**64, 240, dtype=np.uint64).tolist()
    before: Rows = {row: number for number, row in enumerate(hashes[:200])}
    stays = hashes[:60]
    kept = {row: row if row in stays else stays[random.integers(60)] for row in before}
    now = {row: text + 1000 * bool(random.random() < 0.1) for row, text in before.items() if random.random() < 0.9}
    now |= {row: 7 for row in hashes[200:]}
    now |= {row: before[row] for row in hashes[:50]}
    first = _cut(before, [hashes[:50], hashes[50:120], hashes[120:200]])
    second = _cut(
        now, [hashes[:50], [row for row in hashes[100:] if row in now], [row for row in hashes[50:100] if row in now]]
    )
    assert len(first.keys() & second.keys()) == 1
    for name, rows in (first | second).items():
        _embeddings(store, name, rows)
    for name, rows in first.items():
        _links(store, name, kept, rows)
    job = StandingJob(str(tmp_path), "s", "e", tuple(second), "k", {name: f"links-{name}" for name in first}, ranges)
    told: list[Receipt] = []
    carried = carry_decisions(InProcess(), job, told.append)
    remain = {row for row in now if before.get(row) == now[row]}
    stands = {row for row in remain if kept[row] == row}
    gone = {row for row in remain - stands if kept[row] in stands}
    assert carried == Carried(len(stands), len(gone), len(now) - len(stands) - len(gone)) and len(gone) > 20
    for name, rows in second.items():
        both = decisions_on(store, "s", name)
        assert set(both[0].column("row_hash").to_pylist()) == stands & rows.keys()
        links = dict(zip(both[1].column("row_hash").to_pylist(), both[1].column("kept_hash").to_pylist(), strict=True))
        assert links == {row: kept[row] for row in gone & rows.keys()}
    assert carry_decisions(InProcess(), job, told.append) == carried
    assert told[: len(second)] == told[len(second) :]


def test_many_rows_are_compared_in_ranges() -> None:
    assert ranges_for(0) == 1 and ranges_for(RANGE_ROWS) == 1 and ranges_for(RANGE_ROWS + 1) == 2


@pytest.mark.parametrize("lost", [10, 30])
def test_a_link_of_a_row_that_is_no_more_says_nothing_of_others(tmp_path: Path, lost: int) -> None:
    store, kept = LocalStore(tmp_path), {10: 25, 20: 20, 25: 25, 30: 20}
    rows: Rows = {row: 1 for row in kept}
    _links(store, "one", kept, rows)
    _embeddings(store, "one", {row: text for row, text in rows.items() if row != lost})  # embedded again
    job = StandingJob(str(tmp_path), "s", "e", ("one",), "k", {"one": "links-one"}, 1)
    assert carry_decisions(InProcess(), job, lambda receipt: None) == Carried(2, 1, 0)
    stands, gone = (decided.column("row_hash").to_pylist() for decided in decisions_on(store, "s", "one"))
    assert (stands, gone) == ([20, 25], [40 - lost])
