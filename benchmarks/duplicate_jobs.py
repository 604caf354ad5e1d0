"""Deduplication by meaning of many rows through the jobs of a cluster: seconds of each step, memory of each process.

    OMP_NUM_THREADS=1 python benchmarks/duplicate_jobs.py --vectors FILE.npy [--rows 1000000] [--join cluster]
        [--floor 0.9] [--work FOLDER] [--json]

FILE.npy holds real vectors; rows beyond those are copies of them with noise of the data's covariance, each at a cosine
of about 0.8 to its row. They are written as fragments of embeddings in float16, and pass the steps of `penstock run`:
centroids, copies by part, the join of each part, the choice at the floor, and the measured recall of pairs. Ray runs
one task of one thread on each CPU. Private memory (RssAnon) of this process and all below it is read four times a
second.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from deduplication import COPY_NOISE, noise_axes
from scale import Sampler

from penstock.cluster.fragments import Receipt, vector_column, write_fragment
from penstock.cluster.jobs.clustering import ClusteringJob, fit_centroids
from penstock.cluster.jobs.removal import RemovalJob, buckets_for, remove_duplicates
from penstock.cluster.jobs.similarity import (
    JOIN_MEMORY_BYTES,
    JoinJob,
    affordable,
    cut_into_parts,
    find_pairs,
    measured_recall,
    parts_for,
)
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.cluster.session import Session
from penstock.operators.independent_set import Keep
from penstock.operators.similar_pairs import Join, unit_rows
from penstock.pipelines.deduplicating import RECALL_QUERIES
from penstock.pipelines.shared_centroids import most_parts, own_clustering

FRAGMENT_ROWS = 50_000
SEED = 5
SAMPLE_S = 0.25
MIB = 1 << 20
LIMIT_MIB = 2_048


@dataclass
class Clock:
    """Wall seconds of each step, and the memory of processes meanwhile."""

    sampler: Sampler
    seconds: dict[str, float] = field(default_factory=dict)
    _step: str = "start"
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        yield
        self._ended.set()
        thread.join()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._step, started = name, time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        sys.stderr.write(f"{name}: {self.seconds[name]} s\n")

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.sampler.sample(self._step)


def write_rows(real: np.ndarray, rows: int, store: LocalStore) -> tuple[str, ...]:
    """Fragments of embeddings, sorted by hash as all are."""
    spread = noise_axes(unit_rows(real))
    hashes = np.random.default_rng(SEED).permutation(rows).astype(np.uint64) * np.uint64(2**64 // rows)
    names = []
    for number, start in enumerate(range(0, rows, FRAGMENT_ROWS)):
        names.append(f"{number:032x}")
        place = np.arange(start, min(start + FRAGMENT_ROWS, rows))
        vectors = unit_rows(real[place % len(real)])
        noise = np.random.default_rng(SEED + 1 + number).standard_normal(vectors.shape, np.float32) @ spread
        vectors = unit_rows(np.where((place < len(real))[:, None], vectors, vectors + COPY_NOISE * noise))
        order = np.argsort(hashes[place])
        columns = {"row_hash": hashes[place][order], "embedding": vector_column(vectors[order].astype(np.float16))}
        receipt = Receipt(names[-1], len(place), len(place))
        write_fragment(store, fragment_path(EMBEDDINGS, "e", names[-1]), pa.table(columns), receipt)
    return tuple(names)


def run(real: np.ndarray, rows: int, join: Join, floor: float, work: Path) -> dict[str, Any]:
    """All steps; what they took and found."""
    shutil.rmtree(work, ignore_errors=True)
    store = LocalStore(work)
    clock = Clock(Sampler(psutil.Process()))
    dimension = real.shape[1]
    with clock.watching(), Session() as session:
        with clock.step("writing"):
            fragments = write_rows(real, rows, store)
        parts = parts_for(rows, dimension, JOIN_MEMORY_BYTES, join, most_parts(rows))
        clustering = own_clustering(rows, parts, dimension)
        cells = clustering.cells
        with clock.step("centroids"):
            spec = clustering.spec(dimension, SEED)
            fit_centroids(session, ClusteringJob(str(work), "c", "e", fragments, rows, spec))
        job = JoinJob(str(work), "p", "e", "c", fragments, (0,) * cells, join, floor)
        with clock.step("parts"):
            job, factor = decided(session, job, rows, parts, dimension)
        with clock.step("pairs"):
            records = find_pairs(session, job)
        pairs = sum(record.pairs + record.equal for record in records)
        files = tuple(path for record in records for path in record.files)
        equal_files = tuple(path for record in records for path in record.equal_files)
        with clock.step("choice"):
            removal = RemovalJob(str(work), "r", files, floor, Keep.RANDOM, buckets_for(pairs), equal_files=equal_files)
            removed = remove_duplicates(session, removal)
        with clock.step("pair recall"):
            recall = measured_recall(session, job, records, min(1.0, RECALL_QUERIES / rows), SEED)
    private = {kind: round(memory.private / MIB) for kind, memory in sorted(clock.sampler.kinds.items())}
    return {
        "rows": rows,
        "real_rows": min(rows, len(real)),
        "join": job.join.value,
        "asked": join.value,
        "floor": floor,
        "parts": job.parts,
        "cells": cells,
        "predicted_factor": round(factor, 3),
        "copies": sum(record.copies for record in records),
        "pairs": pairs,
        "removed": removed,
        "pair_recall": round(recall.recall, 5),
        "pair_recall_pairs": recall.pairs,
        "seconds": clock.seconds,
        "private_mib": private,
        "largest_process_mib": max(private.values()),
        "cpus": os.cpu_count(),
        "date": date.today().isoformat(),
    }


def decided(session: Session, job: JoinJob, rows: int, parts: int, dimension: int) -> tuple[JoinJob, float]:
    """The join cut into parts, as `penstock run` decides, but for the cells of a graph that takes the place of it."""
    cut, factor = cut_into_parts(session, job, rows, parts, SEED)
    join = affordable(job.join, factor)
    if join is job.join:
        return cut, factor
    parts = parts_for(rows, dimension, JOIN_MEMORY_BYTES, join, most_parts(rows))
    return cut_into_parts(session, replace(job, join=join), rows, parts, SEED)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['rows']:,} rows, {result['real_rows']:,} of them real; join {result['join']} at {result['floor']:g}, "
        f"{result['parts']} parts, {result['cells']:,} cells; {result['pairs']:,} pairs, {result['removed']:,} go, "
        f"pair recall {result['pair_recall']} ({result['pair_recall_pairs']:,} true pairs of sampled rows)",
        "",
        "| step | wall s |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in result["seconds"].items()),
        "",
        "| process | private MiB |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in result["private_mib"].items()),
        "",
        f"largest_process_mib {result['largest_process_mib']}: "
        f"{'met' if result['largest_process_mib'] <= LIMIT_MIB else 'MISSED'}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--join", type=Join, default=Join.CLUSTER)
    parser.add_argument("--floor", type=float, default=0.9)
    parser.add_argument("--work", type=Path, default=Path("/tmp/penstock-duplicate-jobs"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(np.load(options.vectors, mmap_mode="r"), options.rows, options.join, options.floor, options.work)
    sys.stdout.write(markdown(result) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(0 if result["largest_process_mib"] <= LIMIT_MIB else 1)


if __name__ == "__main__":
    main()
