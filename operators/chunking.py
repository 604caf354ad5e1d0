"""Documents to passages: windows in the model's own tokens, cut where the text offers a good place.

A window is cut, looking back over its last quarter, at the last paragraph end, else sentence end, else line end, else
between words, else between tokens. The next window starts `overlap` tokens before the cut, moved forward to the start
of a word. Every token of a document lies in at least one window (but tokens of mere whitespace at its ends), and
text[start:end] is the passage, without surrounding whitespace.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, assert_never

import numpy as np
import pyarrow as pa
from tokenizers import Encoding, Tokenizer

from penstock.operators.deadletters import DeadLetter, dead_letter_table
from penstock.operators.identity import TEXT_HASH_TYPE, hash_texts, row_hashes

STAGE = "passages"
NO_TOKENS = "no_tokens"
SEGMENT_CHARACTERS = 65_536
BATCH_CHARACTERS = 1 << 20  # one batch of encodings takes about 200 bytes per token, so 50 MB
LOOKBACK_DIVISOR = 4  # a cut is looked for in the last quarter of a window
# A passage alone can have more tokens than inside its document (a word cut in two): then the document is cut again with
# the next smaller window. What is still too long at one half is left as it is, and its `tokens` says so.
WINDOW_EIGHTHS = (8, 7, 6, 5, 4)
UNCOUNTED = -1

_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’»)\]]*\s+|[。！？][”’」』）]*\s*")
_LINE_END = re.compile(r"\n\s*")
_WORD = re.compile(r"\S+")

_PASSAGE_FIELDS = (
    pa.field("passage_id", pa.string()),
    pa.field("document_id", pa.string()),
    pa.field("ordinal", pa.int32()),
    pa.field("start", pa.int64()),
    pa.field("end", pa.int64()),
    pa.field("text", pa.string()),
    pa.field("tokens", pa.int32()),
    pa.field("row_hash", pa.uint64()),
    pa.field("text_hash", TEXT_HASH_TYPE),
    pa.field("normal_hash", TEXT_HASH_TYPE),
    pa.field("source", pa.string()),
    pa.field("position", pa.int64()),
)
_DOCUMENT_COLUMNS = ("document_id", "text", "source", "position")


class PassageType(StrEnum):
    TOKENS = "tokens"
    WHOLE = "whole"
    LATE = "late"


@dataclass(frozen=True)
class Chunker:
    """How documents are cut. `whole`: one passage per document, of any length; `tokens` and `overlap` are unused.
    `late`: as `tokens`, but a passage is embedded within its document, so that its text alone does not identify it."""

    kind: PassageType
    tokens: int
    overlap: int

    def __post_init__(self) -> None:
        if self.kind is not PassageType.WHOLE:
            _check_window(self.tokens, self.overlap)


class PassageTokenizer:
    """The tokenizer of a model, without truncation, padding and special tokens."""

    def __init__(self, folder: Path) -> None:
        """Loads `tokenizer.json`, or builds a fast tokenizer from the other tokenizer files of the folder.

        Raises:
            ValueError: the folder holds no tokenizer with character offsets.
        """
        self._tokenizer = _load_tokenizer(Path(folder))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def token_spans(self, text: str) -> np.ndarray:
        """Character offsets (start, end) of each token, int64 (T, 2)."""
        return self.spans_of([text])[0]

    def spans_of(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`token_spans` of each text. Long texts are tokenised in segments, so the peak is about 40 bytes per token."""
        return [spans for _, spans in self.tokens_of(texts)]

    def tokens_of(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids, int32 (T,), and `token_spans` of each text."""
        segments = _segmented(texts)
        found = [
            (np.array(encoding.ids, np.int32), _offsets(encoding) + start)
            for start, encoding in zip(segments.starts, self._encodings(segments.texts), strict=True)
        ]
        lengths = np.array([len(ids) for ids, _ in found], np.int64)
        boundaries = np.cumsum(_sum_by_owner(segments.owners, lengths, len(texts)))[:-1]
        ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in found)])
        spans = np.concatenate([np.empty((0, 2), np.int64), *(spans for _, spans in found)])
        return list(zip(np.split(ids, boundaries), np.split(spans, boundaries), strict=True)) if texts else []

    def _encodings(self, segments: Sequence[str]) -> Iterator[Encoding]:
        for batch in text_batches(segments):
            yield from self._tokenizer.encode_batch(batch, add_special_tokens=False)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text alone, without special tokens, int32 (N,)."""
        segments = _segmented(texts)
        lengths = [
            len(encoding)
            for batch in text_batches(segments.texts)
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ]
        return _sum_by_owner(segments.owners, np.array(lengths, np.int64), len(texts)).astype(np.int32)


def window_spans(text: str, token_spans: np.ndarray, tokens: int, overlap: int) -> list[tuple[int, int]]:
    """Character spans of the windows of a text, at most `tokens` tokens each; none for a text without tokens.

    Takes about 60 bytes per token beyond its arguments.

    Args:
        token_spans: (T, 2) character offsets of the tokens of `text`.
        overlap: tokens, at most, that a window shares with the one before; less than half of `tokens`.
    """
    _check_window(tokens, overlap)
    if len(token_spans) <= tokens:
        return [_stripped(text, 0, len(text))] if len(token_spans) else []
    starts = np.maximum.accumulate(token_spans[:, 0])
    ends = np.maximum.accumulate(token_spans[:, 1])
    cuts = _find_cuts(text, starts, ends)
    spans = []
    for first, cut in _token_windows(len(starts), cuts, tokens, overlap):
        start = 0 if first == 0 else int(starts[first])
        end = len(text) if cut == len(starts) else max(int(starts[cut]), int(ends[cut - 1]))
        spans.append(_stripped(text, start, end))
    return [(start, end) for start, end in spans if start < end]


def passages_schema(documents: pa.Schema) -> pa.Schema:
    """The schema of the passages of documents with this schema: the passage's own columns, then the kept ones."""
    return pa.schema([*_PASSAGE_FIELDS, *(field for field in documents if field.name not in _DOCUMENT_COLUMNS)])


def chunk_documents(documents: pa.Table, chunker: Chunker, tokenizer: PassageTokenizer) -> tuple[pa.Table, pa.Table]:
    """Passages, sorted by row_hash and passage_id, and a dead letter for each document without any token.

    The passages of a document depend on its text alone, not on the documents it comes with.
    """
    texts = documents.column("text").to_pylist()
    passages = [cut for batch in text_batches(texts) for cut in _cut_documents(batch, chunker, tokenizer)]
    empty = [number for number, cut in enumerate(passages) if not cut]
    table = _passage_table(documents, texts, passages, in_context=chunker.kind is PassageType.LATE)
    return table, _no_tokens(documents, empty)


def text_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Runs of texts of about BATCH_CHARACTERS; a longer text is a run of its own."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def normalise_for_comparison(text: str) -> str:
    """The form in which equal texts count as duplicates: NFC, case folded, whitespace runs as one space, stripped.

    NFC and not NFKC: compatibility characters (superscripts, ligatures) can carry meaning.
    """
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFC", text.casefold())
    return " ".join(folded.split())


# ---- cutting


class _Span(NamedTuple):
    """A passage within its document: characters [start, end) and its tokens when it stands alone."""

    start: int
    end: int
    tokens: int


class _Cuts(NamedTuple):
    """Token numbers before which a text can be cut, each sorted, from the best place to the least good."""

    paragraphs: np.ndarray
    sentences: np.ndarray
    lines: np.ndarray
    words: np.ndarray
    tokens: np.ndarray


def _cut_documents(texts: Sequence[str], chunker: Chunker, tokenizer: PassageTokenizer) -> list[list[_Span]]:
    match chunker.kind:
        case PassageType.WHOLE:
            spans = [_stripped(text, 0, len(text)) for text in texts]
            counts = tokenizer.count([text[start:end] for text, (start, end) in zip(texts, spans, strict=True)])
            counted = [_Span(*span, count) for span, count in zip(spans, counts.tolist(), strict=True)]
            return [[span] if span.tokens > 0 else [] for span in counted]
        case PassageType.TOKENS | PassageType.LATE:
            return _cut_into_windows(texts, chunker, tokenizer)
        case _:
            assert_never(chunker.kind)


def _cut_into_windows(texts: Sequence[str], chunker: Chunker, tokenizer: PassageTokenizer) -> list[list[_Span]]:
    token_spans = tokenizer.spans_of(texts)
    passages: list[list[_Span]] = [[] for _ in texts]
    crowded = list(range(len(texts)))
    for eighths in WINDOW_EIGHTHS:
        tokens = max(1, chunker.tokens * eighths // 8)
        overlap = min(chunker.overlap, (tokens - 1) // 2)
        for number in crowded:
            spans = window_spans(texts[number], token_spans[number], tokens, overlap)
            passages[number] = [_Span(start, end, UNCOUNTED) for start, end in spans]
            if len(spans) == 1 and spans[0] == (0, len(texts[number])):
                passages[number] = [_Span(*spans[0], len(token_spans[number]))]
        _count(texts, passages, tokenizer)
        crowded = [number for number in crowded if any(span.tokens > chunker.tokens for span in passages[number])]
        if not crowded:
            break
    return passages


def _count(texts: Sequence[str], passages: list[list[_Span]], tokenizer: PassageTokenizer) -> None:
    """Counts the tokens of the passages that are UNCOUNTED, in place, all documents together."""
    places = [
        (number, ordinal)
        for number, cut in enumerate(passages)
        for ordinal, span in enumerate(cut)
        if span.tokens == UNCOUNTED
    ]
    spans = [(number, passages[number][ordinal]) for number, ordinal in places]
    counts = tokenizer.count([texts[number][span.start : span.end] for number, span in spans])
    for (number, ordinal), count in zip(places, counts.tolist(), strict=True):
        passages[number][ordinal] = passages[number][ordinal]._replace(tokens=count)


def _token_windows(count: int, cuts: _Cuts, tokens: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Windows [first, cut) of token numbers that cover 0..count, each but the last ended at one of `cuts`."""
    first = 0
    while first + tokens < count:
        cut = _best_cut(cuts, first + overlap + 1, first + tokens, tokens // LOOKBACK_DIVISOR)
        yield first, cut
        first = _window_start(cuts, cut - overlap, cut)
    yield first, count


def _best_cut(cuts: _Cuts, lowest: int, limit: int, lookback: int) -> int:
    for places in (cuts.paragraphs, cuts.sentences, cuts.lines, cuts.words):
        cut = _last_between(places, max(lowest, limit - lookback), limit)
        if cut is not None:
            return cut
    cut = _last_between(cuts.tokens, lowest, limit)
    return limit if cut is None else cut


def _last_between(places: np.ndarray, low: int, high: int) -> int | None:
    index = int(np.searchsorted(places, high, side="right")) - 1
    return int(places[index]) if index >= 0 and places[index] >= low else None


def _window_start(cuts: _Cuts, earliest: int, cut: int) -> int:
    for places in (cuts.words, cuts.tokens):
        index = int(np.searchsorted(places, earliest))
        if index < len(places) and places[index] <= cut:
            return int(places[index])
    return cut


def _find_cuts(text: str, starts: np.ndarray, ends: np.ndarray) -> _Cuts:
    def tokens_at(positions: Iterator[int]) -> np.ndarray:
        return _tokens_at(text, np.fromiter(positions, np.int64), starts, ends)

    return _Cuts(
        paragraphs=tokens_at(match.end() for match in _PARAGRAPH_END.finditer(text)),
        sentences=tokens_at(match.end() for match in _SENTENCE_END.finditer(text)),
        lines=tokens_at(match.end() for match in _LINE_END.finditer(text)),
        words=tokens_at(match.start() for match in _WORD.finditer(text)),
        tokens=np.flatnonzero(starts[1:] >= ends[:-1]) + 1,  # byte-level tokens can share a character
    )


def _tokens_at(text: str, positions: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Numbers of the tokens that begin at the character positions; a position inside a token counts for none.

    A token may begin with the whitespace before the position, as those of many byte-pair tokenizers do.
    """
    tokens = np.searchsorted(ends, positions, side="right")
    positions, tokens = positions[tokens < len(starts)], tokens[tokens < len(starts)]
    usable = starts[tokens] >= positions
    for index in np.flatnonzero(~usable).tolist():
        usable[index] = text[starts[tokens[index]] : positions[index]].isspace()
    return np.unique(tokens[usable])


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _check_window(tokens: int, overlap: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens ({tokens}) must be at least 1; it is the size of a window")
    if not 0 <= overlap < tokens / 2:
        raise ValueError(f"overlap ({overlap}) must be less than half of tokens ({tokens}); lower it")


# ---- tables


def _passage_table(
    documents: pa.Table, texts: Sequence[str], passages: Sequence[Sequence[_Span]], in_context: bool
) -> pa.Table:
    spans = [(owner, ordinal, *span) for owner, cut in enumerate(passages) for ordinal, span in enumerate(cut)]
    owners, ordinals, starts, ends, tokens = zip(*spans, strict=True) if spans else ((),) * 5
    schema = passages_schema(documents.schema)
    carried = documents.drop_columns("text").take(pa.array(owners, pa.int64()))
    pieces = [texts[owner][start:end] for owner, start, end in zip(owners, starts, ends, strict=True)]
    document_ids = carried.column("document_id").to_pylist()
    identities = _in_context(texts, spans) if in_context else pieces
    passage_ids = [f"{document_id}#{ordinal}" for document_id, ordinal in zip(document_ids, ordinals, strict=True)]
    own = {
        "passage_id": passage_ids,
        "ordinal": ordinals,
        "start": starts,
        "end": ends,
        "text": pieces,
        "tokens": tokens,
        "row_hash": row_hashes(passage_ids),
        "text_hash": hash_texts(identities),
        "normal_hash": hash_texts([normalise_for_comparison(piece) for piece in pieces]),
    }
    arrays = [
        pa.array(own[field.name], field.type) if field.name in own else carried.column(field.name) for field in schema
    ]
    return pa.table(arrays, schema=schema).sort_by([("row_hash", "ascending"), ("passage_id", "ascending")])


def _in_context(texts: Sequence[str], spans: Sequence[tuple[int, ...]]) -> list[str]:
    """What identifies the vector of a passage that is embedded within its document: that, its place there, its text."""
    documents = [text_hash.hex() for text_hash in hash_texts(texts).to_pylist()]
    return [f"{documents[owner]}:{start}:{end}:{texts[owner][start:end]}" for owner, _, start, end, _ in spans]


def _no_tokens(documents: pa.Table, numbers: Sequence[int]) -> pa.Table:
    rows = documents.select(["source", "position", "document_id"]).take(pa.array(numbers, pa.int64())).to_pylist()
    detail = "the tokenizer finds no token in the text"
    return dead_letter_table([DeadLetter(STAGE, reason=NO_TOKENS, detail=detail, **row) for row in rows])


# ---- tokenising


class _Segments(NamedTuple):
    """Texts in segments: the number of the text, the character where the segment starts, and the segment."""

    owners: np.ndarray
    starts: list[int]
    texts: list[str]


def _segmented(texts: Sequence[str]) -> _Segments:
    segments = [(owner, *segment) for owner, text in enumerate(texts) for segment in _segments(text)]
    owners = np.array([owner for owner, _, _ in segments], np.int64)
    return _Segments(owners, [start for _, start, _ in segments], [segment for _, _, segment in segments])


def _segments(text: str) -> Iterator[tuple[int, str]]:
    """(start, segment) of at most SEGMENT_CHARACTERS, cut before whitespace, inside a word only where there is none."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        limit = start + SEGMENT_CHARACTERS
        cut = max(text.rfind(space, start + 1, limit) for space in " \n\t")
        cut = limit if cut < 0 else cut
        yield start, text[start:cut]
        start = cut
    yield start, text[start:]


def _offsets(encoding: Encoding) -> np.ndarray:
    flat = itertools.chain.from_iterable(encoding.offsets)
    return np.fromiter(flat, np.int64, 2 * len(encoding)).reshape(-1, 2)


def _sum_by_owner(owners: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros(count, np.int64)
    np.add.at(sums, owners, values)
    return sums


def _load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder.

    Raises:
        ValueError: the folder holds none, or none with character offsets.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    from transformers import AutoTokenizer  # heavy: seconds, and most models do not need it

    try:
        slow_or_fast = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"model folder {folder} holds no usable tokenizer ({error}); add its tokenizer.json"
        ) from error
    backend = getattr(slow_or_fast, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"tokenizer of {folder} has no character offsets; convert it to a tokenizer.json")
    return backend
