"""What the reader's path costs over Intel's svs used by hand, with the same graph and codes.

    python benchmarks/index_svs.py --vectors FILE.npy [--rows 99000] [--queries 1000] [--codec CODEC] [--degree 64]
                                   [--window 200] [--rounds 5] [--json]

FILE.npy holds real vectors, float32 or float16 (n, d); they are brought to length 1, and `--queries` behind the first
`--rows` are held out. One side is a shard that is built, written, opened and searched as a run and a reader do it, ids
and all, at the cheapest operating point that reaches the recall; the other is svs as its documentation has it, which
answers with row numbers, at the least search window that does. Both build with one thread and the same parameters. They
take turns, all queries as one batch on one thread, and the share is that of their CPU seconds. CODEC is by default
lvq4x8, and fp16 on CPUs that svs has no LVQ for.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import svs

from penstock.operators.evaluation import exact_neighbours, operating_points
from penstock.operators.indexing import Codec, Family, IndexSpec, Metric, factory_string, open_shard, shard_builder
from penstock.operators.searching import SearchParameters, ShardSearcher, normalize
from penstock.operators.vamana import ALPHA, INTEL, LEANVEC_BITS, LVQ_BITS, VamanaLayout, cpu_vendor, svs_version

K = 10
RECALL = 0.95
LEAST_SHARE = 0.95
BATCHES = 3  # of each side in a round: one takes some 50 ms
WIDEST = 512

Search = Callable[[np.ndarray, int], np.ndarray]


@dataclass
class Side:
    """An index; `search` takes queries and one of the ascending windows, and gives row numbers (q, K)."""

    name: str
    search: Search
    windows: Sequence[int]
    build_s: float
    window: int = 0
    recall: float = 0.0
    seconds: list[float] = field(default_factory=list)


def load(path: Path, rows: int) -> np.ndarray:
    vectors = np.load(path, mmap_mode="r")
    if len(vectors) < rows:
        raise SystemExit(f"--vectors ({path}) holds {len(vectors)} rows; --rows and --queries ask for {rows}")
    return normalize(np.array(vectors[:rows], np.float32))


def ours(vectors: np.ndarray, spec: IndexSpec, folder: Path) -> Side:
    started = time.process_time()
    builder = shard_builder(spec, b"")
    builder.add(vectors)
    builder.write(folder / "shard.svs.tar")
    build_s = time.process_time() - started
    ids = pa.array([f"passage-{row}" for row in range(len(vectors))])
    searcher = ShardSearcher(open_shard(folder / "shard.svs.tar", Family.VAMANA), ids, None, Metric.COSINE, 0)
    return Side(
        f"penstock, {spec.factory}",
        lambda queries, window: searcher.search(queries, K, SearchParameters(ef_search=window)).rows,
        [point.ef_search or 0 for point in operating_points(spec, len(vectors), rerank=False)],
        build_s,
    )


def by_hand(vectors: np.ndarray, spec: IndexSpec, folder: Path) -> Side:
    layout = VamanaLayout.parse(spec.factory, spec.dimension)
    started = time.process_time()
    rows = vectors
    if layout.code in LVQ_BITS or layout.code in LEANVEC_BITS:
        svs.write_vecs(vectors, str(folder / "rows.fvecs"))
        loader = svs.VectorDataLoader(str(folder / "rows.fvecs"), svs.DataType.float32, dims=spec.dimension)
        rows = _compressed(loader, layout)
    elif layout.code:
        rows = vectors.astype(np.float16)
    parameters = svs.VamanaBuildParameters(
        alpha=ALPHA, graph_max_degree=layout.degree, window_size=spec.ef_construction
    )
    index = svs.Vamana.build(parameters, rows, svs.DistanceType.MIP, num_threads=1)
    build_s = time.process_time() - started

    def search(queries: np.ndarray, window: int) -> np.ndarray:
        index.search_window_size = window
        found: np.ndarray = index.search(queries, K)[0]
        return found

    return Side(f"svs by hand, {spec.factory}", search, range(K, WIDEST + 1), build_s)


def _compressed(loader: Any, layout: VamanaLayout) -> Any:  # noqa: ANN401 (svs has no types)
    if layout.code in LVQ_BITS:
        return svs.LVQLoader(loader, *LVQ_BITS[layout.code])
    kinds = {4: svs.LeanVecKind.lvq4, 8: svs.LeanVecKind.lvq8}
    first, second = LEANVEC_BITS[layout.code]
    return svs.LeanVecLoader(loader, layout.reduced, primary_kind=kinds[first], secondary_kind=kinds[second])


def widen(side: Side, queries: np.ndarray, truth: list[set[int]]) -> None:
    """Set the least window that reaches the recall.

    Raises:
        SystemExit: none does.
    """
    for window in side.windows:
        side.window = window
        found = side.search(queries, window).astype(np.int64).tolist()
        side.recall = float(np.mean([len(set(row) & real) / K for row, real in zip(found, truth, strict=True)]))
        if side.recall >= RECALL:
            return
    raise SystemExit(f"{side.name}: recall {side.recall:.4f} with the widest window {side.window} is below {RECALL}")


def take_turns(sides: list[Side], queries: np.ndarray, rounds: int) -> None:
    """CPU seconds of a batch, `rounds` times for each side, in turns within a round too."""
    for _ in range(rounds):
        totals = [0.0 for _ in sides]
        for _ in range(BATCHES):
            for place, side in enumerate(sides):
                started = time.process_time()
                side.search(queries, side.window)
                totals[place] += time.process_time() - started
        for side, total in zip(sides, totals, strict=True):
            side.seconds.append(total / BATCHES)


def compare(options: argparse.Namespace, folder: Path) -> list[Side]:
    vectors = load(options.vectors, options.rows + options.queries)
    base, queries = vectors[: options.rows], np.ascontiguousarray(vectors[options.rows :])
    dimension = vectors.shape[1]
    factory = factory_string(Family.VAMANA, options.codec, dimension, degree=options.degree)
    spec = IndexSpec(Family.VAMANA, options.codec, Metric.COSINE, dimension, factory, 0, 0, options.window)
    names = pa.array([str(row) for row in range(len(base))])
    truth = exact_neighbours(queries, [(names, base)], K, Metric.COSINE, [None] * len(queries))
    neighbours = [{int(name) for name in row} for row in truth.ids]
    sides = [ours(base, spec, folder), by_hand(base, spec, folder)]
    for side in sides:
        widen(side, queries, neighbours)
    take_turns(sides, queries, options.rounds)
    return sides


def figures(side: Side, queries: int) -> dict[str, Any]:
    middle = statistics.median(side.seconds)
    return {
        "name": side.name,
        "recall": round(side.recall, 4),
        "window": side.window,
        "queries_per_cpu_s": round(queries / middle, 1),
        "spread": round((max(side.seconds) - min(side.seconds)) / middle, 3),
        "build_cpu_s": round(side.build_s, 1),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['rows']:,} x {result['dimension']} real vectors, {result['queries']} held-out queries in one batch, "
        f"one thread, recall@{K} of {RECALL}, svs {result['svs']}; {result['machine']}, {result['date']}",
        "",
        "| index | recall | window | queries/CPU s | spread | build CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["sides"]:
        lines.append(
            f"| {one['name']} | {one['recall']:.4f} | {one['window']} | {one['queries_per_cpu_s']:,.0f} "
            f"| {one['spread']:.0%} | {one['build_cpu_s']:.1f} |"
        )
    verdict = "met" if result["svs_share"] >= LEAST_SHARE else "MISSED"
    return "\n".join([*lines, "", f"svs_share {result['svs_share']:.3f}, at least {LEAST_SHARE}: {verdict}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=99_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--codec", type=Codec, default=Codec.LVQ4X8 if cpu_vendor() == INTEL else Codec.FP16)
    parser.add_argument("--degree", type=int, default=64)
    parser.add_argument("--window", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-index-svs-") as folder:
        sides = compare(options, Path(folder))
    mine, hand = (figures(side, options.queries) for side in sides)
    pairs = zip(*(side.seconds for side in sides), strict=True)
    result = {
        "svs_share": round(statistics.median(by_hand_s / ours_s for ours_s, by_hand_s in pairs), 3),
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()} ({cpu_vendor()}), {os.cpu_count()} CPUs",
        "svs": svs_version(),
        "codec": options.codec.value,
        "rows": options.rows,
        "dimension": int(np.load(options.vectors, mmap_mode="r").shape[1]),
        "queries": options.queries,
        "sides": [mine, hand],
    }
    sys.stdout.write(markdown(result) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(0 if result["svs_share"] >= LEAST_SHARE else 1)


if __name__ == "__main__":
    main()
