"""Which numeric precision may stand for float32: the fastest whose vectors agree with it on texts of the corpus.

The reference is the model as sentence-transformers loads it, in float32, with torch's own kernels.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penstock.operators.acceleration import computes_fast
from penstock.operators.encoder_worker import EncoderFails, EncoderWorker
from penstock.operators.encoding import Backend, Encoder, Precision, unit_length

LEAST_MEAN_COSINE = 0.9999
LEAST_COSINE = 0.999
NEIGHBOURS = 10
SAMPLE_TOKENS = 12_288
SAMPLE_TEXTS = 4  # at least, however long they are
REFERENCE_BATCH_TOKENS = 2048
PASSES = 2
HOPELESS = 1.3  # a candidate whose first pass takes so much longer than the best so far is not timed again


@dataclass(frozen=True)
class Candidate:
    """One way to run the model, against float32: cosines of the same text's two vectors, and the share of the ten
    nearest neighbours within the sample that are the same."""

    precision: Precision
    mean_cosine: float
    min_cosine: float
    overlap_at_10: float
    tokens_per_s: float

    @property
    def agrees(self) -> bool:
        return self.mean_cosine >= LEAST_MEAN_COSINE and self.min_cosine >= LEAST_COSINE


@dataclass(frozen=True)
class Agreement:
    """What was compared and chosen. `dimension_overlap_at_10` is the share of the ten nearest neighbours by full
    vectors that truncated ones find too; None where nothing is truncated."""

    chosen: Precision
    candidates: tuple[Candidate, ...]
    sample_texts: int
    sample_tokens: int
    dimension_overlap_at_10: float | None
    worker: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["candidates"] = [asdict(one) | {"agrees": one.agrees} for one in self.candidates]
        return record


class VectorsDisagree(Exception):
    """The backend that the pipeline file names does not give the vectors of the model."""


def compare_precisions(
    encoder: Encoder,
    full_dimension: int,
    folder: Path,
    texts: Sequence[str],
    wanted: Precision | None,
    threads: int | None,
    device: str | None,
    cache: Path | None,
) -> Agreement:
    """Encode a sample in each precision that this device computes at speed, and choose the fastest that agrees.

    With `wanted`, only that one is compared, and chosen: there the figures inform.

    Raises:
        VectorsDisagree: a backend other than torch does not agree.
    """
    reference = replace(
        encoder,
        precision=Precision.FLOAT32,
        backend=Backend.TORCH,
        batch_tokens=REFERENCE_BATCH_TOKENS,
        dimension=full_dimension,
    )
    worker = EncoderWorker(reference, folder, threads, device, fast_kernels=False)
    texts = _sample(worker, texts)
    encoded = worker.encode(texts)
    usable = np.array([row for row in range(len(texts)) if row not in encoded.faults], np.int64)
    full = encoded.vectors[usable]
    truth = unit_length(full[:, : encoder.dimension].copy())
    del worker
    candidates: list[Candidate] = []
    figures: dict[Precision, dict[str, Any]] = {}
    budget = encoder.batch_tokens
    for precision in [wanted] if wanted else _fast_precisions(device):
        described = replace(encoder, precision=precision, batch_tokens=budget)
        fastest = max((known.tokens_per_s for known in candidates), default=0.0)
        try:
            one = EncoderWorker(described, folder, threads, device, cache)
            found = _compare(one, precision, texts, usable, truth, encoded.effort.tokens, fastest)
        except (RuntimeError, NotImplementedError, TypeError, EncoderFails):
            if wanted or precision is Precision.FLOAT32:
                raise
            continue  # this device cannot run this model in this precision
        candidates.append(found)
        budget = one.batch_tokens  # found by the first for the workers to come; the others are timed with the same
        figures[precision] = one.figures()
        del one
    agreeing = [one for one in candidates if one.agrees or one.precision is Precision.FLOAT32]
    if encoder.backend is not Backend.TORCH and not any(one.agrees for one in candidates):
        best = max(candidates, key=lambda one: one.mean_cosine)
        raise VectorsDisagree(
            f"embedding.backend ({encoder.backend.value}) must give the model's vectors (mean cosine to float32 of "
            f"{LEAST_MEAN_COSINE}, least {LEAST_COSINE}), got {best.mean_cosine:.5f} and {best.min_cosine:.5f} in "
            f"{best.precision.value}; use backend torch, or another precision"
        )
    chosen = wanted or max(agreeing or candidates, key=lambda one: one.tokens_per_s).precision
    overlap = None
    if encoder.dimension < full_dimension:
        overlap = neighbour_overlap(unit_length(full), truth)
    return Agreement(chosen, tuple(candidates), len(usable), encoded.effort.tokens, overlap, figures[chosen])


def neighbour_overlap(truth: np.ndarray, found: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Share of the k nearest neighbours (by inner product, the row itself left out) that two sets of vectors (N, d) of
    the same rows have in common; 1.0 for fewer than two rows."""
    k = min(k, len(truth) - 1)
    if k < 1:
        return 1.0
    expected, got = (_neighbours(vectors, k) for vectors in (truth, found))
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(expected.tolist(), got.tolist(), strict=True)]))


def _neighbours(vectors: np.ndarray, k: int) -> np.ndarray:
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -np.inf)
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]


def _fast_precisions(device: str | None) -> list[Precision]:
    return [
        precision
        for precision in (Precision.BFLOAT16, Precision.FLOAT16, Precision.FLOAT32)
        if precision is Precision.FLOAT32 or (device or "cpu") != "cpu" or computes_fast(precision.value)
    ]


def _sample(worker: EncoderWorker, texts: Sequence[str]) -> list[str]:
    """As many of the texts as SAMPLE_TOKENS allows."""
    lengths = np.minimum(worker.tokenize(texts).lengths, worker.encoder.max_tokens or SAMPLE_TOKENS)
    enough = int(np.searchsorted(np.cumsum(lengths), SAMPLE_TOKENS, side="right"))
    return list(texts[: max(enough, SAMPLE_TEXTS)])


def _compare(
    worker: EncoderWorker,
    precision: Precision,
    texts: list[str],
    usable: np.ndarray,
    truth: np.ndarray,
    tokens: int,
    best: float,
) -> Candidate:
    seconds = []
    for _ in range(PASSES):
        started = time.perf_counter()
        encoded = worker.encode(texts)
        seconds.append(time.perf_counter() - started)
        if tokens / seconds[0] * HOPELESS < best:
            break
    found = unit_length(encoded.vectors[usable])
    cosines = np.nan_to_num((found * truth).sum(axis=1), nan=-1.0)
    return Candidate(
        precision=precision,
        mean_cosine=float(cosines.mean()) if len(cosines) else 1.0,
        min_cosine=float(cosines.min(initial=1.0)),
        overlap_at_10=neighbour_overlap(truth, found),
        tokens_per_s=tokens / min(seconds),
    )
