"""Deduplication by meaning from the pipeline file to a search, against a sequential choice over all pairs."""

import json
import os
import shutil
from html import escape
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
import yaml
from tokenizers import Tokenizer
from typer.testing import CliRunner

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.clustering import read_centroids
from penstock.cluster.jobs.evaluation import QueriesInvalid
from penstock.cluster.jobs.training import read_trained
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.identity import row_hashes
from penstock.operators.models import resolve_model
from penstock.operators.routing import index_centroids
from penstock.operators.similar_pairs import Join
from penstock.pipelines import Pipeline, open_index
from penstock.pipelines.cleanup import collect_garbage
from penstock.pipelines.cli import app
from penstock.pipelines.deduplicating import Deduplicating
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.planning import Deduplicated, Embedded
from penstock.pipelines.progress import SilentReporter
from penstock.pipelines.running import Report
from penstock.pipelines.shared_centroids import Clustering

from .conftest import MODEL, Workspace, read_ledger

SIMILARITY = 0.93
RULE = {"type": "semantic", "similarity": SIMILARITY, "keep": "longest"}


REFUSING = """
import torch


class Refusing(torch.nn.Module):
    def forward(self, features, **kwargs):
        if (features["input_ids"] == {token}).any():
            raise ValueError("this token is refused")
        return features

    def save(self, *args, **kwargs):
        pass

    @classmethod
    def load(cls, *args, **kwargs):
        return cls()
"""


def reworded(text: str) -> str:
    """A text that says the same in a few other words."""
    return text.replace("the ", "this ", 1).replace("Return", "Give back", 1).replace(".", " .", 1) + " Please note."


@pytest.fixture(scope="module")
def made(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """90 texts, 40 of them also in other words, 3 of them twice; tests work on copies."""
    workspace = Workspace(tmp_path_factory.mktemp("meaning"), {"index": {"family": "flat", "shards": 2, "recall": 1.0}})
    documents: list[dict[str, Any]] = [
        {"id": f"d{number:03d}", "text": text, "topic": f"t{number % 3}"} for number, text in enumerate(real_texts[:90])
    ]
    again = [{"id": f"e{number:03d}", "text": reworded(real_texts[number]), "topic": "other"} for number in range(40)]
    copies = [{**again[number], "id": f"f{number}"} for number in range(3)]
    workspace.write("one.jsonl", documents[:50])
    workspace.write("two.jsonl", [*documents[50:], *again, *copies])
    run(workspace)
    return workspace


@pytest.fixture
def workspace(made: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(made.folder, tmp_path / "copy")
    return Workspace(tmp_path / "copy", made.settings)


def run(workspace: Workspace, **rule: Any) -> Report:  # noqa: ANN401
    report = workspace.pipeline(deduplicate={**RULE, **rule}).run()
    assert report is not None
    return report


def encoded(root: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Passage id → vector and tokens of all passages that have a vector, deduplicated or not."""
    vectors: dict[str, np.ndarray] = {}
    for path in root.glob("stages/embeddings/*/*.parquet"):
        if path.name.endswith(".dropped.parquet"):
            continue
        table = pa.parquet.read_table(path)
        for name, vector in zip(
            table.column("passage_id").to_pylist(), table.column("embedding").to_pylist(), strict=True
        ):
            vectors[name] = np.array(vector, np.float32)
    tokens: dict[str, int] = {}
    for path in root.glob("stages/passages/*/*.parquet"):
        table = pa.parquet.read_table(path, columns=["passage_id", "tokens"])
        tokens |= dict(zip(table.column("passage_id").to_pylist(), table.column("tokens").to_pylist(), strict=True))
    return {name: (vector / np.linalg.norm(vector), tokens[name]) for name, vector in vectors.items()}


def expected(root: Path, similarity: float) -> set[str]:
    """What stays when rows are decided one by one, the longest first, equals by their hash."""
    rows = encoded(root)
    names = sorted(rows, key=lambda name: (-rows[name][1], int(row_hashes([name])[0])))
    kept: list[str] = []
    for name in names:
        if not kept or max(float(rows[name][0] @ rows[other][0]) for other in kept) < similarity:
            kept.append(name)
    return set(kept)


def published(root: Path) -> set[str]:
    catalog = Catalog(open_store(str(root)), "test")
    entry = catalog.alias("live")
    assert entry is not None
    folder = root / "indexes/test/versions" / entry.version
    return {
        name
        for path in sorted(folder.glob("*.ids.arrow"))
        for name in pa.ipc.open_file(str(path)).read_all().column("id").to_pylist()
    }


def test_what_stays_is_what_a_choice_one_by_one_leaves(made: Workspace) -> None:
    stays = published(made.root)
    assert stays == expected(made.root, SIMILARITY) and 0 < len(stays) < len(encoded(made.root))
    rows = encoded(made.root)
    near = np.stack([rows[name][0] for name in sorted(stays)])
    products = near @ near.T - np.eye(len(near), dtype=np.float32)
    assert products.max() < SIMILARITY


def test_every_passage_that_went_is_linked_to_a_twin_that_stays(made: Workspace) -> None:
    stays, rows = published(made.root), encoded(made.root)
    with open_index(str(made.root), "live") as index:
        links = index.duplicates(sorted(stays)).to_pylist()
    by_meaning = {link["id"]: link for link in links if link["similarity"] is not None}
    same_text = {link["id"]: link for link in links if link["similarity"] is None}
    assert set(by_meaning) == set(rows) - stays
    for link in by_meaning.values():
        assert link["represented_by"] in stays
        measured = float(rows[link["id"]][0] @ rows[link["represented_by"]][0])
        assert link["similarity"] == pytest.approx(measured, abs=1e-3) and link["similarity"] >= np.float32(SIMILARITY)
    assert {name.partition("#")[0] for name in same_text} >= {"f0", "f1", "f2"}
    assert {link["represented_by"] for link in same_text.values()} <= stays


def test_a_table_names_what_went_and_what_stays_for_it(made: Workspace) -> None:
    tables = [pa.parquet.read_table(path) for path in made.root.glob("stages/kept/*/removed-*.parquet")]
    found = {row["removed_id"]: row for row in pa.concat_tables(tables).to_pylist()}
    with open_index(str(made.root), "live") as index:
        links = index.duplicates(sorted(published(made.root))).to_pylist()
    by_meaning = {link["id"]: link for link in links if link["similarity"] is not None}
    assert set(found) == set(by_meaning) == set(encoded(made.root)) - published(made.root)
    for name, link in by_meaning.items():
        assert found[name]["kept_id"] == link["represented_by"] and found[name]["similarity"] == link["similarity"]


def test_a_file_of_twins_alone_leaves_its_links(workspace: Workspace) -> None:
    texts = [json.loads(line) for line in (workspace.corpus / "one.jsonl").read_text().splitlines()]
    twins = [{"id": f"g{row['id']}", "text": row["text"].rstrip(".") + " .", "topic": "twin"} for row in texts[:12]]
    copies = [{**twins[0], "id": "h0"}]
    workspace.write("twins.jsonl", twins)
    workspace.write("zcopies.jsonl", copies)
    run(workspace, keep="column:topic asc")  # "t..." before "twin"
    stays = published(workspace.root)
    with open_index(str(workspace.root), "live") as index:
        linked = {link["id"]: link for link in index.duplicates(sorted(stays)).to_pylist()}
    gone = set(encoded(workspace.root)) - stays
    assert {name for name in gone if name.startswith("g")} and gone <= set(linked)
    assert linked["h0#0"]["similarity"] is None and linked["h0#0"]["represented_by"] in stays


@pytest.mark.slow
def test_an_interrupted_stage_is_made_again(workspace: Workspace) -> None:
    (record,) = workspace.root.glob("stages/kept/*/kept.json")
    kept = record.parent.name
    before = published(workspace.root)
    shutil.rmtree(workspace.root / "stages/embeddings" / kept)  # as clean-up that was cut short leaves it
    report = run(workspace, similarity=SIMILARITY)
    assert report.status.value == "published" and published(workspace.root) == before


def test_the_record_and_the_ledger_say_what_went(made: Workspace) -> None:
    (path,) = made.root.glob("stages/kept/*/kept.json")
    record = json.loads(path.read_text())
    rows, stays = encoded(made.root), published(made.root)
    assert record["removed"] == len(rows) - len(stays) and sum(record["fragments"].values()) == len(stays)
    assert record["join"] == "exact" and record["pair_recall"]["recall"] == 1.0 and record["pairs"] >= record["removed"]
    assert sum(record["histogram"]["pairs"]) == record["pairs"]
    ledger = read_ledger(made.root)["kept"]
    assert ledger["dropped"] == {"duplicate_meaning": record["removed"]} and ledger["rows_in"] == len(rows)


@pytest.mark.slow
def test_a_text_without_a_vector_stops_nothing(workspace: Workspace, tmp_path: Path) -> None:
    model = refusing_model(tmp_path / "model", "harbour")
    embedding = {"model": str(model), "trust_remote_code": True, "precision": "float32", "workers": {"count": 1}}
    changes = {"embedding": embedding, "gate": {"recall": 1.0, "max_dropped_fraction": 0.5}}
    workspace.write("refused.jsonl", [{"id": "refused", "text": "The harbour is refused.", "topic": "x"}])
    for similarity in (SIMILARITY, 0.97):  # decided, and decided again from stored pairs
        report = workspace.pipeline(deduplicate={**RULE, "similarity": similarity}, **changes).run()
        assert report is not None and report.status.value == "published"
        ledger = read_ledger(workspace.root)
        assert ledger["embeddings"]["dropped"] == {"encoder_error": 1}
        kept = ledger["kept"]
        assert kept["rows_in"] == ledger["embeddings"]["rows_out"] == len(encoded(workspace.root))
        assert (
            kept["rows_out"] == len(published(workspace.root)) == kept["rows_in"] - kept["dropped"]["duplicate_meaning"]
        )
    workspace.write("more.jsonl", [{"id": "more", "text": "A new text about a new thing.", "topic": "x"}])
    report = workspace.pipeline(deduplicate={**RULE, "similarity": 0.97}, **changes).run()  # builds upon the last one
    assert report is not None and report.status.value == "published" and "more#0" in published(workspace.root)


def refusing_model(folder: Path, word: str) -> Path:
    """The model, which raises for texts that have a word."""
    source = resolve_model(MODEL)
    shutil.copytree(source, folder, copy_function=os.symlink)
    token = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id(word)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").unlink()
    modules.append({"idx": 9, "name": "9", "path": "9_Refusing", "type": "refusing.Refusing"})
    (folder / "9_Refusing").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "refusing.py").write_text(REFUSING.format(token=token))
    return folder


def test_another_threshold_joins_and_encodes_nothing_again(workspace: Workspace) -> None:
    pairs = {path: path.stat().st_mtime_ns for path in workspace.root.glob("stages/pairs/*/*")}
    for folder in (*workspace.root.glob("stages/replicas/*"), *workspace.root.glob("stages/centroids/*")):
        shutil.rmtree(folder)  # clean-up takes them
    before = workspace.pipeline(deduplicate={**RULE, "similarity": 0.97}).plan()
    assert next(stage for stage in before.stages if stage.name == "kept").why == "to decide again by stored pairs"
    report = run(workspace, similarity=0.97)
    assert {path: path.stat().st_mtime_ns for path in workspace.root.glob("stages/pairs/*/*")} == pairs and pairs
    assert published(workspace.root) == expected(workspace.root, 0.97)
    assert next(entry for entry in report.entries if entry.stage == "embeddings").encoded == 0
    assert not list(workspace.root.glob("stages/replicas/*/*")) and not list(
        workspace.root.glob("stages/centroids/*/*")
    )
    plan = workspace.pipeline(deduplicate={**RULE, "similarity": 0.97}).plan()
    assert plan.up_to_date and [stage.name for stage in plan.stages].count("kept") == 1


@pytest.mark.parametrize(
    "rule", [{"keep": "column:topic desc"}, {"keep": "first"}, {"keep": "densest"}, {"join": "cluster"}]
)
def test_other_rules_leave_no_two_rows_that_are_similar(workspace: Workspace, rule: dict[str, Any]) -> None:
    run(workspace, **rule)
    rows, stays = encoded(workspace.root), published(workspace.root)
    near = np.stack([rows[name][0] for name in sorted(stays)])
    assert (near @ near.T - np.eye(len(near), dtype=np.float32)).max() < SIMILARITY
    for gone in set(rows) - stays:
        assert (near @ rows[gone][0]).max() >= SIMILARITY - 1e-6
    if rule.get("keep") == "column:topic desc":
        assert not {name for name in set(rows) - stays if name.startswith("d") and f"e{name[1:]}" in stays}


def test_the_curve_of_thresholds_is_what_runs_remove(workspace: Workspace, tmp_path: Path) -> None:
    path, drawn, page = workspace.file(deduplicate=RULE), tmp_path / "curve.svg", tmp_path / "pairs.html"
    done = CliRunner().invoke(app, ["dedup-curve", str(path), "--plot", str(drawn), "--page", str(page), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["join"] == "exact" and record["pair_recall"]["recall"] == 1.0 and record["pair_recall"]["pairs"] > 0
    rows = encoded(workspace.root)
    removed = {point["similarity"]: point["removed"] for point in record["points"]}
    assert removed[SIMILARITY] == len(rows) - len(published(workspace.root))
    for similarity in (0.85, 0.97):
        assert removed[similarity] == len(rows) - len(expected(workspace.root, similarity))
    counts = [point["removed"] for point in record["points"]]
    assert counts == sorted(counts, reverse=True) and record["rows"] == len(rows)
    text = drawn.read_text()
    assert text.startswith("<svg") and f"{SIMILARITY:g}: {removed[SIMILARITY]}" in text
    examples = record["examples"]
    assert examples and all(abs(pair["similarity"] - SIMILARITY) <= 0.02 for pair in examples)
    for pair in examples:
        near = float(rows[pair["left"]["id"]][0] @ rows[pair["right"]["id"]][0])
        assert pair["similarity"] == pytest.approx(near, abs=1e-3)
    assert page.read_text().count("<tr") == len(examples) + 1 and escape(examples[0]["left"]["id"]) in page.read_text()
    shown = CliRunner().invoke(app, ["dedup-curve", str(path)])
    assert shown.exit_code == 0 and "in the file" in shown.stdout and f"{removed[SIMILARITY]:,}" in shown.stdout
    assert "Found by join exact: 1.0000 of" in shown.stdout
    other = CliRunner().invoke(app, ["dedup-curve", str(workspace.file(deduplicate={"type": "exact"}))])
    assert isinstance(other.exception, PipelineFileInvalid) and "must be semantic" in str(other.exception)


def answers(root: Path, stays: set[str], query: np.ndarray, k: int) -> list[str]:
    """The k nearest of the passages that stay, most similar first."""
    rows = encoded(root)
    names = sorted(stays, key=lambda name: (-round(float(rows[name][0] @ query), 6), name))
    return names[:k]


@pytest.mark.parametrize("judged", [True, False])
def test_the_curve_says_what_thresholds_do_to_answers(workspace: Workspace, tmp_path: Path, judged: bool) -> None:
    rows = encoded(workspace.root)
    texts = {
        row["id"]: row["text"] for row in map(json.loads, (workspace.corpus / "two.jsonl").read_text().split("\n")[:-1])
    }
    # Reworded texts so short that they are one passage: its vector is that of the query. The text as it was may go.
    chosen = [name for name in sorted(texts) if name.startswith("e") and len(texts[name]) < 180][:12]
    asked = {f"q{name}": texts[name] for name in chosen}
    queries, relevance = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text("\n".join(json.dumps({"id": name, "text": text}) for name, text in asked.items()))
    relevance.write_text("".join(f"q{name}\td{name[1:]}\t1\n" for name in chosen[:10]))
    evaluate = {"queries": str(queries), "k": 3} | ({"relevance": str(relevance)} if judged else {})
    drawn, page = tmp_path / "curve.svg", tmp_path / "pairs.html"
    path = workspace.file(deduplicate=RULE, evaluate=evaluate)
    done = CliRunner().invoke(app, ["dedup-curve", str(path), "--plot", str(drawn), "--page", str(page), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.strip().splitlines()[-1])
    quality, points = record["quality"], {point["similarity"]: point for point in record["points"]}
    assert quality["k"] == 3 and quality["queries"] == (10 if judged else 12)
    assert quality["relevant"] == ("judged" if judged else "nearest")
    assert points[1.0]["recall_represented"] == quality["before"]["recall"] == 1.0
    for similarity in (0.85, SIMILARITY):
        stays = expected(workspace.root, similarity)
        found, credited = [], []
        for document in chosen[: quality["queries"]]:
            vector = rows[f"{document}#0"][0]
            truth = [f"d{document[1:]}#0"] if judged else answers(workspace.root, set(rows), vector, 3)
            top = answers(workspace.root, stays, vector, 3)
            for name in truth:
                twins = [other for other in top if float(rows[name][0] @ rows[other][0]) >= similarity]
                found.append(name in top)
                credited.append(name in top or bool(twins))
        assert points[similarity]["recall"] == pytest.approx(np.mean(found), abs=1e-6) and not all(found)
        assert points[similarity]["recall"] < points[similarity]["recall_represented"] <= np.mean(credited) + 1e-6
    assert ("ndcg" in points[SIMILARITY]) == judged
    if judged:
        gains = []
        for document in chosen[:10]:
            top = answers(workspace.root, set(rows), rows[f"{document}#0"][0], 15)
            documents = list(dict.fromkeys(name.partition("#")[0] for name in top))[:3]
            gains.append(1 / np.log2(documents.index(f"d{document[1:]}") + 2))
        assert quality["before"]["ndcg"] == pytest.approx(np.mean(gains), abs=1e-6)
        assert points[0.85]["ndcg"] < points[0.85]["ndcg_represented"] <= 1.0
    assert drawn.read_text().count("<polyline") == (5 if judged else 3)
    assert page.read_text().count("<tr") == len(record["examples"]) + 2 + len(points)
    shown = CliRunner().invoke(app, ["dedup-curve", str(path)])
    assert "represented" in shown.stdout and f"{points[0.85]['recall']:.4f}" in shown.stdout


def test_judgements_without_a_relevant_document_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    queries, relevance = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text(json.dumps({"id": "q", "text": "an array"}))
    relevance.write_text("q\td000\t0\n")
    evaluate = {"queries": str(queries), "relevance": str(relevance)}
    with pytest.raises(QueriesInvalid) as refused:
        workspace.pipeline(deduplicate=RULE, evaluate=evaluate).dedup_curve()
    words = f"evaluate.relevance ({relevance}) must judge a document relevant (above 0) for some of the 1 queries"
    assert words in str(refused.value)


class Warned(SilentReporter):
    """Notes warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_every_run_says_that_another_join_took_the_place_of_the_one_asked_for(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.pipelines.deduplicating.JOIN_MEMORY_BYTES", 1 << 18)
    monkeypatch.setattr("penstock.cluster.jobs.similarity.MOST_COPIES", 0.5)
    for threshold in (0.95, 0.97, 0.95):
        pipeline, reporter = workspace.pipeline(deduplicate={**RULE, "similarity": threshold, "floor": 0.9}), Warned()
        pipeline.run(reporter)
        (told,) = [text for text in reporter.warnings if "the graph join takes its place" in text]
        assert "an exact join would store" in told
    records = [json.loads(path.read_text()) for path in workspace.root.glob("stages/kept/*/kept.json")]
    done = [record for record in records if record["exact_factor"] is not None]
    assert len(done) == 2 and all(record["parts"] > 1 for record in done)
    for record in done:
        assert record["predicted_factor"] == pytest.approx(1 + record["copies"] / record["rows"], abs=1e-3)
        assert 1 < record["predicted_factor"] <= 3 and record["exact_factor"] > 1 and record["index_cells"] is None
    reporter = Warned()
    assert pipeline.dedup_curve(reporter)["join"] == "graph" and len(reporter.warnings) == 1


EMBEDDED = Embedded((), "e", {"passages": "embeddings"}, 100)


@pytest.mark.parametrize("join", list(Join))
def test_pairs_are_named_by_the_cells_that_decide_which_are_found(
    made: Workspace, monkeypatch: pytest.MonkeyPatch, join: Join
) -> None:
    monkeypatch.setattr("penstock.pipelines.shared_centroids.FEWEST_ROWS_PER_SHARED_CELL", 5)
    rule, asked = {**RULE, "join": join.value}, {"family": "ivf", "nlist": 6, "codec": "sq8", "recall": 0.5}

    def planned(**index: Any) -> Deduplicated:  # noqa: ANN401
        pipeline = made.pipeline(deduplicate=rule, index={**asked, **index}, gate={"recall": 0.5})
        return Deduplicated.of(pipeline.plan().resolved, EMBEDDED)

    first = planned()
    others = [planned(nlist=5), planned(training_rows=50), planned(nlist=30)]  # the last is too many to share
    assert {first.index_cells, *(other.index_cells for other in others)} == (
        {None} if join is Join.EXACT else {Clustering(6, 100), Clustering(5, 100), Clustering(6, 50), None}
    )
    names = {first.pairs, *(other.pairs for other in others)}
    assert len(names) == (1 if join is Join.EXACT else 4) and planned(codec="none").pairs == first.pairs


def test_where_nothing_is_open_nothing_is_clustered(made: Workspace, ray_session: Session) -> None:
    resolved, store = made.pipeline(deduplicate={**RULE, "join": "cluster"}).plan().resolved, open_store(str(made.root))
    doing = Deduplicating(ray_session, store, SilentReporter(), resolved, EMBEDDED)
    planned = doing._decided_join(Deduplicated.of(resolved, EMBEDDED), 100, 0)
    assert (planned.job.parts, planned.factor, planned.clustering) == (1, 1.0, None)


def test_the_index_has_the_centroids_that_deduplication_found(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.pipelines.shared_centroids.FEWEST_ROWS_PER_SHARED_CELL", 5)
    monkeypatch.setattr("penstock.pipelines.shared_centroids.MOST_REMOVED_SHARE", 0.9)
    store, catalog = open_store(str(workspace.root)), Catalog(open_store(str(workspace.root)), "test")

    def stages(**index: Any) -> dict[str, str]:  # noqa: ANN401
        rule = {**RULE, "join": "cluster"}
        asked = {"family": "ivf", "codec": "sq8", "nlist": 6, "recall": 0.5, **index}
        pipeline = workspace.pipeline(deduplicate=rule, index=asked, gate={"recall": 0.5})
        report = pipeline.run()
        assert report is not None and pipeline.plan().version == report.version
        found: dict[str, str] = catalog.manifest(report.version)["lineage"]["stages"]
        trained = faiss.deserialize_index(np.frombuffer(read_trained(store, found["training"]), np.uint8))
        shared = report.to_json()["shared_centroids"]
        assert shared == ("centroids" in found)
        assert not shared or np.array_equal(index_centroids(trained), read_centroids(store, found["centroids"]))
        return found

    first = stages()
    assert json.loads((workspace.root / f"stages/kept/{first['kept']}/kept.json").read_text())["centroids"] == {
        "cells": 6,
        "training_rows": len(encoded(workspace.root)),
    }
    joined = {path: path.stat().st_mtime_ns for path in workspace.root.glob("stages/pairs/*/*")}
    shutil.rmtree(workspace.root / "stages/centroids" / first["centroids"])  # which are found again
    coded = stages(codec="none")
    assert coded["centroids"] == first["centroids"] and coded["training"] != first["training"]
    other = stages(nlist=5)
    assert "centroids" not in other and other["kept"] == first["kept"]
    monkeypatch.setattr("penstock.pipelines.shared_centroids.MOST_REMOVED_SHARE", 0.01)
    assert "centroids" not in stages()
    monkeypatch.setattr("penstock.pipelines.shared_centroids.MOST_REMOVED_SHARE", 0.9)
    assert {path: path.stat().st_mtime_ns for path in workspace.root.glob("stages/pairs/*/*")} == joined
    workspace.write("more.jsonl", [{"id": "more", "text": "A new text about a new thing.", "topic": "x"}])
    later = stages()
    assert later["centroids"] != first["centroids"] and later["training"] != first["training"]


@pytest.mark.slow
def test_cleaning_up_leaves_what_other_thresholds_need(workspace: Workspace) -> None:
    for path in workspace.root.rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))
    collect_garbage(open_store(str(workspace.root)), None, 1.0, dry_run=False)
    report = run(workspace, similarity=0.96)
    assert next(entry for entry in report.entries if entry.stage == "embeddings").encoded == 0
    assert published(workspace.root) == expected(workspace.root, 0.96)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"type": "semantic", "similarity": 1.5}, "similarity"),
        ({"type": "semantic", "similarity": 0.7}, "must be at least 0.8 for join exact"),
        ({"type": "semantic", "keep": "best"}, "keep (best) must be one of longest"),
        ({"type": "semantic", "keep": "column:year"}, "must name a column of documents.keep, which has: topic"),
        ({"type": "semantic", "similarity": 0.9, "floor": 0.95}, "floor (0.95) must be at most similarity (0.9)"),
        ({"type": "exact", "similarity": 0.9}, "similarity belongs to type semantic"),
    ],
)
def test_what_cannot_be_is_refused(made: Workspace, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineFileInvalid) as refused:
        Pipeline.parse(yaml.safe_dump({**yaml.safe_load(made.yaml()), "deduplicate": rule})).plan()
    assert message in str(refused.value)
