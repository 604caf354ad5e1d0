"""Late chunking against the model run by hand with transformers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.chunking import Chunker, PassageTokenizer, PassageType, chunk_documents
from penstock.operators.encoder_process import CRASH, IsolatedEncoder, ProcessOptions
from penstock.operators.encoder_worker import ENCODER_ERROR, EncoderFails, EncoderWorker
from penstock.operators.encoding import ZERO, Encoded, unit_length
from penstock.operators.identity import hash_texts
from penstock.operators.late_chunking import (
    OVERLAP_DIVISOR,
    OVERLAP_TOKENS,
    SUM,
    DocumentTokenizer,
    Span,
    Windows,
    can_pool_late,
    macro_windows,
    sum_tokens,
    tokens_within,
    windows_of,
    windows_table,
)
from penstock.operators.models import ModuleStack, read_module_stack, resolve_model
from penstock.operators.tokenizing import TOKENIZER_ERROR, Fault

from .test_encoder_worker import (
    LONE_SURROGATE,
    POISON,
    REFERENCE,
    TINY_WINDOW,
    build_model,
    encoder_of,
    needs_model,
    on_poison,
    some_texts,
)

TOLERANCE = 2e-6
PROMPT = "search: "
SHORT = [text for text in some_texts(12) if len(text) > 20]
LONG = ". ".join(some_texts(40))  # of many windows of a tiny model
OWN_TRANSFORMER = """
import os
from sentence_transformers.base.modules import Transformer as Plain


class Transformer(Plain):
    def forward(self, features, **options):
        ids = features["input_ids"]
        {action}
        return super().forward(features, **options)
"""


@pytest.fixture(autouse=True)
def one_thread_and_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, since more wait for one another on a busy machine; code of models goes to a folder of the test."""
    import torch

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with large random weights, so that context moves its token vectors."""
    return build_model(tmp_path_factory.mktemp("tiny"), initializer_range=0.3)


def halves(text: str) -> list[Span]:
    """Two passages that meet at a space near the middle."""
    cut = text.index(" ", len(text) // 2)
    return [(0, cut), (cut + 1, len(text))]


def overlapping(text: str, count: int) -> list[Span]:
    """Passages of words, each of which shares some with the next."""
    starts = [0, *(place + 1 for place, character in enumerate(text) if character == " ")]
    step = max(1, len(starts) // count)
    borders = [*starts[::step], len(text) + 1]
    return [(first, last - 1) for first, last in zip(borders, borders[2:] or borders[1:], strict=False)]


def windows_for(
    folder: Path, texts: Sequence[str], passages: Sequence[Sequence[Span]], prompt: str = "", window: int = TINY_WINDOW
) -> Windows:
    faults: dict[int, Fault] = {}
    cut = DocumentTokenizer(folder, prompt, window).cut(texts, passages, faults)
    assert not faults
    return windows_of(*windows_table([cut[number] for number in range(len(texts))]))


def token_vectors(
    folder: Path, text: str, prompt: str = "", window: int = TINY_WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (T, H) and character spans (T, 2) of the tokens of a document, without special tokens and prompt: with
    transformers, one macro window after the other."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = tokenizer(prompt + text, return_offsets_mapping=True, add_special_tokens=False, truncation=False)
    before = sum(end <= len(prompt) for _, end in found["offset_mapping"])
    ids = found["input_ids"]
    size = window - 2 - before
    overlap = min(512, size // 4)
    vectors: list[np.ndarray] = []
    at = before
    while len(vectors) < len(ids) - before:
        part = ids[at : at + size]
        given = [tokenizer.cls_token_id, *ids[:before], *part, tokenizer.sep_token_id]
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([given])).last_hidden_state[0].numpy()
        known = len(vectors) - (at - before)
        vectors += list(hidden[1 + before + known : 1 + before + len(part)])
        at += size - overlap
    return np.stack(vectors), np.array(found["offset_mapping"])[before:] - len(prompt)


def mean_within(vectors: np.ndarray, spans: np.ndarray, passage: Span) -> np.ndarray:
    mean: np.ndarray = vectors[(spans[:, 0] >= passage[0]) & (spans[:, 1] <= passage[1])].mean(axis=0)
    return mean


def check(
    folder: Path, encoded: Encoded, texts: Sequence[str], passages: Sequence[Sequence[Span]], prompt: str = ""
) -> None:
    assert not encoded.faults and not encoded.truncated_tokens.any()
    expected = []
    for text, of_text in zip(texts, passages, strict=True):
        vectors, spans = token_vectors(folder, text, prompt)
        expected += [mean_within(vectors, spans, passage) for passage in of_text]
    assert np.abs(encoded.vectors - unit_length(np.stack(expected))).max() <= TOLERANCE


# ---- windows and spans


@given(st.integers(0, 5000), st.integers(1, 3000))
def test_macro_windows_take_each_token_once(tokens: int, size: int) -> None:
    windows = macro_windows(tokens, size)
    taken = [token for window in windows for token in range(window.first, window.end)]
    assert taken == list(range(tokens))
    assert all(window.end - window.start <= size for window in windows)
    overlap = min(OVERLAP_TOKENS, size // OVERLAP_DIVISOR)
    assert all(window.first - window.start == overlap for window in windows[1:])
    assert all(window.end > window.first for window in windows[1:])


def test_one_window_without_a_limit_and_none_without_room() -> None:
    assert macro_windows(10**6, None) == [(0, 0, 10**6)]
    with pytest.raises(ValueError, match=r"macro window \(0 tokens\) must hold at least 1"):
        macro_windows(5, 0)


def test_tokens_within_a_passage() -> None:
    text = "one two  three 🙂 four"
    tokens = np.array([(0, 3), (3, 7), (7, 8), (8, 14), (15, 16), (15, 16), (17, 21)])  # " two" has its space with it
    passages = [(0, 3), (4, 7), (4, 14), (15, 16), (0, 21), (5, 7)]
    assert tokens_within(text, tokens, passages) == [(0, 1), (1, 2), (1, 4), (4, 6), (0, 7), (1, 2)]


@pytest.mark.parametrize("pads_left", [False, True])
def test_sums_over_pieces_of_padded_batches(pads_left: bool) -> None:
    import torch

    ids = pa.array([[0] * length for length in (5, 9, 3)], pa.list_(pa.int32()))
    pieces = np.array([(0, 1, 4, 0), (1, 1, 3, 0), (1, 2, 8, 1), (2, 1, 2, 2)], np.int32)
    windows = Windows(ids, np.array([5, 9, 3], np.int32), {}, pieces, 3)
    batch = np.array([2, 0, 1])
    vectors = np.random.default_rng(0).normal(size=(3, 9, 4)).astype(np.float32)
    bags = (torch.from_numpy(bag) for bag in windows.bags(batch, 9, pads_left))
    found = sum_tokens(torch.from_numpy(vectors), *bags).numpy()
    assert windows.pieces_of(batch).tolist() == [3, 0, 1, 2]
    for row, (window, first, last, _) in zip(found, pieces[windows.pieces_of(batch)], strict=True):
        shift = 9 - windows.lengths[window] if pads_left else 0
        one = vectors[batch.tolist().index(window)]
        np.testing.assert_allclose(row, one[shift + first : shift + last].sum(axis=0), atol=1e-6)
    assert windows.completed_by().tolist() == [0, 2, 1]


def test_only_windows_that_hold_a_wanted_passage_are_made(folder: Path) -> None:
    vectors, spans = token_vectors(folder, LONG)
    everything = windows_for(folder, [LONG], [[(0, len(LONG))]])
    few = windows_for(folder, [LONG], [[(0, 10), (len(LONG) - 10, len(LONG))]])
    assert len(everything) > 4 and len(few) == 2
    assert few.ids.to_pylist() == [everything.ids[0].as_py(), everything.ids[-1].as_py()]
    pieces = everything.pieces
    assert (pieces[:, 2] - pieces[:, 1]).sum() == len(vectors) == len(spans)


def test_a_document_that_the_tokenizer_refuses_is_a_fault(folder: Path) -> None:
    faults: dict[int, Fault] = {}
    cut = DocumentTokenizer(folder, "", TINY_WINDOW).cut(["a", LONE_SURROGATE, "b"], [[(0, 1)]] * 3, faults)
    assert sorted(cut) == [0, 2] and faults[1].reason == TOKENIZER_ERROR


# ---- vectors


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_vectors_are_means_over_the_tokens_of_the_document(folder: Path, prompt: str) -> None:
    texts = [*SHORT, LONG]
    passages = [*([(0, len(text)), *halves(text)] for text in SHORT), overlapping(LONG, 20)]
    worker = EncoderWorker(encoder_of(folder, prompt=prompt), folder)
    encoded = worker.encode_spans(windows_for(folder, texts, passages, prompt))
    check(folder, encoded, texts, passages, prompt)
    # Context is in the vectors: those of the same words alone are others.
    alone = worker.encode([SHORT[0][slice(*halves(SHORT[0])[0])]]).vectors[0]
    assert encoded.vectors[1] @ alone < 0.999


def test_padding_on_the_left(tmp_path: Path) -> None:
    folder = build_model(tmp_path, "Qwen2", padding_side="left", initializer_range=0.3)
    passages = [halves(text) for text in SHORT]
    encoded = EncoderWorker(encoder_of(folder), folder).encode_spans(windows_for(folder, SHORT, passages))
    check(folder, encoded, SHORT, passages)


def test_passages_that_tile_a_document_add_up_to_it(folder: Path) -> None:
    text = LONG
    words = [0, *(place for place, character in enumerate(text) if character == " "), len(text)]
    tiles = list(zip(words[::3], [*words[3::3], len(text)], strict=False))
    windows = windows_for(folder, [text], [tiles])
    sums = EncoderWorker(encoder_of(folder), folder).encode_tokens(windows, ())
    vectors, _ = token_vectors(folder, text)
    assert sums.columns[SUM].shape == (len(windows.pieces), vectors.shape[1])
    assert (windows.pieces[:, 2] - windows.pieces[:, 1]).sum() == len(vectors)
    np.testing.assert_allclose(sums.columns[SUM].sum(axis=0), vectors.sum(axis=0), atol=1e-3, rtol=1e-5)


def test_other_documents_and_batch_sizes_change_nothing(folder: Path) -> None:
    passages = overlapping(LONG, 20)
    alone = EncoderWorker(encoder_of(folder, batch_tokens=32), folder).encode_spans(
        windows_for(folder, [LONG], [passages])
    )
    among = EncoderWorker(encoder_of(folder, batch_tokens=2048), folder).encode_spans(
        windows_for(folder, [*SHORT, LONG], [*([(0, len(text))] for text in SHORT), passages])
    )
    assert np.abs(alone.vectors - among.vectors[len(SHORT) :]).max() <= TOLERANCE
    assert alone.tokens.tolist() == among.tokens[len(SHORT) :].tolist()


def test_what_follows_pooling_is_run_on_means(tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    folder = build_model(tmp_path, dense=12, initializer_range=0.3)
    dense = SentenceTransformer(str(folder), device="cpu")[2]
    passages = halves(SHORT[0])
    worker = EncoderWorker(encoder_of(folder, normalize=False), folder)
    encoded = worker.encode_spans(windows_for(folder, [SHORT[0]], [passages]))
    vectors, spans = token_vectors(folder, SHORT[0])
    means = np.stack([mean_within(vectors, spans, passage) for passage in passages])
    with torch.inference_mode():
        expected = dense({"sentence_embedding": torch.from_numpy(means)})["sentence_embedding"].numpy()
    assert encoded.vectors.shape == (2, 12)
    np.testing.assert_allclose(encoded.vectors, expected, atol=TOLERANCE)


def test_a_passage_without_tokens_is_a_fault(folder: Path) -> None:
    windows = windows_for(folder, ["some words   and more"], [[(0, 10), (10, 13)]])
    encoded = EncoderWorker(encoder_of(folder), folder).encode_spans(windows)
    assert {row: fault.reason for row, fault in encoded.faults.items()} == {1: ZERO}


@needs_model
def test_the_passage_hash_tells_documents_apart() -> None:
    tokenizer = PassageTokenizer(resolve_model(REFERENCE))
    texts = ["The same words. " * 8 + tail for tail in ("", "Another end.")]
    rows = [{"document_id": f"d{i}", "text": text, "source": "s", "position": i} for i, text in enumerate(texts)]
    late, _ = chunk_documents(pa.Table.from_pylist(rows), Chunker(PassageType.LATE, 16, 0), tokenizer)
    plain, _ = chunk_documents(pa.Table.from_pylist(rows), Chunker(PassageType.TOKENS, 16, 0), tokenizer)
    same = [name for name in late.column_names if name != "text_hash"]
    assert late.select(same).equals(plain.select(same))
    assert len(set(late["text_hash"].to_pylist())) == len(late) > len(set(plain["text_hash"].to_pylist()))
    row = late.to_pylist()[0]
    document = hash_texts([texts[row["position"]]])[0].as_py().hex()
    assert row["text_hash"] == hash_texts([f"{document}:{row['start']}:{row['end']}:{row['text']}"])[0].as_py()


# ---- which models


def test_which_models_can_pool_late(folder: Path, tmp_path: Path) -> None:
    assert read_module_stack(folder) == ModuleStack(("Transformer", "Pooling(mean)"), 32)
    assert can_pool_late(read_module_stack(folder))
    assert can_pool_late(ModuleStack(("Transformer", "Pooling(mean)", "Dense", "Normalize"), 8))
    assert not can_pool_late(ModuleStack(("StaticEmbedding",), None))
    assert not can_pool_late(ModuleStack(("Transformer", "WordWeights", "Pooling(mean)"), 8))
    first = build_model(tmp_path, pooling="cls")
    assert not can_pool_late(read_module_stack(first))
    with pytest.raises(EncoderFails, match="late chunking needs a transformer with mean pooling"):
        EncoderWorker(encoder_of(first), first).encode_spans(windows_for(first, ["a b"], [[(0, 3)]]))


# ---- isolation


def fragile_model(tmp_path: Path, action: str) -> Path:
    """A tiny model whose transformer does something to batches that hold POISON."""
    folder = build_model(tmp_path / "fragile", initializer_range=0.3)
    lines = on_poison(action).replace("\n    ", " ")
    (folder / "modeling_own.py").write_text(OWN_TRANSFORMER.format(action=lines))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "modeling_own.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize(("action", "reason"), [("os.abort()", CRASH), ("raise ValueError('no')", ENCODER_ERROR)])
def test_a_document_that_brings_the_model_down_takes_only_its_own_passages(
    tmp_path: Path, action: str, reason: str
) -> None:
    folder = fragile_model(tmp_path, action)
    texts = [*SHORT[:4], f"some words and {POISON} and some more", *SHORT[4:]]
    passages = [halves(text) for text in texts]
    told: list[int] = []
    options = ProcessOptions(threads=1, device="cpu", timeout_s=60)
    with IsolatedEncoder(encoder_of(folder), folder, options) as worker:
        windows = windows_for(folder, texts, passages)
        encoded = worker.encode_spans(windows, lambda rows, seconds: told.extend(rows.tolist()))
    assert {row: fault.reason for row, fault in encoded.faults.items()} == {8: reason, 9: reason}
    assert encoded.effort.restarts == (2 if reason == CRASH else 0)
    blamed = windows.pieces[np.isin(windows.pieces[:, 3], [8, 9]), 0]
    assert sorted(told) == np.setdiff1d(np.arange(len(windows)), blamed).tolist()
    good: Any = [row for row in range(len(encoded.tokens)) if row not in encoded.faults]
    expected = []
    for text, of_text in zip(texts, passages, strict=True):
        vectors, spans = token_vectors(folder, text)
        expected += [mean_within(vectors, spans, passage) for passage in of_text]
    assert np.abs(encoded.vectors[good] - unit_length(np.stack(expected))[good]).max() <= TOLERANCE
