"""Rows that should be there and rows that are, against counting one by one."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.coverage import EXAMPLES, RowCoverage, compare_rows, in_range

LAST = 2**64 - 1
HASHES = st.lists(st.integers(0, 12).map(lambda one: one * LAST // 12), max_size=16)


def array(hashes: list[int]) -> np.ndarray:
    return np.array(hashes, np.uint64)


@given(HASHES, HASHES, HASHES)
def test_rows_are_counted_as_one_by_one(expected: list[int], built: list[int], embedded: list[int]) -> None:
    wanted, present = set(expected), Counter(built)
    found = compare_rows(array(expected), array(built), array(embedded))
    assert (found.expected, found.rows) == (len(wanted), len(built))
    assert found.missing == len(wanted - present.keys())
    assert found.foreign == len(present.keys() - wanted)
    assert found.doubled == sum(count - 1 for count in present.values())
    assert found.of_model == len(present.keys() & set(embedded))
    assert found.without_vector == len(present.keys() - set(embedded))
    assert bool(found.examples) == bool(found.wrong())
    assert len(found.examples) <= 4 * EXAMPLES


@given(HASHES, HASHES, st.integers(0, LAST - 1))
def test_ranges_add_up_to_the_whole(expected: list[int], built: list[int], cut: int) -> None:
    whole = compare_rows(array(expected), array(built), array(built))
    parts = [
        compare_rows(*(in_range(array(hashes), first, last) for hashes in (expected, built, built)))
        for first, last in ((0, cut), (cut + 1, LAST))
    ]
    together = parts[0].add(parts[1])
    assert together.wrong() == whole.wrong()
    assert (together.rows, together.expected, together.of_model) == (whole.rows, whole.expected, whole.of_model)


def test_one_missing_and_one_doubled_do_not_cancel() -> None:
    found = compare_rows(array([1, 2, 3]), array([1, 3, 3]), array([1, 2, 3]))
    assert found.rows == found.expected == 3
    assert found.wrong() == {"missing": 1, "doubled": 1} and found.examples == (2, 3)
    assert found.named({2: "b"}).names == ("b",)
    assert RowCoverage().add(found) == found and RowCoverage().wrong() == {}
