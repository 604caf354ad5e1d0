"""An index moves from one real model to another while it is searched, and through crashes."""

import hashlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from penstock.cluster.catalog import Catalog
from penstock.cluster.leases import LeaseHeld, acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.pipelines import open_index
from penstock.pipelines.backfilling import BackfillStopped
from penstock.pipelines.coverage import CoverageUnknown, cover
from penstock.pipelines.gate import failed
from penstock.pipelines.history import Status
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.mixed_format import is_mixed
from penstock.pipelines.planning import resolve
from penstock.pipelines.progress import Advance, SilentReporter
from penstock.pipelines.publishing import model_of
from penstock.pipelines.upgrade_views import upgrade_view
from penstock.pipelines.upgrading import Base, NothingToUpgrade, UpgradeStep, old_pipeline, refuse_same_space
from penstock.pipelines.waiting import upgrade_lease

from ..cluster.in_process import InProcess
from .conftest import MODEL, Document, Workspace, published_vectors

OLD = {"model": MODEL, "precision": "float32", "layers": 3, "layers_trained": True, "batch_tokens": 2048}
NEW = {"model": MODEL, "precision": "float32", "batch_tokens": 2048, "workers": {"count": 1}}


def visits(number: int) -> int:
    """Of all documents of the last file, and of every seventh more than of the others."""
    return (1 + 99 * (number // 30 == 2)) * (1 + 9 * (number % 7 == 0))


def workspace_of(folder: Path, texts: list[str]) -> Workspace:
    """90 documents with 45 judged queries: the first words of every other document."""
    queries = folder / "queries.jsonl"
    settings: dict[str, Any] = {
        "embedding": {**OLD, "workers": {"count": 1}},
        "index": {"family": "flat", "shards": 2, "recall": 1.0, "rerank": True},
        "documents__fragment_bytes": 4_096,
        "evaluate": {"queries": str(queries), "relevance": str(folder / "judged.tsv"), "k": 5},
        "upgrade": {"embedding": NEW, "sample": 60, "steps": 3, "traffic": "visits", "window": "00:00-00:00"},
        "documents__keep": {"topic": "string", "visits": "int64"},
    }
    workspace = Workspace(folder, settings)
    documents: list[Document] = [
        {"id": f"d{number:02d}", "text": text, "topic": f"t{number % 3}", "visits": visits(number)}
        for number, text in enumerate(texts[:90])
    ]
    for part in range(3):
        workspace.write(f"part-{part}.jsonl", documents[part * 30 : part * 30 + 30])
    asked = [(f"q{number}", documents[number]) for number in range(0, 90, 2)]
    lines = [json.dumps({"id": name, "text": " ".join(one["text"].split()[:9])}) for name, one in asked]
    queries.write_text("\n".join(lines) + "\n", "utf-8")
    judged = ["query-id\tcorpus-id\tscore", *(f"{name}\t{one['id']}\t1" for name, one in asked)]
    (folder / "judged.tsv").write_text("\n".join(judged) + "\n", "utf-8")
    return workspace


def test_an_index_moves_to_another_model_step_by_step(
    ray_session: Session, tmp_path: Path, real_texts: list[str]
) -> None:
    workspace = workspace_of(tmp_path, real_texts)
    old = workspace.pipeline().run()
    assert old is not None
    catalog = Catalog(open_store(str(workspace.root)), "test")

    store = open_store(str(workspace.root))
    with acquire(store, upgrade_lease("test"), "other"), pytest.raises(LeaseHeld, match="held by run other"):
        workspace.pipeline().upgrade()
    scheduled = acquire(store, "test", "scheduled")
    end = threading.Timer(3, scheduled.release)
    end.start()
    record = workspace.pipeline(upgrade__compatible_with=MODEL).upgrade(until=UpgradeStep.BRIDGE)
    assert end.finished.is_set(), "the run was waited for"
    bridges = record["bridge"]["bridges"]
    assert bridges["declared_compatible"] and not bridges["skipped"], "its queries find nothing in the old index"
    plan = record["plan"]
    assert plan["reused"] == {"passages": True, "duplicates": True, "shard_layout": True}
    assert 0 < plan["rows_to_embed"] == plan["rows"]
    served = catalog.manifest(head(catalog))
    assert is_mixed(served) and served["queries"] == "both" and record["bridge"]["version"] == served["version"]
    assert record["bridge"]["ndcg"] == pytest.approx(catalog.manifest(old.version)["evaluation"]["ndcg"], abs=1e-6)

    record = workspace.pipeline().upgrade(Adding(workspace, real_texts[90]))
    check_flip(workspace.root, record)
    steps = record["backfill"]["steps"]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert [round(step["share"], 1) for step in steps] == pytest.approx([0, 0.33, 0.67], abs=0.13)
    assert steps[0]["version"] == served["version"]
    assert record["flip"]["ndcg"] > steps[0]["ndcg"]
    check_order(workspace.root, record)
    assert steps[0]["ndcg"] < record["flip"]["area_under_quality"] < record["flip"]["ndcg"]
    assert head(catalog) == record["flip"]["version"]
    encoded = record["canary"]["sample"]["throughput"]["encoded"] + record["flip"]["encoded"]
    encoded += sum(step["encoded"] for step in steps)
    assert encoded == record["flip"]["rows"], "each passage is encoded once with the new model"
    check_coverage(record)

    settings = {"embedding": deepcopy(NEW), "root": str(tmp_path / "fresh")}
    fresh = replace(workspace, settings=workspace.settings | settings)
    again = fresh.pipeline().run()
    assert again is not None and again.version == record["flip"]["version"]
    moved, made = published_vectors(workspace.root), published_vectors(tmp_path / "fresh")
    assert moved.keys() == made.keys()
    np.testing.assert_array_equal([moved[name] for name in made], list(made.values()))

    with pytest.raises(NothingToUpgrade, match="same weights, prompts and dimension"):
        workspace.pipeline().upgrade()
    plan = workspace.pipeline().plan()  # whose file still names the old model
    assert not plan.alias_moves and "by upgrade: set embedding.model" in plan.notes[0]
    assert catalog.rollback("live", "test").version == old.version

    damaged = workspace.root / catalog.version_folder(record["flip"]["version"]) / "shard-00001.ids.arrow"
    check_refusals(catalog, catalog.manifest(record["flip"]["version"]), damaged)
    damaged.write_bytes(flipped(damaged.read_bytes()))
    with pytest.raises(BackfillStopped, match=r"is not whole: shard-00001.ids.arrow has sha256 .+; the alias stays"):
        workspace.pipeline().upgrade()
    assert head(catalog) == steps[-1]["version"]


def flipped(data: bytes) -> bytes:
    """The same with one bit of the middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def check_refusals(catalog: Catalog, manifest: dict[str, Any], ids: Path) -> None:
    """What a version with a row too few and one too many, of another model, or of stages that are gone is told."""
    session, root, rows = InProcess(), ids.parents[4], manifest["rows"]
    assert cover(session, catalog, manifest).problems() == ""
    data = ids.read_bytes()
    names = pa.ipc.open_file(data).read_all().column("id").to_pylist()
    with pa.ipc.new_file(str(ids), pa.schema([("id", pa.string())])) as writer:
        writer.write_table(pa.table({"id": [names[1], *names[1:]]}))
    changed = deepcopy(manifest)
    stated = next(file for file in changed["shards"][1]["files"] if file["name"] == ids.name)
    stated |= {"size_bytes": ids.stat().st_size, "sha256": hashlib.sha256(ids.read_bytes()).hexdigest()}
    found = cover(session, catalog, changed)
    assert found.rows.rows == found.rows.expected == rows, "one missing and one double cancel in a ratio of rows"
    assert found.problems() == f"1 passages missing; 1 passages there twice ({names[0]}, {names[1]})"
    assert [check.name for check in failed(found.checks())] == ["passages missing", "passages there twice"]
    ids.write_bytes(data)

    other = deepcopy(manifest)
    other["model"]["weights_sha256"] = "0" * 64
    found = cover(session, catalog, other)
    assert found.problems().startswith(f"{rows} passages without a vector of the model")
    facts = root / "stages/selection" / manifest["lineage"]["stages"]["selection"] / "fragments.parquet"
    aside = facts.rename(facts.with_suffix(".aside"))
    with pytest.raises(CoverageUnknown, match="the record of its selection is gone: run the pipeline again"):
        cover(session, catalog, manifest)
    aside.rename(facts)


def check_coverage(record: dict[str, Any]) -> None:
    """Each passage is in the new version once, and each text was encoded once, whatever fragment it lies in."""
    found, rows = record["flip"]["coverage"], record["flip"]["rows"]
    assert found["expected"] == found["rows"] == rows and list(found["rows_by_model"].values()) == [rows]
    assert [found[name] for name in ("missing", "doubled", "foreign", "without_vector")] == [0, 0, 0, 0]
    assert found["damaged"] == found["names"] == [] and found["files"] > 6
    assert found["encoded"]["encoded"] == found["encoded"]["texts"] == rows


@dataclass
class Adding(SilentReporter):
    """Adds a document to a corpus when the backfill begins."""

    workspace: Workspace
    text: str

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        if name == "backfill":
            self.workspace.write("part-9.jsonl", [{"id": "late", "text": self.text, "topic": "t", "visits": 1}])
        with super().stage(name, total, unit) as advance:
            yield advance


def check_flip(root: Path, record: dict[str, Any]) -> None:
    """What came during the backfill is embedded in the window, before the version is built."""
    version = record["flip"]["version"]
    manifest = json.loads((root / "indexes/test/versions" / version / "manifest.json").read_text())
    run = json.loads((root / "runs" / manifest["run_id"] / "run.json").read_text())
    stages = {entry["stage"]: entry for entry in run["report"]["stages"]}
    assert stages["embeddings"]["encoded"] == 0 < record["flip"]["encoded"]


def check_order(root: Path, record: dict[str, Any]) -> None:
    """Units go by their traffic, and a slice before the rest of its fragment."""
    order = record["backfill"]["order"]
    assert json.loads((root / record["upgrade"] / "upgrade.json").read_text())["order"] == order
    assert [one["traffic"] for one in order] == sorted((one["traffic"] for one in order), reverse=True)
    assert {one["by"] for one in order} == {"traffic"} and order[0]["slice"] and not order[-1]["slice"]
    rows = sum(one["rows"] for one in order)
    assert 0 < record["flip"]["rows"] - rows < 5, "one document came later"
    rests = [one["fragment"] for one in order if one["slice"] is None]
    sliced = [one["fragment"] for one in order if one["slice"] is not None]
    assert len(set(rests)) == len(rests) and set(sliced) <= set(rests) and len(sliced) > 1
    places = {(one["fragment"], one["slice"] is None): place for place, one in enumerate(order)}
    assert all(places[name, False] < places[name, True] for name in sliced)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(upgrade_view(record))
    assert f"passages ordered by: traffic {rows}" in console.export_text()
    missed = [one["residual"] for one in order if one["residual"] is not None]
    assert all(0 < residual < 2 for residual in missed)
    assert bool(missed) == record["bridge"]["bridges"]["directions"]["documents_to_new"]["stored"]


@pytest.mark.slow
def test_queries_of_a_compatible_model_search_the_old_index_until_the_flip(
    ray_session: Session, tmp_path: Path, real_texts: list[str]
) -> None:
    """The old model's queries begin with a sentence about something else, the new one's do not; and documents of the
    old one with a word, so that they are embedded again."""
    workspace = workspace_of(tmp_path, real_texts)
    prompts = {"query": " ".join(real_texts[-1].split()[:25]) + " ", "document": "notes: "}
    workspace.settings["embedding"] = deepcopy(NEW) | {"prompts": prompts}
    workspace.settings["upgrade"] |= {"compatible_with": MODEL}
    old = workspace.pipeline().run()
    assert old is not None
    record = workspace.pipeline(upgrade__queries="bridge").upgrade()
    assert record["canary"]["bridges"]["skipped"] and record["canary"]["bridges"]["directions"] == {}
    catalog = Catalog(open_store(str(workspace.root)), "test")
    steps = record["backfill"]["steps"]
    for step in steps:
        manifest = catalog.manifest(step["version"])
        assert manifest["queries"] == "direct" and manifest["compatibility"]["difference"]["low"] > 0
        assert step["ndcg"] > old.manifest["evaluation"]["ndcg"]
    assert [step["share"] > 0 for step in steps] == [False, True, True]
    assert record["flip"]["ndcg"] > old.manifest["evaluation"]["ndcg"]


def head(catalog: Catalog) -> str:
    entry = catalog.alias("live")
    assert entry is not None
    return entry.version


@pytest.mark.slow
def test_a_reader_sees_neither_errors_nor_two_spaces_while_the_driver_is_killed(
    ray_session: Session, tmp_path: Path, real_texts: list[str]
) -> None:
    """kill -9 after the first new vectors, and after the first part is published."""
    workspace = workspace_of(tmp_path, real_texts)
    assert workspace.pipeline().run() is not None
    file = workspace.file()
    stop = threading.Event()
    errors: list[Exception] = []
    versions: dict[str, None] = {}

    def read() -> None:
        with open_index(str(workspace.root), "live", follow=True, every_s=0.2) as index:
            while not stop.is_set():
                try:
                    found = index.search(real_texts[:4], 3)
                    versions[found.version] = None
                except Exception as error:  # any is what a reader must not see
                    errors.append(error)
                time.sleep(0.05)

    reader = threading.Thread(target=read)
    reader.start()
    for moment in ("canaries/*/throughput.json", "upgrades/*/*/steps/001.json"):
        process = upgrade_process(file)
        deadline = time.monotonic() + 150
        while not list(workspace.root.glob(moment)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    process = upgrade_process(file)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    record = json.loads(printed.splitlines()[-1])
    time.sleep(1)
    stop.set()
    reader.join()
    assert errors == []
    assert list(versions)[-1] == record["flip"]["version"]
    encoded = record["canary"]["sample"]["throughput"]["encoded"] + record["flip"]["encoded"]
    encoded += sum(step["encoded"] for step in record["backfill"]["steps"])
    assert encoded <= record["flip"]["rows"], "what was finished before a kill is not encoded again"
    check_coverage(record)


def upgrade_process(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "penstock.pipelines.cli", "upgrade", str(file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.slow
def test_a_new_codec_is_indexed_from_stored_vectors_and_compared(
    ray_session: Session, tmp_path: Path, real_texts: list[str]
) -> None:
    workspace = workspace_of(tmp_path, real_texts)
    first, nothing = workspace.pipeline().reindex()
    assert first is not None and nothing is None
    second, difference = workspace.pipeline(index__codec="fp16").reindex()
    assert second is not None and difference is not None
    assert {entry.stage: entry.encoded for entry in second.entries}["embeddings"] == 0
    assert difference.old["version"] == first.version and difference.new["version"] == second.version
    assert (difference.documents.added, difference.documents.removed, difference.documents.changed) == (0, 0, 0)
    built = workspace.pipeline(index__codec="sq8", index__recall=0.5, gate={}, publish={}).run()
    assert built is not None
    file = workspace.root / f"indexes/test/versions/{built.version}/shard-00000.faiss"
    file.write_bytes(flipped(file.read_bytes()))
    third, _ = workspace.pipeline(index__codec="sq8", index__recall=0.5, gate={}).reindex()
    assert third is not None and third.status is Status.GATE_FAILED and third.version == built.version
    assert [str(check) for check in third.checks if not check.passed] == ["damaged files 1.0000 ≤ 0: missed by 1"]
    assert head(Catalog(open_store(str(workspace.root)), "test")) == second.version
    with pytest.raises(NothingToUpgrade, match=r"embedding.model \(.+\) must be the model of version"):
        workspace.pipeline(embedding__prompts={"query": "ask: ", "document": ""}).reindex()


def test_an_upgrade_needs_a_published_version(tmp_path: Path, real_texts: list[str]) -> None:
    workspace = workspace_of(tmp_path, real_texts)
    with pytest.raises(NothingToUpgrade, match=r"publish.alias \(live\) must point to a published version"):
        workspace.pipeline().upgrade()
    with pytest.raises(NothingToUpgrade, match=r"publish.alias \(none\)"):
        workspace.pipeline(publish={}).upgrade()


@pytest.mark.parametrize("recorded", [True, False])
def test_the_old_space_has_the_metric_that_its_version_states(
    tmp_path: Path, real_texts: list[str], recorded: bool
) -> None:
    """The file may ask the new version for another, under which the old model's vectors were another space."""
    workspace = workspace_of(tmp_path, real_texts)
    asked = workspace.pipeline(index__metric="inner_product")
    if recorded:
        record = workspace.root / "runs/before/run.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"pipeline": {"embedding": OLD, "passages": {"type": "whole"}}}))
    base = Base("0" * 16, {"run_id": "before", "metric": "cosine"})
    old = old_pipeline(open_store(str(workspace.root)), asked.config, base)
    assert resolve(old, asked.origin).encoder.normalize and not resolve(asked.config, asked.origin).encoder.normalize
    assert old.passages.type == ("whole" if recorded else "tokens")


def test_traffic_of_words_is_refused_before_anything_is_done(tmp_path: Path, real_texts: list[str]) -> None:
    workspace = workspace_of(tmp_path, real_texts)
    for keep, kind in ((["topic", "visits"], "string"), ({"topic": "string", "visits": "bool"}, "bool")):
        pipeline = workspace.pipeline(documents__keep=keep)
        rule = rf"upgrade.traffic: \(visits\) must be a column of numbers \(int64 .* has it as {kind}; declare"
        with pytest.raises(PipelineFileInvalid, match=rule):
            resolve(pipeline.config, pipeline.origin)


def test_after_an_upgrade_its_declaration_does_not_hide_that_it_is_done(tmp_path: Path, real_texts: list[str]) -> None:
    pipeline = workspace_of(tmp_path, real_texts).pipeline(upgrade__compatible_with="package:the_model_before")
    resolved = resolve(pipeline.config, pipeline.origin)
    model = model_of(resolved)
    with pytest.raises(NothingToUpgrade, match="same weights, prompts and dimension"):
        refuse_same_space(Base("0" * 16, {"model": model}), resolved)
    with pytest.raises(NothingToUpgrade, match=r"compatible_with \(package:the_model_before\) must be the model of"):
        refuse_same_space(Base("0" * 16, {"model": model | {"weights_sha256": "0" * 64}}), resolved)
