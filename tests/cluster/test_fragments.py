from itertools import pairwise
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.cluster import fragments
from penstock.cluster.fragments import (
    ROW_GROUP_ROWS,
    Receipt,
    group_ends,
    open_fragment,
    read_fragment,
    read_hash_range,
    read_receipt,
    vector_column,
    vectors_of,
    write_fragment,
)
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store

LARGEST = 2**64 - 1
RECEIPT = Receipt("f" * 32, 100, 90, {"empty_text": 7, "null_id": 3}, passages=120, tokens=3000, truncated_tokens=4)
HASHES = st.integers(0, LARGEST) | st.sampled_from([0, 1, 2**63 - 1, 2**63, LARGEST - 1, LARGEST])


def _table(rows: int, dimension: int = 4, seed: int = 1) -> pa.Table:
    """Embeddings whose hashes fill the whole range of uint64, its ends included, in ascending order."""
    random = np.random.default_rng(seed)
    hashes = np.sort(random.integers(0, LARGEST, rows, dtype=np.uint64, endpoint=True))
    hashes[:1], hashes[rows - 1 :] = 0, LARGEST
    vectors = random.standard_normal((rows, dimension)).astype(np.float16)
    return pa.table(
        {
            "passage_id": [f"passage-{row}" for row in range(rows)],
            "row_hash": pa.array(hashes, pa.uint64()),
            "embedding": vector_column(vectors),
        }
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return LocalStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def large(local: Store) -> pa.Table:
    """Four full row groups and a part of one, at `large`, with hashes repeated across the ends of two row groups."""
    table = _table(4 * ROW_GROUP_ROWS + 1000)
    hashes = table.column("row_hash").to_numpy().copy()
    for end in (ROW_GROUP_ROWS, 3 * ROW_GROUP_ROWS):
        hashes[end - 2 : end + 2] = hashes[end]
    table = table.set_column(1, "row_hash", pa.array(hashes))
    write_fragment(local, "large", table, RECEIPT)
    return table


def _filtered(table: pa.Table, first: int, last: int) -> list[str]:
    rows = zip(table.column("row_hash").to_pylist(), table.column("passage_id").to_pylist(), strict=True)
    return [passage for row_hash, passage in rows if first <= row_hash <= last]


def _in_range(store: Store, path: str, first: int, last: int) -> list[str]:
    ids: list[str] = read_hash_range(store, path, first, last, ["passage_id"]).column("passage_id").to_pylist()
    return ids


# ---- round trip


def test_a_fragment_reads_back_as_it_was_written(store: Store) -> None:
    table = _table(50)
    written = write_fragment(store, "stages/a/b.parquet", table, RECEIPT)
    found = read_fragment(store, "stages/a/b.parquet")
    assert found.replace_schema_metadata() == table
    assert found.schema.types == table.schema.types
    info = store.info("stages/a/b.parquet")
    assert info is not None and info.size_bytes == written
    assert read_receipt(store, "stages/a/b.parquet") == RECEIPT


def test_columns_are_read_alone(local: Store, large: pa.Table) -> None:
    assert read_fragment(local, "large", ["row_hash"]).column_names == ["row_hash"]
    assert read_fragment(local, "large", []).num_columns == 0


@pytest.mark.parametrize("receipt", [RECEIPT, Receipt("x", 0, 0), Receipt("né", 1, 0, {"b": 1, "a": 0})])
def test_receipts_round_trip(receipt: Receipt) -> None:
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_equal_tables_give_equal_bytes(local: Store) -> None:
    table = _table(3000)
    pieces = pa.concat_tables([table.slice(0, 7), table.slice(7, 2000), table.slice(2007)])
    stray = table.replace_schema_metadata({"made by": "another run"})
    contents = []
    for number, same in enumerate([table, _table(3000), pieces, stray]):
        write_fragment(local, f"same-{number}", same, RECEIPT)
        contents.append(local.read(f"same-{number}"))
    assert len(set(contents)) == 1
    write_fragment(local, "other", _table(3000, seed=2), RECEIPT)
    assert local.read("other") != contents[0]


def test_row_groups_have_their_size(local: Store, large: pa.Table) -> None:
    with open_fragment(local, "large") as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    assert sizes == [ROW_GROUP_ROWS] * 4 + [1000]


# ---- damage


def test_a_flipped_byte_is_never_read_as_another_value(local: Store) -> None:
    """Anywhere but in the footer, which has no checksum of its own."""
    table = _table(400, dimension=8)
    write_fragment(local, "whole", table, RECEIPT)
    content = local.read("whole")
    random = Random(7)
    footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    offsets = sorted(random.sample(range(len(content) - footer_bytes), 300))
    refused = 0
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << random.randrange(8)
        local.write("damaged", bytes(damaged))
        try:
            found = read_fragment(local, "damaged")
        except (OSError, pa.ArrowException):
            refused += 1
        else:
            assert found.replace_schema_metadata() == table, f"byte {offset} of {len(content)} read back silently wrong"
    assert refused > 0.9 * len(offsets)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_fragment_is_refused(local: Store, large: pa.Table, share: float) -> None:
    content = local.read("large")
    local.write("cut", content[: int(len(content) * share)])
    with pytest.raises((OSError, pa.ArrowException)):
        read_fragment(local, "cut")


# ---- ranges of hashes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HASHES, HASHES)
def test_a_range_equals_a_filter(local: Store, large: pa.Table, one: int, other: int) -> None:
    first, last = min(one, other), max(one, other)
    assert _in_range(local, "large", first, last) == _filtered(large, first, last)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 400), max_size=12), st.integers(1, 300))
def test_rows_are_grouped_by_value(local: Store, counts: list[int], least: int) -> None:
    values = np.repeat(np.arange(len(counts)), counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "LEAST_GROUP_ROWS", least)
        ends = group_ends(values)
        write_fragment(local, "grouped", pa.table({"part": values, "row": np.arange(len(values))}), None, "part")
    assert ends[-1] == len(values) and ends == sorted(ends)
    sizes = np.diff(ends, prepend=0)
    assert all(size >= least for size in sizes[:-1]) and all(values[end - 1] != values[end] for end in ends[:-1])
    for number, count in enumerate(counts):  # a value that has enough rows begins with a row group or follows few
        assert (
            count == 0
            or int(np.searchsorted(values, number))
            - max([0, *(end for end in ends if end <= np.searchsorted(values, number))])
            < least
        )
    assert read_fragment(local, "grouped").column("row").to_pylist() == list(range(len(values)))


def test_a_range_that_ends_at_a_row_group_equals_a_filter(local: Store, large: pa.Table) -> None:
    hashes = large.column("row_hash").to_pylist()
    ends = [hashes[end + step] for end in range(ROW_GROUP_ROWS, len(hashes), ROW_GROUP_ROWS) for step in (-1, 0)]
    bounds = sorted({0, LARGEST, *ends, *(end + 1 for end in ends), *(end - 1 for end in ends)})
    for first, last in [*pairwise(bounds), *((bound, bound) for bound in bounds)]:
        assert _in_range(local, "large", first, last) == _filtered(large, first, last)


def test_ranges_that_touch_hold_every_row_once(local: Store, large: pa.Table) -> None:
    bounds = [0, 2**62, 2**63, 2**63 + 2**62, LARGEST + 1]
    parts = [_in_range(local, "large", start, stop - 1) for start, stop in pairwise(bounds)]
    assert sum(parts, []) == large.column("passage_id").to_pylist()


def test_statistics_of_large_hashes_prune_row_groups(local: Store, large: pa.Table) -> None:
    """Damage in the first row groups is not noticed by a reader of the last one: it does not read them."""
    content = bytearray(local.read("large"))
    with open_fragment(local, "large") as file:
        for group in range(3):
            for column in range(file.metadata.num_columns):
                place = file.metadata.row_group(group).column(column)
                start = place.dictionary_page_offset or place.data_page_offset
                content[start : start + 64] = bytes(64)
    local.write("damaged-start", bytes(content))
    first = large.column("row_hash")[4 * ROW_GROUP_ROWS].as_py()
    assert first > 2**63
    assert _in_range(local, "damaged-start", first, LARGEST) == _filtered(large, first, LARGEST)
    with pytest.raises((OSError, pa.ArrowException)):
        _in_range(local, "damaged-start", 0, 2**62)


@pytest.mark.parametrize(("first", "last"), [(0, LARGEST), (5, 7), (LARGEST, LARGEST)])
def test_a_range_of_an_empty_fragment_is_empty(local: Store, first: int, last: int) -> None:
    write_fragment(local, "empty", _table(2).slice(0, 0), RECEIPT)
    found = read_hash_range(local, "empty", first, last, ["passage_id", "embedding"])
    assert found.num_rows == 0 and set(found.column_names) == {"row_hash", "passage_id", "embedding"}
    assert vectors_of(found.column("embedding")).shape == (0, 4)
    assert read_receipt(local, "empty") == RECEIPT


def test_a_range_between_row_groups_is_empty_and_keeps_its_columns(local: Store) -> None:
    table = _table(2)
    write_fragment(local, "gap", table)
    found = read_hash_range(local, "gap", 1, LARGEST - 1, ["embedding"])
    assert found.num_rows == 0 and vectors_of(found.column("embedding")).shape == (0, 4)


def test_the_hash_column_may_stand_behind_nested_ones(local: Store) -> None:
    table = _table(3 * ROW_GROUP_ROWS)
    nested = pa.table({"pair": pa.array([{"a": 1, "b": 2}] * table.num_rows)})
    for name in ("embedding", "row_hash", "passage_id"):
        nested = nested.append_column(name, table.column(name))
    write_fragment(local, "nested", nested)
    middle = table.column("row_hash")[ROW_GROUP_ROWS].as_py()
    assert _in_range(local, "nested", middle, LARGEST) == _filtered(table, middle, LARGEST)
    assert _in_range(local, "nested", 0, middle) == _filtered(table, 0, middle)


# ---- vectors


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("cuts", [[], [0], [3], [1, 1, 9], [10]])
def test_vectors_of_sliced_and_chunked_columns(dtype: type[np.floating], cuts: list[int]) -> None:
    vectors = np.random.default_rng(3).standard_normal((10, 5)).astype(dtype)
    whole = vector_column(vectors)
    bounds = [0, *cuts, 10]
    column = pa.chunked_array([whole.slice(start, stop - start) for start, stop in pairwise(bounds)])
    for start, rows in [(0, 10), (2, 3), (7, 3), (9, 0)]:
        found = vectors_of(column.slice(start, rows))
        assert found.dtype == dtype and np.array_equal(found, vectors[start : start + rows])


def test_one_chunk_is_not_copied() -> None:
    array = vector_column(np.ones((10, 5), np.float32))
    found = vectors_of(pa.chunked_array([array]).slice(2))
    assert found.__array_interface__["data"][0] == array.values.buffers()[1].address + 2 * 5 * 4


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_rows_give_an_array_of_the_dimension(dtype: type[np.floating]) -> None:
    empty = vector_column(np.empty((0, 7), dtype))
    for column in (pa.chunked_array([empty]), pa.chunked_array([], empty.type)):
        assert vectors_of(column).shape == (0, 7) and vectors_of(column).dtype == dtype


def test_vectors_that_are_no_contiguous_array_are_stored_by_value() -> None:
    vectors = np.arange(60, dtype=np.float32).reshape(10, 6)[::2, ::2]
    assert np.array_equal(vectors_of(pa.chunked_array([vector_column(vectors)])), vectors)


def test_vectors_are_stored_without_dictionaries(local: Store) -> None:
    """Which would cost six times the CPU time to read, and space; ids and hashes stay as they are."""
    table = _table(1000, dimension=384)
    write_fragment(local, "encodings", table)
    with open_fragment(local, "encodings") as file:
        group = file.metadata.row_group(0)
        encodings = {
            group.column(place).path_in_schema: group.column(place).encodings for place in range(group.num_columns)
        }
    assert "BYTE_STREAM_SPLIT" in encodings["embedding.list.element"]
    assert "RLE_DICTIONARY" not in encodings["embedding.list.element"]
    assert "RLE_DICTIONARY" in encodings["passage_id"]
    assert read_fragment(local, "encodings").equals(table)
