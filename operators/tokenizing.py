"""Texts to token ids, as the model's own preprocessing makes them: the part of encoding that needs no model.

Runs ahead of the encoders, on other CPUs; ids travel as Arrow lists. Workers compare these ids with their model's own
preprocessing when they start, and tokenise by themselves where the two differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from penstock.operators.chunking import SEGMENT_CHARACTERS, PassageTokenizer, text_batches

T = TypeVar("T")

TOKENIZER_ERROR = "tokenizer_error"
CHARACTERS_PER_TOKEN = 64  # more than any tokenizer makes of running text; a text that has more is read further


@dataclass(frozen=True)
class Fault:
    """Why a row has no vector: a dead letter's reason and detail."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Tokenized:
    """Token ids list<int32> (N,) with special tokens, cut to the model's window, null where the tokenizer raised;
    `lengths` int32 (N,) counts the tokens of the whole text, special tokens included."""

    ids: pa.ListArray
    lengths: np.ndarray
    faults: dict[int, Fault]

    def __len__(self) -> int:
        return len(self.ids)

    def within(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each text that a model with this window takes, and those that lie beyond it, int32 (N,)."""
        limit = window or int(self.lengths.max(initial=1))
        return np.minimum(self.lengths, limit).astype(np.int32), np.maximum(self.lengths - limit, 0)


class TextTokenizer(PassageTokenizer):
    """The tokenizer of a model with its prompt, special tokens and window; None is no window."""

    def __init__(self, folder: Path, prompt: str, window: int | None, special_tokens: int) -> None:
        super().__init__(folder)
        self._prompt, self._window, self._special = prompt, window, special_tokens

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Ids of the texts. A text that makes the tokenizer raise is a fault, and its neighbours are not.

        Memory: the ids, and what the tokenizer keeps of BATCH_CHARACTERS at a time (some 100 bytes a token).
        """
        parts = [self._tokenize(batch) for batch in text_batches(texts)] or [self._tokenize([])]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        faults = {
            int(start) + row: fault
            for start, part in zip(starts, parts, strict=False)
            for row, fault in part.faults.items()
        }
        ids = pa.concat_arrays([part.ids for part in parts])
        return Tokenized(ids, np.concatenate([part.lengths for part in parts]), faults)

    def _tokenize(self, texts: Sequence[str]) -> Tokenized:
        faults: dict[int, Fault] = {}
        ids: list[list[int] | None] = [None] * len(texts)
        lengths = np.zeros(len(texts), np.int32)
        for row, found in call_each(self._ids_of, texts, faults):
            ids[row], lengths[row] = found
        return Tokenized(pa.array(ids, pa.list_(pa.int32())), lengths, faults)

    def _ids_of(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """(ids, tokens of the whole text) of each text."""
        prompted = [self._prompt + text for text in texts]
        short = [row for row, text in enumerate(prompted) if len(text) <= SEGMENT_CHARACTERS]
        encodings = self._tokenizer.encode_batch_fast([prompted[row] for row in short], add_special_tokens=True)
        found = {row: (encoding.ids, len(encoding)) for row, encoding in zip(short, encodings, strict=True)}
        for row, text in enumerate(prompted):
            if row not in found:
                ids = self._cut(text)
                whole = not self._window or len(ids) < self._window
                found[row] = (ids, len(ids) if whole else int(self.count([text])[0]) + self._special)
            elif self._window and found[row][1] > self._window:
                found[row] = (self._cut(text), found[row][1])
        return [found[row] for row in range(len(texts))]

    def _cut(self, text: str) -> list[int]:
        """The ids of a text cut to the window, of which no more is read than the window needs."""
        if not self._window:
            return list(self._tokenizer.encode(text).ids)
        characters = max(SEGMENT_CHARACTERS, self._window * CHARACTERS_PER_TOKEN)
        self._tokenizer.enable_truncation(self._window)
        try:
            while True:
                space = max(text.rfind(space, 1, characters) for space in " \n\t")
                prefix = text[: characters if space < 0 else space]
                encoding = self._tokenizer.encode(text if characters >= len(text) else prefix)
                if len(encoding) >= self._window or characters >= len(text):
                    return list(encoding.ids)
                characters *= 2
        finally:
            self._tokenizer.no_truncation()


def call_each(
    function: Callable[[Sequence[str]], Sequence[T]], texts: Sequence[str], faults: dict[int, Fault]
) -> list[tuple[int, T]]:
    """(row, result) of a batch function; where it raises, the texts that make it raise are found by bisection."""
    results: list[tuple[int, T]] = []
    parts = [range(len(texts))] if texts else []
    while parts:
        part = parts.pop()
        try:
            results += zip(part, function([texts[row] for row in part]), strict=True)
        except Exception as error:  # whatever a tokenizer raises
            if len(part) == 1:
                faults[part[0]] = Fault(TOKENIZER_ERROR, f"{type(error).__name__}: {error}"[:500])
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
    return results
