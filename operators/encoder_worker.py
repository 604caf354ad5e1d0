"""Load a sentence-transformers model and encode with it, at the device's best batch size.

Batches are formed by a token budget over texts of like lengths, so that little is padded; the order of rows is
restored. On CPU, texts of models that take token ids are padded to a length that follows from each alone: vectors are
the same, bit for bit, for any batch size. Elsewhere they are up to float rounding
(tests/operators/test_encoder_worker.py).
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from penstock.operators.acceleration import accelerate
from penstock.operators.batch_budget import BudgetCache, find_budget, is_out_of_memory
from penstock.operators.encoding import (
    Backend,
    Effort,
    Encoded,
    Encoder,
    Precision,
    check_same_model,
    even_batches,
    padded_lengths,
    token_batches,
    unit_length,
)
from penstock.operators.late_chunking import (
    Windows,
    can_pool_late,
    passage_vectors,
    result_rows,
    result_zeros,
    sum_tokens,
)
from penstock.operators.models import read_model_card, read_module_stack, tokenizer_folder
from penstock.operators.tokenizing import Fault, TextTokenizer, Tokenized

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

QUERY_BATCH_TOKENS = 2048  # for a few short texts at a time, where a search for the best budget would only delay them
SMALL_BUDGET, BATCHES_TO_OVERLAP = 4096, 16
LEAST_KEPT_BUDGET = 1024  # a batch can fail since others on the device had the memory at that moment
MOST_ROWS = 32_768  # attention kernels of accelerators have a launch grid of 65,535 at most
OUT_OF_MEMORY = "out_of_memory"
ENCODER_ERROR = "encoder_error"
LAYER_LISTS = ("layer", "layers", "h", "block", "blocks")
FEATURES = {"input_ids", "attention_mask", "token_type_ids", "modality", "prompt_length"}
# A fragment of at least so many rows, of which every one makes the model raise, says that the model is broken.
ROWS_OF_PROOF = 8
PROBES = (
    "A short probe.",
    "Ärger mit ÜMLAUTEN, 数据库 and emoji 🙂 — in one line; numbers 3.14159 and [MASK] </s> <unk>.",
    "a",
    "tokens that go on and on, " * 400,
)

BatchDone = Callable[[np.ndarray, np.ndarray], None]


class DeviceLost(Exception):
    """The accelerator is in a state that only a new process mends."""


class EncoderFails(Exception):
    """The model raised for every single text of a fragment: nothing is wrong with the texts."""


class EncoderWorker:
    """Loads a model once and encodes texts; one per worker process. Without a device, torch's best one is taken.

    Args:
        threads: CPU threads of torch; without it, torch's own choice.
        cache: folder where the batch budget found for this model and device is kept.
        fast_kernels: on CPU, use the kernels of `operators/acceleration.py`.

    Raises:
        ModelMismatch: the folder's hashes differ from the descriptor's.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        threads: int | None = None,
        device: str | None = None,
        cache: Path | None = None,
        fast_kernels: bool = True,
    ) -> None:
        started = time.perf_counter()
        import torch

        card = read_model_card(encoder.model, folder)
        check_same_model(encoder, card)
        if threads:
            torch.set_num_threads(threads)
        self.encoder = encoder
        self._model = _load(encoder, folder, threads, device)
        loaded = time.perf_counter()
        self._device = torch.device(self._model.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # events and copies are of the current device
        self._prompt_length, self._takes = _inspect(self._model, encoder)
        self._tokenizer = TextTokenizer(
            tokenizer_folder(folder), encoder.prompt, encoder.max_tokens, encoder.special_tokens
        )
        self._pads_evenly = False
        self.takes_token_ids = self._takes is not None and self._same_token_ids()
        self._pads_evenly = self.takes_token_ids and self._device.type == "cpu"
        stack = read_module_stack(folder)
        self._token_dimension = stack.token_dimension if can_pool_late(stack) and self.takes_token_ids else None
        self.fast_kernels = False
        if fast_kernels and self._device.type == "cpu" and encoder.backend is Backend.TORCH:
            found = accelerate(self._model, self._probe, lambda: _load(encoder, folder, threads, device))
            self._model, self.fast_kernels = found
        self._flops_per_token, self._attention_flops = _flops(self._model)
        self._budgets = BudgetCache(cache, self._budget_key())
        self.batch_tokens = encoder.batch_tokens or self._budgets.load() or self._find_budget()
        self._peak_flops = _matrix_peak(self._device, self._model.dtype)
        self._ready_at_s = time.time()
        self._load_s, self._prepare_s = loaded - started, time.perf_counter() - loaded

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Token ids of texts, with prompt and special tokens."""
        return self._tokenizer.tokenize(texts)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; peak memory is two batches of `batch_tokens` tokens plus the vectors (N * d * 4 bytes)."""
        return self.encode_tokens(self._tokenizer.tokenize(texts), texts)

    def encode_tokens(
        self,
        tokenized: Tokenized,
        texts: Sequence[str],
        on_start: Callable[[np.ndarray], None] | None = None,
        on_done: BatchDone | None = None,
        rows: np.ndarray | None = None,
        one_by_one: bool = False,
    ) -> Encoded:
        """Encode texts whose token ids are made; `texts` themselves serve models with preprocessing of their own.

        `on_start` is told the rows of each batch before it, `on_done` the rows and their vectors after it. With `rows`,
        only those are encoded. Of `Windows` the result is the sums over their pieces instead of vectors.

        Raises:
            EncoderFails: each text of a fragment made the model raise, or the model has no windows.
            DeviceLost: the device must be given up, and the process with it.
        """
        started = time.perf_counter()
        lengths, truncated = tokenized.within(self.encoder.max_tokens)
        faults = dict(tokenized.faults)
        chosen = np.arange(len(tokenized)) if rows is None else rows
        chosen = np.array([row for row in chosen.tolist() if row not in faults], np.int64)
        windows = tokenized if isinstance(tokenized, Windows) else None
        if windows is not None and self._token_dimension is None:
            raise EncoderFails(
                f"encoder ({self.encoder.model}): late chunking needs a transformer with mean pooling that takes token "
                "ids, this model is another; choose passages.type tokens"
            )
        name, result = result_zeros(tokenized, self.encoder.dimension, self._token_dimension)
        effort = Effort()
        inputs = _Inputs(tokenized.ids, texts, lengths, windows)

        def take(done: np.ndarray, found: np.ndarray) -> None:
            found = found if windows is not None else self._finish(found)
            result[result_rows(tokenized, done)] = found
            if on_done:
                on_done(done, found)

        self._encode_rows(inputs, chosen, 1 if one_by_one else None, on_start, take, faults, effort)
        failed = [row for row in faults if faults[row].reason == ENCODER_ERROR]
        if len(failed) >= ROWS_OF_PROOF and len(failed) == len(chosen) and not self._encodes_probes():
            raise EncoderFails(
                f"encoder ({self.encoder.model}): the model raised for each of {len(chosen)} texts, the last with "
                f"{faults[failed[-1]].detail}; check the model with sentence-transformers alone"
            )
        effort.wall_s = time.perf_counter() - started
        return Encoded({name: result}, lengths, truncated, faults, effort)

    def encode_spans(self, windows: Windows) -> Encoded:
        """Encode passages within their documents."""
        sums = self.encode_tokens(windows, ())
        return passage_vectors(windows, sums, self.encoder.dimension, self.project)

    def project(self, means: np.ndarray) -> np.ndarray:
        """Vectors of means of token vectors, (N, token_dimension): what the model does after pooling."""
        import torch

        with torch.inference_mode():
            vectors = torch.from_numpy(means).to(self._device)
            for module in list(self._model)[2:]:
                vectors = module({"sentence_embedding": vectors})["sentence_embedding"]
            return self._finish(vectors.float().cpu().numpy())

    def figures(self) -> dict[str, Any]:
        """What this worker found about itself: device, budget, kernels, who tokenises, whether each text is padded
        by itself (`padded_lengths`), the device's measured matrix peak in operations per second (accelerators), seconds
        to import and load and to prepare, and when it was ready (seconds since the epoch)."""
        return {
            "device": _device_name(self._device),
            "batch_tokens": self.batch_tokens,
            "fast_kernels": self.fast_kernels,
            "takes_token_ids": self.takes_token_ids,
            "pads_evenly": self._pads_evenly,
            "peak_flops": self._peak_flops,
            "flops_per_token": self._flops_per_token,
            "attention_flops": self._attention_flops,
            "load_s": round(self._load_s, 3),
            "prepare_s": round(self._prepare_s, 3),
            "ready_at_s": round(self._ready_at_s, 3),
        }

    # ---- batches

    def _encode_rows(
        self,
        inputs: _Inputs,
        rows: np.ndarray,
        most_rows: int | None,
        on_start: Callable[[np.ndarray], None] | None,
        take: BatchDone,
        faults: dict[int, Fault],
        effort: Effort,
    ) -> None:
        """Run all batches, two in flight on an accelerator; what raises is halved down to the culprit."""
        waiting: deque[np.ndarray] = deque(self._batches(inputs.lengths, rows, most_rows))
        in_flight: deque[_InFlight] = deque()
        # One text at a time is a search for the culprit: nothing else may be in flight then.
        depth = 1 if self._device.type == "cpu" or most_rows == 1 else 2
        while waiting or in_flight:
            if waiting and len(in_flight) < depth:
                batch = waiting.popleft()
                if on_start:
                    on_start(np.concatenate([*(one.rows for one in in_flight), batch]))
                try:
                    in_flight.append(self._launch(inputs, batch))
                except Exception as error:
                    self._blame(error, batch, inputs.lengths, waiting, faults, effort)
                continue
            done = in_flight.popleft()
            try:
                found = done.wait(effort)
            except Exception as error:
                self._blame(error, done.rows, inputs.lengths, waiting, faults, effort)
                continue
            take(done.rows, found)
            self._count(done, inputs.lengths, effort)

    def _batches(self, lengths: np.ndarray, rows: np.ndarray, most_rows: int | None) -> Iterator[np.ndarray]:
        if self._pads_evenly:
            padded = padded_lengths(lengths[rows], self.encoder.max_tokens)
            batches = even_batches(padded, self.batch_tokens, most_rows or MOST_ROWS)
        else:
            budget = self.batch_tokens
            if self._device.type != "cpu":  # enough batches that copying one and computing another overlap
                budget = min(budget, max(SMALL_BUDGET, int(lengths[rows].sum()) // BATCHES_TO_OVERLAP))
            batches = token_batches(lengths[rows], budget, most_rows or MOST_ROWS)
        return (rows[batch] for batch in batches)

    def _padded_length(self, lengths: np.ndarray) -> int:
        """Tokens to which a batch of rows of these lengths is padded."""
        padded = padded_lengths(lengths, self.encoder.max_tokens) if self._pads_evenly else lengths
        return int(padded.max(initial=1))

    def _blame(
        self,
        error: Exception,
        batch: np.ndarray,
        lengths: np.ndarray,
        waiting: deque[np.ndarray],
        faults: dict[int, Fault],
        effort: Effort,
    ) -> None:
        """After an error: smaller batches where memory ran out, else halves; a single row is a fault."""
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold the activations
            self._empty_device_cache()
            if len(batch) == 1:
                detail = f"{lengths[batch[0]]} tokens alone are too much: {error}"
                faults[int(batch[0])] = Fault(OUT_OF_MEMORY, detail[:500])
                return
            padded = len(batch) * self._padded_length(lengths[batch])
            self.batch_tokens = max(min(self.batch_tokens, padded) // 2, 1)
            if not self.encoder.batch_tokens:
                self._budgets.save(max(self.batch_tokens, LEAST_KEPT_BUDGET))
            effort.budget_halvings += 1
            rest = np.concatenate([batch, *waiting])
            waiting.clear()
            waiting.extend(self._batches(lengths, rest, None))
            return
        if _is_device_error(error):
            raise DeviceLost(f"{type(error).__name__}: {error}") from error
        if len(batch) == 1:
            faults[int(batch[0])] = Fault(ENCODER_ERROR, f"{type(error).__name__}: {error}"[:500])
            return
        middle = len(batch) // 2
        waiting.extendleft([batch[middle:], batch[:middle]])

    def _launch(self, inputs: _Inputs, rows: np.ndarray) -> _InFlight:
        import torch

        with torch.inference_mode():
            features = self._features(inputs, rows)
            bags = self._bags(inputs, rows)
            if self._device.type != "cuda":
                features = {
                    name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                    for name, value in features.items()
                }
                bags = [bag.to(self._device) for bag in bags]
                started = time.perf_counter()
                vectors = self._forward(features, *bags)
                return _InFlight(rows, vectors, time.perf_counter() - started)
            features = {
                name: value.pin_memory().to(self._device, non_blocking=True) if hasattr(value, "pin_memory") else value
                for name, value in features.items()
            }
            bags = [bag.pin_memory().to(self._device, non_blocking=True) for bag in bags]
            begin, end = _cuda_event(), _cuda_event()
            begin.record()
            found = self._forward(features, *bags)
            end.record()
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            host.copy_(found, non_blocking=True)
            copied = _cuda_event()
            copied.record()
            return _InFlight(rows, host, 0.0, (begin, end, copied))

    def _features(self, inputs: _Inputs, rows: np.ndarray) -> dict[str, Any]:
        if not self.takes_token_ids:
            texts = [inputs.texts[row] for row in rows]
            features: dict[str, Any] = self._model.preprocess(
                texts, prompt=self.encoder.prompt or None, task=self.encoder.task
            )
            return features
        return self._padded_features(inputs.ids, rows)

    def _padded_features(self, ids: pa.ListArray, rows: np.ndarray) -> dict[str, Any]:
        """What the model's own preprocessing would give for these ids: padded, masked, on the side it pads."""
        import torch

        assert self._takes is not None
        values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        starts, ends = offsets[rows], offsets[rows + 1]
        counts = (ends - starts).astype(np.int64)
        longest = self._padded_length(counts)
        places = np.arange(longest)
        inside = places >= longest - counts[:, None] if self._takes.pads_left else places < counts[:, None]
        first = np.cumsum(counts) - counts
        matrix = np.full((len(rows), longest), self._takes.pad_id, np.int64)
        matrix[inside] = values[np.repeat(starts - first, counts) + np.arange(counts.sum())]
        mask = inside.astype(np.int64)
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(matrix),
            "attention_mask": torch.from_numpy(mask),
            "modality": "text",
        }
        if self._takes.token_types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        if self._prompt_length is not None:
            features["prompt_length"] = self._prompt_length
        return features

    def _bags(self, inputs: _Inputs, rows: np.ndarray) -> list[torch.Tensor]:
        """The tokens of each piece of a batch of windows; nothing for other rows."""
        import torch

        if inputs.windows is None:
            return []
        assert self._takes is not None
        longest = self._padded_length(inputs.lengths[rows])
        return [torch.from_numpy(bag) for bag in inputs.windows.bags(rows, longest, self._takes.pads_left)]

    def _forward(self, features: dict[str, Any], *bags: torch.Tensor) -> torch.Tensor:
        """Vectors of the rows or, with `bags`, sums of the token vectors of their pieces."""
        found = self._model(features, task=self.encoder.task)
        if bags:
            return sum_tokens(found["token_embeddings"], *bags)
        vectors: torch.Tensor = found["sentence_embedding"]
        return vectors.float()

    def _finish(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors[:, : self.encoder.dimension]
        return unit_length(vectors) if self.encoder.normalize else vectors

    def _count(self, done: _InFlight, lengths: np.ndarray, effort: Effort) -> None:
        of_batch = lengths[done.rows].astype(np.int64)
        effort.tokens += int(of_batch.sum())
        effort.padded_tokens += self._padded_length(of_batch) * len(of_batch)
        effort.flops += float(self._flops_per_token * of_batch.sum() + self._attention_flops * (of_batch**2).sum())

    # ---- at the start

    def _probe(self) -> np.ndarray:
        inputs = self._tokenizer.tokenize(PROBES)
        import torch

        with torch.inference_mode():
            features = self._features(_Inputs(inputs.ids, PROBES, inputs.lengths), np.arange(len(PROBES)))
            vectors: np.ndarray = self._forward(features).cpu().numpy()
        return vectors

    def _encodes_probes(self) -> bool:
        """Whether the model still encodes any text at all."""
        faults: dict[int, Fault] = {}
        probes = self._tokenizer.tokenize(PROBES)
        inputs = _Inputs(probes.ids, PROBES, probes.within(self.encoder.max_tokens)[0])
        self._encode_rows(inputs, np.arange(len(PROBES)), None, None, lambda *_: None, faults, Effort())
        return len(faults) < len(PROBES)

    def _same_token_ids(self) -> bool:
        """Whether ids made ahead, padded here, are the very features that the model's own preprocessing makes."""
        import torch

        try:
            theirs = self._model.preprocess(list(PROBES), prompt=self.encoder.prompt or None, task=self.encoder.task)
            ours = self._padded_features(self._tokenizer.tokenize(PROBES).ids, np.arange(len(PROBES)))
        except (ValueError, TypeError, KeyError, RuntimeError):
            return False
        if set(ours) != set(theirs):
            return False
        return all(
            torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
            for name, value in ours.items()
        )

    def _find_budget(self) -> int:
        window = min(self.encoder.max_tokens or 256, 512)
        accelerator = self._device.type != "cpu"

        def seconds(budget: int) -> float:
            """Seconds per token of one batch at this budget, of texts of about half the window."""
            tokens = max(8, window // 2)
            rows = max(1, budget // tokens)
            text = "word " * (tokens - self.encoder.special_tokens)
            ids = self._tokenizer.tokenize([text]).ids[0].as_py()[:tokens]
            inputs = _Inputs(pa.array([ids] * rows, pa.list_(pa.int32())), [text] * rows, np.full(rows, len(ids)))
            started = time.perf_counter()
            self._launch(inputs, np.arange(rows)).wait(Effort())
            return (time.perf_counter() - started) / (rows * tokens)

        try:
            budget = find_budget(seconds, accelerator)
        finally:
            self._empty_device_cache()
        self._budgets.save(budget)
        return budget

    def _budget_key(self) -> dict[str, object]:
        import torch

        encoder = self.encoder
        return {
            "model": encoder.weights_hash,
            "configuration": encoder.configuration_hash,
            "precision": encoder.precision.value,
            "layers": encoder.layers,
            "backend": encoder.backend.value,
            "device": _device_name(self._device),
            "threads": torch.get_num_threads(),
            "fast_kernels": self.fast_kernels,
            "torch": str(torch.__version__),
        }

    def _empty_device_cache(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Inputs:
    ids: pa.ListArray
    texts: Sequence[str]
    lengths: np.ndarray
    windows: Windows | None = None


@dataclass(frozen=True)
class _Takes:
    """How the model's preprocessing pads token ids."""

    pad_id: int
    pads_left: bool
    token_types: bool


@dataclass(frozen=True)
class _InFlight:
    """A batch on its way: vectors on the host, ready once the last event has happened."""

    rows: np.ndarray
    vectors: torch.Tensor
    seconds: float
    events: tuple[Any, ...] = ()

    def wait(self, effort: Effort) -> np.ndarray:
        if self.events:
            begin, end, copied = self.events
            copied.synchronize()
            effort.busy_s += begin.elapsed_time(end) / 1000
        else:
            effort.busy_s += self.seconds
        found: np.ndarray = self.vectors.cpu().numpy()
        return found


def _cuda_event() -> Any:  # noqa: ANN401
    import torch

    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


def _is_device_error(error: Exception) -> bool:
    words = str(error)
    return isinstance(error, RuntimeError) and ("CUDA error" in words or "device-side assert" in words)


def _matrix_peak(device: torch.device, dtype: torch.dtype | None, size: int = 8192, repeats: int = 5) -> float | None:
    """Operations per second of a large matrix product on an accelerator: the most that a model could reach."""
    import torch

    if device.type != "cuda" or dtype is None:
        return None
    try:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates = []
        for _ in range(repeats + 1):
            begin, end = _cuda_event(), _cuda_event()
            begin.record()
            a @ b
            end.record()
            end.synchronize()
            rates.append(2 * size**3 / (begin.elapsed_time(end) / 1000))
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return float(max(rates))


def _device_name(device: torch.device) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _load(encoder: Encoder, folder: Path, threads: int | None, device: str | None) -> SentenceTransformer:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"trust_remote_code": encoder.trust_remote_code, "local_files_only": True}
    if encoder.backend is Backend.OPENVINO:
        hint = {"bfloat16": "bf16", "float16": "f16"}.get(encoder.precision.value, "f32")
        hints = {"INFERENCE_PRECISION_HINT": hint} | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
        settings = {"ov_config": hints, "export": True}
        model = SentenceTransformer(str(folder), backend="openvino", device="cpu", model_kwargs=settings, **options)
        return model.eval()
    settings = {"use_safetensors": True, "dtype": getattr(torch, encoder.precision.value)}
    model = SentenceTransformer(str(folder), device=device, model_kwargs=settings, **options)
    if encoder.layers is not None:
        keep_first_layers(model, encoder.layers)
    for module in list(model)[1:]:
        module.float()
    if encoder.precision is not Precision.FLOAT32:
        _widen_outputs(model)
    return model.eval()


def _widen_outputs(model: SentenceTransformer) -> None:
    """Run the first module, the transformer, in a narrower format, and what follows it (pooling, Dense, Normalize) in
    float32: a mean over tokens and a norm lose most by rounding, and cost nearly nothing."""
    import torch

    def widen(_module: torch.nn.Module, _inputs: object, features: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in features.items()
        }

    model[0].register_forward_hook(widen)


def keep_first_layers(model: SentenceTransformer, layers: int) -> None:
    """Drop all transformer layers after the first `layers`: for models trained so that these can stand alone.

    Raises:
        ValueError: the model has no list of as many layers as its configuration says, or has fewer.
    """
    import torch

    transformer = model.transformers_model
    total = getattr(getattr(transformer, "config", None), "num_hidden_layers", None)
    if transformer is not None and isinstance(total, int) and 1 <= layers <= total:
        for parent in transformer.modules():
            for name, child in parent.named_children():
                if name in LAYER_LISTS and isinstance(child, torch.nn.ModuleList) and len(child) == total:
                    setattr(parent, name, child[:layers])
                    transformer.config.num_hidden_layers = layers
                    return
    raise ValueError(
        f"embedding.layers ({layers}) must be at most the model's {total or 'list of'} transformer layers; "
        "lower it, or leave it out"
    )


def _inspect(model: SentenceTransformer, encoder: Encoder) -> tuple[int | None, _Takes | None]:
    """The length of the prompt, where pooling wants to know it, and how the model pads; None for other features."""
    features: dict[str, Any] = model.preprocess(["a", "two words"], prompt=encoder.prompt or None, task=encoder.task)
    tokenizer = getattr(model, "tokenizer", None)
    pad_id = getattr(tokenizer, "pad_token_id", None)
    prompt_length = features.get("prompt_length")
    if not set(features) <= FEATURES or "attention_mask" not in features or pad_id is None:
        return prompt_length, None
    left = getattr(tokenizer, "padding_side", "right") == "left"
    return prompt_length, _Takes(int(pad_id), left, "token_type_ids" in features)


def _flops(model: SentenceTransformer) -> tuple[float, float]:
    """Floating point operations of the transformer per token, and per squared length of a text (attention)."""
    transformer = model.transformers_model
    config = getattr(transformer, "config", None)
    if transformer is None or config is None or not hasattr(transformer, "modules"):
        return 0.0, 0.0
    linear = 0
    for name, module in transformer.named_modules():
        if name.startswith("pooler"):  # of one vector per text, which nobody asks for
            continue
        width_in, width_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(width_in, int) and isinstance(width_out, int):
            linear += width_in * width_out
    layers = getattr(config, "num_hidden_layers", 0) or 0
    width = getattr(config, "hidden_size", 0) or 0
    return 2.0 * linear, 4.0 * layers * width
