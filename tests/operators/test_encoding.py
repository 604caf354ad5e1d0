from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.encoding import (
    MAY_BE_FILLED,
    MOST_PADDING,
    NON_FINITE,
    OVERFLOW,
    VECTOR,
    ZERO,
    Backend,
    Effort,
    Encoded,
    Encoder,
    ModelMismatch,
    Precision,
    check_same_model,
    encoder_for,
    even_batches,
    padded_lengths,
    token_batches,
    unit_length,
    vector_faults,
)
from penstock.operators.models import ModelCard

CARD = ModelCard(
    reference="/models/mine",
    weights_hash="w" * 64,
    tokenizer_hash="t" * 64,
    configuration_hash="c" * 64,
    dimension=384,
    max_tokens=256,
    special_tokens=2,
    query_prompt="query: ",
    document_prompt="passage: ",
)
ENCODER = encoder_for(CARD, prompt="", dimension=384, normalize=True)
# What may differ between two encoders whose vectors are the same: where the model lies, and how it is run.
NO_PART_OF_IDENTITY = {"model": "/other/folder", "batch_tokens": 64, "trust_remote_code": True, "special_tokens": 3}
PART_OF_IDENTITY: dict[str, object] = {
    "weights_hash": "x",
    "tokenizer_hash": "x",
    "configuration_hash": "x",
    "max_tokens": 128,
    "dimension": 100,
    "normalize": False,
    "precision": Precision.BFLOAT16,
    "layers": 3,
    "backend": Backend.OPENVINO,
}


def test_the_descriptor_is_that_of_the_card_with_its_options() -> None:
    found = encoder_for(
        CARD, prompt="passage: ", dimension=128, normalize=False, precision=Precision.FLOAT16, batch_tokens=99, layers=2
    )
    assert (found.model, found.max_tokens, found.special_tokens) == (CARD.reference, 256, 2)
    assert (found.prompt, found.dimension, found.normalize) == ("passage: ", 128, False)
    assert (found.precision, found.batch_tokens, found.layers) == (Precision.FLOAT16, 99, 2)
    assert not found.trust_remote_code and found.backend is Backend.TORCH
    with pytest.raises(TypeError, match="batch_size"):
        encoder_for(CARD, prompt="", dimension=384, normalize=True, batch_size=3)


def test_the_identity_of_vectors_leaves_out_where_and_how_fast() -> None:
    elsewhere = replace(ENCODER, **NO_PART_OF_IDENTITY)  # type: ignore[arg-type]
    assert elsewhere.fingerprint() == ENCODER.fingerprint() and elsewhere.space == ENCODER.space


def test_the_identity_of_vectors_has_all_that_changes_them() -> None:
    others = [replace(ENCODER, **{name: value}) for name, value in PART_OF_IDENTITY.items()]  # type: ignore[arg-type]
    prompted = replace(ENCODER, prompt="query: ")
    assert len({other.fingerprint() for other in [ENCODER, prompted, *others]}) == len(PART_OF_IDENTITY) + 2
    assert len({other.space for other in [ENCODER, *others]}) == len(PART_OF_IDENTITY) + 1
    assert prompted.space == ENCODER.space


def test_the_task_is_part_of_the_identity_but_not_of_the_space() -> None:
    """As the prompt: a model that routes by task makes other vectors for queries, of the same space."""
    queries = replace(ENCODER, task="query")
    assert queries.fingerprint() != ENCODER.fingerprint() and queries.space == ENCODER.space


def test_each_field_is_known_to_be_part_of_the_identity_or_not() -> None:
    known = {*NO_PART_OF_IDENTITY, *PART_OF_IDENTITY, "prompt", "task"}
    assert {field.name for field in fields(Encoder)} == known


@pytest.mark.parametrize("name", ["weights_hash", "tokenizer_hash", "configuration_hash"])
def test_another_model_is_refused_naming_both(name: str) -> None:
    wanted = replace(ENCODER, **{name: "0123456789abcdef" * 4})  # type: ignore[arg-type]
    with pytest.raises(
        ModelMismatch,
        match=rf"{name} of the model \(/models/mine\) must be 0123456789abcdef, .* got {name[0] * 16}; supply",
    ):
        check_same_model(wanted, CARD)
    check_same_model(ENCODER, replace(CARD, reference="elsewhere"))


def test_efforts_add_up() -> None:
    total = Effort(tokens=1, busy_s=0.5, restarts=1)
    total.add(Effort(tokens=2, padded_tokens=4, busy_s=0.25, wall_s=1.0, flops=3.0, budget_halvings=1))
    assert total == Effort(3, 4, 0.75, 1.0, 3.0, 1, 1)


def test_vectors_are_the_column_of_that_name() -> None:
    vectors, counts = np.eye(2, dtype=np.float32), np.ones(2, np.int32)
    assert Encoded({VECTOR: vectors}, counts, counts, {}, Effort()).vectors is vectors


@given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 2000))
def test_token_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = _batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(padded, batches, strict=True))
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(lengths, reverse=True)


@given(lengths=st.lists(st.integers(0, 300), max_size=60), budget=st.integers(1, 2000), most=st.integers(1, 256))
def test_even_batches_hold_every_row_once_and_one_padded_length(lengths: list[int], budget: int, most: int) -> None:
    cut = np.minimum(np.array(lengths, np.int32), most)
    padded = padded_lengths(cut, most)
    batches = list(even_batches(padded, budget, 7))
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        length = int(padded[batch[0]])
        assert (padded[batch] == length).all() and len(batch) <= 7
        assert len(batch) * length <= budget or len(batch) == 1


@pytest.mark.parametrize(
    ("length", "most", "expected"), [(0, 256, 8), (8, 256, 8), (9, None, 16), (250, 254, 254), (254, 254, 254)]
)
def test_a_padded_length_is_the_next_multiple_within_the_window(length: int, most: int | None, expected: int) -> None:
    assert padded_lengths(np.array([length]), most).tolist() == [expected]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 5000), st.integers(1, 20) | st.none())
def test_token_batches_are_full_or_end_where_much_would_be_padded(
    lengths: list[int], budget: int, most_rows: int | None
) -> None:
    batches = _batches(lengths, budget, most_rows)
    for batch, later in zip(batches, [*batches[1:], None], strict=True):
        longest, shortest = lengths[batch[0]], lengths[batch[-1]]
        room = min(max(budget // longest, 1), most_rows or len(lengths))
        assert len(batch) <= room
        if later and len(batch) < room:
            assert lengths[later[0]] < (1 - MOST_PADDING) * longest
        if len(batch) > max(room // MAY_BE_FILLED, 1):
            assert shortest >= (1 - MOST_PADDING) * longest
    sizes = [len(batch) for batch in batches[:-1]]
    rooms = [min(max(budget // lengths[batch[0]], 1), most_rows or len(lengths)) for batch in batches[:-1]]
    left = [len(lengths) - sum(sizes[:number]) for number in range(len(sizes))]
    assert all(size >= min(room, rest) // MAY_BE_FILLED for size, room, rest in zip(sizes, rooms, left, strict=True))


def test_texts_of_one_length_fill_batches() -> None:
    assert [len(batch) for batch in _batches([10] * 25, 100)] == [10, 10, 5]
    assert [len(batch) for batch in _batches([10] * 25, 100, 8)] == [8, 8, 8, 1]
    assert _batches([], 100) == []


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_texts_of_one_length_keep_their_order(lengths: list[int], budget: int) -> None:
    rows = [row for batch in _batches(lengths, budget) for row in batch]
    assert rows == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def _batches(lengths: list[int], budget: int, most_rows: int | None = None) -> list[list[int]]:
    return [batch.tolist() for batch in token_batches(np.array(lengths, dtype=np.int32), budget, most_rows)]


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), max_size=8))
def test_unit_length_scales_rows_and_leaves_zero_alone(rows: list[list[float]]) -> None:
    vectors = np.array(rows, dtype=np.float32).reshape(-1, 3)
    before = vectors.copy()
    found = unit_length(vectors)
    norms = np.linalg.norm(vectors, axis=1)
    expected = np.where(norms > 1e-12, 1.0, np.linalg.norm(found, axis=1))
    assert np.allclose(np.linalg.norm(found, axis=1), expected, atol=1e-5)
    assert np.array_equal(vectors, before) and found.dtype == np.float32


def test_faulty_vectors_are_named_by_row() -> None:
    rows = {
        0: ([1.0, 2.0], None),
        1: ([np.nan, 1.0], NON_FINITE),
        2: ([np.inf, 1.0], NON_FINITE),
        3: ([-np.inf, np.nan], NON_FINITE),
        4: ([0.0, -0.0], ZERO),
        5: ([65504.0, 1.0], None),
        6: ([65536.0, 1.0], OVERFLOW),
        7: ([1.0, -1e18], OVERFLOW),
        8: ([3e-8, 0.0], None),
        9: ([2e-8, -1e-8], ZERO),
        10: ([1e-44, 0.0], ZERO),
    }
    vectors = np.array([row for row, _ in rows.values()], dtype=np.float32)
    half = np.dtype(np.float16)
    assert vector_faults(vectors, half) == {row: reason for row, (_, reason) in rows.items() if reason}
    with np.errstate(over="ignore"):
        stored = vectors.astype(half)
    kept = [row for row in rows if row not in vector_faults(vectors, half)]
    assert np.isfinite(stored[kept]).all() and stored[kept].any(axis=1).all()


def test_full_precision_holds_what_half_does_not() -> None:
    vectors = np.array([[65536.0, 1.0], [1e-10, 0.0], [0.0, 0.0], [np.nan, 0.0]], dtype=np.float32)
    assert vector_faults(vectors, np.dtype(np.float32)) == {2: ZERO, 3: NON_FINITE}
    assert vector_faults(vectors[:0], np.dtype(np.float32)) == {}
