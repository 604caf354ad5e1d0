"""The reader on two published versions: what it opens and when, filters, missing shards, and a moving alias."""

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from penstock.cluster.catalog import Catalog
from penstock.cluster.file_cache import DamagedFile
from penstock.cluster.node import CACHE_VARIABLE
from penstock.cluster.session import Session
from penstock.cluster.storage import Store, open_store
from penstock.operators.encoding import ModelMismatch
from penstock.operators.searching import SearchParameters, normalize
from penstock.pipelines import Coverage, Found, OpenIndex, open_index
from penstock.pipelines.cli import app
from penstock.pipelines.opened import Request
from penstock.pipelines.reader import AliasUnknown

from ..conftest import S3Server
from .conftest import Document, Workspace, published_vectors

KEEP = {"kind": "string", "year": "int64", "weight": "float64", "free": "bool", "written": "timestamp"}
SEARCHERS, MOVES = 8, 20


@dataclass(frozen=True)
class Library:
    """Two published versions under one root; `live` points to the second."""

    root: Path
    documents: dict[str, Document]
    old: str
    new: str

    @property
    def catalog(self) -> Catalog:
        return Catalog(open_store(str(self.root)), "test")

    @property
    def vectors(self) -> dict[str, list[float]]:
        return published_vectors(self.root)

    def point_to(self, version: str) -> None:
        self.catalog.move("live", version, expected=None, run_id="test", reason="promote")

    def file(self, version: str, name: str) -> Path:
        return self.root / "indexes/test/versions" / version / name

    def derive(self, name: str, change: Callable[[dict[str, Any]], None]) -> str:
        """A version like `new` with a changed manifest."""
        folder = self.root / "indexes/test/versions"
        shutil.copytree(folder / self.new, folder / name)
        manifest = json.loads((folder / name / "manifest.json").read_text())
        change(manifest)
        (folder / name / "manifest.json").write_text(json.dumps({**manifest, "version": name}))
        return name


@pytest.fixture(scope="module")
def published(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Library:
    """Made once; tests work on copies. The old version is the new one without its second shard."""
    workspace = Workspace(tmp_path_factory.mktemp("reader"), {"documents__keep": KEEP})
    documents = [document(number, text) for number, text in enumerate(real_texts[:40])]
    workspace.write("all.jsonl", [*documents, {**documents[10], "id": "z-copy"}])
    report = workspace.pipeline().run()
    assert report is not None
    made = Library(workspace.root, {str(one["id"]): one for one in documents}, "old", str(report.version))
    made.derive(
        "old", lambda manifest: manifest.update(rows=manifest["shards"][0]["rows"], shards=manifest["shards"][:1])
    )
    return made


def document(number: int, text: str) -> Document:
    return {
        "id": f"d{number:02d}",
        "text": text,
        "kind": ("a", "b", "c", None)[number % 4],
        "year": 2000 + number % 7,
        "weight": number / 4,
        "free": number % 3 == 0,
        "written": f"2024-01-{1 + number % 28:02d}T12:00:00Z",
    }


@pytest.fixture
def library(published: Library, tmp_path: Path) -> Library:
    shutil.copytree(published.root / "indexes", tmp_path / "root" / "indexes")
    return Library(tmp_path / "root", published.documents, published.old, published.new)


@pytest.fixture
def queries(published: Library) -> np.ndarray:
    """float32 (12, d): some of the stored vectors, at length 1."""
    return normalize(np.array(list(published.vectors.values())[:12]))


@pytest.fixture
def remote(library: Library, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same versions on S3, and an empty cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    store = open_store(f"s3://{s3_server.bucket()}/penstock")
    for path in library.root.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(library.root).as_posix())
    return store


def opened_now(library: Library) -> OpenIndex:
    return open_index(str(library.root), "test/live")


def same(first: Found, second: Found) -> bool:
    return bool((first.ids == second.ids).all()) and np.array_equal(
        first.similarities, second.similarities, equal_nan=True
    )


def fetched(server: S3Server, store: Store) -> list[str]:
    """Names of the shards' files that were read from the store, one for each time."""
    bucket = store.url.split("/")[2]
    targets = [entry["target"] for entry in server.log() if entry["method"] == "GET" and bucket in entry["target"]]
    return sorted(target.rpartition("/")[2].rstrip("?") for target in targets if "/shard-" in target)


# ---- opening


def test_shards_and_rows_are_fetched_when_they_are_needed(
    remote: Store, s3_server: S3Server, queries: np.ndarray
) -> None:
    with open_index(remote.url, "live") as index:
        assert len(index) and not fetched(s3_server, remote)
        with ThreadPoolExecutor(SEARCHERS) as threads:
            found = list(threads.map(lambda _: index.search(queries, 5), range(SEARCHERS)))
        assert all(same(found[0], one) for one in found)
        searched = [f"shard-0000{shard}.{kind}" for shard in range(2) for kind in ("faiss", "ids.arrow")]
        assert fetched(s3_server, remote) == searched
        assert index.search(queries, 5, rows=True).rows is not None
        assert fetched(s3_server, remote) == sorted(searched + [f"shard-0000{shard}.rows.arrow" for shard in range(2)])
    with open_index(remote.url, "live") as again:
        assert same(again.search(queries, 5), found[0])
    assert len(fetched(s3_server, remote)) == 6


def test_texts_rows_and_no_queries_at_all(library: Library, queries: np.ndarray) -> None:
    with opened_now(library) as index:
        wanted = library.documents["d20"]
        found = index.search(str(wanted["text"])[:200], 2, rows=True)
        assert found.rows is not None and found.version == index.version == library.new
        best = found.rows[0].to_pylist()[0]
        assert (best["document_id"], best["kind"], best["year"]) == ("d20", wanted["kind"], wanted["year"])
        assert found.rows[0].column_names[:3] == ["id", "similarity", "document_id"]
        assert np.allclose(found.rows[0].column("similarity").to_numpy(), found.similarities[0])
        none = index.search(queries[:0], 3, rows=True)
        assert none.ids.shape == (0, 3) and none.rows == []
        with pytest.raises(ValueError, match="queries of 3 dimensions must have the index's 384"):
            index.search(np.zeros((1, 3)))


def test_a_closed_index_says_so(library: Library, queries: np.ndarray) -> None:
    index = opened_now(library)
    with index:
        index.search(queries)
    with pytest.raises(ValueError, match=r"index \(test\) is closed; open it again"):
        index.search(queries)


# ---- filters


@pytest.mark.parametrize(
    ("where", "meets"),
    [
        ({"kind": "a"}, lambda row: row["kind"] == "a"),
        (
            {"kind": ["a", "c"], "year": {"min": 2002, "max": 2004}},
            lambda row: row["kind"] in ("a", "c") and 2002 <= row["year"] <= 2004,
        ),
        ({"year": {"max": 2001}}, lambda row: row["year"] <= 2001),
        ({"weight": {"min": 5}}, lambda row: row["weight"] >= 5),
        ({"free": True}, lambda row: row["free"]),
        ({"document_id": {"d12", "d13"}}, lambda row: row["id"] in ("d12", "d13")),
        ({"written": {"min": datetime(2024, 1, 20, tzinfo=UTC)}}, lambda row: row["written"] >= "2024-01-20"),
        ({"year": np.int64(2003)}, lambda row: row["year"] == 2003),
        ({"kind": []}, lambda row: False),
        ({}, lambda row: True),
    ],
)
def test_filters_find_the_nearest_of_the_rows_that_meet_them(
    library: Library, queries: np.ndarray, where: dict[str, object], meets: Callable[[Document], bool]
) -> None:
    stored = library.vectors
    allowed = [name for name in stored if meets(library.documents[name.partition("#")[0]])]
    with opened_now(library) as index:
        found = index.search(queries, 4, rows=True, where=where)
    near = queries @ np.array([stored[name] for name in allowed], np.float32).reshape(-1, queries.shape[1]).T
    assert found.rows is not None and found.coverage.share == 1
    for query in range(len(queries)):
        best = sorted(zip(-near[query], allowed, strict=True))[:4]
        names = [name for name in found.ids[query] if name is not None]
        assert len(names) == len(best) and set(names) <= set(allowed)
        assert np.allclose(found.similarities[query, : len(best)], [-one[0] for one in best], atol=1e-5)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"yaer": 2000},
            r"column \(yaer\) must be one that the index keeps: document_id, kind, year, weight, free, wri",
        ),
        ({"text": "x"}, r"column \(text\) must be one that the index keeps"),
        ({"year": "soon"}, r"value \('soon'\) for column year must be of its type int64, got str"),
        ({"year": True}, r"value \(True\) for column year must be of its type int64, got bool"),
        ({"kind": 3}, r"value \(3\) for column kind must be of its type string, got int"),
        ({"kind": [None]}, r"value \(None\) for column kind must be of its type string, got NoneType"),
        ({"written": {"min": "May"}}, r"value \('May'\) for column written must be of its type timestamp, got str"),
        ({"year": {"from": 1}}, r"range of column year \(\{'from': 1\}\) must have `min`, `max` or both"),
        ({"year": {}}, r"range of column year \(\{\}\) must have `min`, `max` or both"),
    ],
)
def test_filters_that_cannot_be_are_refused(
    library: Library, queries: np.ndarray, where: dict[str, object], message: str
) -> None:
    with opened_now(library) as index, pytest.raises(ValueError, match=message):
        index.search(queries, where=where)


# ---- missing shards


def damage(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_without_a_shard_a_search_fails_or_answers_from_the_rest(
    library: Library, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = library.file(library.new, "shard-00001.ids.arrow")
    data = damage(path)
    with opened_now(library) as index:
        rows = [shard["rows"] for shard in index.manifest["shards"]]
        with pytest.raises(DamagedFile, match="shard-00001.ids.arrow"):
            index.search(queries)
        found = index.search(queries, 10_000, rows=True, degraded=True)
        assert found.coverage.missing == (1,)
        assert found.coverage.share == pytest.approx(rows[0] / sum(rows))
        assert [name is not None for name in found.ids[0]].count(True) == rows[0]
        assert "shard 1 of indexes/test/versions" in caplog.text and "next try in 30 s" in caplog.text
        path.write_bytes(data)
        assert index.search(queries, degraded=True).coverage.missing == (1,)  # within the pause
        index._present().shards[1].searcher._retry_s = time.monotonic()
        assert index.search(queries, degraded=True).coverage == Coverage()
        assert index.search(queries).coverage.share == 1
        assert same(index.search(queries), index.search(queries, degraded=True))


def test_lost_rows_cost_a_shard_only_where_rows_are_needed(library: Library, queries: np.ndarray) -> None:
    library.file(library.new, "shard-00000.rows.arrow").unlink()
    with opened_now(library) as index:
        assert index.search(queries, degraded=True).coverage.share == 1
        for options in ({"rows": True}, {"where": {"year": {"min": 2000}}}):
            with pytest.raises(DamagedFile, match=r"shard-00000.rows.arrow.*no file"):
                index.search(queries, **options)  # type: ignore[arg-type]
            found = index.search(queries, degraded=True, **options)  # type: ignore[arg-type]
            assert found.coverage.missing == (0,) and found.ids[0, 0] is not None
    library.file(library.new, "shard-00001.rows.arrow").unlink()
    with opened_now(library) as index, pytest.raises(DamagedFile, match="needs one shard at least"):
        index.search(queries, degraded=True, rows=True)


# ---- a moving alias


def test_answers_are_of_one_version_while_the_alias_moves(library: Library, queries: np.ndarray) -> None:
    expected = {}
    for version in (library.old, library.new):
        library.point_to(version)
        with opened_now(library) as index:
            expected[version] = index.search(queries, 5)
    assert not same(*expected.values())
    answers: list[Found] = []
    ended = threading.Event()

    def search() -> None:
        while not ended.is_set():
            answers.append(index.search(queries, 5))

    with open_index(str(library.root), "live", follow=True, every_s=0.01) as index:
        with ThreadPoolExecutor(SEARCHERS) as threads:
            searches = [threads.submit(search) for _ in range(SEARCHERS)]
            for move in range(MOVES):
                wanted = (library.old, library.new)[move % 2]
                library.point_to(wanted)
                while index.version != wanted and index.follow_error is None:
                    time.sleep(0.005)
            ended.set()
            for one in searches:
                one.result()
        assert index.follow_error is None
    assert {answer.version for answer in answers} == set(expected)
    assert all(same(answer, expected[answer.version]) for answer in answers)


def test_what_was_in_use_is_opened_before_the_change_and_the_old_version_is_let_go(
    library: Library, queries: np.ndarray
) -> None:
    library.point_to(library.old)
    with opened_now(library) as index:
        index.search("repair of the roof", rows=True)
        before = index._present()
        gone = [weakref.ref(shard.searcher.get()) for shard in before.shards.values()]
        assert not index.refresh()
        library.point_to(library.new)
        assert index.refresh()
        present = index._present()
        assert all(shard.searcher.ready for shard in present.shards.values()) and present.encoder is before.encoder
        assert all(shard.rows.ready for shard in present.shards.values())
        before.search(queries, Request(3, SearchParameters(), True, (), False))  # as one under way does
        gc.disable()
        try:
            del before
            assert [reference() for reference in gone] == [None]
        finally:
            gc.enable()


def test_shards_that_were_not_in_use_stay_closed(library: Library) -> None:
    other = library.derive("other", lambda manifest: None)
    with opened_now(library) as index:
        index._present().shards[1].searcher.get()
        library.point_to(other)
        assert index.refresh()
        shards = index._present().shards.values()
        assert [shard.searcher.ready for shard in shards] == [False, True]
        assert not any(shard.rows.ready for shard in shards)


def test_a_version_that_cannot_be_opened_is_not_changed_to(
    library: Library, queries: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    library.point_to(library.old)
    data = damage(library.file(library.new, "shard-00001.faiss"))
    with open_index(str(library.root), "live", follow=True, every_s=0.01) as index:
        before = index.search(queries)
        library.point_to(library.new)
        while index.follow_error is None:
            time.sleep(0.005)
        assert isinstance(index.follow_error, DamagedFile) and index.version == library.old
        assert same(index.search(queries), before)
        assert "alias live of index test cannot be followed" in caplog.text and "shard-00001.faiss" in caplog.text
        library.file(library.new, "shard-00001.faiss").write_bytes(data)
        assert index.refresh() and index.follow_error is None
        assert index.search(queries).version == library.new


def test_another_model_must_be_the_one_of_the_manifest(library: Library) -> None:
    other = library.derive("other", lambda manifest: manifest["model"].update(weights_sha256="0" * 64))
    with opened_now(library) as index:
        index.search("repair of the roof")
        library.point_to(other)
        with pytest.raises(ModelMismatch):
            index.refresh()
        assert index.search("repair of the roof").version == library.new


def test_vectors_of_one_model_never_ask_another(library: Library, queries: np.ndarray) -> None:
    other = library.derive("other", lambda manifest: manifest["model"].update(space="f" * 32))
    with opened_now(library) as texts_only, opened_now(library) as index:
        index.search(queries)
        library.point_to(other)
        assert texts_only.refresh()
        with pytest.raises(ModelMismatch, match="version other of index test must have the vector space of version"):
            index.refresh()
        assert index.version == library.new


def test_an_alias_that_is_gone_changes_nothing(library: Library, queries: np.ndarray) -> None:
    with opened_now(library) as index:
        shutil.rmtree(library.root / "indexes/test/aliases/live")
        with pytest.raises(AliasUnknown, match=r"alias \(live\) points to no published version"):
            index.refresh()
        assert index.search(queries).version == library.new
    with pytest.raises(ValueError, match=r"every_s \(0\) must be above 0"):
        index.follow(0)


def test_following_ends_with_the_index(library: Library, queries: np.ndarray) -> None:
    def followers() -> int:
        return sum(thread.name == "penstock-follow" for thread in threading.enumerate())

    index = open_index(str(library.root), "live", follow=True, every_s=0.01)
    index.search(queries)
    assert followers() == 1
    del index
    for _ in range(1000):
        if not followers():
            break
        time.sleep(0.01)
    assert followers() == 0


# ---- the command line


def test_command_line_filters_and_names_duplicates_and_missing_shards(library: Library) -> None:
    text = str(library.documents["d10"]["text"])[:200]
    arguments = ["search", "live", text, "--root", str(library.root), "--k", "50", "--json"]
    arguments += ["--where", "year>=2002", "--where", "year<=2004", "--where", "kind=a,c"]
    done = CliRunner().invoke(app, [*arguments, "--with-duplicates"])
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)["results"][0]["answers"]
    assert answers and all(2002 <= row["year"] <= 2004 and row["kind"] in ("a", "c") for row in answers)
    assert {row["document_id"]: row["duplicates"] for row in answers}["d10"] == ["z-copy#0"]
    damage(library.file(library.new, "shard-00001.faiss"))
    done = CliRunner().invoke(app, [*arguments, "--degraded"])
    assert json.loads(done.stdout)["coverage"]["missing"] == [1]
    assert "of the rows, without shard 1" in done.stderr
