"""Choose the index by measurement: which configuration keeps what the file asks for, at the least cost."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from penstock.cluster.jobs.evaluation import EncodeQueriesTask, encode_queries
from penstock.cluster.jobs.tuning import TuningJob, TuningTask, measure_candidates
from penstock.cluster.session import Session
from penstock.operators.indexing import Codec, Family
from penstock.operators.tuning import Budget, Candidate, Trial, choose, groups, measure_grid, search_grid
from penstock.pipelines.building import query_moments
from penstock.pipelines.planning import (
    Embedded,
    Resolved,
    held_out_rows,
    index_candidates,
    searched_rows,
    split_path,
)
from penstock.pipelines.progress import Reporter

# Exact search of so few rows takes a fraction of a millisecond: no measurement could find a better index.
EXACT_ROWS = 2_000
SAMPLE_ROWS = 100_000
GROUPS_PER_TASK = 4  # indexes that are measured one after the other on one reading of the sample


def tune_index(
    session: Session,
    resolved: Resolved,
    embedded: Embedded,
    root: str,
    reporter: Reporter,
    exhaustive: bool = False,
) -> dict[str, Any]:
    """The record of the choice: what was measured, and what was chosen.

    Args:
        exhaustive: measure every candidate at the full sample, not only those that promise most.
    """
    budget = resolved.budget(embedded.rows)
    rows = searched_rows(resolved, embedded.rows)
    exact = Candidate(Family.FLAT, Codec.NONE, False)
    grid = index_candidates(resolved, embedded.rows)
    transformed = bool(resolved.pipeline.index.transforms)
    fits = exact in grid and budget.latency_ms is None and not exhaustive and not transformed
    if not grid or (rows <= EXACT_ROWS and fits):
        only = {"family": exact.family.value, "codec": exact.codec.value, "rerank": transformed}
        behind = "all compared behind the transforms, and the nearest again as stored"
        how = behind if transformed else "searched exactly"
        return _stamp({"met": True, "chosen": only, "why": f"{rows} vectors a shard are {how}"})
    job = _job(session, resolved, embedded, root, budget)
    cpus = _measuring_cpus(session)

    def measure(some: Sequence[Candidate], size: int, screening: bool) -> Sequence[Trial]:
        return _measure(session, some, TuningTask(job, size, (), screening), reporter, cpus)

    search = measure_grid if exhaustive else search_grid
    return _stamp(search(grid, min(SAMPLE_ROWS, rows), budget, measure).to_json())


def unmet(record: dict[str, Any]) -> str:
    """What of a budget nothing that was measured meets, and what comes nearest."""
    asked, chosen = record["budget"], record["chosen"]
    parts = [f"{name} {asked[name]:g} (nearest: {chosen[name]:g})" for name in record["misses"]]
    return (
        f"index: no configuration that was measured keeps {' and '.join(parts)}; the nearest is {chosen['factory']}"
        f"{' with re-ranking' if chosen['rerank'] else ''}"
    )


def _measuring_cpus(session: Session) -> float:
    """CPUs that a measurement takes: all of this machine, so that no other one disturbs it; one of a cluster's."""
    return 1.0 if os.environ.get("RAY_ADDRESS") else session.resources().get("CPU", 1.0)


def _job(session: Session, resolved: Resolved, embedded: Embedded, root: str, budget: Budget) -> TuningJob:
    index, asked = resolved.pipeline.index, resolved.pipeline.evaluate.queries
    queries: np.ndarray | None = None
    if isinstance(asked, str):
        store, path = split_path(asked)
        queries = session.run(encode_queries, EncodeQueriesTask(store.url, path, resolved.query_encoder)).vectors
    return TuningJob(
        root=root,
        embeddings_fingerprint=embedded.embeddings_fingerprint,
        fragments=tuple(sorted(embedded.embeddings.values())),
        rows=embedded.rows,
        shard_rows=searched_rows(resolved, embedded.rows),
        budget=budget,
        metric=resolved.metric,
        seed=index.seed,
        training_rows=index.training_rows,
        held_out=held_out_rows(embedded.rows),
        queries=queries,
        steps=index.steps(),
        query_moments=query_moments(session, resolved),
        stored=index.rerank_codec,
    )


def _measure(
    session: Session, some: Sequence[Candidate], sample: TuningTask, reporter: Reporter, cpus: float
) -> list[Trial]:
    """The trials of some candidates on a sample."""
    shared = groups(some)
    tasks = [
        replace(sample, groups=tuple(shared[first : first + GROUPS_PER_TASK]))
        for first in range(0, len(shared), GROUPS_PER_TASK)
    ]
    trials: list[Trial] = []
    with reporter.stage(f"tuning on {sample.sample_rows:,}", len(some), "configurations") as advance:
        for found in session.stream(measure_candidates, tasks, cpus=cpus):
            trials += found
            best = choose(trials, sample.job.budget)
            advance(len(found), f"{best.factory}, {best.queries_per_s:,.0f} queries/s")
    return sorted(trials, key=lambda trial: -trial.queries_per_s)


def _stamp(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "measured": datetime.now(UTC).isoformat(timespec="seconds")}
