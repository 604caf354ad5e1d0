from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.deduplication import (
    DuplicateIds,
    bucket_of,
    hash_prefix,
    losing_documents,
    repeated,
    represented,
)
from penstock.operators.identity import TEXT_HASH_TYPE, hash_texts

Document = tuple[str, str, int]
Passage = tuple[str, int, bytes]

HASHES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=60)
IDS = st.sampled_from(["a", "b", "é", "e\u0301", "A", ""])
DOCUMENTS = st.lists(st.tuples(IDS, st.sampled_from(["x/1", "x/10", "x/2"]), st.integers(0, 4)), max_size=25)
KEYS = st.sampled_from(hash_texts(["one", "two", "three"]).to_pylist())
PASSAGES = st.lists(st.tuples(IDS, st.integers(0, 12), KEYS), max_size=25, unique_by=lambda row: row[:2])
KEEPING = st.sampled_from([DuplicateIds.FIRST, DuplicateIds.LAST])


def _documents(rows: list[Document]) -> pa.Table:
    return pa.table(
        {
            "document_id": pa.array([document for document, _, _ in rows], pa.string()),
            "source": pa.array([source for _, source, _ in rows], pa.string()),
            "position": pa.array([position for _, _, position in rows], pa.int64()),
        }
    )


def _passages(rows: list[Passage]) -> pa.Table:
    return pa.table(
        {
            "passage_id": pa.array([f"{document}#{ordinal}" for document, ordinal, _ in rows], pa.string()),
            "document_id": pa.array([document for document, _, _ in rows], pa.string()),
            "ordinal": pa.array([ordinal for _, ordinal, _ in rows], pa.int32()),
            "normal_hash": pa.array([key for _, _, key in rows], TEXT_HASH_TYPE),
        }
    )


def _in_pieces(table: pa.Table, cuts: list[int]) -> pa.Table:
    """The same rows, in chunks that are slices."""
    bounds = [0, *sorted(min(cut, table.num_rows) for cut in cuts), table.num_rows]
    return pa.concat_tables([table.slice(start, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)])


def _rows(table: pa.Table) -> list[Document]:
    return sorted((row["document_id"], row["source"], row["position"]) for row in table.to_pylist())


@given(DOCUMENTS, KEEPING, st.lists(st.integers(0, 25), max_size=3))
def test_losing_documents_equal_brute_force(rows: list[Document], policy: DuplicateIds, cuts: list[int]) -> None:
    losers = losing_documents(_in_pieces(_documents(rows), cuts), policy)
    best = min if policy is DuplicateIds.FIRST else max
    expected = [
        row for row in rows if row[1:] != best((other[1:] for other in rows if other[0] == row[0]), key=_byte_order)
    ]
    assert _rows(losers) == sorted(expected)


def _byte_order(place: tuple[str, int]) -> tuple[bytes, int]:
    return place[0].encode(), place[1]


@given(DOCUMENTS, KEEPING, st.randoms())
def test_losing_documents_do_not_depend_on_order(rows: list[Document], policy: DuplicateIds, random: Random) -> None:
    losers = _rows(losing_documents(_documents(rows), policy))
    random.shuffle(rows)
    assert _rows(losing_documents(_documents(rows), policy)) == losers


def test_several_rows_of_one_document_do_not_compete() -> None:
    rows = [("a", "x", 1), ("a", "x", 1), ("b", "x", 2), ("b", "y", 0), ("b", "y", 0)]
    first = losing_documents(_documents(rows), DuplicateIds.FIRST)
    assert _rows(first) == [("b", "y", 0), ("b", "y", 0)]
    assert _rows(losing_documents(_documents(rows), DuplicateIds.LAST)) == [("b", "x", 2)]


def test_the_error_policy_has_no_losers() -> None:
    with pytest.raises(ValueError, match="policy must be first or last here"):
        losing_documents(_documents([]), DuplicateIds.ERROR)


@given(PASSAGES, st.lists(st.integers(0, 25), max_size=3))
def test_represented_passages_equal_brute_force(rows: list[Passage], cuts: list[int]) -> None:
    found = represented(_in_pieces(_passages(rows), cuts), "normal_hash")
    expected = {}
    for document, ordinal, key in rows:
        stays = min((other for other in rows if other[2] == key), key=lambda other: (other[0].encode(), other[1]))
        if stays[:2] != (document, ordinal):
            expected[f"{document}#{ordinal}"] = f"{stays[0]}#{stays[1]}"
    assert dict(_links(found)) == expected
    assert len(_links(found)) == len(expected)


@given(PASSAGES, st.randoms())
def test_represented_passages_do_not_depend_on_order(rows: list[Passage], random: Random) -> None:
    links = sorted(_links(represented(_passages(rows), "normal_hash")))
    random.shuffle(rows)
    assert sorted(_links(represented(_passages(rows), "normal_hash"))) == links


def test_ordinals_are_compared_as_numbers() -> None:
    key = hash_texts(["same"]).to_pylist()[0]
    found = represented(_passages([("a", 10, key), ("a", 9, key)]), "normal_hash")
    assert _links(found) == [("a#10", "a#9")]


def _links(table: pa.Table) -> list[tuple[str, str]]:
    return [(row["passage_id"], row["represented_by"]) for row in table.to_pylist()]


@given(HASHES)
def test_repeated_equals_brute_force(hashes: list[int]) -> None:
    found = repeated(np.array(hashes, dtype=np.uint64))
    assert found.tolist() == sorted({value for value in hashes if hashes.count(value) > 1})


@given(HASHES, st.integers(1, 9))
def test_buckets_partition_the_rows_and_their_union_equals_the_whole(hashes: list[int], buckets: int) -> None:
    values = np.array(hashes, dtype=np.uint64)
    places = bucket_of(values, buckets)
    assert places.tolist() == [value % buckets for value in hashes]
    parts = [repeated(values[places == bucket]).tolist() for bucket in range(buckets)]
    assert sorted(sum(parts, [])) == repeated(values).tolist()


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_hash_prefix_reads_sliced_and_chunked_columns(values: list[bytes], cut: int, start: int) -> None:
    whole = pa.array(values, TEXT_HASH_TYPE)
    column = pa.chunked_array([whole.slice(0, cut), whole.slice(cut)], TEXT_HASH_TYPE)
    expected = [int.from_bytes(value[:8], "little") for value in values]
    assert hash_prefix(column).tolist() == expected
    assert hash_prefix(column.slice(start, 5)).tolist() == expected[start : start + 5]
    assert hash_prefix(pa.chunked_array([whole.slice(start)], TEXT_HASH_TYPE)).tolist() == expected[start:]


def test_hash_prefix_of_no_rows_is_empty() -> None:
    found = hash_prefix(pa.chunked_array([], TEXT_HASH_TYPE))
    assert found.dtype == np.uint64 and len(found) == 0
