"""Encode passages and queries with a sentence-transformers model.

Batches are formed by a token budget over length-sorted texts, so that little is padded; the order of rows is restored.
Vectors are the same for any batch size up to float rounding: within 2e-6 per component in float32 on CPU
(tests/operators/test_encoding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from penstock.operators.chunking import PassageTokenizer
from penstock.operators.identity import fingerprint
from penstock.operators.models import ModelCard, read_model_card, tokenizer_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OPERATOR_VERSION = 1
DEFAULT_BATCH_TOKENS = 4096  # larger batches leave the L2 cache: 16k tokens cost 1.5 times 4k on a 2 MiB-L2 CPU
NON_FINITE = "non_finite_vector"
ZERO = "zero_vector"
OVERFLOW = "float16_overflow"


class Precision(StrEnum):
    """The numeric format of the model's weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ModelMismatch(Exception):
    """The model found is not the one that the descriptor, or the index, was made with."""


@dataclass(frozen=True)
class Encoder:
    """Frozen descriptor of an encoder: what crosses to a worker, which loads the weights there.

    `prompt` is put before each text; `dimension` truncates (Matryoshka) before vectors are normalised to unit length.
    """

    model: str
    weights_hash: str
    tokenizer_hash: str
    configuration_hash: str
    max_tokens: int | None
    special_tokens: int
    dimension: int
    prompt: str
    normalize: bool
    precision: Precision = Precision.FLOAT32
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    trust_remote_code: bool = False

    def parameters(self) -> dict[str, object]:
        """All that changes a vector, and nothing else: not where the model lies, nor the batch size."""
        return {
            "operator": "encode",
            "version": OPERATOR_VERSION,
            "weights": self.weights_hash,
            "tokenizer": self.tokenizer_hash,
            "configuration": self.configuration_hash,
            "max_tokens": self.max_tokens,
            "dimension": self.dimension,
            "prompt": self.prompt,
            "normalize": self.normalize,
            "precision": self.precision.value,
        }

    def fingerprint(self) -> str:
        return fingerprint(**self.parameters())

    @property
    def space(self) -> str:
        """Identity of the vector space: the parameters less the prompt, since queries may have one of their own."""
        return fingerprint(**{name: value for name, value in self.parameters().items() if name != "prompt"})


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 (N, d) in the order of the texts; `tokens` and `truncated_tokens` int32 (N,) count what the model
    was given (with prompt and special tokens) and what of it lay beyond its window."""

    vectors: np.ndarray
    tokens: np.ndarray
    truncated_tokens: np.ndarray


class EncoderWorker:
    """Loads a model once and encodes texts; one per worker process. Without a device, torch's best one is taken.

    Raises:
        ModelMismatch: the folder's hashes differ from the descriptor's.
    """

    def __init__(self, encoder: Encoder, folder: Path, threads: int | None = None, device: str | None = None) -> None:
        card = read_model_card(encoder.model, folder)
        check_same_model(encoder, card)
        self.encoder = encoder
        self._tokenizer = PassageTokenizer(tokenizer_folder(folder))
        self._model = _load(encoder, folder, threads, device)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; peak memory is one batch of `batch_tokens` tokens plus the vectors (N * d * 4 bytes)."""
        encoder = self.encoder
        lengths = self._tokenizer.count([encoder.prompt + text for text in texts]) + encoder.special_tokens
        window = encoder.max_tokens or int(lengths.max(initial=1))
        vectors = np.empty((len(texts), encoder.dimension), dtype=np.float32)
        for rows in token_batches(np.minimum(lengths, window), encoder.batch_tokens):
            vectors[rows] = self._encode_batch([texts[row] for row in rows])
        truncated = np.maximum(lengths - window, 0).astype(np.int32)
        return Encoded(vectors, np.minimum(lengths, window).astype(np.int32), truncated)

    def _encode_batch(self, texts: list[str]) -> np.ndarray:
        raw = self._model.encode(
            texts,
            prompt=self.encoder.prompt,
            batch_size=len(texts),
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        vectors = raw.float().cpu().numpy()[:, : self.encoder.dimension]
        return unit_length(vectors) if self.encoder.normalize else vectors


def encoder_for(card: ModelCard, *, prompt: str, dimension: int, normalize: bool, **options: object) -> Encoder:
    """The descriptor of an encoder for a model card; `options` are the remaining fields of Encoder."""
    return Encoder(
        model=card.reference,
        weights_hash=card.weights_hash,
        tokenizer_hash=card.tokenizer_hash,
        configuration_hash=card.configuration_hash,
        max_tokens=card.max_tokens,
        special_tokens=card.special_tokens,
        dimension=dimension,
        prompt=prompt,
        normalize=normalize,
        **options,  # type: ignore[arg-type]
    )


def check_same_model(encoder: Encoder, card: ModelCard) -> None:
    """Refuse a model whose weights, tokenizer or configuration differ from the descriptor's, naming both."""
    for name in ("weights_hash", "tokenizer_hash", "configuration_hash"):
        expected, found = getattr(encoder, name), getattr(card, name)
        if expected != found:
            raise ModelMismatch(
                f"{name} of the model ({encoder.model}) must be {expected[:16]}, which the vectors were made with; "
                f"got {found[:16]}; supply the original model, or run the pipeline again to embed with the new one"
            )


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Row numbers grouped into batches of padded size (rows * longest) within `batch_tokens`, longest rows first.

    A row longer than the budget is a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        rows = max(batch_tokens // longest, 1)
        yield order[start : start + rows]
        start += rows


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float32; zero and non-finite rows stay as they are, for `vector_faults` to name."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(norms) & (norms > 0)
    scaled: np.ndarray = np.divide(vectors, norms, out=vectors.astype(np.float32), where=usable)
    return scaled


def vector_faults(vectors: np.ndarray, stored: np.dtype[np.floating]) -> dict[int, str]:
    """Row number → reason for vectors (N, d) that must not be stored: not finite, zero, or beyond the stored format.

    Zero is also what becomes zero in the stored format, or has a length of zero in float32.
    """
    faults: dict[int, str] = {}
    norms = np.linalg.norm(vectors, axis=1)
    peaks = np.abs(vectors).max(axis=1, initial=0.0)
    limit = float(np.finfo(stored).max)
    least = float(np.finfo(stored).smallest_subnormal) / 2  # and what is below it rounds to zero
    for row in np.flatnonzero(~np.isfinite(norms)):
        faults[int(row)] = NON_FINITE
    for row in np.flatnonzero((norms == 0) | (peaks <= least)):
        faults[int(row)] = ZERO
    for row in np.flatnonzero(np.isfinite(peaks) & (peaks > limit)):
        faults[int(row)] = OVERFLOW
    return faults


def _load(encoder: Encoder, folder: Path, threads: int | None, device: str | None) -> SentenceTransformer:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads:
        torch.set_num_threads(threads)
    model = SentenceTransformer(
        str(folder),
        device=device,
        trust_remote_code=encoder.trust_remote_code,
        local_files_only=True,
        model_kwargs={"use_safetensors": True},
    )
    return model.to(getattr(torch, encoder.precision.value)).eval()
