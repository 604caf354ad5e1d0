"""Family auto with transforms: chosen ones, and given ones behind which it measures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from penstock.operators.searching import SearchParameters
from penstock.pipelines import open_index
from penstock.pipelines.history import Status
from penstock.pipelines.planning import Resolved, choice_path, resolve
from penstock.pipelines.running import Report

from .conftest import Workspace

# A latency keeps so few vectors from being searched exactly without a measurement.
AUTO: dict[str, Any] = {"shards": 2, "recall": 0.9, "latency_ms": 1000.0}
HALF = 192


def folder_of(workspace: Workspace, report: Report) -> Path:
    return workspace.root / "indexes/test/versions" / report.version


def full_vectors(workspace: Workspace) -> dict[str, np.ndarray]:
    """Passage id → embedding, read with pyarrow alone."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in workspace.root.glob("stages/embeddings/*/*.parquet")]
    table = pa.concat_tables(tables)
    vectors = np.array(table.column("embedding").to_pylist(), np.float32)
    return dict(zip(table.column("passage_id").to_pylist(), vectors, strict=True))


def resolved(workspace: Workspace, **index: Any) -> Resolved:  # noqa: ANN401
    pipeline = workspace.pipeline(index={**AUTO, **index})
    return resolve(pipeline.config, pipeline.origin)


@pytest.mark.usefixtures("ray_session")
def test_a_choice_of_fewer_dimensions_is_built_published_and_searched(workspace: Workspace) -> None:
    asked = workspace.pipeline(index=AUTO, gate={"recall": 0.9})
    record = asked.tune()
    (half,) = [trial for trial in record["trials"] if trial.get("reduced")]
    assert half["factory"] == f"PCA{HALF},HNSW16_SQ8" and half["reduced"] == HALF and half["rerank"]
    (path,) = (workspace.root / "tuning").glob("*.json")
    path.write_text(json.dumps(record | {"chosen": half}))
    report = asked.run()
    assert report is not None and report.status is Status.PUBLISHED
    manifest, folder = report.manifest, folder_of(workspace, report)
    assert manifest["transforms"] == [{"type": "pca", "dimension": HALF}]
    assert manifest["faiss"]["dimension"] == HALF and manifest["dimension"] == 2 * HALF and manifest["rerank"]
    shared = folder / "transforms.safetensors"
    files = [shared, *folder.glob("*.faiss")]
    assert len(files) == 3 and report.index_bytes == sum(file.stat().st_size for file in files)
    assert manifest["bytes_per_vector"] == pytest.approx(report.index_bytes / manifest["rows"], abs=0.1)
    again = workspace.pipeline(index=AUTO, gate={"recall": 0.9})
    assert again.plan().up_to_date and again.run() is None
    vectors = full_vectors(workspace)
    names, matrix = list(vectors), np.stack(list(vectors.values()))
    with open_index(str(workspace.root), "live") as index:
        found = index.search(matrix[:20], 5, parameters=SearchParameters(ef_search=200, rerank_factor=16))
    exact = np.argsort(-(matrix[:20] @ matrix.T), axis=1, kind="stable")[:, :5]
    hits = [len({names[row] for row in rows} & set(ids)) / 5 for ids, rows in zip(found.ids, exact, strict=True)]
    assert np.mean(hits) > 0.97
    np.testing.assert_allclose(found.similarities[:, 0], 1.0, atol=2e-3)  # of the original vectors


@pytest.mark.usefixtures("ray_session")
def test_given_transforms_are_measured_and_kept(workspace: Workspace) -> None:
    """Even few vectors are, as behind transforms they would not be searched exactly."""
    index = {"shards": 2, "recall": 0.9, "transforms": [{"type": "pca", "dimension": 16}], "rerank_codec": "lvq8"}
    report = workspace.pipeline(index=index, gate={"recall": 0.5}).run()
    assert report is not None and report.status is Status.PUBLISHED and report.tuning is not None
    trials, chosen = report.tuning["trials"], report.tuning["chosen"]
    assert len(trials) > 8 and not any("reduced" in trial for trial in trials)
    assert {trial["rerank_bytes"] for trial in trials} == {0.0, 384.0 + 4.0}
    assert chosen["rerank"] and chosen["recall"] >= 0.9
    assert report.manifest["transforms"] == [{"type": "pca", "dimension": 16}]
    assert report.manifest["faiss"]["dimension"] == 16 and report.manifest["stored"] == "lvq8"
    assert workspace.pipeline(index=index, gate={"recall": 0.5}).plan().up_to_date


@pytest.mark.usefixtures("ray_session")
def test_too_few_vectors_to_measure_are_compared_behind_the_transforms(tmp_path: Path) -> None:
    few = Workspace(tmp_path)
    few.write(
        "few.jsonl", [{"id": f"d{row}", "text": f"A short text about {row} things.", "topic": "t"} for row in range(5)]
    )
    record = few.pipeline(index={"shards": 1, "recall": 0.9, "transforms": [{"type": "rotation"}]}).tune()
    assert record["why"] == "5 vectors a shard are all compared behind the transforms, and the nearest again as stored"
    assert record["chosen"] == {"family": "flat", "codec": "none", "rerank": True}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_is_fitted_to_queries_is_measured_with_them(workspace: Workspace) -> None:
    asked = workspace.folder / "asked.jsonl"
    texts = ["how to reshape an array", "the mean along an axis", "read numbers from a text file"]
    asked.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    index = {**AUTO, "transforms": [{"type": "sphering", "dimension": 96}], "queries": str(asked)}
    record = workspace.pipeline(index=index).tune()
    assert max(trial["recall"] for trial in record["trials"]) >= 0.9
    before = resolved(workspace, **{name: index[name] for name in ("transforms", "queries")}).choice_fingerprint(1000)
    asked.write_text(json.dumps({"text": "something else"}) + "\n")
    after = resolved(workspace, **{name: index[name] for name in ("transforms", "queries")}).choice_fingerprint(1000)
    assert before != after


def test_what_is_given_is_part_of_a_choice(workspace: Workspace) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"rerank_codec": "lvq8"},
        {"transforms": [{"type": "pca", "dimension": 96}]},
        {"transforms": [{"type": "pca", "dimension": 128}]},
    ]
    paths = {choice_path(resolved(workspace, **index).choice_fingerprint(1000)) for index in variants}
    assert len(paths) == len(variants)
    assert choice_path(resolved(workspace, rerank_codec="float16").choice_fingerprint(1000)) in paths
