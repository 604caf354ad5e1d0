"""Mixed versions of two real models: answers against brute force, refusals, and readers while the alias moves."""

import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from penstock.cluster.catalog import Catalog, Reason
from penstock.cluster.file_cache import DamagedFile
from penstock.cluster.jobs.superseded import SupersededTask, mark_superseded
from penstock.cluster.node import CACHE_VARIABLE
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.adapter_fitting import Pairs, fit_adapter
from penstock.operators.adapters import Adapter, Ridge
from penstock.operators.bridging import (
    BridgeRecord,
    Direction,
    Fit,
    Sample,
    SpaceIdentity,
    Verdict,
    WrongSpace,
    sample_hash,
)
from penstock.operators.confidence import Interval
from penstock.operators.encoding import ModelMismatch
from penstock.operators.indexing import Metric
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines import Found, OpenIndex, open_index
from penstock.pipelines.cleanup import collect_garbage
from penstock.pipelines.cli import app
from penstock.pipelines.diffing import compare
from penstock.pipelines.measuring_answers import measure_answers
from penstock.pipelines.mixed import BridgeUnfit, PartUnfit, publish_mixed
from penstock.pipelines.mixed_format import MixedParts, MixedUnsupported
from penstock.pipelines.model_pair import published_manifest, refuse_other_model
from penstock.pipelines.opened_mixed import OpenMixed, Way
from penstock.pipelines.planning import alias_moves
from penstock.pipelines.progress import choose_reporter
from penstock.pipelines.publishing import model_of, shards_of

from ..conftest import S3Server
from .conftest import Document, Workspace

LAYERS = 3  # of the old model
K = 20  # four times as many are compared again, which is all of the old part
INDEX = {"family": "flat", "shards": 2, "recall": 1.0, "rerank": True, "rerank_codec": "float32"}
PASSING = Verdict(Interval(1, 0.95, 1), Interval(0.5, 0.4, 0.6), 0.9)
BOTH, BRIDGE = QueryMode.BOTH, QueryMode.BRIDGE
LENGTH = 0.9


@dataclass(frozen=True)
class Upgrade:
    """Versions under one root: `old` with the old model; with the new one `part`, of one of three files, and `new`."""

    root: Path
    documents: list[Document]
    old: str
    part: str
    new: str

    @property
    def catalog(self) -> Catalog:
        return Catalog(open_store(str(self.root)), "test")

    @property
    def model(self) -> dict[str, Any]:
        """The new one, as manifests have it."""
        model: dict[str, Any] = self.catalog.manifest(self.new)["model"]
        return model

    def done(self, version: str) -> set[str]:
        """Documents of the files that a version of the new model has."""
        return {str(one["id"]) for one in self.documents if one["file"] == 0 or version == self.new}

    def vectors(self, version: str) -> dict[str, np.ndarray]:
        """Passage id → stored vector."""
        folder = self.root / "indexes/test/versions" / version
        found: dict[str, np.ndarray] = {}
        for path in sorted(folder.glob("*.vectors.arrow")):
            ids = path.with_name(path.name.replace("vectors", "ids"))
            names = pa.ipc.open_file(ids).read_all().column("id").to_pylist()
            found |= dict(zip(names, pa.ipc.open_file(path).read_all().column("vector").to_pylist(), strict=True))
        return {name: np.array(vector, np.float32) for name, vector in found.items()}

    def opened(self, version: str) -> OpenIndex:
        return OpenIndex(self.catalog, "live", self.catalog.manifest(version))

    def point_to(self, version: str) -> None:
        self.catalog.move("live", version, expected=None, run_id="test", reason="promote")


@pytest.fixture(scope="module")
def made(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Upgrade:
    """48 documents in three files, some of which have the text of one in another file; before the new model comes, some
    of the first file change, which have or had the text of others."""
    workspace = Workspace(tmp_path_factory.mktemp("mixed"), {"index": INDEX, "passages__overlap": 0})
    documents = [
        {"id": f"d{i:02d}", "text": text, "topic": f"t{i % 3}", "file": i // 16}
        for i, text in enumerate(real_texts[:48])
    ]
    copies = [(2, 0), (5, 2), (20, 0), (22, 2), (35, 0), (37, 1), (40, 1)]
    documents += [
        {**documents[of], "id": f"{'abz'[n % 3]}-copy{n}", "file": file} for n, (of, file) in enumerate(copies)
    ]
    for file in range(3):
        workspace.write(f"part-{file}.jsonl", [one for one in documents if one["file"] == file])
    old = workspace.pipeline(embedding__layers=LAYERS, embedding__layers_trained=True).run()
    for one in documents:
        if one["id"] in ("d05", "z-copy2", "b-copy4"):
            one["after"] = f"Now {one['id']} says: {real_texts[60]}"
    first = [{**one, "text": one.get("after", one["text"])} for one in documents if one["file"] == 0]
    workspace.write("part-0.jsonl", first)
    versions = []
    for pattern in (f"{workspace.corpus}/part-0.jsonl", f"{workspace.corpus}/*.jsonl"):
        report = workspace.pipeline(documents__path=pattern, publish={}).run()
        assert report is not None
        versions.append(str(report.version))
    assert old is not None
    return Upgrade(workspace.root, documents, str(old.version), *versions)


@pytest.fixture
def upgrade(made: Upgrade, tmp_path: Path) -> Upgrade:
    shutil.copytree(made.root, tmp_path / "root")
    return replace(made, root=tmp_path / "root")


@pytest.fixture(scope="module")
def asked(made: Upgrade) -> list[str]:
    return [" ".join(str(one["text"]).split()[:8]) for one in made.documents[::5]]


# ---- bridges


def identity(model: dict[str, Any]) -> SpaceIdentity:
    return SpaceIdentity(model["reference"], model["space"], model["weights_sha256"], model["dimension"])


def fitted(upgrade: Upgrade, direction: Direction) -> tuple[Adapter, BridgeRecord]:
    """An adapter of the passages that both models embedded, with a record that says it passed."""
    old, new = upgrade.vectors(upgrade.old), upgrade.vectors(upgrade.new)
    names = sorted(old.keys() & new.keys())
    sides = [np.stack([vectors[name] for name in names]) for vectors in (new, old)]
    models = [identity(upgrade.catalog.manifest(version)["model"]) for version in (upgrade.new, upgrade.old)]
    if direction is Direction.DOCUMENTS_TO_NEW:
        sides, models = sides[::-1], models[::-1]
    pairs = Pairs(*sides)
    adapter = fit_adapter(Ridge(0.1), pairs, Metric.COSINE)
    record = BridgeRecord(
        direction, *models, len(pairs), 0, sample_hash(Sample(pairs)), 1, Fit(Ridge(0.1)), (),
        adapter.content_hash(), PASSING, LENGTH,
    )  # fmt: skip
    return adapter, record


def write_bridge(upgrade: Upgrade, folder: str, bridges: Sequence[tuple[Adapter, BridgeRecord]]) -> str:
    for adapter, record in bridges:
        path = upgrade.root / folder / f"{record.direction.value}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(adapter.to_bytes())
        path.with_suffix(".json").write_text(json.dumps(record.to_json()))
    return folder


@pytest.fixture
def bridge(upgrade: Upgrade) -> str:
    return write_bridge(upgrade, "bridges/b", [fitted(upgrade, direction) for direction in Direction])


def mix(
    session: Session, upgrade: Upgrade, new: str | None, bridge: str | None = None, queries: QueryMode = BOTH
) -> dict[str, Any]:
    model = upgrade.model if bridge else None
    return publish_mixed(session, upgrade.catalog, "run", upgrade.old, new, bridge, queries, model)


def same(first: Found, second: Found) -> bool:
    return bool((first.ids == second.ids).all()) and np.array_equal(
        first.similarities, second.similarities, equal_nan=True
    )


def live_ids(upgrade: Upgrade, manifest: dict[str, Any]) -> set[str]:
    """Passages of the old version that count, under the ids they go by, by the files of the mixed one."""
    versions = upgrade.root / "indexes/test/versions"
    live: set[str] = set()
    for shard in MixedParts.of(manifest).shards:
        ids = pa.ipc.open_file(versions / upgrade.old / f"shard-{shard.shard:05d}.ids.arrow").read_all()
        names, gone = np.array(ids.column("id").to_pylist(), object), np.zeros(shard.rows, bool)
        own = {file.name.split(".")[1]: versions / manifest["version"] / file.name for file in shard.files}
        if own:
            gone = pa.ipc.open_file(own["superseded"]).read_all().column("superseded").to_numpy()
        if "names" in own:
            now = pa.ipc.open_file(own["names"]).read_all()
            names[now.column("row").to_numpy()] = now.column("id").to_pylist()
        assert gone.sum() == shard.superseded and len(gone) == shard.rows
        live |= set(names[~gone])
    return live


def renamed(upgrade: Upgrade, manifest: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The same by the ids that old rows go by."""
    folders = [upgrade.root / "indexes/test/versions" / version for version in (upgrade.old, manifest["version"])]
    for path in folders[1].glob("*.names.arrow"):
        ids = pa.ipc.open_file(folders[0] / path.name.replace("names", "ids")).read_all().column("id").to_pylist()
        now = pa.ipc.open_file(path).read_all()
        pairs = zip(now.column("row").to_pylist(), now.column("id").to_pylist(), strict=True)
        old |= {name: old[ids[row]] for row, name in pairs}
    return old


# ---- what is superseded


@pytest.mark.parametrize("whole", [False, True])
def test_every_document_is_answered_and_none_twice(ray_session: Session, upgrade: Upgrade, whole: bool) -> None:
    version = upgrade.new if whole else upgrade.part
    manifest = mix(ray_session, upgrade, version)
    new, live, done = upgrade.vectors(version), live_ids(upgrade, manifest), upgrade.done(version)
    assert not {name for name in live if name.rpartition("#")[0] in done} and not live & set(new)
    texts = {str(one["id"]): str(one["text"]) for one in upgrade.documents}
    texts |= {str(one["id"]): str(one["after"]) for one in upgrade.documents if "after" in one}
    with upgrade.opened(manifest["version"]) as index:
        rows = index.search("any", 500, rows=True)
        assert rows.rows is not None and set(rows.ids[0]) - {None} == live | set(new)
        links = index.duplicates(list(live | set(new))).to_pylist()
        found = {row["id"]: row for row in rows.rows[0].to_pylist()}
        assert len(found) == len({row["text"] for row in found.values()}) == len(index)
    for name, row in found.items():
        assert row["document_id"] == name.rpartition("#")[0] and row["text"] in texts[row["document_id"]]
    stated = [one["id"] for one in links]
    assert len(stated) == len(set(stated)) == manifest["duplicates"] and not set(stated) & (live | set(new))
    for one in links:
        assert found[one["represented_by"]]["text"] in texts[one["document_id"]]
    reached = {name.rpartition("#")[0] for name in live | set(new) | set(stated)}
    assert reached == {str(one["id"]) for one in upgrade.documents}
    assert manifest["rows"] == len(live) + len(new) and manifest["documents"] == len(upgrade.documents)
    assert [part["rows"] for part in manifest["parts"]] == [len(live), len(new)]
    assert any(shard["standing_in"] for shard in manifest["shards"]) != whole


# ---- answers


def test_nothing_embedded_answers_as_the_old_version_and_everything_as_the_new(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str
) -> None:
    for new, alike in ((None, upgrade.old), (upgrade.new, upgrade.new)):
        manifest = mix(ray_session, upgrade, new, bridge)
        with upgrade.opened(manifest["version"]) as mixed, upgrade.opened(alike) as plain:
            found = mixed.search(asked, 7)
            assert same(found, plain.search(asked, 7)) and not found.ranks_fused
            assert mixed.operating_point == plain.operating_point and len(mixed) == len(plain)
            assert mixed.manifest["model"] == upgrade.model
            assert found.version == mixed.version == manifest["version"] and found.coverage.share == 1
            wanted = [name for name in found.ids.ravel() if name]
            assert mixed.duplicates(wanted).num_rows == plain.duplicates(wanted).num_rows


@pytest.mark.parametrize("queries", [BOTH, BRIDGE])
def test_adapted_documents_are_merged_by_similarity_in_the_new_space(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str, queries: QueryMode
) -> None:
    manifest = mix(ray_session, upgrade, upgrade.part, bridge, queries)
    old, new = renamed(upgrade, manifest, upgrade.vectors(upgrade.old)), upgrade.vectors(upgrade.part)
    live = sorted(live_ids(upgrade, manifest))
    adapter, _ = fitted(upgrade, Direction.DOCUMENTS_TO_NEW)
    mapped = adapter.apply(np.stack([old[name] for name in live])) * np.float32(LENGTH)
    names = np.array([*live, *new], object)
    with upgrade.opened(manifest["version"]) as index:
        vectors = index.encode(asked)
        found = index.search(asked, K)
        by_vectors = index.search(vectors, K)
        present = index._present()
        assert isinstance(present, OpenMixed) and present.way is Way.ADAPTED
    near = vectors @ np.concatenate([mapped, np.stack(list(new.values()))]).T
    for query, similarities in enumerate(near):
        best = np.argsort(-similarities, kind="stable")[:K]
        assert np.allclose(found.similarities[query], similarities[best], atol=1e-5)
        assert set(found.ids[query]) == set(names[best])
    assert (by_vectors.ids[:, 0] == found.ids[:, 0]).all() and not found.ranks_fused


def test_without_an_adapter_new_hits_take_the_places_of_superseded_rows(
    ray_session: Session, upgrade: Upgrade, asked: list[str]
) -> None:
    manifest = mix(ray_session, upgrade, upgrade.part)
    live = live_ids(upgrade, manifest)
    with upgrade.opened(upgrade.old) as one, upgrade.opened(upgrade.part) as other:
        before, after = one.search(asked, 9).ids, other.search(asked, 9).ids.tolist()
    with upgrade.opened(manifest["version"]) as index:
        found = index.search(asked, 9, rows=True)
    assert found.ranks_fused and np.isnan(found.similarities).all() and found.rows is not None
    assert found.rows[0].column("similarity").null_count == 9 and found.coverage.share == 1
    identities = renamed(upgrade, manifest, {name: name for name in upgrade.vectors(upgrade.old)})
    names = {name: now for now, name in identities.items() if now != name}
    for query, (old, new) in enumerate(zip(before, after, strict=True)):
        expected = [names.get(name, name) if names.get(name, name) in live else new.pop(0) for name in old]
        assert found.ids[query].tolist() == expected
        assert found.rows[query].column("id").to_pylist() == expected


@pytest.mark.parametrize("lost", ["old", "new", "mixed"])
def test_places_without_a_part_or_what_is_superseded(
    ray_session: Session, upgrade: Upgrade, asked: list[str], lost: str
) -> None:
    manifest = mix(ray_session, upgrade, upgrade.part)
    versions, live = upgrade.root / "indexes/test/versions", live_ids(upgrade, manifest)
    new = set(upgrade.vectors(upgrade.part))
    folder = versions / {"old": upgrade.old, "new": upgrade.part, "mixed": manifest["version"]}[lost]
    for path in [*folder.glob("*.ids.arrow"), *folder.glob("*.superseded.arrow")]:
        path.unlink()
    with upgrade.opened(manifest["version"]) as index:
        with pytest.raises(DamagedFile):
            index.search(asked)
        found = index.search(asked, 500, degraded=True)
    names = {name for name in found.ids[0] if name is not None}
    assert names == (live if lost == "new" else new)
    assert found.coverage.missing == ((0, 1) if lost == "new" else (2, 3)) and found.ranks_fused


def test_filters_rows_and_lost_shards(ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str) -> None:
    manifest = mix(ray_session, upgrade, upgrade.part, bridge)
    topics = {str(one["id"]): one["topic"] for one in upgrade.documents}
    with upgrade.opened(manifest["version"]) as index:
        every = index.search(asked, 500)
        found = index.search(asked, 500, rows=True, where={"topic": "t1"})
        assert found.rows is not None
        for query in range(len(asked)):
            meet = [name for name in every.ids[query] if name and topics[name.rpartition("#")[0]] == "t1"]
            assert [name for name in found.ids[query] if name] == meet
            assert found.rows[query].column("document_id").to_pylist() == [name.rpartition("#")[0] for name in meet]
    folder = upgrade.root / "indexes/test/versions"
    (folder / manifest["version"] / "shard-00001.superseded.arrow").write_bytes(b"torn")
    (folder / upgrade.part / "shard-00000.ids.arrow").unlink()
    lost = manifest["shards"][1], upgrade.catalog.manifest(upgrade.part)["shards"][0]
    with upgrade.opened(manifest["version"]) as index:
        with pytest.raises(DamagedFile):
            index.search(asked)
        found = index.search(asked, 500, degraded=True)
    assert found.coverage.missing == (0, 3)
    rows = lost[0]["rows"] - lost[0]["superseded"] + lost[1]["rows"]
    assert found.coverage.share == pytest.approx(1 - rows / manifest["rows"])
    assert (found.ids[0] != None).sum() == manifest["rows"] - rows  # noqa: E711


def test_vectors_need_an_adapter_of_queries(ray_session: Session, upgrade: Upgrade, bridge: str) -> None:
    vectors = np.stack(list(upgrade.vectors(upgrade.new).values())[:3])
    only = write_bridge(upgrade, "bridges/documents", [fitted(upgrade, Direction.DOCUMENTS_TO_NEW)])
    manifest = mix(ray_session, upgrade, upgrade.part, only)
    spaces = [upgrade.catalog.manifest(version)["model"]["space"][:16] for version in (upgrade.part, upgrade.old)]
    with upgrade.opened(manifest["version"]) as index, pytest.raises(ModelMismatch) as refusal:
        index.search(vectors)
    assert all(space in str(refusal.value) for space in spaces)
    with upgrade.opened(mix(ray_session, upgrade, upgrade.new)["version"]) as index:
        assert index.search(vectors, 1).similarities.min() > 0.99
    waiting = mix(ray_session, upgrade, None, bridge, BRIDGE)
    adapter, _ = fitted(upgrade, Direction.QUERIES_TO_OLD)
    with upgrade.opened(waiting["version"]) as index, upgrade.opened(upgrade.old) as old:
        found, expected = index.search(vectors, 4), old.search(adapter.apply(vectors), 4)
        assert (found.ids == expected.ids).all()
        assert np.allclose(found.similarities, expected.similarities, atol=1e-5)


# ---- queries of a compatible model


MEASURED = {"estimate": 0.2, "low": 0.05, "high": 0.3}


def write_compatibility(upgrade: Upgrade, folder: str, **changes: Any) -> str:  # noqa: ANN401
    """What `fit_bridges` writes where new queries find more in the old index than old ones; the folder."""
    models = {"old": upgrade.catalog.manifest(upgrade.old)["model"], "new": upgrade.model}
    record = {name: vars(identity(model)) for name, model in models.items()}
    path = upgrade.root / folder / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**record, "compatibility": {"difference": MEASURED}, **changes}))
    return folder


@pytest.mark.parametrize("part", [False, True])
def test_queries_of_a_compatible_model_search_old_vectors_as_they_are(
    ray_session: Session, upgrade: Upgrade, asked: list[str], part: bool
) -> None:
    folder = write_compatibility(upgrade, "bridges/c")
    manifest = mix(ray_session, upgrade, upgrade.part if part else None, folder, QueryMode.DIRECT)
    assert manifest["queries"] == "direct" and manifest["compatibility"]["difference"] == MEASURED
    assert manifest["files"] == []
    old = upgrade.vectors(upgrade.old)
    live = live_ids(upgrade, manifest)
    names = {name: now for now, name in renamed(upgrade, manifest, {name: name for name in old}).items() if now != name}
    with upgrade.opened(manifest["version"]) as index:
        found = index.search(asked, 9)
        vectors = index.encode(asked)
        assert same(found, index.search(vectors, 9)) and found.ranks_fused is part
        present = index._present()
        assert isinstance(present, OpenMixed) and not present.old.encoder.loaded
    with upgrade.opened(upgrade.part) as other:
        after = other.search(vectors, 9).ids.tolist()
    near = vectors @ np.stack(list(old.values())).T
    for query, new in enumerate(after):
        ranked = [names.get(name, name) for name in np.array(list(old), object)[np.argsort(-near[query])[:9]]]
        assert found.ids[query].tolist() == [name if name in live else new.pop(0) for name in ranked]


def test_a_model_that_was_not_measured_to_be_compatible_is_refused(ray_session: Session, upgrade: Upgrade) -> None:
    equal = {"compatibility": {"difference": {**MEASURED, "low": 0.0}}}
    for folder in (
        write_compatibility(upgrade, "bridges/equal", **equal),
        write_compatibility(upgrade, "bridges/unjudged", compatibility=None),
        "bridges/nothing",
    ):
        with pytest.raises(BridgeUnfit, match=rf"queries \(direct\) of .* must be measured to find more.*in {folder};"):
            mix(ray_session, upgrade, upgrade.part, folder, QueryMode.DIRECT)
    other = write_compatibility(upgrade, "bridges/other", new={"space": "d" * 32})
    with pytest.raises(WrongSpace, match=f"bridges/other is about queries from space {'d' * 16} to"):
        mix(ray_session, upgrade, upgrade.part, other, QueryMode.DIRECT)


# ---- adapters that cannot be read


def test_without_a_readable_adapter_of_documents_new_hits_take_places(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, plain = (mix(ray_session, upgrade, upgrade.part, folder) for folder in (bridge, None))
    folder = upgrade.root / "indexes/test/versions" / manifest["version"]
    (folder / "documents_to_new.safetensors").write_bytes(b"torn")
    upgrade.point_to(upgrade.old)
    with open_index(str(upgrade.root), "live") as index, upgrade.opened(plain["version"]) as expected:
        index.search(asked, 6)
        upgrade.point_to(manifest["version"])
        assert index.refresh()
        found = index.search(asked, 6)
        assert found.version == manifest["version"] and found.ranks_fused
        assert same(found, expected.search(asked, 6))
    assert "adapter documents_to_new of" in caplog.text and "next try in 30 s" in caplog.text


def test_without_a_readable_adapter_of_queries_texts_are_encoded_by_both_models(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str
) -> None:
    manifest, both = (mix(ray_session, upgrade, upgrade.part, bridge, queries) for queries in (BRIDGE, BOTH))
    folder = upgrade.root / "indexes/test/versions" / manifest["version"]
    (folder / "queries_to_old.json").unlink()
    with upgrade.opened(manifest["version"]) as index, upgrade.opened(both["version"]) as expected:
        assert same(index.search(asked, 6), expected.search(asked, 6))
        with pytest.raises(DamagedFile, match=r"queries given as vectors of .* adapter queries_to_old cannot be read"):
            index.search(index.encode(asked))
    change_model(upgrade, upgrade.old, reference=str(upgrade.root / "gone"))
    with (
        upgrade.opened(manifest["version"]) as index,
        pytest.raises(
            DamagedFile,
            match=r"cannot be asked with texts: .* the old model .*gone, which does without it, is not at hand",
        ),
    ):
        index.search(asked)


def test_a_reader_stays_where_a_version_has_no_way_for_its_queries(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str
) -> None:
    """By vectors there is none without the adapter of queries; by texts none without the old model, too."""
    good, torn = (mix(ray_session, upgrade, new, bridge, BRIDGE)["version"] for new in (None, upgrade.part))
    (upgrade.root / "indexes/test/versions" / torn / "queries_to_old.safetensors").write_bytes(b"torn")
    upgrade.point_to(good)
    with open_index(str(upgrade.root), "live") as texts, open_index(str(upgrade.root), "live") as vectors:
        queries = vectors.encode(asked)
        before = texts.search(asked, 6), vectors.search(queries, 6)
        upgrade.point_to(torn)
        with pytest.raises(DamagedFile, match=r"queries given as vectors of .* adapter queries_to_old cannot be read"):
            vectors.refresh()
        assert vectors.version == good and same(vectors.search(queries, 6), before[1])
        change_model(upgrade, upgrade.old, reference=str(upgrade.root / "gone"))
        assert texts.refresh() and texts.search(asked, 6).version == torn
        upgrade.point_to(good)
        with open_index(str(upgrade.root), "live") as none:
            none.search(asked)
            upgrade.point_to(torn)
            with pytest.raises(DamagedFile, match="cannot be asked with texts: "):
                none.refresh()
            assert same(none.search(asked, 6), before[0]) and none.version == good


def test_parts_of_one_space_are_merged_as_they_are(ray_session: Session, upgrade: Upgrade, asked: list[str]) -> None:
    manifest = publish_mixed(ray_session, upgrade.catalog, "run", upgrade.new, upgrade.part, None, BRIDGE)
    with upgrade.opened(manifest["version"]) as mixed, upgrade.opened(upgrade.new) as plain:
        found, expected = mixed.search(asked, 8, rows=True), plain.search(asked, 8)
        assert found.rows is not None and not found.ranks_fused
        assert np.allclose(found.similarities, expected.similarities, atol=1e-5)
        assert np.allclose(mixed.search(mixed.encode(asked), 8).similarities, expected.similarities, atol=1e-5)


# ---- publishing


def test_the_same_inputs_make_one_version_and_a_crash_leaves_none(
    ray_session: Session, upgrade: Upgrade, bridge: str
) -> None:
    first = mix(ray_session, upgrade, upgrade.part, bridge)
    folder = upgrade.root / "indexes/test/versions" / first["version"]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    assert mix(ray_session, upgrade, upgrade.part, bridge) == first
    others = [
        mix(ray_session, upgrade, upgrade.part),
        mix(ray_session, upgrade, upgrade.new, bridge),
        mix(ray_session, upgrade, upgrade.part, bridge, BRIDGE),
    ]
    assert len({one["version"] for one in [first, *others]}) == 4
    (folder / "manifest.json").unlink()
    (folder / "shard-00000.superseded.arrow").unlink()
    assert first["version"] not in upgrade.catalog.versions()
    again = mix(ray_session, upgrade, upgrade.part, bridge)
    assert {**again, "commit_id": None} == {**first, "commit_id": None}
    assert files == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_what_does_not_belong_together_is_not_published(ray_session: Session, upgrade: Upgrade, bridge: str) -> None:
    adapter, record = fitted(upgrade, Direction.QUERIES_TO_OLD)
    failing = replace(record, verdict=replace(PASSING, recovery=Interval(0.9, 0.5, 1)))
    strange = replace(record, target=replace(record.target, space="f" * 32))
    for folder, wrong, error, message in [
        ("failing", failing, BridgeUnfit, "must recover 0.9 of the reference.*got 0.5000 and"),
        ("strange", strange, WrongSpace, f"leads to space {'f' * 32} of"),
        ("other", replace(record, adapter_hash="0" * 64), WrongSpace, "must be 0000000000000000"),
    ]:
        with pytest.raises(error, match=message):
            mix(ray_session, upgrade, upgrade.part, write_bridge(upgrade, f"bridges/{folder}", [(adapter, wrong)]))
    (upgrade.root / "bridges/b/queries_to_old.json").write_bytes(
        (upgrade.root / "bridges/b/documents_to_new.json").read_bytes()
    )
    with pytest.raises(BridgeUnfit, match="adapter queries_to_old has the record of documents_to_new"):
        mix(ray_session, upgrade, upgrade.part, bridge)
    with pytest.raises(BridgeUnfit, match=r"queries \(bridge\) need an adapter from .* got none in no folder"):
        mix(ray_session, upgrade, upgrade.part, None, BRIDGE)
    with pytest.raises(ValueError, match=r"versions to mix \(.*\) must be two"):
        mix(ray_session, upgrade, upgrade.old)
    other = upgrade.catalog.manifest(upgrade.old)["model"]
    with pytest.raises(ModelMismatch, match=f"must be of the model .*{other['space'][:16]}.*, got "):
        publish_mixed(ray_session, upgrade.catalog, "r", upgrade.old, upgrade.part, None, BOTH, other)
    mixed = mix(ray_session, upgrade, upgrade.part)
    with pytest.raises(MixedUnsupported, match=f"is mixed of {upgrade.old} and {upgrade.part}: mix one of these"):
        publish_mixed(ray_session, upgrade.catalog, "r", mixed["version"], upgrade.new, None, BOTH)
    with pytest.raises(ValueError, match="adapters of bridges/b lead to a model that no version has yet"):
        publish_mixed(ray_session, upgrade.catalog, "r", upgrade.old, None, bridge, BOTH)
    assert len(upgrade.catalog.versions()) == 4
    path = upgrade.root / "indexes/test/versions" / upgrade.new / "manifest.json"
    checks = [{"name": "recall", "measured": 0.25, "bound": 1.0, "at_least": True, "passed": False}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "gate": checks}))
    with pytest.raises(PartUnfit, match=f"version {upgrade.new} must have passed its gate.*, got recall 0.2500"):
        mix(ray_session, upgrade, upgrade.new)


def test_a_reader_refuses_an_adapter_of_other_spaces(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str
) -> None:
    manifest = mix(ray_session, upgrade, upgrade.part, bridge)
    changed = {**manifest, "model": {**manifest["model"], "space": "e" * 32}}
    with OpenIndex(upgrade.catalog, "live", changed) as index, pytest.raises(WrongSpace, match="e" * 32):
        index.search(asked)


# ---- readers while an upgrade goes on


def test_a_reader_follows_an_upgrade_and_a_rollback_without_an_error(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str
) -> None:
    mixed = [mix(ray_session, upgrade, new, bridge)["version"] for new in (None, upgrade.part, upgrade.new)]
    path = [*mixed, upgrade.new, mixed[2], upgrade.old]
    expected = {}
    for version in {*path}:
        with upgrade.opened(version) as index:
            expected[version] = index.search(asked, 5)
    answers: list[Found] = []
    ended = threading.Event()

    def search() -> None:
        while not ended.is_set():
            answers.append(index.search(asked, 5))

    upgrade.point_to(upgrade.old)
    with open_index(str(upgrade.root), "live", follow=True, every_s=0.01) as index:
        index.search(asked, 5)
        with ThreadPoolExecutor(2) as threads:
            searches = [threads.submit(search) for _ in range(2)]
            for version in path:
                upgrade.point_to(version)
                while index.version != version and index.follow_error is None:
                    time.sleep(0.005)
                seen = len(answers)
                while len(answers) < seen + 4 and index.follow_error is None:
                    time.sleep(0.005)
            ended.set()
            for one in searches:
                one.result()
        assert index.follow_error is None
    assert {answer.version for answer in answers} == set(path)
    assert all(same(answer, expected[answer.version]) for answer in answers)


def test_parts_and_models_are_opened_once(ray_session: Session, upgrade: Upgrade, asked: list[str]) -> None:
    mixed = [mix(ray_session, upgrade, new)["version"] for new in (upgrade.part, upgrade.new)]
    upgrade.point_to(upgrade.old)
    with open_index(str(upgrade.root), "live") as index:
        index.search(asked)
        old = index._present()
        upgrade.point_to(mixed[0])
        assert index.refresh()
        first = index._present()
        assert isinstance(first, OpenMixed) and first.old is old and first.encoder.loaded
        assert first.new is not None and all(shard.searcher.ready for shard in first.new.shards.values())
        upgrade.point_to(mixed[1])
        assert index.refresh()
        second = index._present()
        assert isinstance(second, OpenMixed) and second.old is old and second.encoder is first.encoder
        assert second.new is not None and all(shard.searcher.ready for shard in second.new.shards.values())
        upgrade.point_to(upgrade.new)
        assert index.refresh() and index._present() is second.new
        index.search(index.encode(asked))
        upgrade.point_to(upgrade.old)
        with pytest.raises(ModelMismatch, match="must have the vector space of version"):
            index.refresh()


# ---- other commands


def test_clean_up_keeps_what_a_kept_version_is_mixed_of(ray_session: Session, upgrade: Upgrade) -> None:
    mixed = [mix(ray_session, upgrade, new)["version"] for new in (upgrade.part, upgrade.new)]
    upgrade.catalog.move("live", mixed[0], expected=None, run_id="test", reason=Reason.BACKFILL)
    time.sleep(0.01)
    collect_garbage(open_store(str(upgrade.root)), 1, 1e-6, False)
    left = set(upgrade.catalog.versions())
    # the newest of all is kept for people to look at, and the newest that is not a step on the way
    assert left == {upgrade.old, upgrade.part, upgrade.new, *mixed}
    upgrade.point_to(upgrade.new)
    collect_garbage(open_store(str(upgrade.root)), 1, 1e-6, False)
    assert set(upgrade.catalog.versions()) == {upgrade.new, upgrade.old, mixed[1]}
    with upgrade.opened(mixed[1]) as index:
        assert index.search("any").coverage.share == 1


def test_the_command_line_knows_mixed_versions(ray_session: Session, upgrade: Upgrade, asked: list[str]) -> None:
    mixed = mix(ray_session, upgrade, upgrade.part)["version"]

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--root", str(upgrade.root)])

    assert call("promote", "live", mixed).exit_code == 0
    listed = {one["version"]: one for one in json.loads(call("versions", "--json").stdout)}
    assert listed[mixed]["recall"] is None and listed[mixed]["gate"] == "none" and listed[mixed]["aliases"] == "live"
    done = call("search", "live", asked[0], "--with-duplicates")
    assert done.exit_code == 0 and "#" in done.stdout and "nan" not in done.stdout
    with pytest.raises(MixedUnsupported, match="compare one of these"):
        compare(upgrade.catalog.store, upgrade.catalog, upgrade.old, mixed, ray_session, choose_reporter(True))


def test_mixed_versions_are_marked_in_and_read_from_object_storage(
    ray_session: Session, upgrade: Upgrade, asked: list[str], bridge: str, s3_server: S3Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    manifest = mix(ray_session, upgrade, upgrade.part, bridge, BRIDGE)
    store = open_store(f"s3://{s3_server.bucket()}/penstock")
    for path in (upgrade.root / "indexes").rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(upgrade.root).as_posix())
    catalog = Catalog(store, "test")
    old, new = (
        tuple(shards_of(catalog.manifest(version), catalog.version_folder(version)))
        for version in (upgrade.old, upgrade.part)
    )
    for shard, left in zip(old, MixedParts.of(manifest).shards, strict=True):
        assert mark_superseded(SupersededTask(store.url, "marked", shard, new)).files == left.files
    with OpenIndex(catalog, "live", manifest) as index, upgrade.opened(manifest["version"]) as other:
        assert same(index.search(asked, 6, rows=True), other.search(asked, 6))


# ---- measurement


@pytest.fixture(scope="module")
def judged(made: Upgrade, tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> Workspace:
    """The pipeline of the new model, with queries of which all but the first are judged."""
    folder = tmp_path_factory.mktemp("judged")
    lines = [json.dumps({"id": f"q{number}", "text": text}) for number, text in enumerate(asked)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    relevant = [str(one["id"]) for one in made.documents[::5]]
    judgements = [f"q{number}\t{name}\t1\nq{number}\td07\t2" for number, name in enumerate(relevant) if number]
    (folder / "qrels.tsv").write_text("\n".join(judgements))
    settings = {"queries": str(folder / "queries.jsonl"), "relevance": str(folder / "qrels.tsv"), "k": 3}
    return Workspace(made.root.parent, {"index": INDEX, "passages__overlap": 0, "evaluate": settings})


def test_quality_is_measured_by_judgements_for_each_query(
    ray_session: Session, upgrade: Upgrade, judged: Workspace, asked: list[str]
) -> None:
    resolved = judged.pipeline().plan().resolved
    manifest = mix(ray_session, upgrade, upgrade.part)
    found = measure_answers(ray_session, upgrade.catalog.store.url, manifest, upgrade.old, resolved)
    assert (found["queries"], found["k"]) == (len(asked) - 1, 3)
    with upgrade.opened(manifest["version"]) as index:
        ids = index.search(asked[1:], 15).ids
    for query, (names, document) in enumerate(zip(ids, upgrade.documents[5::5], strict=False)):
        ranked = list(dict.fromkeys(name.rpartition("#")[0] for name in names))[:3]
        judgement = {"d07": 2.0} | {str(document["id"]): 1.0}
        gains = [judgement.get(name, 0.0) for name in ranked]
        ideal = sum(gain / np.log2(rank + 2) for rank, gain in enumerate(sorted(judgement.values(), reverse=True)))
        dcg = sum(gain / np.log2(rank + 2) for rank, gain in enumerate(gains))
        assert found["per_query"]["ndcg"][query] == pytest.approx(dcg / ideal, abs=1e-6)
        assert found["per_query"]["recall"][query] == pytest.approx(np.count_nonzero(gains) / len(judgement), abs=1e-6)
    assert found["recall"] == pytest.approx(np.mean(found["per_query"]["recall"]), abs=1e-6)


def test_without_judgements_the_overlap_with_the_old_version_is_measured(
    ray_session: Session, upgrade: Upgrade, judged: Workspace, asked: list[str], bridge: str
) -> None:
    resolved = judged.pipeline(evaluate__relevance=None).plan().resolved
    url = upgrade.catalog.store.url
    manifest = mix(ray_session, upgrade, upgrade.part, bridge)
    found = measure_answers(ray_session, url, manifest, upgrade.old, resolved)
    with upgrade.opened(manifest["version"]) as index, upgrade.opened(upgrade.old) as old:
        pairs = zip(index.search(asked, 3).ids, old.search(asked, 3).ids, strict=True)
        overlap = [len(set(one) & set(other)) / 3 for one, other in pairs]
    assert found["per_query"] == {"overlap": pytest.approx(overlap, abs=1e-6)} and 0 < found["overlap"] < 1
    resolved = judged.pipeline(evaluate={"queries": 12}).plan().resolved
    waiting = measure_answers(ray_session, url, mix(ray_session, upgrade, None), upgrade.old, resolved)
    assert (waiting["overlap"], waiting["queries"], waiting["queries_from"]) == (1.0, 12, "passages")


# ---- one model with other prompts


def change_model(upgrade: Upgrade, version: str, **changes: Any) -> None:  # noqa: ANN401
    """Let the manifest of a version state something else of its model."""
    path = upgrade.root / "indexes/test/versions" / version / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"model": manifest["model"] | changes}))


@pytest.mark.parametrize("prompt", ["document_prompt", "query_prompt"])
def test_similarities_of_other_prompts_never_meet(
    ray_session: Session, upgrade: Upgrade, asked: list[str], prompt: str
) -> None:
    shutil.rmtree(upgrade.root / "indexes/test/versions" / upgrade.old)  # both parts are of the new model
    same_model = replace(upgrade, old=upgrade.new)
    ways = {}
    for text in ("", "about: "):
        change_model(upgrade, upgrade.new, **{prompt: text})
        manifest = mix(ray_session, same_model, upgrade.part)
        with upgrade.opened(manifest["version"]) as index:
            present = index._present()
            assert isinstance(present, OpenMixed)
            ways[text] = present.way
            found = index.search(asked, 5)
            assert found.ranks_fused == bool(text) and found.ids.all()
            if not text:
                assert same(found, index.search(index.encode(asked), 5))
                continue
            with pytest.raises(ModelMismatch, match="has no adapter of queries"):
                index.search(index.encode(asked), 5)
    assert ways == {"": Way.ONE_SPACE, "about: ": Way.PLACES}
    with pytest.raises(BridgeUnfit, match="need an adapter"):
        mix(ray_session, same_model, upgrade.part, queries=BRIDGE)
    upgrade.point_to(upgrade.part)
    with open_index(str(upgrade.root), "live") as index:
        index.search(index.encode(asked), 5)
        upgrade.point_to(upgrade.new)
        with pytest.raises(ModelMismatch, match="got .*, prompts ('about: ' and ''|'' and 'about: '); open"):
            index.refresh()


@pytest.mark.parametrize("reason", [Reason.BACKFILL, Reason.UPGRADE, Reason.PROMOTE])
def test_no_run_undoes_a_move_to_another_model(upgrade: Upgrade, judged: Workspace, reason: Reason) -> None:
    catalog, nothing = upgrade.catalog, {"query": "", "document": ""}
    catalog.move("live", upgrade.new, expected=None, run_id="test", reason=reason)
    others: list[dict[str, Any]] = [
        {"embedding__layers": LAYERS, "embedding__layers_trained": True},
        {"embedding__prompts": {**nothing, "query": "about: "}},
        {"embedding__prompts": {**nothing, "document": "passage: "}},
    ]
    for changes in others:
        moves, note = alias_moves(judged.pipeline(**changes).plan().resolved, catalog, "0" * 16)
        assert not moves and f"moved to version {upgrade.new} of model" in note and f"by {reason}: set" in note
    for changes in ({}, {"embedding__dimension": 64}, {"embedding__precision": "bfloat16"}):
        assert alias_moves(judged.pipeline(**changes).plan().resolved, catalog, "0" * 16) == (True, "")
    catalog.move("live", upgrade.old, expected=None, run_id="test", reason=Reason.PUBLISH)
    assert alias_moves(judged.pipeline().plan().resolved, catalog, "0" * 16) == (True, "")


def test_no_run_undoes_a_move_to_another_dimension(upgrade: Upgrade, judged: Workspace) -> None:
    """As an upgrade of the dimension alone leaves it: the file with the old one is refused, one with a third is not."""
    catalog, resolved = upgrade.catalog, judged.pipeline(embedding__dimension=256).plan().resolved
    change_model(upgrade, upgrade.old, **model_of(resolved))
    for reason in (Reason.BACKFILL, Reason.UPGRADE):
        catalog.move("live", upgrade.old, expected=None, run_id="test", reason=Reason.PUBLISH)
        catalog.move("live", upgrade.new, expected=None, run_id="test", reason=reason)
        moves, note = alias_moves(resolved, catalog, "0" * 16)
        assert not moves and "where the file has" in note
        told, own = note.split(" where the file has ")
        assert "dimension 384, prompts" in told and "dimension 256, prompts" in own
        for changes in ({}, {"embedding__dimension": 64}):
            assert alias_moves(judged.pipeline(**changes).plan().resolved, catalog, "0" * 16) == (True, "")


# ---- while the alias points to a mixed version


def test_health_and_bridges_look_at_the_old_part(ray_session: Session, upgrade: Upgrade, judged: Workspace) -> None:
    mixed = str(mix(ray_session, upgrade, upgrade.part)["version"])
    upgrade.point_to(mixed)
    told = CliRunner().invoke(app, ["health", "live", "--root", str(upgrade.root), "--json"])
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout.splitlines()[-1])
    assert record["version"] == upgrade.old and record["rows"] == len(upgrade.vectors(upgrade.old))
    assert f"version {mixed} is mixed of two spaces: the report is of its old part" in told.output
    old = judged.pipeline(embedding__layers=LAYERS, embedding__layers_trained=True).plan().resolved
    assert published_manifest(old, upgrade.catalog.store)["version"] == upgrade.old
    refuse_other_model(old, published_manifest(old, upgrade.catalog.store))


# ---- clean-up


def test_clean_up_keeps_what_a_rollback_returns_to(upgrade: Upgrade) -> None:
    """As nightly runs of the old file would make `part` and `new`, which are newer."""
    catalog, store = upgrade.catalog, open_store(str(upgrade.root))
    upgrade.point_to(upgrade.part)
    made_by = {version: catalog.manifest(version)["run_id"] for version in (upgrade.old, upgrade.part, upgrade.new)}
    later = [f"test-20990101T0000{number:02d}Z-00000000" for number in range(21)]
    for run_id in later:
        store.write(f"runs/{run_id}/dead-letters.parquet", b"")
    time.sleep(0.01)
    collect_garbage(store, 1, 1e-6, False)
    assert set(catalog.versions()) == {upgrade.old, upgrade.part, upgrade.new}
    assert store.folders("runs") == {*made_by.values(), *later[1:]}, "an upgrade reads how the old version was made"
    assert catalog.rollback("live", "test").version == upgrade.old
    collect_garbage(store, 1, 1e-6, False)
    assert set(catalog.versions()) == {upgrade.old, upgrade.new}


@pytest.mark.parametrize(
    ("days", "flipped", "kept"), [(0, False, True), (59, False, True), (61, False, False), (0, True, False)]
)
def test_clean_up_keeps_the_stages_of_an_unfinished_upgrade(
    upgrade: Upgrade, days: int, flipped: bool, kept: bool
) -> None:
    stage = upgrade.root / "stages/embeddings/of-an-upgrade/vectors.parquet"
    other = upgrade.root / "stages/embeddings/of-nothing/vectors.parquet"
    record = upgrade.root / "upgrades/test/0123456789abcdef/upgrade.json"
    for path in (stage, other, record):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"keep": [["embeddings", "of-an-upgrade"]]}))
    moment = time.time() - days * 86_400
    os.utime(record, (moment, moment))
    if flipped:
        record.with_name("flip.json").write_text("{}")
    time.sleep(0.01)
    collect_garbage(open_store(str(upgrade.root)), 1, 1e-6, False)
    assert stage.exists() is kept and not other.exists() and record.exists()
