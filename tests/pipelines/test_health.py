"""The health of published spaces, and drift between versions, on indexes that a user made."""

import json
import re
import shutil
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.stored_sample import StoredSampleTask, merge_stored, sample_stored
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.indexing import Metric
from penstock.operators.moments import moments_of
from penstock.operators.space_health import space_health
from penstock.pipelines.cli import EXIT_FAILED, EXIT_INVALID, app, main
from penstock.pipelines.health import HealthCheck
from penstock.pipelines.progress import SilentReporter
from penstock.pipelines.publishing import shards_of
from penstock.pipelines.reader import AliasUnknown
from penstock.pipelines.version_samples import sampled_texts, sampled_vectors

from .conftest import Workspace, published_vectors

SMALL = {"passages": {"type": "whole"}, "embedding__dimension": 32, "index__rerank": True}


@pytest.fixture(scope="module")
def made(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """`live` of a corpus, and `narrow`, whose texts all begin alike, of the same index."""
    workspace = Workspace(tmp_path_factory.mktemp("health"), dict(SMALL))
    documents = [{"id": f"d{row:03d}", "text": text, "topic": "t"} for row, text in enumerate(real_texts[:90])]
    workspace.write("all.jsonl", documents)
    assert workspace.pipeline().run() is not None
    alike = "NumPy array shape dtype axis returns ndarray of floats. " * 3
    workspace.write("all.jsonl", [{**one, "text": alike + str(one["text"])[:40]} for one in documents])
    assert workspace.pipeline(publish__alias="narrow").run() is not None
    return workspace


def version(workspace: Workspace, alias: str) -> str:
    entry = Catalog(open_store(str(workspace.root)), "test").alias(alias)
    assert entry is not None
    return entry.version


def told(*arguments: str) -> Any:  # noqa: ANN401
    return CliRunner().invoke(app, ["health", *arguments])


def test_figures_are_those_of_the_stored_vectors(made: Workspace) -> None:
    vectors = np.array(list(published_vectors(made.root).values()), np.float32)
    found = told("live", "--root", str(made.root), "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout.splitlines()[-1])
    assert record["version"] == version(made, "live") and record["vectors_from"] == "stored vectors (float16)"
    assert record["sample_rows"] == record["rows"] == len(vectors)
    expected = space_health(moments_of(vectors, vectors.mean(axis=0)), vectors, Metric.COSINE).to_json()
    health = record["report"]["health"]
    for name in ("effective_rank", "isotropy", "mean_cosine", "mean_norm"):
        assert health[name] == pytest.approx(expected[name], abs=2e-3), name
    assert health["hubness"] == pytest.approx(expected["hubness"], abs=0.2)


def test_any_version_is_looked_at(made: Workspace) -> None:
    before = version(made, "live")
    found = told("narrow", "--root", str(made.root), "--version", before, "--json")
    assert found.exit_code == 0 and json.loads(found.stdout.splitlines()[-1])["version"] == before
    unknown = told("narrow", "--root", str(made.root), "--version", "0" * 16)
    assert isinstance(unknown.exception, AliasUnknown) and f"version ({'0' * 16}) must be" in str(unknown.exception)


def test_drift_is_an_alarm(made: Workspace, tmp_path: Path) -> None:
    page, before = tmp_path / "health.html", version(made, "live")
    found = told("narrow", "--root", str(made.root), "--against", before, "--page", str(page))
    assert found.exit_code == EXIT_FAILED
    assert f"drift since version {before}: " in found.output and "mean cosine went from" in found.output
    words = page.read_text()
    assert "<script" not in words and words.count("<svg") == 2 and "alarm" in words
    for picture in re.findall(r"<svg.*?</svg>", words, re.DOTALL):
        xml.etree.ElementTree.fromstring(picture)
    same = told("live", "--root", str(made.root), "--against", before)
    assert same.exit_code == 0 and "no figure became worse than is allowed" in same.output


def test_other_spaces_stand_side_by_side(made: Workspace) -> None:
    report = made.pipeline(embedding__dimension=48, publish__alias="wider").run()
    assert report is not None
    found = told("wider", "--root", str(made.root), "--against", version(made, "live"), "--json")
    record = json.loads(found.stdout.splitlines()[-1])
    assert found.exit_code == 0 and record["drift"] == [] and record["alarms"] == []
    assert "the versions are of two models" in record["why"]
    view = told("wider", "--root", str(made.root), "--against", version(made, "live"))
    assert "not compared: the versions are of two models" in view.output


def test_other_prompts_of_documents_stand_side_by_side(made: Workspace, tmp_path: Path) -> None:
    """As the manifest of a run with a prompt would state it."""
    root, before = tmp_path / "root", version(made, "live")
    shutil.copytree(made.root / "indexes", root / "indexes")
    path = root / "indexes/test/versions" / version(made, "narrow") / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"model": manifest["model"] | {"document_prompt": "passage: "}}))
    found = told("narrow", "--root", str(root), "--against", before)
    assert found.exit_code == 0
    assert "not compared: the versions' documents have two prompts, '' and 'passage: '" in found.output


def test_without_stored_vectors_embeddings_are_looked_at_while_they_are_there(made: Workspace) -> None:
    assert made.pipeline(index__rerank=False, publish__alias="bare").run() is not None
    catalog = Catalog(open_store(str(made.root)), "test")
    with Session() as session:
        check = HealthCheck(session, SilentReporter(), catalog)
        bare, stored = (check.report(version(made, alias)) for alias in ("bare", "narrow"))
        assert bare["vectors_from"] == "embeddings that the version was built from"
        health = bare["report"]["health"]
        assert health["effective_rank"] == pytest.approx(stored["report"]["health"]["effective_rank"], rel=1e-4)
        for path in made.root.glob("stages/embeddings/*/*.parquet"):
            path.unlink()
        with pytest.raises(
            ValueError, match=r"version \([0-9a-f]{16}\) must have vectors to report on: it stores none"
        ):
            check.report(version(made, "bare"))


def test_samples_are_bounded_and_nested(made: Workspace) -> None:
    store = open_store(str(made.root))
    catalog = Catalog(store, "test")
    manifest = catalog.manifest(version(made, "live"))
    shards = shards_of(manifest, catalog.version_folder(manifest["version"]))

    def sample(wanted: int, seed: int) -> np.ndarray:
        tasks = [StoredSampleTask(store.url, shard, manifest["rows"], wanted, seed) for shard in shards]
        return merge_stored([sample_stored(task) for task in tasks], wanted, seed)

    assert sample(20, 7).shape == (20, 32)
    assert np.array_equal(sample(20, 7), sample(40, 7)[:20])
    assert not np.array_equal(sample(20, 7), sample(20, 8))


def test_samples_hold_texts_and_vectors_of_all_files_in_proportion(made: Workspace, real_texts: list[str]) -> None:
    """Rows of a shard lie file after file: its first ones are of one topic where each file has its own."""
    workspace = Workspace(made.folder / "topics", dict(SMALL))
    for file in range(3):
        texts = [f"Topic {file}: {text}" for text in real_texts[file * 30 : file * 30 + 30]]
        documents = [{"id": f"{file}-{row}", "text": text, "topic": "t"} for row, text in enumerate(texts)]
        workspace.write(f"{file}.jsonl", documents)
    assert workspace.pipeline().run() is not None
    catalog = Catalog(open_store(str(workspace.root)), "test")
    manifest = catalog.manifest(version(workspace, "live"))
    texts = sampled_texts(catalog, manifest, 30)
    assert len(texts) == 30 and min(Counter(text[:7] for text in texts).values()) >= 4
    vectors, names = sampled_vectors(catalog, manifest, 30), published_vectors(workspace.root)
    ids, known = list(names), np.array(list(names.values()), np.float32)
    nearest = [ids[row] for row in (vectors @ known.T).argmax(axis=1).tolist()]
    assert Counter(name[0] for name in nearest) == Counter(text[6] for text in texts)
    assert len(sampled_vectors(catalog, manifest, 500)) == len(sampled_texts(catalog, manifest, 500)) == 90


def test_a_sample_of_a_large_version_is_taken_by_workers(made: Workspace, ray_session: Session) -> None:
    catalog = Catalog(open_store(str(made.root)), "test")
    record = HealthCheck(ray_session, SilentReporter(), catalog, sample_rows=40).report(version(made, "live"))
    assert record["sample_rows"] == 40 and record["report"]["health"]["rows"] == 40


def test_versions_that_are_none_are_named(made: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # noqa: ANN401
    arguments = ["penstock", "health", "live", "--root", str(made.root), "--against", "0" * 16]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == EXIT_INVALID
    assert f"version ({'0' * 16}) must be a published one of index test" in capsys.readouterr().err
