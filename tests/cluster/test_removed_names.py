"""The table of what went by meaning, by ids."""

from pathlib import Path

import pyarrow as pa
import pytest

from penstock.cluster.fragments import read_fragment, write_fragment
from penstock.cluster.jobs.kept import LINK_SCHEMA, links_path
from penstock.cluster.jobs.removed_names import NAMED_ROWS, NAMES_SCHEMA, NamesTask, name_ranges, write_names
from penstock.cluster.layout import EMBEDDINGS, KEPT, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import row_hashes

FRAGMENTS = ("one", "two", "none")
STAYS = {"one": ["a#0", "b#0"], "two": ["c#0"], "none": []}
WENT = {"one": {"d#0": "c#0", "e#0": None}, "two": {"f#0": "a#0", "g#0": "a#0", "h#0": "b#0"}, "none": {}}


def written(root: Path) -> LocalStore:
    store = LocalStore(root)
    for fragment in FRAGMENTS:
        stays = pa.table(
            {"row_hash": row_hashes(STAYS[fragment]), "passage_id": pa.array(STAYS[fragment], pa.string())}
        )
        write_fragment(store, fragment_path(EMBEDDINGS, "k", fragment), stays.sort_by("row_hash"))
        rows = [
            {
                "row_hash": int(row_hashes([name])[0]),
                "id": name,
                "document_id": name[0],
                "kept_hash": None if kept is None else int(row_hashes([kept])[0]),
                "similarity": None if kept is None else 0.9,
                "group": 1,
            }
            for name, kept in WENT[fragment].items()
        ]
        links = pa.Table.from_pylist(rows, schema=LINK_SCHEMA).sort_by("row_hash")
        write_fragment(store, links_path("k", fragment), links)
    return store


@pytest.mark.parametrize("ranges", [1, 3])
def test_what_went_is_named_with_what_stays_for_it(tmp_path: Path, ranges: int) -> None:
    store = written(tmp_path)
    counts = [write_names(NamesTask(str(tmp_path), "k", FRAGMENTS, number, ranges)) for number in range(ranges)]
    paths = [fragment_path(KEPT, "k", f"removed-{number:05d}") for number in range(ranges)]
    found = pa.concat_tables([read_fragment(store, path).replace_schema_metadata() for path in paths])
    assert sum(counts) == found.num_rows and found.schema == NAMES_SCHEMA
    expected = {name: kept for links in WENT.values() for name, kept in links.items()}
    named = {row["removed_id"]: row["kept_id"] for row in found.to_pylist()}
    assert named == expected and found.num_rows == len(expected)
    assert [row["similarity"] is None for row in found.to_pylist()] == [
        row["kept_id"] is None for row in found.to_pylist()
    ]


def test_a_link_to_a_row_that_does_not_stay_is_an_error(tmp_path: Path) -> None:
    store = written(tmp_path)
    stays = pa.table({"row_hash": row_hashes(["b#0"]), "passage_id": ["b#0"]})
    write_fragment(store, fragment_path(EMBEDDINGS, "k", "one"), stays)
    with pytest.raises(ValueError, match=r"links of k \(2 rows\) must be to rows that stay"):
        write_names(NamesTask(str(tmp_path), "k", FRAGMENTS, 0, 1))


def test_ranges_hold_about_as_many_rows() -> None:
    assert (name_ranges(0), name_ranges(NAMED_ROWS), name_ranges(NAMED_ROWS + 1)) == (1, 1, 2)
