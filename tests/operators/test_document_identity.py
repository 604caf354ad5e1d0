"""One hash of all passages of a document, against hashing them one document after the other."""

import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.document_identity import document_hashes
from penstock.operators.identity import TEXT_HASH_TYPE

Passages = dict[int, tuple[int, int]]  # row → document, text


def hashed(passages: Passages, order: list[int]) -> dict[int, bytes]:
    texts = pa.chunked_array([pa.array([passages[row][1].to_bytes(16, "big") for row in order], TEXT_HASH_TYPE)])
    documents = np.array([passages[row][0] for row in order], np.uint64)
    own, digests = document_hashes(documents, np.array(order, np.uint64), texts)
    assert own.dtype == np.uint64 and digests.type == TEXT_HASH_TYPE and own.tolist() == sorted(set(own.tolist()))
    return dict(zip(own.tolist(), digests.to_pylist(), strict=True))


@given(st.dictionaries(st.integers(0, 2**64 - 1), st.tuples(st.integers(0, 3), st.integers(0, 2))), st.randoms())
def test_the_hash_of_a_document_is_that_of_its_passages_in_the_order_of_their_hashes(
    passages: Passages, random: object
) -> None:
    order = list(passages)
    random.shuffle(order)  # type: ignore[attr-defined]
    found = hashed(passages, order)
    for document, digest in found.items():
        rows = sorted(row for row in passages if passages[row][0] == document)
        data = [row.to_bytes(8, "little") for row in rows] + [passages[row][1].to_bytes(16, "big") for row in rows]
        assert digest == hashlib.blake2b(b"".join(data), digest_size=16).digest()


def test_a_passage_that_comes_goes_or_changes_changes_its_document_alone() -> None:
    passages = {1: (7, 1), 2: (7, 2), 3: (8, 1)}
    before = hashed(passages, [1, 2, 3])
    for changed in ({**passages, 4: (7, 9)}, {1: (7, 1), 3: (8, 1)}, {**passages, 2: (7, 3)}, {**passages, 5: (7, 2)}):
        after = hashed(changed, sorted(changed))
        assert after[7] != before[7] and after[8] == before[8]
