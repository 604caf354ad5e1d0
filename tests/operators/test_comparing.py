from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.comparing import (
    EXAMPLES,
    DocumentChanges,
    compare_documents,
    digest_documents,
    neighbour_churn,
)
from penstock.operators.identity import row_hashes

Documents = dict[str, list[str]]
DOCUMENTS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(st.sampled_from(["x", "y", "z"]), min_size=1), max_size=6
)


def batches(documents: Documents, size: int = 2) -> list[pa.RecordBatch]:
    rows = [(name, text) for name, texts in documents.items() for text in texts]
    table = pa.table(
        {"document_id": [name for name, _ in rows], "text": [text for _, text in rows]},
        schema=pa.schema([("document_id", pa.string()), ("text", pa.string())]),
    )
    return table.to_batches(size)


def changes(old: Documents, new: Documents, buckets: int = 1) -> dict[str, set[str]]:
    names = {int(row_hashes([name])[0]): name for name in {*old, *new}}
    found: dict[str, set[str]] = {name: set() for name in ("added", "removed", "changed", "unchanged")}
    for bucket in range(buckets):
        parts = (digest_documents(batches(one), bucket, buckets) for one in (old, new))
        for name, hashes in compare_documents(*parts).items():
            found[name] |= {names[int(value)] for value in hashes}
    return found


@given(DOCUMENTS, DOCUMENTS, st.integers(1, 4))
def test_documents_are_compared_by_the_texts_of_their_passages(old: Documents, new: Documents, buckets: int) -> None:
    common = old.keys() & new.keys()
    changed = {name for name in common if Counter(old[name]) != Counter(new[name])}
    assert changes(old, new, buckets) == {
        "added": set(new.keys() - old.keys()),
        "removed": set(old.keys() - new.keys()),
        "changed": changed,
        "unchanged": common - changed,
    }


def test_neither_order_nor_batches_of_passages_matter() -> None:
    one, other = {"a": ["x", "y", "y"]}, {"a": ["y", "x", "y"]}
    assert changes(one, other)["unchanged"] == {"a"}
    digests = [digest_documents(batches(one, size), 0, 1) for size in (1, 2, 9)]
    assert len({int(found.digests[0]) for found in digests}) == 1


def test_changes_of_buckets_add_up() -> None:
    one = DocumentChanges(1, 2, 3, 4, {"added": ("a", "c"), "changed": ("x",)})
    total = one.add(DocumentChanges(10, 20, 30, 40, {"added": ("b", "d", "e", "f")}))
    assert (total.added, total.removed, total.changed, total.unchanged) == (11, 22, 33, 44)
    assert total.examples == {"added": ("a", "b", "c", "d", "e")[:EXAMPLES], "changed": ("x",)}


def test_churn_is_the_share_of_answers_that_are_gone() -> None:
    old = np.array([["a", "b"], ["a", None], [None, None]], dtype=object)
    new = np.array([["b", "c"], ["a", "b"], ["a", "b"]], dtype=object)
    assert neighbour_churn(old, new).tolist()[:2] == [0.5, 0.0]
    assert np.isnan(neighbour_churn(old, new)[2])
