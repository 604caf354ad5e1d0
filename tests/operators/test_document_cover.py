"""Shares of documents that others cover, against counting by sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.document_cover import document_shares

Incidences = list[tuple[int, int, int]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 6)), max_size=60))
def test_shares_are_those_of_sets(found: Incidences) -> None:
    passages = np.array([7, 8, 9, 10, 11])
    columns = np.array(found, np.int64).reshape(-1, 3)
    document, other, share = document_shares(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.uint64), passages)
    expected = {
        (one, two): len({passage for a, b, passage in found if (a, b) == (one, two)}) / passages[one]
        for one, two, _ in found
    }
    got = dict(zip(zip(document.tolist(), other.tolist(), strict=True), share.tolist(), strict=True))
    assert list(got) == sorted(expected) and share.dtype == np.float32
    assert all(abs(got[pair] - expected[pair]) < 1e-6 for pair in expected)


def test_a_short_document_within_a_long_one_is_covered_and_not_the_other_way() -> None:
    # both passages of document 0 are in document 1, of which they are 2 of 8
    document, other, passage = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]), np.array([1, 2, 3, 4])
    shares = document_shares(document, other, passage, np.array([2, 8]))
    assert [column.tolist() for column in shares] == [[0, 1], [1, 0], [1.0, 0.25]]
