"""Late chunking: the whole document through the model, then the mean of the token vectors of each passage.

Günther et al., "Late Chunking: Contextual Chunk Embeddings Using Long-Context Embedding Models", arXiv 2409.04701. A
document beyond the model's window goes through it in overlapping macro windows, as in the authors' implementation
(github.com/jina-ai/late-chunking): the overlap only gives context to the later window, and vectors of its tokens are
taken from the earlier one. The vectors of special tokens and of the prompt are in no mean.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from penstock.operators.chunking import PassageTokenizer, text_batches
from penstock.operators.encoding import VECTOR, ZERO, Encoded
from penstock.operators.models import ModuleStack
from penstock.operators.tokenizing import Fault, Tokenized, call_each

if TYPE_CHECKING:
    import torch

OVERLAP_TOKENS = 512  # of jina's implementation, for windows of 8,192
OVERLAP_DIVISOR = 4  # a smaller window shares at most a quarter, so that three quarters of each forward pass count
SUM = "sum"
MEAN_POOLED = ("Transformer", "Pooling(mean)")
AFTER_POOLING = {"Dense", "Normalize", "LayerNorm", "Dropout"}

Span = tuple[int, int]


class MacroWindow(NamedTuple):
    """Tokens [start, end) of a document, which go through the model together; vectors are taken of [first, end)."""

    start: int
    first: int
    end: int


class Piece(NamedTuple):
    """Tokens [first, last) of the ids of a window: those of one passage."""

    window: int
    first: int
    last: int


class CutDocument(NamedTuple):
    """The macro windows of a document that its passages need, as token ids, and the pieces of each passage."""

    windows: list[np.ndarray]
    pieces: list[list[Piece]]


@dataclass(frozen=True)
class Windows(Tokenized):
    """Macro windows of documents as token ids, and the pieces in them of `passages` passages.

    `pieces` is int32 (P, 4), sorted by window: window, first, last, passage. A window without pieces is not needed.
    """

    pieces: np.ndarray
    passages: int

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first piece of each window, and the end of the last, int64 (W + 1,)."""
        return np.searchsorted(self.pieces[:, 0], np.arange(len(self) + 1))

    def pieces_of(self, windows: np.ndarray) -> np.ndarray:
        """Numbers of the pieces of some windows, window by window."""
        return _ranges(self._starts[windows], self._starts[windows + 1])

    def bags(self, windows: np.ndarray, longest: int, pads_left: bool) -> tuple[np.ndarray, np.ndarray]:
        """For a batch of windows padded to `longest` tokens: the places of the tokens of each of its pieces in the
        flattened batch, and where each piece begins among these."""
        rows = np.repeat(np.arange(len(windows)), np.diff(self._starts)[windows])
        padding = (longest - self.lengths[windows]) if pads_left else np.zeros(len(windows), np.int64)
        pieces = self.pieces[self.pieces_of(windows)].astype(np.int64)
        base = rows * longest + padding[rows]
        sizes = pieces[:, 2] - pieces[:, 1]
        return _ranges(base + pieces[:, 1], base + pieces[:, 2]), np.cumsum(sizes) - sizes

    def completed_by(self) -> np.ndarray:
        """How many passages are complete with each window, if windows come in order, int64 (W,)."""
        last = np.full(self.passages, -1)
        last[self.pieces[:, 3]] = self.pieces[:, 0]
        completed: np.ndarray = np.bincount(last[last >= 0], minlength=len(self))
        return completed


class DocumentTokenizer(PassageTokenizer):
    """The tokenizer of a model with its prompt, special tokens and window; None is no window."""

    def __init__(self, folder: Path, prompt: str, window: int | None) -> None:
        super().__init__(folder)
        self._prompt, self._window = prompt, window
        probe = self._tokenizer.encode("a")
        content = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        self._before, self._after = probe.ids[: content[0]], probe.ids[content[-1] + 1 :]

    def cut(
        self, texts: Sequence[str], passages: Sequence[Sequence[Span]], faults: dict[int, Fault]
    ) -> dict[int, CutDocument]:
        """Each document (by number) cut into macro windows, for the passages of it that are wanted (character spans).

        A document that makes the tokenizer raise is a fault instead. Takes about 40 bytes per token.
        """
        cut: dict[int, CutDocument] = {}
        done = 0
        for batch in text_batches(texts):
            found: dict[int, Fault] = {}
            prompted = [self._prompt + text for text in batch]
            for row, (ids, spans) in call_each(self.tokens_of, prompted, found):
                cut[done + row] = self._cut(batch[row], ids, spans, passages[done + row])
            faults |= {done + row: fault for row, fault in found.items()}
            done += len(batch)
        return cut

    def _cut(self, text: str, ids: np.ndarray, token_spans: np.ndarray, passages: Sequence[Span]) -> CutDocument:
        prompt = int(np.searchsorted(np.maximum.accumulate(token_spans[:, 1]), len(self._prompt), side="right"))
        before = np.array([*self._before, *ids[:prompt]], np.int32)
        ids, token_spans = ids[prompt:], np.maximum(token_spans[prompt:] - len(self._prompt), 0)
        size = self._window and self._window - len(before) - len(self._after)
        windows = macro_windows(len(ids), size)
        pieces = [_pieces(tokens, windows, len(before)) for tokens in tokens_within(text, token_spans, passages)]
        needed = sorted({piece.window for of_passage in pieces for piece in of_passage})
        place = {window: number for number, window in enumerate(needed)}
        after = np.array(self._after, np.int32)
        cut = [np.concatenate([before, ids[windows[window].start : windows[window].end], after]) for window in needed]
        return CutDocument(cut, [[one._replace(window=place[one.window]) for one in some] for some in pieces])


def macro_windows(tokens: int, size: int | None) -> list[MacroWindow]:
    """Windows of at most `size` tokens over a document; each token has its vector from exactly one of them."""
    if size is not None and size < 1:
        raise ValueError(
            f"macro window ({size} tokens) must hold at least 1 beside prompt and special tokens; shorten the prompt"
        )
    windows = [MacroWindow(0, 0, tokens if size is None else min(size, tokens))]
    while size is not None and windows[-1].end < tokens:
        end = windows[-1].end
        start = end - min(OVERLAP_TOKENS, size // OVERLAP_DIVISOR)
        windows.append(MacroWindow(start, end, min(start + size, tokens)))
    return windows


def tokens_within(text: str, token_spans: np.ndarray, passages: Sequence[Span]) -> list[Span]:
    """Numbers [first, last) of the tokens (T, 2) that lie within each passage, both given by their characters.

    White space that a token carries beyond the border, as those of many byte-pair tokenizers do, does not count. A
    passage within which no token lies has those that it cuts.
    """
    starts, ends = (np.maximum.accumulate(token_spans[:, side]) for side in (0, 1))
    found = []
    for start, end in passages:
        first, last = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end))
        inner_first, inner_last = first, last
        while inner_first < inner_last and text[starts[inner_first] : start].strip():
            inner_first += 1
        while inner_first < inner_last and text[end : ends[inner_last - 1]].strip():
            inner_last -= 1
        found.append((inner_first, inner_last) if inner_first < inner_last else (first, last))
    return found


def sum_tokens(token_vectors: torch.Tensor, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sums in float32 (P, H) over the pieces of a batch (B, T, H), by what `Windows.bags` gives."""
    import torch

    flat = token_vectors.reshape(-1, token_vectors.shape[-1]).float()
    return torch.nn.functional.embedding_bag(tokens, flat, starts, mode="sum")


def result_zeros(tokenized: Tokenized, dimension: int, token_dimension: int | None) -> tuple[str, np.ndarray]:
    """Name and zeros of what an encoder fills in: a vector for each row, or, of windows, a sum for each piece."""
    if not isinstance(tokenized, Windows):
        return VECTOR, np.zeros((len(tokenized), dimension), np.float32)
    return SUM, np.zeros((len(tokenized.pieces), token_dimension or 0), np.float32)


def result_rows(tokenized: Tokenized, rows: np.ndarray) -> np.ndarray:
    """The rows of the result that come of rows of the input."""
    return tokenized.pieces_of(rows) if isinstance(tokenized, Windows) else rows


def passage_vectors(
    windows: Windows, sums: Encoded, dimension: int, project: Callable[[np.ndarray], np.ndarray]
) -> Encoded:
    """Vectors of the passages, (passages, dimension), of the sums over their pieces.

    `project` makes vectors of means: what the model does after pooling. A fault of a window is one of each passage
    that has tokens there. `tokens` counts the passage's own; nothing is truncated.
    """
    of_window, first, last, passage = windows.pieces.T
    tokens = np.bincount(passage, last - first, windows.passages).astype(np.int32)
    faults = {
        int(passage[piece]): sums.faults[int(of_window[piece])]
        for piece in np.flatnonzero(np.isin(of_window, list(sums.faults)))
    }
    for row in np.flatnonzero(tokens == 0).tolist():
        faults[row] = Fault(ZERO, "no token of the document lies in the passage")
    means = np.zeros((windows.passages, sums.columns[SUM].shape[1]), np.float32)
    np.add.at(means, passage, sums.columns[SUM])
    means /= np.maximum(tokens, 1)[:, None]
    good = np.setdiff1d(np.arange(windows.passages), list(faults))
    vectors = np.zeros((windows.passages, dimension), np.float32)
    if len(good):
        vectors[good] = project(means[good])
    return Encoded({VECTOR: vectors}, tokens, np.zeros_like(tokens), faults, sums.effort)


def can_pool_late(stack: ModuleStack) -> bool:
    """Whether the mean over the tokens of a passage is what the model makes a vector of."""
    after = set(stack.kinds[len(MEAN_POOLED) :])
    return stack.kinds[: len(MEAN_POOLED)] == MEAN_POOLED and after <= AFTER_POOLING


def windows_table(documents: Sequence[CutDocument]) -> tuple[pa.ListArray, pa.ListArray]:
    """Cut documents as columns: list<list<int32>>, the windows of each document, and list<list<int32>[3]>, the pieces
    of each passage of all documents, whose windows are numbered through all documents."""
    firsts = itertools.accumulate((len(document.windows) for document in documents), initial=0)
    pieces = [
        [(first + piece.window, piece.first, piece.last) for piece in of_passage]
        for first, document in zip(firsts, documents, strict=False)
        for of_passage in document.pieces
    ]
    windows = pa.array([document.windows for document in documents], pa.list_(pa.list_(pa.int32())))
    return windows, pa.array(pieces, pa.list_(pa.list_(pa.int32(), 3)))


def windows_of(windows: pa.ListArray, pieces: pa.ListArray) -> Windows:
    """The windows of all documents, and the pieces of all passages, of such columns."""
    ids = windows.flatten()
    rows = pieces.flatten().flatten().to_numpy().reshape(-1, 3)
    owners = np.repeat(np.arange(len(pieces)), pieces.value_lengths().fill_null(0).to_numpy())
    table = np.column_stack([rows, owners]).astype(np.int32)
    lengths = ids.value_lengths().to_numpy().astype(np.int32)
    return Windows(ids, lengths, {}, table[np.argsort(table[:, 0], kind="stable")], len(pieces))


def _pieces(tokens: Span, windows: Sequence[MacroWindow], before: int) -> list[Piece]:
    """The parts of a range of tokens in each window, `before` tokens of which come before the document's own."""
    pieces = []
    for number in range(bisect_right(windows, tokens[0], key=lambda window: window.end), len(windows)):
        window = windows[number]
        first, last = max(tokens[0], window.first), min(tokens[1], window.end)
        if first >= last:
            break
        pieces.append(Piece(number, before + first - window.start, before + last - window.start))
    return pieces


def _ranges(firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """The numbers of the ranges [first, last), one range after the other."""
    sizes = lasts - firsts
    numbers: np.ndarray = np.arange(int(sizes.sum())) + np.repeat(firsts - np.cumsum(sizes) + sizes, sizes)
    return numbers
