import hashlib
import json
from enum import StrEnum
from random import Random
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.identity import canonical_json, fingerprint, fingerprint_set, hash_texts, row_hashes

LONE_SURROGATE = "\ud800"
PINNED_ROW_HASHES = [5214342244617052049, 16476032584258269876, 10941676874114079976, 12724256827670563740]
PINNED_TEXT_HASHES = [
    "cae66941d9efbd404e4d88758ea67670",
    "68b14c8f7a151e50b900bbfa22ccc342",
    "c90413a25cc9dc4a0ad2be276b3ef651",
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Colour(StrEnum):
    RED = "red"


@given(PLAIN)
def test_canonical_json_is_json_of_the_same_value(value: object) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), PLAIN, max_size=6), st.randoms())
def test_key_order_never_matters(value: dict[str, object], random: Random) -> None:
    keys = list(value)
    random.shuffle(keys)
    assert canonical_json({key: value[key] for key in keys}) == canonical_json(value)


def test_the_text_has_no_spaces_sorted_keys_and_plain_utf8() -> None:
    assert canonical_json({"b": [1, 2.0, None], "a": "né\n"}) == '{"a":"né\\n","b":[1,2.0,null]}'.encode()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [1, {"b": float("nan")}]}, r"\$\.a\[1\]\.b \(nan\) is not a finite number"),
        ([float("-inf")], r"\$\[0\] \(-inf\) is not a finite number"),
        ({"a": {1, 2}}, r"\$\.a is a set: turn it into plain data"),
        ({"a": (b"x",)}, r"\$\.a\[0\] is a bytes"),
        (object(), r"\$ is a object"),
        ({"a": np.int64(3)}, r"\$\.a is a int64"),
        ({"a": np.zeros(2)}, r"\$\.a is a ndarray"),
        ({"a": {1: 2}}, r"\$\.a has the key 1: keys of an identity are strings"),
        ({"a": {None: 2}}, r"\$\.a has the key None"),
        ({"a": "x" + LONE_SURROGATE}, r"\$\.a \('x\\ud800'\) holds half a surrogate pair"),
        ({"a": {LONE_SURROGATE: 1}}, r"\$\.a \('\\ud800'\) holds half a surrogate pair"),
    ],
)
def test_what_has_no_single_text_is_refused_with_its_path(value: object, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        canonical_json(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0, None), ("1", 1), (0.0, -0.0), ("", None), ([], {}), ("é", "e\u0301"), ([1, 2], [2, 1])],
)
def test_values_that_differ_have_different_fingerprints(one: object, other: object) -> None:
    assert fingerprint(value=one) != fingerprint(value=other)


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 2), [1, 2]), (Colour.RED, "red"), (MappingProxyType({"a": 1}), {"a": 1}), (1e3, 1000.0)],
)
def test_forms_of_one_value_have_one_fingerprint(one: object, other: object) -> None:
    assert fingerprint(value=one) == fingerprint(value=other)


def test_a_fingerprint_is_128_bits_of_sha256() -> None:
    assert fingerprint(b=[1], a="x") == hashlib.sha256(b'{"a":"x","b":[1]}').hexdigest()[:32]


@given(st.lists(st.text("0123456789abcdef", min_size=4, max_size=8)), st.randoms())
def test_a_set_fingerprint_is_free_of_order(members: list[str], random: Random) -> None:
    expected = hashlib.sha256("".join(f"{member}\n" for member in sorted(members)).encode()).hexdigest()[:32]
    random.shuffle(members)
    assert fingerprint_set(members) == expected


def test_set_fingerprints_tell_sets_apart() -> None:
    sets: list[list[str]] = [[], ["a"], ["a", "b"], ["ab"], ["a", "a"]]
    assert len({fingerprint_set(members) for members in sets}) == len(sets)


@given(st.lists(st.text()))
def test_row_hashes_are_blake2b_64_big_endian(ids: list[str]) -> None:
    found = row_hashes(ids)
    expected = [int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "big") for row_id in ids]
    assert found.tolist() == expected
    assert found.dtype == np.uint64 and found.dtype.isnative


def test_row_hashes_of_a_few_ids_never_change() -> None:
    """Part of the format: they order the rows of every stored file and place them in shards."""
    ids = ["document-1#0", "", "né#12", "numpy/linalg.py:norm#3"]
    assert row_hashes(ids).tolist() == PINNED_ROW_HASHES


@given(st.lists(st.text()))
def test_text_hashes_are_blake2b_128(texts: list[str]) -> None:
    found = hash_texts(texts)
    assert found.type == pa.binary(16)
    assert found.to_pylist() == [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]


def test_text_hashes_of_a_few_texts_never_change() -> None:
    assert [value.hex() for value in hash_texts(["", "a passage", "né"]).to_pylist()] == PINNED_TEXT_HASHES


def test_hashes_compare_bytes_and_normalise_nothing() -> None:
    texts = ["é", "e\u0301", "a", "a ", "\ufeffa", "a\0", "\u200fa"]
    assert len(set(row_hashes(texts).tolist())) == len(set(hash_texts(texts).to_pylist())) == len(texts)


def test_text_that_utf8_cannot_hold_is_refused_by_the_hashes() -> None:
    with pytest.raises(UnicodeEncodeError):
        row_hashes([LONE_SURROGATE])
    with pytest.raises(UnicodeEncodeError):
        hash_texts([LONE_SURROGATE])
