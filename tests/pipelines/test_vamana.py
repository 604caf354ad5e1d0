"""Indexes of svs through the whole pipeline: built, measured, published, opened and searched like those of faiss."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from penstock.cluster.node import CACHE_VARIABLE
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators import vamana
from penstock.operators.searching import normalize, open_vectors
from penstock.operators.vamana import svs_version
from penstock.pipelines import open_index
from penstock.pipelines.cli import app
from penstock.pipelines.loading import PipelineFileInvalid

from ..conftest import S3Server
from .conftest import Workspace

INDEX = {"family": "vamana", "degree": 16, "shards": 2, "recall": 0.95}


@dataclass(frozen=True)
class Library:
    """A published version, and its vectors as they are stored for re-ranking."""

    workspace: Workspace
    vectors: dict[str, list[float]]
    topics: dict[str, str]
    manifest: dict[str, Any]

    @property
    def queries(self) -> np.ndarray:
        return normalize(np.array(list(self.vectors.values())[:12]))

    def nearest(self, k: int, topic: str | None = None) -> np.ndarray:
        """Similarities float32 (12, k) of the truly nearest vectors."""
        names = [name for name in self.vectors if topic in (None, self.topics[name.partition("#")[0]])]
        near = self.queries @ np.array([self.vectors[name] for name in names], np.float32).T
        return -np.sort(-near, axis=1)[:, :k]


def stored_vectors(folder: Path) -> dict[str, list[float]]:
    """Passage id → vector of all shards of a version."""
    vectors: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*.vectors.arrow")):
        ids = pa.ipc.open_file(path.with_name(path.name.replace("vectors", "ids"))).read_all().column("id").to_pylist()
        vectors |= dict(zip(ids, open_vectors(path).take(np.arange(len(ids))).tolist(), strict=True))
    return vectors


@pytest.fixture(scope="module")
def library(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Library:
    if svs_version() is None:
        pytest.skip("svs is not installed")
    workspace = Workspace(tmp_path_factory.mktemp("vamana"))
    documents = [{"id": f"d{n:02d}", "text": text, "topic": "abc"[n % 3]} for n, text in enumerate(real_texts[:60])]
    workspace.write("all.jsonl", documents)
    report = workspace.pipeline(index={**INDEX, "rerank": True}, gate={"recall": 0.9}).run()
    assert report is not None and report.manifest is not None
    vectors = stored_vectors(workspace.root / "indexes/test/versions" / str(report.version))
    assert len(vectors) == report.manifest["rows"]
    return Library(workspace, vectors, {one["id"]: one["topic"] for one in documents}, report.manifest)


def test_a_version_says_how_svs_built_it(library: Library) -> None:
    built = {"family": "vamana", "codec": "none", "factory": "SVSVamana16", "dimension": 384, "ef_construction": 200}
    assert library.manifest["svs"] == {**built, "version": svs_version()} and "faiss" not in library.manifest
    names = [file["name"] for shard in library.manifest["shards"] for file in shard["files"]]
    assert "shard-00001.svs.tar" in names and not [name for name in names if name.endswith(".faiss")]
    assert library.manifest["bytes_per_vector"] > 4 * library.manifest["dimension"]
    point = library.manifest["operating_point"]
    assert point["recall"] >= 0.95 and 10 <= point["parameters"]["ef_search"] <= 64


def test_the_reader_finds_the_nearest_and_those_that_a_filter_allows(library: Library) -> None:
    with open_index(str(library.workspace.root), "test/live") as index:
        everything = index.search(library.queries, 5)
        some = index.search(library.queries, 5, where={"topic": "b"}, rows=True)
    assert np.allclose(everything.similarities, library.nearest(5), atol=1e-3)
    assert np.allclose(some.similarities, library.nearest(5, "b"), atol=1e-3)
    assert some.rows is not None and set(some.rows[0].column("topic").to_pylist()) == {"b"}


def test_shards_on_object_storage_are_unpacked_within_the_cache_and_gone_afterwards(
    library: Library, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    store = open_store(f"s3://{s3_server.bucket()}/penstock")
    for path in (library.workspace.root / "indexes").rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(library.workspace.root).as_posix())
    with open_index(store.url, "test/live") as index:
        found = index.search(library.queries, 5)
    assert np.allclose(found.similarities, library.nearest(5), atol=1e-3)
    assert not list((tmp_path / "cache").glob("penstock-vamana-*"))


def test_the_same_run_builds_nothing_and_another_release_of_svs_builds_anew(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"index": {**INDEX, "rerank": True}, "gate": {"recall": 0.9}}
    assert library.workspace.pipeline(**settings).plan().up_to_date
    monkeypatch.setattr("penstock.pipelines.planning.svs_version", lambda: "99.0")
    training = next(stage for stage in library.workspace.pipeline(**settings).plan().stages if stage.name == "training")
    assert (training.todo, training.why) == (1, f"changed parameter: svs {svs_version()} → 99.0")


def test_another_degree_is_another_index(library: Library) -> None:
    plans = [
        library.workspace.pipeline(index={**INDEX, **change}).plan()
        for change in ({}, {"degree": 8}, {"ef_construction": 50}, {"codec": "fp16"})
    ]
    assert len({plan.version for plan in plans}) == len(plans)


def test_a_factory_string_names_it_too(library: Library) -> None:
    plan = library.workspace.pipeline(index={"factory": "SVSVamana16", "shards": 2, "recall": 0.95}).plan()
    assert plan.resolved.pipeline.index.family == "vamana" and plan.version is not None


def test_without_svs_planning_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vamana, "PACKAGE", "a-package-that-is-not-installed")
    workspace = Workspace(tmp_path)
    workspace.write("all.jsonl", [{"id": "d", "text": "A text.", "topic": "a"}])
    message = r"index: family \(vamana\) needs the package scalable-vs, .* pip install 'penstock\[svs\]'"
    with pytest.raises(PipelineFileInvalid, match=message):
        workspace.pipeline(index=INDEX).plan()
    validated = CliRunner().invoke(app, ["validate", str(workspace.file(index=INDEX))])
    assert "penstock[svs]" in str(validated.exception)


def test_without_svs_the_reader_says_what_to_install(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vamana, "PACKAGE", "a-package-that-is-not-installed")
    with pytest.raises(ValueError, match=r"family \(vamana\) needs the package scalable-vs"):
        open_index(str(library.workspace.root), "test/live")


def test_compressed_codes_are_refused_on_another_cpu_before_anything_is_done(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vamana, "CPU_FACTS", tmp_path / "none")
    with pytest.raises(PipelineFileInvalid, match=r"index: code \(LVQ4x8\) .* needs an Intel CPU, .* got unknown"):
        library.workspace.pipeline(index={**INDEX, "codec": "lvq4x8"}).plan()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"family": "hnsw", "degree": 8}, r"degree \(8\) belongs to vamana, but family is hnsw"),
        ({"family": "vamana", "hnsw_m": 8}, r"hnsw_m \(8\) belongs to hnsw, but family is vamana"),
        ({"family": "vamana", "codec": "sq8"}, r"codec \(sq8\) is not built with family vamana"),
        ({"family": "ivf", "codec": "lvq8"}, r"codec \(lvq8\) is not built with family ivf"),
        (
            {"family": "vamana", "codec": "lvq8", "leanvec_dimension": 8},
            r"leanvec_dimension \(8\) belongs to leanvec4x8 and leanvec8x8, but family is vamana and codec is lvq8",
        ),
    ],
)
def test_options_of_other_families_are_refused(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineFileInvalid, match=message):
        Workspace(tmp_path).pipeline(index=index)
