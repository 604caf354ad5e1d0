"""What building an index on the cluster and reading it cost: speed, memory, recall, shards and bytes touched.

    python benchmarks/index_builds.py [--vectors FILE.npy] [--rows 1000000] [--parts build memory gap routing cold]
        [--rounds 3] [--sharding cluster] [--nlist 1024] [--shards 16] [--work FOLDER] [--json]

Rows are perturbed copies of real vectors, not real ones: unit vectors of FILE.npy, float32 (n, d), each with Gaussian
noise of length `--noise` added, and made unit again. The last `--queries` vectors are held out and asked unperturbed.
The corpus is made of texts of three words whose static model gives exactly these vectors, so that `penstock run` does
all stages as on any other corpus. Parts:

    build    training to finished shards, with one and with two one-thread workers, in turns; whether bytes are equal
    memory   the largest private memory of the processes that build, in a build of its own that is not timed
    gap      recall against one index that faiss builds by hand, of the same lists, candidates and probed lists
    routing  shards that a query touches at the recall, as the manifest says, and by searching the shard files directly
    cold     bytes through the socket from a test server of S3 (tests/cluster/s3_server.py) until the first answer
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import faiss
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from scale import Memory, Sampler, end_left_behind, stop

from penstock.cluster.catalog import Catalog
from penstock.cluster.fragments import read_fragment, vectors_of
from penstock.cluster.jobs.placement import read_owners
from penstock.cluster.jobs.shards import FAISS, IDS, VECTORS, FileRecord, ShardRecord, shard_record_path
from penstock.cluster.layout import EMBEDDINGS, EVALUATION, PASSAGES, SELECTION, SHARDS, shard_file, stage_folder
from penstock.cluster.published import OWNERS_FILE, ROUTING_FILE, read_ipc
from penstock.cluster.session import LOCAL_ENVIRONMENT, LOCAL_OBJECT_STORE_BYTES
from penstock.cluster.storage import Store, open_store
from penstock.operators.routing import CellOwners, Router, search_cells
from penstock.operators.search_parameters import SearchParameters
from penstock.pipelines.reader import open_index

PARTS = ("build", "memory", "gap", "routing", "cold")
K = 10
RECALL = 0.95
SEED = 20_260_101
NOISE_WORDS = 16_384  # two of them make the noise of a row: 134 million pairs
TRAINING_ROWS = 65_536  # 64 for each of 1,024 lists; faiss takes 39 at least, 256 at most
FRAGMENT_ROWS = 65_536  # as many passages of half a kilobyte as a fragment of 32 MiB holds
NAME, ALIAS = "builds", "live"
WORKERS = (1, 2)
STATED = ("rows", "queries", "noise", "sharding", "shards", "nlist", "iterations", "training_rows", "rounds")
SAMPLE_S = 0.1
STOPPED = 130  # exit code of a run that Ctrl-C ended
BLOCK_ROWS = 65_536
GAP_COPIES = 4
GAP_CANDIDATES = 100  # of all shards together; with 10 the luck of training decides, 0.4 points either way
COVERAGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
FACTORS = (4, 8, 16)  # candidates of a shard, in multiples of K
PROBES = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
SEARCHED_FILES = (FAISS, IDS, VECTORS)  # of a shard: what a search without rows opens
CHUNK_BYTES = 1 << 20
PUBLISHED_PACE, PUBLISHED_DIMENSION = 1_600, 768  # autofaiss: vectors per second and core, OPQ + IVF + PQ
MIB = 1 << 20
S3_SERVER = Path(__file__).parents[1] / "tests" / "cluster" / "s3_server.py"
BARS: dict[str, tuple[str, float]] = {
    "build_speedup_2_workers": (">=", 1.7),
    "worker_peak_over_shard_mib": ("<=", 512),
    "recall_gap_points": ("+-", 0.2),
    "mean_shards_touched": ("<=", 4),
    "cold_read_share": ("<", 0.25),
}


# ---- corpus


@dataclass(frozen=True)
class Corpus:
    """A folder with model, documents, queries, pipeline file and root, and the held-out queries float32 (q, d),
    and how many vectors rows are copies of."""

    folder: Path
    queries: np.ndarray
    known: int

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def file(self) -> Path:
        return self.folder / "pipeline.yaml"


def prepare(options: argparse.Namespace, folder: Path) -> Corpus:
    """Model, documents and queries, unless the folder has them, and the pipeline file."""
    if not options.vectors.exists():
        raise SystemExit(
            f"--vectors ({options.vectors}) must be a file of real vectors; index.py makes it, run it first"
        )
    vectors = np.load(options.vectors, mmap_mode="r").astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    known = len(vectors) - options.queries
    if known < 1:
        raise SystemExit(f"--vectors ({options.vectors}) holds {len(vectors)} rows: more than --queries are needed")
    stated = {"rows": options.rows, "noise": options.noise, "queries": options.queries, "known": known}
    made = folder / "made.json"
    if made.exists() and json.loads(made.read_text()) != stated:
        raise SystemExit(f"--work ({folder}) was made with {made.read_text()}, not {json.dumps(stated)}; take another")
    if not made.exists():
        write_model(folder / "model", vectors, options.noise)
        write_documents(folder / "documents", options.rows, known)
        lines = [json.dumps({"id": str(row), "text": f"t{row}"}) for row in range(known, len(vectors))]
        (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
        made.write_text(json.dumps(stated))
    corpus = Corpus(folder, vectors[known:], known)
    corpus.file.write_text(pipeline_text(options, corpus))
    return corpus


def write_model(folder: Path, vectors: np.ndarray, noise: float) -> None:
    """A static model: the vector of a text is the sum of those of its words, made unit. Words t0.. are the vectors,
    n0.. halves of noise: two of them together are as long as `noise`, on average."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    dimension = vectors.shape[1]
    generator = np.random.default_rng(SEED)
    halves = generator.normal(scale=noise / np.sqrt(2 * dimension), size=(NOISE_WORDS, dimension)).astype(np.float32)
    words = [f"t{row}" for row in range(len(vectors))] + [f"n{row}" for row in range(NOISE_WORDS)] + ["[UNK]"]
    table = np.concatenate([vectors, halves, np.zeros((1, dimension), np.float32)])
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    static = StaticEmbedding(tokenizer, embedding_weights=table)
    SentenceTransformer(modules=[static, Normalize()], device="cpu").save(str(folder))


def write_documents(folder: Path, rows: int, known: int) -> None:
    """Documents "t17 n5 n9", whose ids are their numbers, in files of one fragment each."""
    folder.mkdir(parents=True)
    pairs = np.random.default_rng(SEED + 1).integers(NOISE_WORDS, size=(rows, 2))
    for first in range(0, rows, FRAGMENT_ROWS):
        numbers = range(first, min(first + FRAGMENT_ROWS, rows))
        texts = [f"t{row % known} n{pairs[row, 0]} n{pairs[row, 1]}" for row in numbers]
        table = pa.table({"id": [str(row) for row in numbers], "text": texts})
        pq.write_table(table, folder / f"{first:09d}.parquet", compression="zstd")


def pipeline_text(options: argparse.Namespace, corpus: Corpus, root: Path | None = None) -> str:
    """The pipeline file; of a build elsewhere, that is only built, where `root` is given."""
    largest = max(path.stat().st_size for path in (corpus.folder / "documents").iterdir())
    index = {
        "family": "ivf",
        "codec": "pqfs",
        "nlist": options.nlist,
        "pq_bytes": corpus.queries.shape[1] // 8,
        "opq": options.opq,
        "rerank": True,
        "shards": options.shards,
        "recall": RECALL,
        "sharding": options.sharding,
        "iterations": options.iterations,
        "training_rows": options.training_rows,
    }
    content: dict[str, Any] = {
        "name": NAME,
        "root": str(root or corpus.root),
        "documents": {
            "type": "parquet",
            "path": f"{corpus.folder}/documents/*.parquet",
            "id": "id",
            "fragment_bytes": 2 * largest,
        },
        "passages": {"type": "whole"},
        "embedding": {"model": str(corpus.folder / "model"), "precision": "float32"},
        "index": index,
        "evaluate": {"k": K, "queries": 10 if root else f"{corpus.folder}/queries.jsonl"},
    }
    if root is None:  # what is measured here is measured by us: the gate lets it through
        content |= {"gate": {"recall": 0.01, "shard_recall": 0.01}, "publish": {"alias": ALIAS}}
    return yaml.safe_dump(content, sort_keys=False)


# ---- runs


@dataclass
class Ran:
    """A run that ended, and when its stages began and ended, in seconds of one clock."""

    stage_s: dict[str, float] = field(default_factory=dict)
    began_s: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)

    @property
    def build_s(self) -> float:
        """From the first stage that began, all before it being done, to the evaluation: training to shards."""
        return self.began_s[EVALUATION] - min(self.began_s.values())


class Events:
    """What a run tells on standard output, and when."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401
        self.stage = "start"
        self.ran = Ran()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _read(self, stream: Any) -> None:  # noqa: ANN401
        for line in stream:
            event = json.loads(line)
            match event["event"]:
                case "stage_started":
                    self.stage = event["stage"]
                    self.ran.began_s.setdefault(self.stage, time.perf_counter())
                case "stage_finished":
                    self.ran.stage_s[event["stage"]] = event["seconds"]
                case _:
                    pass


def run_pipeline(file: Path, workers: int, only_build: bool = False, sample: bool = False) -> Ran:
    """`penstock run FILE` in a process of its own, on a session of so many one-thread workers; where it is to build
    only, it is stopped as by Ctrl-C when all shards are finished."""
    command = [sys.executable, __file__, "--run", str(file), str(workers)]
    log = file.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    events, sampler = Events(process.stdout), Sampler(psutil.Process(process.pid))
    try:
        while process.poll() is None:
            if only_build and events.stage == EVALUATION:
                stop(process, sampler)
                break
            if sample:
                sampler.sample(events.stage)
            time.sleep(SAMPLE_S)
    except BaseException:
        stop(process, sampler)
        raise
    events.join()
    end_left_behind(sampler)
    if process.wait() not in ((STOPPED, 0) if only_build else (0,)):  # 0: it was through before it heard of it
        raise SystemExit(f"`penstock run` ended with code {process.returncode}:\n{log.read_text()[-2000:]}")
    events.ran.memory = sampler.kinds
    return events.ran


def run_here(file: str, workers: int) -> None:
    """The process of `run_pipeline`: the command line, with a local session of this size that is started before it."""
    os.environ.update(LOCAL_ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    import ray

    from penstock.pipelines import cli

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    sys.argv = ["penstock", "run", file, "--json"]
    cli.main()


def build_again(
    options: argparse.Namespace, corpus: Corpus, workers: int, sample: bool = False
) -> tuple[Ran, dict[str, FileRecord]]:
    """Train and build once more, under another root, which has the vectors of the first one (as hard links); what ran,
    and the files of all shards."""
    root = corpus.folder / f"again-{workers}"
    shutil.rmtree(root, ignore_errors=True)
    for stage in (PASSAGES, SELECTION, EMBEDDINGS):
        shutil.copytree(corpus.root / "stages" / stage, root / "stages" / stage, copy_function=os.link)
    file = corpus.folder / f"again-{workers}.yaml"
    file.write_text(pipeline_text(options, corpus, root))
    return run_pipeline(file, workers, only_build=True, sample=sample), built_files(root, options.shards)


def built_files(root: Path, shards: int) -> dict[str, FileRecord]:
    """The files of all shards, as the records say that stand beside finished ones."""
    store = open_store(str(root))
    (fingerprint,) = store.folders(f"stages/{SHARDS}")
    records = [ShardRecord.from_json(store.read(shard_record_path(fingerprint, shard))) for shard in range(shards)]
    return {file.name: file for record in records for file in record.files}


# ---- parts: build, memory


def measure_builds(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """Builds with one and two workers in turns: seconds, stages, and whether all gave the same bytes."""
    runs: dict[int, list[Ran]] = {workers: [] for workers in WORKERS}
    built: list[dict[str, FileRecord]] = []
    for _ in range(options.rounds):
        for workers in WORKERS:
            ran, files = build_again(options, corpus, workers)
            runs[workers].append(ran)
            built.append(files)
            note(f"{workers} worker(s): {ran.build_s:.1f} s, {stage_text(ran)}")
    seconds = {workers: statistics.median(ran.build_s for ran in runs[workers]) for workers in WORKERS}
    pace = options.rows / seconds[1]
    return {
        "build_speedup_2_workers": round(seconds[1] / seconds[2], 3),
        "build_s": {str(workers): [round(ran.build_s, 2) for ran in runs[workers]] for workers in WORKERS},
        "stage_s": {str(workers): median_stages(runs[workers]) for workers in WORKERS},
        "vectors_per_s_per_core": round(pace),
        "published_vectors_per_s_per_core": PUBLISHED_PACE,
        "pace_at_published_dimension": round(pace * corpus.queries.shape[1] / PUBLISHED_DIMENSION),
        "same_bytes": all(files == built[0] for files in built),
    }


def stage_text(ran: Ran) -> str:
    return ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in ran.stage_s.items() if stage != EVALUATION)


def median_stages(runs: Sequence[Ran]) -> dict[str, float]:
    stages = [stage for stage in runs[0].stage_s if stage != EVALUATION]
    return {stage: round(statistics.median(ran.stage_s[stage] for ran in runs), 2) for stage in stages}


def measure_memory(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """Private memory (heap and stacks, of each process alone) and the kernel's mark of resident memory (with mapped
    files and Ray's shared pages), by what the worker did, up to the last shard."""
    ran, files = build_again(options, corpus, WORKERS[-1], sample=True)
    workers = {kind: memory for kind, memory in ran.memory.items() if kind.startswith("worker ")}
    shard = max(file.size_bytes for file in files.values() if file.name.endswith(f".{FAISS}"))
    over = {kind: (memory.private - shard) / MIB for kind, memory in workers.items()}
    worst = max(over, key=lambda kind: over[kind])
    return {
        "worker_peak_over_shard_mib": round(over[worst], 1),
        "worst_worker": worst,
        "largest_shard_mib": round(shard / MIB, 1),
        "private_mib": {kind: round(memory.private / MIB, 1) for kind, memory in workers.items()},
        "resident_mark_mib": {kind: round(memory.peak / MIB, 1) for kind, memory in workers.items()},
    }


# ---- parts: gap, routing


@dataclass(frozen=True, eq=False)
class Truth:
    """What is searched and what is to be found.

    Attributes:
        vectors: float32 (n, d), row i being document i, as stored.
        queries: float32 (q, d).
        nearest: int64 (q, K), exact.
    """

    vectors: np.ndarray
    queries: np.ndarray
    nearest: np.ndarray

    def rerank(self, candidates: np.ndarray) -> np.ndarray:
        """The K most similar of candidate rows int64 (q, c), where -1 is none."""
        near = np.empty(candidates.shape, np.float32)
        for query, rows in enumerate(candidates):
            near[query] = np.where(rows >= 0, self.vectors[rows] @ self.queries[query], -np.inf)
        return np.take_along_axis(candidates, np.argsort(-near, axis=1, kind="stable")[:, :K], axis=1)

    def hits(self, found: np.ndarray) -> np.ndarray:
        """Share of the K nearest among the found rows int64 (q, c), of each query: float64 (q,)."""
        pairs = zip(found.tolist(), self.nearest.tolist(), strict=True)
        return np.array([len(set(row) & set(real)) / K for row, real in pairs])


def exact(vectors: np.ndarray, queries: np.ndarray) -> Truth:
    """The exact neighbours, found on all processors."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    nearest = faiss.knn(queries, vectors, K, faiss.METRIC_INNER_PRODUCT)[1]
    faiss.omp_set_num_threads(1)
    return Truth(vectors, queries, nearest)


def noisy(queries: np.ndarray, noise: float) -> np.ndarray:
    """Each query several times, with noise of its own as rows have it, so that a small difference is told from luck."""
    several = np.repeat(queries, GAP_COPIES if noise else 1, axis=0)
    scale = noise / np.sqrt(queries.shape[1])
    several += np.random.default_rng(SEED + 2).normal(scale=scale, size=several.shape).astype(np.float32)
    several /= np.linalg.norm(several, axis=1, keepdims=True)
    return several


def read_vectors(corpus: Corpus, rows: int) -> np.ndarray:
    """The stored vectors float32 (n, d), row i being document i."""
    store = open_store(str(corpus.root))
    vectors = np.empty((rows, corpus.queries.shape[1]), np.float32)
    seen = 0
    for path in fragments_of(store):
        table = read_fragment(store, path, ["passage_id", "embedding"])
        vectors[numbers_of(table.column("passage_id"))] = vectors_of(table.column("embedding"))
        seen += table.num_rows
    if seen != rows:
        raise SystemExit(f"embeddings of {corpus.root} must be {rows} rows, got {seen}; take another --work")
    return vectors


def fragments_of(store: Store) -> list[str]:
    (fingerprint,) = store.folders(f"stages/{EMBEDDINGS}")
    folder = stage_folder(EMBEDDINGS, fingerprint)
    return [f"{folder}/{name}" for name in sorted(store.names(folder)) if name.endswith(".parquet")]


def numbers_of(ids: pa.ChunkedArray) -> np.ndarray:
    """Document numbers int64 (n,) of passage ids, "17#0" or the like."""
    return np.array([int(name.partition("#")[0]) for name in ids.to_pylist()], np.int64)


@dataclass(frozen=True, eq=False)
class IndexFiles:
    """The faiss files of shards, read without the project's reader, and the document number of each of their rows.

    Attributes:
        trained: the index with all cells and without rows.
        owners: which shard owns each cell, where shards own cells.
    """

    shards: list[faiss.Index]
    numbers: list[np.ndarray]
    trained: faiss.Index
    owners: CellOwners | None = None

    def search(self, queries: np.ndarray, nprobe: int, coverage: float, count: int) -> "Candidates":
        """At most `count` rows of each shard that a query is routed to, by their codes."""
        shape = (len(queries), len(self.shards), count)
        near, numbers = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        point = SearchParameters(nprobe=nprobe, coverage=coverage)
        routing = Router(self.trained, self.owners).route(queries, point) if self.owners else None
        for place, (shard, own) in enumerate(zip(self.shards, self.numbers, strict=True)):
            asked = np.flatnonzero(routing.shards[:, place]) if routing else np.arange(len(queries))
            if routing:
                found, rows = search_cells(shard, routing.probes(place, asked), count)
            else:
                faiss.extract_index_ivf(shard).nprobe = nprobe
                found, rows = shard.search(queries, count)
            near[asked, place] = np.where(rows >= 0, found, -np.inf)
            numbers[asked, place] = np.where(rows >= 0, own[rows], -1)
        touched = routing.mean_shards() if routing else float(len(self.shards))
        return Candidates(near.reshape(len(queries), -1), numbers.reshape(len(queries), -1), touched)


@dataclass(frozen=True, eq=False)
class Candidates:
    """What shards gave: similarities by code float32 (q, c), document numbers int64 (q, c), -1 where there are none,
    and how many shards a query touched."""

    near: np.ndarray
    numbers: np.ndarray
    touched: float

    def best(self, count: int) -> np.ndarray:
        """The document numbers int64 (q, count) that are most similar by code."""
        order = np.argsort(-self.near, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(self.numbers, order, axis=1)


def read_index(corpus: Corpus, manifest: dict[str, Any]) -> IndexFiles:
    folder = corpus.root / Catalog(open_store(str(corpus.root)), NAME).version_folder(manifest["version"])
    names = range(len(manifest["shards"]))
    shards = [faiss.read_index(str(folder / shard_file(shard, FAISS))) for shard in names]
    numbers = [numbers_of(read_ipc(folder / shard_file(shard, IDS)).column("id")) for shard in names]
    if (folder / ROUTING_FILE).exists():
        owners = read_owners((folder / OWNERS_FILE).read_bytes())
        return IndexFiles(shards, numbers, faiss.read_index(str(folder / ROUTING_FILE)), owners)
    trained = faiss.clone_index(shards[0])
    trained.reset()
    return IndexFiles(shards, numbers, trained)


def measure_gap(
    options: argparse.Namespace, corpus: Corpus, manifest: dict[str, Any], vectors: np.ndarray
) -> dict[str, Any]:
    """Recall of the shards, in all probed cells, minus that of single indexes of the same lists and codes; each gives
    the same number of candidates by code at the same nprobe, which are then ranked by the stored vectors.

    The gap is to one index of the same trained parameters, filled with all rows: what building in parts changes. To one
    that faiss also trains by hand, the difference is that of two trainings, of which ours sees all rows.
    """
    truth, nprobe = exact(vectors, noisy(corpus.queries, options.noise)), int(point_of(manifest)["nprobe"])
    started = time.perf_counter()
    hand = by_hand(manifest["faiss"]["factory"], vectors, options.training_rows)
    by_hand_s = time.perf_counter() - started
    built = read_index(corpus, manifest)
    own, other, same = (
        truth.hits(truth.rerank(index.search(truth.queries, nprobe, 1.0, GAP_CANDIDATES).best(GAP_CANDIDATES)))
        for index in (built, hand, in_one(built.trained, vectors))
    )
    return {
        "recall_gap_points": round(100 * float((own - same).mean()), 3),
        "recall_over_hand_points": round(100 * float((own - other).mean()), 3),
        "recall_over_hand_error_points": round(100 * float((own - other).std() / np.sqrt(len(own))), 3),
        "recall_distributed": round(float(own.mean()), 4),
        "recall_by_hand": round(float(other.mean()), 4),
        "by_hand_s": round(by_hand_s, 1),
        "nprobe": nprobe,
        "candidates": GAP_CANDIDATES,
        "queries": len(own),
    }


def point_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The search parameters of a version's operating point."""
    return dict(manifest["operating_point"]["parameters"])


def by_hand(factory: str, vectors: np.ndarray, training_rows: int) -> IndexFiles:
    """As the wiki of faiss says: train on a random sample, of as many rows, and add all rows to one index."""
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(SEED + 3).choice(len(vectors), min(training_rows, len(vectors)), replace=False)
    index.train(vectors[sample])
    return in_one(index, vectors)


def in_one(trained: faiss.Index, vectors: np.ndarray) -> IndexFiles:
    """One index of all rows, from a trained one."""
    index = faiss.clone_index(trained)
    index.add(vectors)
    return IndexFiles([index], [np.arange(len(vectors))], trained)


def measure_routing(corpus: Corpus, manifest: dict[str, Any], vectors: np.ndarray) -> dict[str, Any]:
    """What the manifest says, the recall of the reader on our queries, and the least that searching the shard files
    with other settings takes."""
    truth = exact(vectors, corpus.queries)
    with open_index(str(corpus.root), ALIAS) as index:
        found = index.search(truth.queries, K)
    numbers = np.array([[int(str(name).partition("#")[0]) for name in row] for row in found.ids.tolist()])
    files = read_index(corpus, manifest)
    return {
        "mean_shards_touched": manifest["sharding"]["shards_touched"],
        "shards": len(files.shards),
        "imbalance": manifest["sharding"]["imbalance"],
        "recall_reader": round(float(truth.hits(numbers).mean()), 4),
        "recall_manifest": manifest["evaluation"]["recall"],
        "operating_point": point_of(manifest),
        "by_settings": [row for factor in FACTORS for row in sweep(files, truth, factor)] if files.owners else [],
    }


def sweep(files: IndexFiles, truth: Truth, factor: int) -> list[dict[str, float]]:
    """For each coverage the least nprobe that reaches the recall, which is no less than with more coverage, and how
    many shards it touches; it ends where no nprobe does. Each shard gives K * factor candidates."""
    probes, reached = iter(PROBES), []
    nprobe = next(probes)
    for coverage in COVERAGES:
        while (row := recall_at(files, truth, nprobe, coverage, factor))["recall"] < RECALL:
            nprobe = next(probes, 0)
            if not nprobe:
                return reached
        reached.append(row)
    return reached


def recall_at(files: IndexFiles, truth: Truth, nprobe: int, coverage: float, factor: int) -> dict[str, float]:
    candidates = files.search(truth.queries, nprobe, coverage, K * factor)
    recall = float(truth.hits(truth.rerank(candidates.numbers)).mean())
    touched = round(candidates.touched, 3)
    recall = round(recall, 4)
    return {"rerank_factor": factor, "coverage": coverage, "nprobe": nprobe, "recall": recall, "shards": touched}


# ---- part: cold


class CountingProxy:
    """Passes connections on to a port of this machine, and counts the bytes that come back."""

    def __init__(self, port: int) -> None:
        self.bytes = 0
        self._target = ("127.0.0.1", port)
        self._counting = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._target)
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if counts:
                    with self._counting:
                        self.bytes += len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_server() -> Iterator[tuple[int, CountingProxy]]:
    """The tests' server in a process of its own: its port, and a proxy before it to which S3 clients are sent."""
    with subprocess.Popen([sys.executable, S3_SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            port = int(process.stdout.readline())  # type: ignore[union-attr]
            proxy = CountingProxy(port)
            os.environ |= {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "benchmark",
                "AWS_SECRET_ACCESS_KEY": "benchmark",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "NO_PROXY": "127.0.0.1",
            }
            yield port, proxy
            proxy.close()
        finally:
            process.terminate()


def measure_cold(options: argparse.Namespace, corpus: Corpus, manifest: dict[str, Any]) -> dict[str, Any]:
    """Each query by itself: an empty cache, the index opened by its alias, one search."""
    kinds = tuple(f".{kind}" for kind in SEARCHED_FILES)
    files = [*manifest["files"], *(file for shard in manifest["shards"] for file in shard["files"])]
    searched = sum(file["size_bytes"] for file in files if file["name"].endswith(kinds))
    with s3_server() as (port, proxy):
        root = upload(corpus.root, port)
        before = len(requests(port))
        read = [cold_bytes(root, query, proxy) for query in corpus.queries[: options.cold_queries]]
        opened = [one for one in requests(port)[before:] if one["method"] == "HEAD" and f".{FAISS}?" in one["target"]]
    return {
        "cold_read_share": round(statistics.mean(read) / searched, 4),
        "cold_read_share_largest": round(max(read) / searched, 4),
        "cold_read_share_of_all_files": round(statistics.mean(read) / sum(file["size_bytes"] for file in files), 4),
        "shards_opened": round(len(opened) / len(read), 2),
        "index_mib": round(searched / MIB, 1),
        "queries": len(read),
    }


def upload(folder: Path, port: int) -> str:
    """The catalog of a local root in a fresh bucket."""
    with urlopen(Request(f"http://127.0.0.1:{port}/cold", b"", method="PUT")):
        root = "s3://cold/root"
    store = open_store(root)
    for path in sorted((folder / "indexes").rglob("*")):
        if path.is_file():
            store.upload(path, path.relative_to(folder).as_posix())
    return root


def requests(port: int) -> list[dict[str, str]]:
    """All that the server was asked for, so far."""
    with urlopen(f"http://127.0.0.1:{port}/__log") as reply:
        entries: list[dict[str, str]] = json.loads(reply.read())
    return entries


def cold_bytes(root: str, query: np.ndarray, proxy: CountingProxy) -> int:
    """Bytes that the server sent from opening to the first answer."""
    before = proxy.bytes
    with tempfile.TemporaryDirectory(prefix="penstock-cold-") as cache:
        os.environ["PENSTOCK_CACHE"] = cache
        with open_index(root, ALIAS) as index:
            found = index.search(query[None], K)
    if found.ids[0, 0] is None:
        raise SystemExit("a cold search must find rows, got none")
    return proxy.bytes - before


# ---- all


def measure_parts(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The first run is the one that a user starts: it embeds, builds, evaluates and publishes."""
    corpus = prepare(options, folder)
    first = run_pipeline(corpus.file, WORKERS[-1])
    note(f"first run: {stage_text(first)}, evaluation {first.stage_s.get(EVALUATION, 0)}")
    with open_index(str(corpus.root), ALIAS) as index:
        manifest = index.manifest
    found: dict[str, Any] = {
        "factory": manifest["faiss"]["factory"],
        "known": corpus.known,
        "dimension": manifest["dimension"],
    }
    vectors = read_vectors(corpus, options.rows) if {"gap", "routing"} & set(options.parts) else None
    for part in options.parts:
        started = time.perf_counter()
        found[part] = measure_part(part, options, corpus, manifest, vectors)
        note(f"{part} took {time.perf_counter() - started:.0f} s: {json.dumps(found[part])}")
    return found


def measure_part(
    part: str, options: argparse.Namespace, corpus: Corpus, manifest: dict[str, Any], vectors: np.ndarray | None
) -> dict[str, Any]:
    match part:
        case "build":
            return measure_builds(options, corpus)
        case "memory":
            return measure_memory(options, corpus)
        case "gap" if vectors is not None:
            return measure_gap(options, corpus, manifest, vectors)
        case "routing" if vectors is not None:
            return measure_routing(corpus, manifest, vectors)
        case "cold":
            return measure_cold(options, corpus, manifest)
        case _:
            raise SystemExit(f"--parts ({part}) must be some of {', '.join(PARTS)}")


def figures(found: dict[str, Any]) -> dict[str, float]:
    """The figures that have bars, of the parts that were measured."""
    return {name: part[name] for part in found.values() if isinstance(part, dict) for name in BARS if name in part}


def met(name: str, value: float) -> bool:
    match BARS[name]:
        case (">=", least):
            return value >= least
        case ("<=", most):
            return value <= most
        case ("<", limit):
            return value < limit
        case (_, room):
            return abs(value) <= room


def all_met(found: dict[str, Any]) -> bool:
    bars = all(met(name, value) for name, value in figures(found).items())
    return bars and found.get("build", {}).get("same_bytes", True)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['rows']:,} x {result['dimension']}: {result['data']}, {result['queries']} held-out real vectors as "
        f"queries, k {K}, recall {RECALL}; {result['factory']} in {result['shards']} shards ({result['sharding']}); "
        f"{result['machine']}, {result['date']}",
        "",
        "| figure | value | bar | |",
        "|---|---|---|---|",
    ]
    for name, value in figures(result).items():
        sign, limit = BARS[name]
        lines.append(f"| {name} | {value:g} | {sign} {limit:g} | {'met' if met(name, value) else 'MISSED'} |")
    for part in PARTS:
        if part in result:
            more = ", ".join(f"{name} {json.dumps(value)}" for name, value in result[part].items() if name not in BARS)
            lines += ["", f"{part}: {more}"]
    return "\n".join(lines)


def note(line: str) -> None:
    sys.stderr.write(line + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path(tempfile.gettempdir()) / "penstock-index-vectors.npy")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000, help="vectors of the file that are held out")
    parser.add_argument("--noise", type=float, default=0.3, help="length of the noise, that of a vector being 1")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sharding", choices=["cluster", "hash"], default="cluster")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--opq", action="store_true")
    parser.add_argument("--iterations", type=int, default=2, help="of k-means over all rows, after the sample")
    parser.add_argument("--training-rows", type=int, default=TRAINING_ROWS)
    parser.add_argument("--cold-queries", type=int, default=20)
    parser.add_argument("--work", type=Path, help="a folder that is kept, and used again by the next call")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    parser.add_argument("--run", nargs=2, metavar=("FILE", "WORKERS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.run:
        run_here(options.run[0], int(options.run[1]))
        return
    if os.environ.get("RAY_ADDRESS"):
        raise SystemExit("RAY_ADDRESS must not be set: sessions of one and of two workers are compared; unset it")
    os.environ["OMP_NUM_THREADS"] = "1"
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="penstock-builds-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure_parts(options, folder.resolve())
    stated = {name: getattr(options, name) for name in STATED}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    data = f"perturbed copies of {found['known']:,} real vectors (Gaussian noise of length {options.noise:g})"
    if options.noise == 0 and options.rows <= found["known"]:
        data = "real vectors"
    result = {
        "data": data,
        "date": date.today().isoformat(),
        "machine": machine,
        "dimension": found["dimension"],
        **stated,
        **found,
    }
    sys.stdout.write(markdown(result) + "\n")
    if options.json:
        sys.stdout.write(json.dumps({**figures(found), **result}) + "\n")
    sys.exit(0 if all_met(found) else 1)


if __name__ == "__main__":
    main()
