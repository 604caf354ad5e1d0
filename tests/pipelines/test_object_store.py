"""The same file against an S3 server: the same versions, through faults, and one publisher at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.catalog import Catalog
from penstock.cluster.storage import open_store

from ..conftest import S3Server
from .conftest import MODEL, Workspace, penstock

PIPELINE = f"""
name: test
root: ${{PENSTOCK_TEST_ROOT}}
documents: {{type: docstrings, packages: [s3fs], fragment_bytes: 100000}}
passages: {{type: tokens, tokens: 64, overlap: 8}}
embedding: {{model: {MODEL}, precision: float32, batch_tokens: 2048, workers: {{count: 1}}}}
index: {{family: hnsw, shards: 2, rerank: true, recall: 0.9}}
evaluate: {{queries: 20}}
gate: {{recall: 0.9}}
publish: {{alias: live}}
"""


@pytest.fixture(scope="module")
def pipeline_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("object-store") / "pipeline.yaml"
    path.write_text(PIPELINE, "utf-8")
    return path


@pytest.fixture(scope="module")
def local_manifest(pipeline_file: Path) -> dict[str, Any]:
    """The manifest of a run on local disk."""
    root = pipeline_file.parent / "root"
    done = penstock("run", str(pipeline_file), environment={"PENSTOCK_TEST_ROOT": str(root)})
    assert done.returncode == 0, done.stderr
    return live_manifest(str(root))


def live_manifest(root: str) -> dict[str, Any]:
    catalog = Catalog(open_store(root), "test")
    entry = catalog.alias("live")
    assert entry is not None
    return catalog.manifest(entry.version)


def files_of(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    return [(file["name"], file["sha256"]) for shard in manifest["shards"] for file in shard["files"]]


def test_same_version_and_files_as_on_local_disk(
    s3_server: S3Server, pipeline_file: Path, local_manifest: dict[str, Any], tmp_path: Path
) -> None:
    root = f"s3://{s3_server.bucket()}/penstock"
    environment = {"PENSTOCK_TEST_ROOT": root, "PENSTOCK_CACHE": str(tmp_path / "cache")}
    done = penstock("run", str(pipeline_file), environment=environment)
    assert done.returncode == 0, done.stderr
    manifest = live_manifest(root)
    assert manifest["version"] == local_manifest["version"]
    assert files_of(manifest) == files_of(local_manifest)
    again = penstock("run", str(pipeline_file), environment=environment)
    assert again.returncode == 0 and "Nothing to do" in again.stdout
    found = penstock("search", "live", "open a file on a bucket", "--root", root, "--json", environment=environment)
    assert found.returncode == 0, found.stderr
    answers = json.loads(found.stdout)["results"][0]["answers"]
    assert len(answers) == 5 and answers[0]["module"].startswith("s3fs")


@pytest.mark.slow
def test_faults_of_the_store_change_nothing(
    s3_server: S3Server, pipeline_file: Path, local_manifest: dict[str, Any]
) -> None:
    root = f"s3://{s3_server.bucket()}/penstock"
    s3_server.faults(
        [
            {"do": "503", "method": "PUT", "match": "passages", "nth": 2, "count": 2},
            {"do": "500", "method": "GET", "match": "passages", "nth": 2, "count": 1},
            {"do": "drop", "method": "PUT", "match": "embeddings", "nth": 2, "count": 1},
            {"do": "drop", "method": "GET", "match": "embeddings", "nth": 3, "count": 1},
            {"do": "lost_reply", "method": "PUT", "match": "leases", "nth": 1, "count": 1},
            {"do": "lost_reply", "method": "PUT", "match": "manifest", "nth": 1, "count": 1},
            {"do": "lost_reply", "method": "PUT", "match": "aliases", "nth": 1, "count": 1},
            {"do": "503", "method": "PUT", "match": "shard-", "nth": 1, "count": 2},
        ]
    )
    try:
        done = penstock("run", str(pipeline_file), environment={"PENSTOCK_TEST_ROOT": root})
        log = s3_server.log()
    finally:
        s3_server.faults([])
    assert done.returncode == 0, done.stderr
    injected = [entry for entry in log if entry["action"] and root.split("/")[2] in entry["target"]]
    assert len(injected) >= 9
    manifest = live_manifest(root)
    assert manifest["version"] == local_manifest["version"]
    assert files_of(manifest) == files_of(local_manifest)
    assert len(Catalog(open_store(root), "test").history("live")) == 1


def test_of_two_concurrent_runs_one_publishes_and_the_other_says_who(s3_server: S3Server, pipeline_file: Path) -> None:
    root = f"s3://{s3_server.bucket()}/penstock"
    command = [sys.executable, "-m", "penstock.pipelines.cli", "run", str(pipeline_file)]
    environment = {**os.environ, "PENSTOCK_TEST_ROOT": root}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [(process.communicate(timeout=200), process.returncode) for process in both]
    codes = sorted(code for _, code in ended)
    assert codes == [0, 4], [output for output, _ in ended]
    refused = next(output[1] for output, code in ended if code == 4)
    winner = live_manifest(root)["run_id"]
    assert winner in refused


def test_store_without_preconditions_is_refused(s3_server: S3Server, workspace: Workspace) -> None:
    s3_server.faults([{"do": "ignore_preconditions", "method": "PUT", "count": 1_000_000}])
    try:
        done = penstock("run", str(workspace.file(root=f"s3://{s3_server.bucket()}/penstock")))
    finally:
        s3_server.faults([])
    assert done.returncode == 2
    assert "If-None-Match" in done.stderr and "Traceback" not in done.stderr
