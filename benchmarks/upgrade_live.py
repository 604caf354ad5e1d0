"""A whole upgrade, killed again and again, while a reader asks: what it saw, and what was embedded twice.

    python benchmarks/upgrade_live.py [--documents 600] [--kills 10] [--work FOLDER] [--json]

Docstrings of the installed packages are published with all-MiniLM-L6-v2 pooled by its first token, and moved to the
model as it is by `penstock upgrade`. At random moments its driver or a worker gets kill -9, and the command is given
again. All along a thread asks the alias, with `follow`, for documents by their first lines. Afterwards every answer is
checked against the vectors of the old and the new version: all its similarities must be of one space; where passages of
two spaces were ordered by places, each must be where its own space has it. No version may answer worse than the worse
of the old one and the one that answers through the bridge, beyond the confidence interval. What encoders made is summed
over the receipts of all fragments of the new space: it must be as many vectors as there are distinct texts. At last the
old version, the mixed ones in the middle and the new one are asked in turn, a text at a time, for their latency.
"""

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import yaml
from answer_audit import fallen, follows_places
from model_pairs import MODEL, Texts, docstrings

from penstock.cluster.catalog import Catalog
from penstock.cluster.storage import open_store
from penstock.operators.adapters import Adapter
from penstock.operators.confidence import mean_interval
from penstock.operators.mixed_spaces import QueryMode
from penstock.operators.models import resolve_model
from penstock.pipelines import Found, OpenIndex, open_index

K = 10
SEED = 20_261_121
BATCH = 16
STEPS = 5
FRAGMENT_BYTES = 16_384  # a fragment for each file, so that there are steps
PAUSE_S = 0.1
KILL_AFTER_S = (8.0, 45.0)  # with three kills; with more, each run is shorter, so that the last ones find one to kill
KILLS_AT_THAT = 3
LEAST_SPAN_S = 10.0
LATENCY_ROUNDS = 60
ZEROS = ("reader_errors", "mixed_answers", "wasted_embeddings", "quality_falls", "kills_missed")
CLOSE = 2e-3  # similarities of float16 vectors, and of the same texts in other batches


@dataclass
class Seen:
    """What the reader got: (queries, answer), and what was raised."""

    answers: list[tuple[np.ndarray, Found]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def write_corpus(folder: Path, texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    """Documents, queries and judgements; the pipeline of the old model."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    documents = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts.documents)]
    for part in range(12):
        lines = [json.dumps(one) for one in documents[part::12]]
        (corpus / f"part-{part:02d}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    asked = texts.fitting_queries + texts.queries
    relevant = texts.fitting_relevant + texts.relevant
    queries = [json.dumps({"id": f"q{number}", "text": text}) for number, text in enumerate(asked)]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n", "utf-8")
    judged = [f"q{number}\td{row}\t1" for number, rows in enumerate(relevant) for row in rows]
    (folder / "judged.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n", "utf-8")
    workers = {"count": options.workers}
    return {
        "name": "live",
        "root": str(folder / "root"),
        "documents": {"type": "jsonl", "path": f"{corpus}/*.jsonl", "id": "id", "fragment_bytes": FRAGMENT_BYTES},
        "passages": {"type": "tokens", "tokens": 126, "overlap": 0},
        "embedding": {"model": str(first_token_model(folder)), "precision": "float32", "workers": workers},
        "index": {"family": "flat", "shards": 2, "recall": 1.0, "rerank": True},
        "evaluate": {"queries": str(folder / "queries.jsonl"), "relevance": str(folder / "judged.tsv"), "k": K},
        "gate": {"recall": 0.99},
        "publish": {"alias": "live"},
        "upgrade": {"model": MODEL, "sample": 300, "steps": STEPS, "seed": SEED},
    }


def first_token_model(folder: Path) -> Path:
    """all-MiniLM-L6-v2 that pools by its first token instead of the mean."""
    place = folder / "model-cls"
    shutil.copytree(resolve_model(MODEL), place)
    pooling = place / "1_Pooling" / "config.json"
    stated = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(stated | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    return place


def penstock(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "penstock.pipelines.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def upgraded(file: Path, kills: int, draw: random.Random) -> tuple[dict[str, Any], int]:
    """Upgrade through so many kills, or fewer where it ends before; the last record, and how many kills there were."""
    first, last = KILL_AFTER_S
    span = max(LEAST_SPAN_S, (last - first) * KILLS_AT_THAT / max(kills, KILLS_AT_THAT))
    for killed in range(kills):
        process = penstock("upgrade", str(file), "--json")
        try:
            printed, _ = process.communicate(timeout=draw.uniform(first, first + span))
        except subprocess.TimeoutExpired:
            _kill(process, draw)
            process.wait()
        else:
            return _record_of(process, printed), killed
    process = penstock("upgrade", str(file), "--json")
    printed, _ = process.communicate()
    return _record_of(process, printed), kills


def _record_of(process: subprocess.Popen[str], printed: str) -> dict[str, Any]:
    if process.returncode:
        raise SystemExit(f"the upgrade ended with {process.returncode}: {printed[-2_000:]}")
    record: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return record


def _kill(process: subprocess.Popen[str], draw: random.Random) -> None:
    """kill -9 of the driver, or of one of its workers, after which the driver goes on by itself."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "encoder_process" in " ".join(child.cmdline())]
    if workers and draw.random() < 0.5:
        draw.choice(workers).kill()
        time.sleep(2)
    process.kill()


def read(root: Path, texts: Sequence[str], seen: Seen, stop: threading.Event) -> None:
    """Ask until told to stop."""
    draw = np.random.default_rng(SEED)
    with open_index(str(root), "live", follow=True, every_s=0.5) as index:
        while not stop.is_set():
            rows = draw.integers(0, len(texts), BATCH)
            try:
                seen.answers.append((rows, index.search([texts[row] for row in rows], K)))
            except Exception as error:  # any is what the reader must not see
                seen.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(PAUSE_S)


class Audit:
    """Checks answers against the vectors of the two versions that they come from."""

    def __init__(self, root: Path, old: str, new: str, texts: Sequence[str]) -> None:
        self.catalog = Catalog(open_store(str(root)), "live")
        self.root, self.old, self.new = root, old, new
        self.vectors = {version: self._stored(version) for version in (old, new)}
        self.queries = {version: self._encoded(version, texts) for version in (old, new)}

    def mixed(self, rows: np.ndarray, found: Found) -> int:
        """How many answers of a search have similarities of two spaces, or of none, or passages where no space has
        them."""
        if found.ranks_fused:
            return self._misplaced(rows, found)
        spaces = self._spaces(found.version)
        wrong = 0
        for row, ids, similarities in zip(rows.tolist(), found.ids, found.similarities, strict=True):
            filled = [place for place, name in enumerate(ids) if name is not None]
            fits = [
                all(any(abs(near(row, ids[place]) - similarities[place]) < CLOSE for near in space) for place in filled)
                for space in spaces
            ]
            wrong += not any(fits)
        return wrong

    def _misplaced(self, rows: np.ndarray, found: Found) -> int:
        """How many answers without similarities are none that filling places may give."""
        manifest = self.catalog.manifest(found.version)
        old, asked = self.vectors[self.old], self._asked_of_old(manifest)
        part = self._part(manifest)
        again = {name.rpartition("#")[0] for name in part}
        superseded = {name for name in old if name.rpartition("#")[0] in again}
        wrong = 0
        for row, ids in zip(rows.tolist(), found.ids, strict=True):
            before = {name: float(asked[row] @ vector) for name, vector in old.items()}
            after = {name: float(self.queries[self.new][row] @ self.vectors[self.new][name]) for name in part}
            answer = [str(name) for name in ids if name is not None]
            wrong += not follows_places(answer, before, after, superseded, K, CLOSE)
        return wrong

    def _part(self, manifest: dict[str, Any]) -> list[str]:
        """The ids of what is embedded again in a mixed version."""
        versions = [part["version"] for part in manifest["parts"] if part["role"] == "new"]
        folders = [self.root / self.catalog.version_folder(version) for version in versions]
        tables = [pa.ipc.open_file(path).read_all() for one in folders for path in sorted(one.glob("*.ids.arrow"))]
        return [name for table in tables for name in table.column("id").to_pylist()]

    def _asked_of_old(self, manifest: dict[str, Any]) -> np.ndarray:
        """The queries with which a mixed version asks its old part."""
        match QueryMode(manifest["queries"]):
            case QueryMode.BOTH:
                return self.queries[self.old]
            case QueryMode.DIRECT:
                return self.queries[self.new]
            case QueryMode.BRIDGE:
                folder = self.root / self.catalog.version_folder(manifest["version"])
                adapter = Adapter.from_bytes((folder / "queries_to_old.safetensors").read_bytes())
                return adapter.apply(self.queries[self.new])

    def _spaces(self, version: str) -> list[list[Any]]:
        """For each space in which a version may answer: what a similarity there may be."""
        old, new = (self._similarity(one, self.vectors[one]) for one in (self.old, self.new))
        manifest = self.catalog.manifest(version)
        if manifest["format"] != "penstock-mixed/1":
            return [[old if version == self.old else new]]
        folder = self.root / self.catalog.version_folder(version)
        adapter_file = folder / "documents_to_new.safetensors"
        if not adapter_file.exists():
            return [[old], [new]]
        adapter = Adapter.from_bytes(adapter_file.read_bytes())
        length = float(json.loads(adapter_file.with_suffix(".json").read_text())["length"])
        mapped = {name: adapter.apply(vector[None])[0] * length for name, vector in self.vectors[self.old].items()}
        return [[old], [new, self._similarity(self.new, mapped)]]

    def _similarity(self, space: str, vectors: dict[str, np.ndarray]) -> Any:  # noqa: ANN401
        return lambda row, name: float(self.queries[space][row] @ vectors[name]) if name in vectors else np.inf

    def _encoded(self, version: str, texts: Sequence[str]) -> np.ndarray:
        with OpenIndex(self.catalog, "audit", self.catalog.manifest(version)) as index:
            return index.encode(list(texts))

    def _stored(self, version: str) -> dict[str, np.ndarray]:
        folder = self.root / self.catalog.version_folder(version)
        found: dict[str, np.ndarray] = {}
        for path in sorted(folder.glob("*.vectors.arrow")):
            ids = pa.ipc.open_file(path.with_name(path.name.replace("vectors", "ids"))).read_all().column("id")
            vectors = pa.ipc.open_file(path).read_all().column("vector").to_pylist()
            found |= {name: np.array(vector, np.float32) for name, vector in zip(ids.to_pylist(), vectors, strict=True)}
        return found


def latencies(catalog: Catalog, versions: dict[str, str], texts: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of one search for one text, by name of the version; asked in turn, so that what else the
    machine does meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    with ExitStack() as opened:
        indexes = {
            name: opened.enter_context(OpenIndex(catalog, "latency", catalog.manifest(version)))
            for name, version in versions.items()
        }
        for turn in range(LATENCY_ROUNDS + 1):
            for name, index in indexes.items():
                started = time.perf_counter()
                index.search(texts[turn % len(texts)], K)
                seconds[name].append(time.perf_counter() - started)
    return {name: round(1000 * float(np.median(taken[1:])), 2) for name, taken in seconds.items()}


def compared_latencies(catalog: Catalog, old: str, record: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """What an answer takes half way through the backfill, against the old version; and the adapters it had."""
    mixed = half_way(catalog, record["backfill"]["steps"])
    taken = latencies(catalog, {"old": old, "mixed": mixed, "new": record["flip"]["version"]}, texts)
    return {
        "latency_ms": taken,
        "mixed_over_old_latency": round(taken["mixed"] / taken["old"], 2),
        "mixed_adapters": [file["name"] for file in catalog.manifest(mixed)["files"] if "safetensors" in file["name"]],
    }


def half_way(catalog: Catalog, steps: Sequence[dict[str, Any]]) -> str:
    """The mixed version of which the share that is embedded again is nearest to a half."""
    there = [step for step in steps if step["part"] is not None and catalog.has_manifest(step["version"])]
    return str(min(there, key=lambda step: abs(step["share"] - 0.5))["version"])


def recalls(seen: Seen, relevant: Sequence[Sequence[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Version → the queries that it answered, and for each whether a document asked for was found, in the order in
    which versions answered."""
    found: dict[str, list[tuple[int, float]]] = {}
    for rows, answer in seen.answers:
        worth = hits(answer, [relevant[row] for row in rows])
        found.setdefault(answer.version, []).extend(zip(rows.tolist(), worth, strict=True))
    return {
        version: (np.array([row for row, _ in answers]), np.array([hit for _, hit in answers]))
        for version, answers in found.items()
    }


def hits(found: Found, relevant: Sequence[Sequence[int]]) -> list[float]:
    """For each query 1 where a document asked for was found, else 0."""
    worth = []
    for ids, rows in zip(found.ids, relevant, strict=True):
        documents = {str(name).rpartition("#")[0] for name in ids if name is not None}
        worth.append(float(any(f"d{document}" in documents for document in rows)))
    return worth


def asked_now(catalog: Catalog, version: str, texts: Sequence[str], relevant: Sequence[Sequence[int]]) -> np.ndarray:
    """What the answers of a version to all queries are worth."""
    with OpenIndex(catalog, "floor", catalog.manifest(version)) as index:
        return np.array(hits(index.search(list(texts), K), relevant))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = docstrings(options.documents, options.documents // 3)
    settings = write_corpus(folder, texts, options)
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    if penstock("run", str(file)).wait():
        raise SystemExit("the old version could not be published")
    catalog = Catalog(open_store(settings["root"]), "live")
    old = catalog.alias("live")
    if old is None:
        raise SystemExit("the old version has no alias")
    asked = texts.fitting_queries + texts.queries
    seen, stop = Seen(), threading.Event()
    reader = threading.Thread(target=read, args=(folder / "root", asked, seen, stop))
    reader.start()
    started = time.monotonic()
    record, killed = upgraded(file, options.kills, random.Random(SEED))
    seconds = time.monotonic() - started
    time.sleep(3)
    stop.set()
    reader.join()
    audit = Audit(folder / "root", old.version, record["flip"]["version"], asked)
    relevant = texts.fitting_relevant + texts.relevant
    by_version = recalls(seen, relevant)
    bridge = record["backfill"]["steps"][0]["version"]
    floors = {version: asked_now(catalog, version, asked, relevant) for version in (old.version, bridge)}
    fell = fallen(by_version, floors, SEED)
    made = record["flip"]["coverage"]["encoded"]
    embedded = record["canary"]["sample"]["throughput"]["encoded"] + record["flip"]["encoded"]
    embedded += sum(step["encoded"] for step in record["backfill"]["steps"])
    return {
        "passages": record["flip"]["rows"],
        "kills": killed,
        "kills_missed": options.kills - killed,
        "seconds": round(seconds, 1),
        "searches": len(seen.answers),
        "reader_errors": len(seen.errors),
        "first_error": next(iter(seen.errors), None),
        "versions_seen": len(by_version),
        "mixed_answers": sum(audit.mixed(rows, found) for rows, found in seen.answers),
        "recorded_embeddings": embedded,
        "encoded_in_fragments": made["encoded"],
        "distinct_texts": made["texts"],
        "wasted_embeddings": made["encoded"] - made["texts"],
        "places_answers": sum(len(found.ids) for _, found in seen.answers if found.ranks_fused),
        "recall_old": round(float(floors[old.version].mean()), 4),
        "recall_bridge": round(float(floors[bridge].mean()), 4),
        "quality_falls": len(fell),
        "fallen_versions": fell,
        **compared_latencies(catalog, old.version, record, asked),
        "recall_by_version": [
            {"version": version, "answers": len(worth), **mean_interval(worth, SEED).to_json()}
            for version, (_, worth) in by_version.items()
        ],
        "steps": [{name: step[name] for name in ("share", "ndcg", "rows")} for step in record["backfill"]["steps"]],
        "ndcg_new": record["flip"]["ndcg"],
        "area_under_quality": record["flip"]["area_under_quality"],
    }


def markdown(found: dict[str, Any]) -> str:
    lines = [f"{found['passages']} passages, {found['kills']} kills in {found['seconds']:.0f} s", ""]
    lines += ["| version | answers | recall@10 [95 %] |", "|---|---|---|"]
    for one in found["recall_by_version"]:
        lines.append(
            f"| {one['version']} | {one['answers']} | {one['estimate']:.3f} [{one['low']:.3f}, {one['high']:.3f}] |"
        )
    took = ", ".join(f"{name} {value:.1f}" for name, value in found["latency_ms"].items())
    lines += ["", f"milliseconds for one text (median): {took}"]
    lines += ["", f"reader: {found['searches']} searches, {found['reader_errors']} errors; mixed answers "]
    lines[-1] += (
        f"{found['mixed_answers']}; vectors made {found['encoded_in_fragments']} of {found['distinct_texts']} texts; "
        f"versions below {min(found['recall_old'], found['recall_bridge']):.3f} (the old one or the bridge) "
        f"{found['quality_falls']}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for corpus and root; without it, one that is removed")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-upgrade-") as place:
        found = measure(options, options.work or Path(place))
    machine = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
    sys.stdout.write(markdown(found))
    if options.json:
        sys.stdout.write(json.dumps(machine | found) + "\n")
    sys.exit(1 if any(found[name] for name in ZEROS) else 0)


if __name__ == "__main__":
    main()
