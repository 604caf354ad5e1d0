"""Joins of similar rows against multiplying all rows, SemDeDup and semhash: pairs found and time taken.

    OMP_NUM_THREADS=1 python benchmarks/deduplication.py --vectors FILE.npy
        [--rows 100000] [--rounds 5] [--scaling 25000 50000 ...] [--merge FILE ...] [--json]

FILE.npy holds real vectors, floating point (n, d). Rows beyond those are copies with noise of the data's covariance,
each at a cosine of about 0.8 to its row. All sides take turns on one thread, `--rounds` times; the median of the CPU
seconds counts. Those that take most of the time, all pairs and semhash, run in the first round alone. The truth is
that of the blocked multiplication of all rows, checked in float64 as all sides are, and a side that finds a pair which
is none ends the program. SemDeDup is k-means of faiss (20 iterations, at most 256 rows for each centroid) and all pairs
of each cell in float32. semhash is left out, and named, where it is not installed; NeMo Curator's semantic
deduplication needs a GPU (cudf) and is not run. `--merge` takes files that `duplicate_jobs.py` wrote with `--json`, and
adds their figures to the last line.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from penstock.operators.clustering import ClusteringSpec, build_quantizer, cluster_sample, nearest_cells
from penstock.operators.similar_pairs import Pairs, cell_pairs, pair_similarities, similar_pairs, unit_rows

ALL_PAIRS = "blocked float32, all pairs"
FLOORS = (0.95, 0.9)
SEMDEDUP_CELLS = (100, 1000)
CLUSTER_CELLS = (2, 4, 8, 16, 32, 64)
CLUSTER_ITERATIONS = 5
ROWS_PER_CENTROID = 64
BLOCK_ROWS = 2_048
COPY_NOISE = 0.75
SEED = 11
NEAR = 1e-5  # float32 products are looked at again from so much below the floor

Find = Callable[[np.ndarray, float], set[int]]


@dataclass
class Side:
    """A way to find pairs, numbered left * rows + right; `slow` ones run once. `names_pairs` is false of what names
    rows to remove alone."""

    name: str
    find: Find
    slow: bool = False
    names_pairs: bool = True
    seconds: dict[float, list[float]] = field(default_factory=dict)
    recall: dict[float, float] = field(default_factory=dict)

    def median_s(self, floor: float) -> float:
        return statistics.median(self.seconds[floor])


# ---- data


def load_vectors(path: Path, rows: int) -> tuple[np.ndarray, int]:
    """Unit rows float32 (rows, d), and how many of them are real."""
    real = unit_rows(np.load(path)[:rows])
    random, spread = np.random.default_rng(SEED), noise_axes(real)
    parts = [real]
    for first in range(len(real), rows, len(real)):
        base = real[: rows - first]
        noise = random.standard_normal(base.shape, np.float32) @ spread
        parts.append(unit_rows(base + COPY_NOISE * noise))
    return np.concatenate(parts), len(real)


def noise_axes(real: np.ndarray) -> np.ndarray:
    """What standard normal rows are multiplied with to have the covariance of the data, (d, d)."""
    few = real[:8_192]
    weights, axes = np.linalg.eigh(few.T.astype(np.float64) @ few / len(few))
    spread: np.ndarray = (np.sqrt(np.maximum(weights, 0))[:, None] * axes.T).astype(np.float32)
    return spread


# ---- the sides


def as_set(pairs: Pairs, rows: int) -> set[int]:
    return set((pairs.left * rows + pairs.right).tolist())


def all_pairs(vectors: np.ndarray, floor: float) -> set[int]:
    """Each block of rows times itself and all before it, in float32."""
    found = []
    for first in range(0, len(vectors), BLOCK_ROWS):
        end = min(first + BLOCK_ROWS, len(vectors))
        for start in range(0, end, BLOCK_ROWS):
            products = vectors[start : start + BLOCK_ROWS] @ vectors[first:end].T
            left, right = np.nonzero(products >= floor - NEAR)
            earlier = left + start < right + first
            found.append((left[earlier] + start, right[earlier] + first))
    return checked(vectors, floor, found)


def checked(vectors: np.ndarray, floor: float, found: list[tuple[np.ndarray, np.ndarray]]) -> set[int]:
    left, right = (np.concatenate([part[side] for part in found]) for side in (0, 1))
    near = pair_similarities(vectors, left, right) >= np.float32(floor)
    return set((np.minimum(left, right) * len(vectors) + np.maximum(left, right))[near].tolist())


def semdedup(cells: int) -> Find:
    def find(vectors: np.ndarray, floor: float) -> set[int]:
        kmeans = faiss.Kmeans(vectors.shape[1], cells, niter=20, seed=1, spherical=True, min_points_per_centroid=1)
        kmeans.train(vectors)
        cell = kmeans.index.search(vectors, 1)[1][:, 0]
        order = np.argsort(cell, kind="stable")
        found = []
        for members in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
            rows = vectors[members]
            for first in range(0, len(rows), BLOCK_ROWS):
                products = rows[: first + BLOCK_ROWS] @ rows[first : first + BLOCK_ROWS].T
                left, right = np.nonzero(products >= floor - NEAR)
                earlier = left < right + first
                found.append((members[left[earlier]], members[right[earlier] + first]))
        return checked(vectors, floor, found)

    return find


def exact(vectors: np.ndarray, floor: float) -> set[int]:
    return as_set(Pairs.joined(list(similar_pairs(vectors, floor))), len(vectors))


def cluster(cells: int) -> Find:
    def find(vectors: np.ndarray, floor: float) -> set[int]:
        rows, dimension = vectors.shape
        spec = ClusteringSpec(
            cells, dimension, True, min(rows, ROWS_PER_CENTROID * cells), 1, sample_iterations=CLUSTER_ITERATIONS
        )
        picked = np.random.default_rng(1).choice(rows, spec.training_rows, replace=False)
        cell = nearest_cells(build_quantizer(cluster_sample(spec, vectors[picked]), True), vectors)[0]
        return as_set(Pairs.joined(list(cell_pairs(vectors, cell, floor))), rows)

    return find


def semhash() -> Find | None:
    """It names rows to remove and not all pairs: its time alone counts."""
    try:
        library: Any = importlib.import_module("semhash")
    except ImportError:
        return None

    def find(vectors: np.ndarray, floor: float) -> set[int]:
        records = [str(row) for row in range(len(vectors))]
        index = library.SemHash.from_embeddings(embeddings=vectors, records=records, model=None)
        index.self_deduplicate(threshold=floor)
        return set()

    return find


# ---- measuring


def sides() -> list[Side]:
    found = [Side(ALL_PAIRS, all_pairs, slow=True)]
    found += [Side(f"SemDeDup, k = {cells}", semdedup(cells)) for cells in SEMDEDUP_CELLS]
    found += [Side("exact", exact)]
    found += [Side(f"cluster, k = {cells}", cluster(cells)) for cells in CLUSTER_CELLS]
    peer = semhash()
    if peer is None:
        _note("semhash is not installed and left out")
    else:
        found.append(Side("semhash", peer, slow=True, names_pairs=False))
    return found


def measure(contenders: Sequence[Side], vectors: np.ndarray, rounds: int) -> dict[float, int]:
    """Times all sides in turn and checks what they found; returns the true pairs at each floor."""
    counts = {}
    for floor in FLOORS:
        truth: set[int] = set()
        for number in range(rounds):
            for side in contenders if number == 0 else [one for one in contenders if not one.slow]:
                started = time.process_time()
                found = side.find(vectors, floor)
                side.seconds.setdefault(floor, []).append(time.process_time() - started)
                truth = truth or found
                if not found <= truth:
                    raise SystemExit(f"{side.name} found {len(found - truth)} pairs at {floor} that are none")
                side.recall[floor] = len(found) / max(1, len(truth))
                _note(f"{floor} round {number}: {side.name} {side.seconds[floor][-1]:.2f} s, {side.recall[floor]:.5f}")
        counts[floor] = len(truth)
    return counts


def scaling(path: Path, sizes: Sequence[int]) -> dict[int, float]:
    """CPU seconds of the exact join at the lowest floor by rows, each the lesser of two."""
    seconds = {}
    for rows in sizes:
        vectors, _ = load_vectors(path, rows)
        taken = []
        for _ in range(2):
            started = time.process_time()
            exact(vectors, min(FLOORS))
            taken.append(time.process_time() - started)
        seconds[rows] = min(taken)
        _note(f"exact, {rows} rows: {seconds[rows]:.2f} s")
    return seconds


def exponent(seconds: dict[int, float]) -> float:
    """The slope of time over rows, both as logarithms."""
    rows, taken = ([math.log(value) for value in values] for values in (seconds.keys(), seconds.values()))
    return float(np.polyfit(rows, taken, 1)[0])


def ratios(contenders: Sequence[Side], seconds: dict[int, float]) -> dict[str, float]:
    by_name = {side.name: side for side in contenders}
    ours, semdedups = by_name["exact"], [side for side in contenders if side.name.startswith("SemDeDup")]
    like = by_name[f"SemDeDup, k = {max(SEMDEDUP_CELLS)}"]
    fastest = min(semdedups, key=lambda side: side.median_s(min(FLOORS)))
    total = {side.name: sum(map(side.median_s, FLOORS)) for side in contenders}
    return {
        "exact_pair_recall_95": ours.recall[0.95],
        "exact_pair_recall_90": ours.recall[0.9],
        "exact_over_semdedup_time": round(total["exact"] / total[like.name], 3),
        "exact_over_fastest_semdedup_time": round(total["exact"] / total[fastest.name], 3),
        "allpairs_over_exact_time": round(total[ALL_PAIRS] / total["exact"], 2),
        "cluster_over_best_peer_time": round(max(_like(contenders, fastest, floor) for floor in FLOORS), 3),
        "scaling_exponent": round(exponent(seconds), 3),
        **({"semhash_over_exact_time": round(total["semhash"] / total["exact"], 2)} if "semhash" in total else {}),
    }


def _like(contenders: Sequence[Side], peer: Side, floor: float) -> float:
    """The time of the fastest cluster join that finds as many pairs as a peer, over the peer's."""
    clusters = [side for side in contenders if side.name.startswith("cluster")]
    like = [side for side in clusters if side.recall[floor] >= peer.recall[floor]]
    return min((side.median_s(floor) for side in like), default=math.inf) / peer.median_s(floor)


def bars(found: dict[str, float]) -> dict[str, bool]:
    """What the figures must reach."""
    return {
        "exact_pair_recall_95": found["exact_pair_recall_95"] == 1,
        "exact_pair_recall_90": found["exact_pair_recall_90"] == 1,
        "exact_over_semdedup_time": found["exact_over_semdedup_time"] <= 1.5,
        "allpairs_over_exact_time": found["allpairs_over_exact_time"] >= 4,
        "cluster_over_best_peer_time": found["cluster_over_best_peer_time"] <= 1,
        "scaling_exponent": found["scaling_exponent"] <= 1.5,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['rows']:,} x {result['dimension']} vectors, {result['real_rows']:,} of them real, one thread; "
        f"{result['pairs'][0]:,} pairs at {FLOORS[0]} and {result['pairs'][1]:,} at {FLOORS[1]}; {result['machine']}, "
        f"{result['date']}",
        "",
        "| join | CPU s at 0.95 | at 0.9 | pair recall at 0.95 | at 0.9 |",
        "|---|---|---|---|---|",
    ]
    for one in result["sides"]:
        shown = [f"{value:.5f}" if one["names_pairs"] else "-" for value in one["recall"]]
        lines.append(f"| {one['name']} | {one['seconds'][0]:.2f} | {one['seconds'][1]:.2f} | {shown[0]} | {shown[1]} |")
    lines += ["", "| rows | exact, CPU s at 0.9 |", "|---|---|"]
    lines += [f"| {rows:,} | {seconds:.2f} |" for rows, seconds in result["scaling"].items()]
    verdicts = [f"{name}: {'met' if met else 'MISSED'}" for name, met in bars(result["ratios"]).items()]
    return "\n".join([*lines, "", json.dumps(result["ratios"]), *verdicts])


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Figures of runs through the jobs, by rows and join."""
    found: dict[str, Any] = {}
    for file in files:
        run = json.loads(file.read_text().splitlines()[-1])
        name = f"jobs_{run['rows']}_{run['join']}"
        found |= {f"{name}_{key}": run[key] for key in ("largest_process_mib", "pair_recall", "pairs", "removed")}
        found[f"{name}_seconds"] = round(sum(run["seconds"].values()), 1)
    return found


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scaling", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000, 400_000])
    parser.add_argument("--merge", type=Path, nargs="*", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    vectors, real = load_vectors(options.vectors, options.rows)
    contenders = sides()
    pairs = measure(contenders, vectors, options.rounds)
    seconds = scaling(options.vectors, options.scaling)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "rows": options.rows,
        "real_rows": real,
        "dimension": vectors.shape[1],
        "pairs": [pairs[floor] for floor in FLOORS],
        "sides": [
            {
                "name": side.name,
                "rounds": len(side.seconds[min(FLOORS)]),
                "names_pairs": side.names_pairs,
                "seconds": [round(side.median_s(floor), 3) for floor in FLOORS],
                "recall": [side.recall[floor] for floor in FLOORS],
            }
            for side in contenders
        ],
        "scaling": seconds,
        "ratios": ratios(contenders, seconds),
    }
    sys.stdout.write(markdown(result) + "\n")
    if options.json:
        sys.stdout.write(json.dumps({**result["ratios"], **merged(options.merge), **result}) + "\n")
    sys.exit(0 if all(bars(result["ratios"]).values()) else 1)


if __name__ == "__main__":
    main()
