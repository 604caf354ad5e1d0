"""Shards that own cells, from the pipeline file to a routed search."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from penstock.cluster.catalog import Catalog
from penstock.cluster.file_cache import DamagedFile
from penstock.cluster.jobs import placement
from penstock.cluster.jobs.cells import CellsJob
from penstock.cluster.jobs.placement import PlacementJob, PlacementTask, place_rows, read_placed
from penstock.cluster.jobs.shard_rows import FragmentPair, RowSource
from penstock.cluster.jobs.transforms import DamagedTransforms
from penstock.cluster.layout import PLACEMENT, fragment_path
from penstock.cluster.node import CACHE_VARIABLE
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.searching import SearchParameters, normalize
from penstock.pipelines import Pipeline, open_index
from penstock.pipelines.cleanup import collect_garbage
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.planning import read_facts

from ..conftest import S3Server
from .conftest import Workspace

CELLS, SHARDS, DIMENSION = 12, 4, 384
INDEX = {"family": "ivf", "nlist": CELLS, "shards": SHARDS, "sharding": "cluster", "recall": 0.9}


@dataclass(frozen=True)
class Published:
    workspace: Workspace
    manifest: dict[str, Any]

    @property
    def root(self) -> Path:
        return self.workspace.root

    @property
    def folder(self) -> Path:
        return self.root / "indexes/test/versions" / str(self.manifest["version"])

    def ids(self, shard: int) -> list[str]:
        with pa.ipc.open_file(str(self.folder / f"shard-{shard:05d}.ids.arrow")) as file:
            return list(file.read_all().column("id").to_pylist())

    def vectors(self) -> dict[str, np.ndarray]:
        """Passage id → stored vector, from the embeddings themselves."""
        tables = [pa.parquet.read_table(path) for path in self.root.glob("stages/embeddings/*/*.parquet")]
        found: dict[str, np.ndarray] = {}
        for table in tables:
            found |= dict(
                zip(table.column("passage_id").to_pylist(), table.column("embedding").to_pylist(), strict=True)
            )
        return {name: np.array(vector, np.float32) for name, vector in found.items()}


def run(workspace: Workspace, **changes: Any) -> Published:  # noqa: ANN401
    report = workspace.pipeline(**changes).run()
    assert report is not None
    return Published(workspace, Catalog(open_store(str(workspace.root)), "test").manifest(report.version))


@pytest.fixture(scope="module")
def published(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Published:
    """A corpus of 200 texts and one that is there twice, in one version; tests that change anything work on copies."""
    settings = {"index": INDEX, "gate": {"recall": 0.85}}
    workspace = Workspace(tmp_path_factory.mktemp("cells"), settings)
    documents = [
        {"id": f"d{number:03d}", "text": text, "topic": f"t{number % 4}"}
        for number, text in enumerate(real_texts[:200])
    ]
    workspace.write("one.jsonl", documents[:90])
    workspace.write("two.jsonl", [*documents[90:], {**documents[10], "id": "z-copy"}])
    return run(workspace)


@pytest.fixture
def copied(published: Published, tmp_path: Path) -> Published:
    shutil.copytree(published.workspace.folder, tmp_path / "copy")
    return Published(Workspace(tmp_path / "copy", published.workspace.settings), published.manifest)


def queries_of(published: Published, count: int = 40) -> np.ndarray:
    vectors = np.stack(list(published.vectors().values()))
    noise = np.random.default_rng(1).standard_normal((count, DIMENSION)) / 60
    return normalize(vectors[np.linspace(0, len(vectors) - 1, count).astype(int)] + noise)


def exact(published: Published, queries: np.ndarray, k: int) -> list[set[str]]:
    vectors = published.vectors()
    names, matrix = list(vectors), np.stack(list(vectors.values()))
    return [{names[row] for row in order[:k]} for order in np.argsort(-(queries @ matrix.T), axis=1, kind="stable")]


def test_each_shard_owns_cells_and_every_row_lies_in_one(published: Published) -> None:
    manifest = published.manifest
    owned = [set(published.ids(shard)) for shard in range(SHARDS)]
    assert sum(map(len, owned)) == len(set().union(*owned)) == manifest["rows"] == len(published.vectors())
    assert manifest["sharding"]["rule"] == "cluster" and manifest["sharding"]["shards"] == SHARDS
    assert {file["name"] for file in manifest["files"]} == {"routing.faiss", "owners.json"}
    searched = [published.folder / "owners.json", *published.folder.glob("*.faiss")]  # shards, and what routes to them
    size_bytes = sum(file.stat().st_size for file in searched)
    assert len(searched) == SHARDS + 2
    assert manifest["bytes_per_vector"] == pytest.approx(size_bytes / manifest["rows"], abs=0.1)
    shares = json.loads((published.folder / "owners.json").read_text())
    assert sorted(set(shares["shard_of_cell"])) == list(range(SHARDS)) and len(shares["shard_of_cell"]) == CELLS
    rows = [shard["rows"] for shard in manifest["shards"]]
    assert max(rows) * SHARDS / sum(rows) == pytest.approx(shares["imbalance"]) and manifest["sharding"][
        "imbalance"
    ] == pytest.approx(shares["imbalance"], abs=1e-4)
    assert 1 <= manifest["evaluation"]["shards_touched"] < SHARDS
    assert manifest["sharding"]["shards_touched"] == manifest["evaluation"]["shards_touched"]


def test_a_search_of_all_cells_is_exact_and_routed_ones_reach_the_recall(published: Published) -> None:
    queries = queries_of(published)
    truth = exact(published, queries, 10)
    with open_index(str(published.root), "live") as index:
        everything = index.search(queries, 10, parameters=SearchParameters(nprobe=CELLS, coverage=1.0))
        assert [set(names) for names in everything.ids] == truth
        default = index.search(queries, 10)
        found = np.mean([len(set(names) & wanted) / 10 for names, wanted in zip(default.ids, truth, strict=True)])
        assert found >= 0.8 and default.coverage.share == 1.0
        near = {name: vector for name, vector in published.vectors().items()}
        assert default.similarities[0, 0] == pytest.approx(float(queries[0] @ near[default.ids[0, 0]]), abs=1e-5)


def test_filters_search_all_shards(published: Published) -> None:
    queries = queries_of(published, 5)
    with open_index(str(published.root), "live") as index:
        found = index.search(queries, 3, where={"topic": "t2"}, rows=True)
        assert found.rows is not None
        assert all(set(rows.column("topic").to_pylist()) == {"t2"} for rows in found.rows)
        assert all(None not in names for names in found.ids.tolist())


def test_a_query_without_direction_is_refused_wherever_it_would_be_sent(copied: Published) -> None:
    nothing = np.full((1, DIMENSION), np.nan, np.float32)
    with open_index(str(copied.root), "live") as index, pytest.raises(ValueError, match="has no direction"):
        index.search(nothing, 3)


def test_a_degraded_search_does_without_routing(copied: Published) -> None:
    queries = queries_of(copied, 5)
    path = copied.folder / "owners.json"
    path.chmod(0o644)
    path.write_text("{}")
    with open_index(str(copied.root), "live") as index:
        with pytest.raises(DamagedFile, match=r"owners\.json"):
            index.search(queries, 3)
        found = index.search(queries, 3, degraded=True, parameters=SearchParameters(nprobe=CELLS))
        assert [set(names) for names in found.ids] == exact(copied, queries, 3) and found.coverage.share == 1.0


def test_owners_that_clean_up_took_are_found_again(copied: Published) -> None:
    for path in copied.root.glob("stages/shards/*/owners.json"):
        path.unlink()
    again = run(copied.workspace, gate={"recall": 0.8})
    assert (again.folder / "owners.json").read_bytes() == (copied.folder / "owners.json").read_bytes()


def test_duplicates_lie_beside_what_represents_them(published: Published) -> None:
    with open_index(str(published.root), "live") as index:
        links = index.duplicates(list(published.vectors()))
        assert index.duplicates(["d010#0"]).column("document_id").to_pylist() == ["z-copy"]
    assert published.manifest["duplicates"] == links.num_rows
    for shard in range(SHARDS):
        with pa.ipc.open_file(str(published.folder / f"shard-{shard:05d}.duplicates.arrow")) as file:
            assert set(file.read_all().column("represented_by").to_pylist()) <= set(published.ids(shard))


def test_only_the_shards_a_query_needs_are_fetched(
    published: Published, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    remote = open_store(f"s3://{s3_server.bucket()}/penstock")
    for path in (published.root / "indexes").rglob("*"):
        if path.is_file():
            remote.upload(path, path.relative_to(published.root).as_posix())
    with open_index(remote.url, "test/live") as index:
        one = index.search(queries_of(published, 1), 3, parameters=SearchParameters(nprobe=1))
    bucket = remote.url.split("/")[2]
    targets = [entry["target"] for entry in s3_server.log() if entry["method"] == "GET" and bucket in entry["target"]]
    names = {target.rpartition("/")[2].rstrip("?") for target in targets}
    shards = {name for name in names if name.endswith(".faiss") and name.startswith("shard-")}
    assert len(shards) == 1 and one.coverage.share == 1.0
    assert {"routing.faiss", "owners.json"} <= names and not any("rows.arrow" in name for name in names)


def test_what_is_missing_is_made_again_and_a_changed_gate_builds_nothing(copied: Published) -> None:
    root, workspace = copied.root, copied.workspace
    before = {path.name: path.read_bytes() for path in copied.folder.iterdir() if path.name.startswith("shard-")}
    placed = sorted(root.glob("stages/placement/*/*.parquet"))
    cells = sorted(root.glob("stages/cells/*/*.parquet"))
    assert len(placed) == len(cells) >= 2
    placed[0].unlink()
    cells[0].unlink()
    next(root.glob("stages/shards/*/shard-00001.json")).unlink()
    again = run(workspace, gate={"recall": 0.8})
    assert again.manifest["version"] != copied.manifest["version"]
    assert {name: (again.folder / name).read_bytes() for name in before} == before
    for name in ("routing.faiss", "owners.json"):
        assert (again.folder / name).read_bytes() == (copied.folder / name).read_bytes()
    with open_index(str(root), "live") as index:
        assert index.version == again.manifest["version"] and index.search(queries_of(copied), 3).ids.all()


def test_rows_placed_in_parts_are_those_placed_at_once(copied: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, store = copied.manifest["lineage"]["stages"], open_store(str(copied.root))
    source = RowSource(store.url, stages["passages"], stages["selection"], stages["embeddings"])
    cells = CellsJob(store.url, stages["training"], stages["embeddings"], stages["training"], CELLS)
    job = PlacementJob(source, stages["shards"], cells)
    pairs = tuple(
        FragmentPair(fact.passages, fact.embeddings_fragment(stages["embeddings"]), fact.kept < fact.passages_in)
        for fact in read_facts(store, stages["selection"]) or []
    )

    def placed() -> list[pa.Table]:
        found = [pair for shard in range(SHARDS) for pair in read_placed(store, job.fingerprint, pairs, shard)]
        return [table.combine_chunks() for pair in found for table in pair]

    before = placed()
    monkeypatch.setattr(placement, "PLACED_ROWS", 7)
    assert sum(place_rows(PlacementTask(job, pair)) for pair in pairs) == copied.manifest["rows"]
    assert all(one.equals(other) for one, other in zip(placed(), before, strict=True))


def test_a_fragment_without_rows_is_placed_and_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([], pa.float16()), 4)
    passages = pa.table({"passage_id": pa.array([], pa.string()), "text_hash": pa.array([], pa.binary(16))})
    placement._write_groups(
        tmp_path / "rows.parquet", iter([(pa.table({"embedding": vectors}), passages)]), np.empty(0)
    )
    store.upload(tmp_path / "rows.parquet", fragment_path(PLACEMENT, "f", "e"))
    ((embedded, rows),) = read_placed(store, "f", (FragmentPair("p", "e", False),), 0)
    assert embedded.num_rows == rows.num_rows == 0 and embedded.schema.field("embedding").type == vectors.type


def test_cleaning_up_leaves_what_the_version_needs(copied: Published) -> None:
    for path in copied.root.rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))
    collect_garbage(open_store(str(copied.root)), None, 1.0, dry_run=False)
    left = {path.name for path in (copied.root / "stages").iterdir() if any(path.iterdir())}
    assert left == {"passages", "selection", "embeddings", "training", "shards", "evaluation"}
    with open_index(str(copied.root), "live") as index:
        assert index.search(queries_of(copied), 3).ids.all()
    report = copied.workspace.pipeline(gate={"recall": 0.8}).run()
    assert report is not None and report.manifest["sharding"]["rule"] == "cluster"


def test_k_means_over_all_vectors_and_transforms_before_the_cells(copied: Published) -> None:
    steps = [{"type": "pca", "dimension": 64}, {"type": "rotation"}]
    made = run(
        copied.workspace, index={**INDEX, "iterations": 3, "rerank": True, "rerank_codec": "lvq8", "transforms": steps}
    )
    assert made.manifest["faiss"]["factory"] == f"IVF{CELLS},Flat" and made.manifest["stored"] == "lvq8"
    assert [step["type"] for step in made.manifest["transforms"]] == ["pca", "rotation"]
    assert len(list(copied.root.glob("stages/centroids/*/centroids-*.faiss"))) >= 2
    assert "transforms.safetensors" in {file["name"] for file in made.manifest["files"]}
    assert (
        made.manifest["operating_point"]["parameters"]["rerank_factor"] > 1
        and made.manifest["evaluation"]["recall"] >= 0.9
    )
    queries = queries_of(made)
    with open_index(str(made.root), "live") as index:
        found = index.search(queries, 10, parameters=SearchParameters(nprobe=CELLS, coverage=1.0, rerank_factor=4))
    truth = exact(made, queries, 10)
    assert np.mean([len(set(names) & wanted) / 10 for names, wanted in zip(found.ids, truth, strict=True)]) > 0.97


def test_family_auto_chooses_among_codecs_of_cells(copied: Published) -> None:
    made = run(copied.workspace, index={"shards": 2, "sharding": "cluster", "recall": 0.8})
    assert made.manifest["faiss"]["family"] == "ivf" and made.manifest["sharding"]["rule"] == "cluster"
    (record,) = (json.loads(path.read_text()) for path in copied.root.glob("tuning/*.json"))
    assert {trial["family"] for trial in record["trials"]} == {"ivf"}


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "centring"}, {"type": "pca", "dimension": 96}],
        [{"type": "truncation", "dimension": 128}, {"type": "normalization"}],
        [{"type": "sphering", "dimension": 96}],
        [{"type": "whitening", "dimension": 96}],
    ],
)
def test_transforms_before_a_flat_index(copied: Published, steps: list[dict[str, Any]]) -> None:
    index: dict[str, Any] = {"family": "flat", "shards": 2, "recall": 0.9, "rerank": True, "transforms": steps}
    if steps[0]["type"] == "sphering":
        asked = copied.workspace.folder / "asked.jsonl"
        texts = ["how to reshape an array", "the mean along an axis", "read numbers from a text file"] * 10
        asked.write_text("".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number, text in enumerate(texts)))
        index["queries"] = str(asked)
    made = run(copied.workspace, index=index)
    assert made.manifest["dimension"] == DIMENSION and made.manifest["faiss"]["dimension"] == steps[-1].get(
        "dimension", 128
    )
    queries = queries_of(made)
    with open_index(str(made.root), "live") as opened:
        found = opened.search(queries, 10)
    truth = exact(made, queries, 10)
    assert np.mean([len(set(names) & wanted) / 10 for names, wanted in zip(found.ids, truth, strict=True)]) > 0.85
    assert made.manifest["evaluation"]["recall"] >= 0.9
    near = made.vectors()
    assert found.similarities[0, 0] == pytest.approx(float(queries[0] @ near[found.ids[0, 0]]), abs=1e-3)


def test_damaged_transforms_are_refused(copied: Published) -> None:
    index = {"family": "flat", "shards": 1, "recall": 0.5, "transforms": [{"type": "rotation", "seed": 3}]}
    run(copied.workspace, index=index)
    path = next(copied.root.glob("stages/transforms/*/transforms.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    for kind in ("training", "shards"):
        shutil.rmtree(copied.root / "stages" / kind)
    with pytest.raises(DamagedTransforms, match=r"must have sha256 .* remove the two files of their folder"):
        run(copied.workspace, index={**index, "training_rows": 100})


def test_fewer_cells_than_shards_are_refused_before_anything_is_encoded(workspace: Workspace) -> None:
    for index in ({"family": "ivf", "nlist": 3}, {}):
        settings = {"index": {**index, "shards": 4, "sharding": "cluster"}}
        with pytest.raises(PipelineFileInvalid, match="cells|cell for each of 4 shards"):
            workspace.pipeline(**settings).run()
    assert not list(workspace.root.glob("stages/embeddings/*/*.parquet"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"family": "hnsw", "shards": 2, "sharding": "cluster"},
            "sharding (cluster) shares out the cells of family ivf",
        ),
        ({"factory": "HNSW16", "shards": 2, "sharding": "cluster"}, "shares out the cells of family ivf"),
        ({"family": "ivf", "sharding": "cluster"}, "set shards to 2 or more"),
        ({"family": "flat", "transforms": [{"type": "pca", "both_sides": True}]}, "parameter both_sides (True) of pca"),
        ({"family": "flat", "transforms": [{"type": "truncation"}]}, "type (truncation) needs a dimension"),
        (
            {"family": "flat", "transforms": [{"type": "pca", "dimension": 999}]},
            "dimension of pca (999) must be at most",
        ),
        (
            {"family": "flat", "transforms": [{"type": "sphering", "dimension": 8}]},
            "queries and a transform of type sphering",
        ),
        ({"family": "flat", "rerank_codec": "lvq8"}, "set rerank to true"),
        ({"family": "flat", "iterations": 2}, "iterations (2) belongs to ivf"),
    ],
)
def test_what_does_not_go_together_is_refused(workspace: Workspace, index: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineFileInvalid) as refused:
        Pipeline.parse(yaml.safe_dump({**yaml.safe_load(workspace.yaml()), "index": index})).plan()
    assert message in str(refused.value)
