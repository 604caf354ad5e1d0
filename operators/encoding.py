"""What an encoder is and what it gives: the descriptor that identifies a vector space, batches, faults of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from penstock.operators.identity import fingerprint
from penstock.operators.models import ModelCard
from penstock.operators.tokenizing import Fault

OPERATOR_VERSION = 2
VECTOR = "vector"
MAY_BE_FILLED = 4
MOST_PADDING = 1 / 8
PAD_TO = 8  # tokens
NON_FINITE = "non_finite_vector"
ZERO = "zero_vector"
OVERFLOW = "float16_overflow"


class Precision(StrEnum):
    """The numeric format of the model's weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Backend(StrEnum):
    """What runs the model: torch, or what sentence-transformers loads for `backend=`."""

    TORCH = "torch"
    OPENVINO = "openvino"


class TextRefused(Exception):
    """A text that must have a vector got none."""


class ModelMismatch(Exception):
    """The model found is not the one that the descriptor, or the index, was made with."""


@dataclass(frozen=True)
class Encoder:
    """Frozen descriptor of an encoder: what crosses to a worker, which loads the weights there.

    `prompt` is put before each text; `dimension` truncates (Matryoshka) before vectors are normalised to unit length;
    `layers` runs the first transformer layers alone; `task` is "document" or "query", for models that route by it.
    Without `batch_tokens` the worker finds the budget by measurement.
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
    batch_tokens: int | None = None
    trust_remote_code: bool = False
    layers: int | None = None
    backend: Backend = Backend.TORCH
    task: str = "document"

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
            "layers": self.layers,
            "backend": self.backend.value,
            "task": self.task,
        }

    def fingerprint(self) -> str:
        return fingerprint(**self.parameters())

    @property
    def space(self) -> str:
        """Identity of the vector space: the parameters less prompt and task, in which queries may differ."""
        shared = {name: value for name, value in self.parameters().items() if name not in ("prompt", "task")}
        return fingerprint(**shared)


@dataclass
class Effort:
    """What encoding took: real and padded tokens of the batches, seconds the device computed and seconds altogether,
    floating point operations (of the linear layers and attention), and out-of-memory retries."""

    tokens: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0
    wall_s: float = 0.0
    flops: float = 0.0
    budget_halvings: int = 0
    restarts: int = 0

    def add(self, other: Effort) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of N texts, in their order.

    `columns` are named arrays of N rows; an encoder of dense vectors yields "vector", float32 (N, d). `tokens` and
    `truncated_tokens` int32 (N,) count what the model was given (with prompt and special tokens) and what of it lay
    beyond its window. Rows in `faults` have no usable vector.
    """

    columns: dict[str, np.ndarray]
    tokens: np.ndarray
    truncated_tokens: np.ndarray
    faults: dict[int, Fault]
    effort: Effort

    @property
    def vectors(self) -> np.ndarray:
        return self.columns[VECTOR]

    def require(self) -> np.ndarray:
        """The vectors (N, d) of all rows.

        Raises:
            TextRefused: a row has none.
        """
        for row, fault in self.faults.items():
            raise TextRefused(f"text {row} has no vector: {fault.reason}: {fault.detail}; leave it out, or change it")
        return self.vectors


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


def token_batches(lengths: np.ndarray, batch_tokens: int, most_rows: int | None = None) -> Iterator[np.ndarray]:
    """Row numbers grouped into batches of padded size (rows * longest) within `batch_tokens`, longest rows first.

    A batch that is a quarter full takes no row that would be padded by more than an eighth. A row longer than the
    budget is a batch of its own; no batch has more than `most_rows` rows.
    """
    order = np.argsort(-lengths, kind="stable")
    sorted_lengths = np.maximum(lengths[order], 1)
    start = 0
    while start < len(order):
        longest = int(sorted_lengths[start])
        rows = min(max(batch_tokens // longest, 1), most_rows or len(order), len(order) - start)
        least_rows = max(1, rows // MAY_BE_FILLED)
        alike = int(np.searchsorted(-sorted_lengths[start : start + rows], -longest * (1 - MOST_PADDING), side="right"))
        taken = min(rows, max(alike, least_rows))
        yield order[start : start + taken]
        start += taken


def padded_lengths(lengths: np.ndarray, most: int | None) -> np.ndarray:
    """Lengths rounded up to a multiple of PAD_TO, but not beyond `most` tokens, where a row is no longer itself.

    What a text is padded to decides in which order its sums are made. A length that follows from the text alone gives
    the same vector, bit for bit, in whatever batch it is encoded: on CPU, the number of rows changes nothing.
    """
    rounded = -(-np.maximum(lengths, 1) // PAD_TO) * PAD_TO
    limited: np.ndarray = rounded if most is None else np.maximum(np.minimum(rounded, most), lengths)
    return limited


def even_batches(padded: np.ndarray, batch_tokens: int, most_rows: int) -> Iterator[np.ndarray]:
    """Row numbers grouped into batches of rows of one padded length within `batch_tokens`, longest rows first."""
    order = np.argsort(-padded, kind="stable")
    for alike in np.split(order, np.flatnonzero(np.diff(padded[order])) + 1):
        rows = min(max(batch_tokens // int(padded[alike].max(initial=1)), 1), most_rows)
        yield from (alike[start : start + rows] for start in range(0, len(alike), rows))


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
