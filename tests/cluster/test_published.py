"""Published files as readers open them, and the node's cache of those that came from object storage."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.file_cache import PARTIAL, DamagedFile, FileCache
from penstock.cluster.jobs.shards import FileRecord, ShardRecord
from penstock.cluster.local_store import LocalStore
from penstock.cluster.node import CACHE_LIMIT_VARIABLE, CACHE_VARIABLE, cache_limit_bytes
from penstock.cluster.published import OBJECTS, hold_file, open_duplicates, open_rows, open_searcher
from penstock.cluster.s3_store import S3Store
from penstock.cluster.storage import Store
from penstock.operators.indexing import Codec, Family, IndexSpec, Metric, ShardBuilder, train_index
from penstock.operators.searching import SearchParameters, VectorWriter, normalize

from ..conftest import S3Server

ROWS, DIMENSION = 50, 8
VECTORS = normalize(np.random.default_rng(3).normal(size=(ROWS, DIMENSION)))
IDS = [f"p{row:02d}" for row in range(ROWS)]
FOLDER = "indexes/test/versions/one"

# A process that holds one cached file, says so, and then fetches another one.
HOLDER = """
import sys
from pathlib import Path
from penstock.cluster.file_cache import FileCache
from penstock.cluster.jobs.shards import FileRecord
from penstock.cluster.local_store import LocalStore
root, cache, first, second, size = sys.argv[1:]
files, store = FileCache(Path(cache), 10**6), LocalStore(Path(root))
with files.hold(store, "first", FileRecord("first", int(size), first)):
    print("held", flush=True)
    with files.hold(store, "second", FileRecord("second", int(size), second)):
        print("never", flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this node; the folder of its files."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / OBJECTS


@pytest.fixture
def shard(store: Store, cache: Path, tmp_path: Path) -> ShardRecord:
    """A published shard in a store of each kind."""
    return published_shard(store, tmp_path / "built")


def published_shard(store: Store, built: Path) -> ShardRecord:
    built.mkdir()
    spec = IndexSpec(Family.FLAT, Codec.NONE, Metric.COSINE, DIMENSION, "Flat", 0, 0)
    builder = ShardBuilder(train_index(spec, VECTORS[:0]))
    builder.add(VECTORS)
    builder.write(built / "shard-00000.faiss")
    with VectorWriter(built / "shard-00000.vectors.arrow", DIMENSION, np.float16) as writer:
        writer.add(VECTORS)
    links = {"id": ["d"], "document_id": ["x"], "represented_by": ["p01"]}
    for kind, columns in (("ids", {"id": IDS}), ("rows", {"passage_id": IDS, "text": IDS}), ("duplicates", links)):
        table = pa.table(columns)
        with pa.ipc.new_file(str(built / f"shard-00000.{kind}.arrow"), table.schema) as stream:
            stream.write_table(table)
    for path in sorted(built.iterdir()):
        store.upload(path, f"{FOLDER}/{path.name}")
    return ShardRecord(0, ROWS, 1, FOLDER, tuple(record_of(path) for path in sorted(built.iterdir())))


def record_of(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def own_nearest(store: Store, shard: ShardRecord) -> list[str]:
    """What each stored vector finds first: itself, if all is well."""
    searcher = open_searcher(store, shard, Family.FLAT, Metric.COSINE)
    nearest: list[str] = searcher.search(VECTORS, 1, SearchParameters()).ids[:, 0].tolist()
    return nearest


def gets(server: S3Server, name: str) -> int:
    return sum(entry["method"] == "GET" and name in entry["target"] for entry in server.log())


# ---- opening


def test_a_shard_opens_from_any_store(store: Store, shard: ShardRecord) -> None:
    assert own_nearest(store, shard) == IDS
    assert open_rows(store, shard).column("text").to_pylist() == IDS
    assert open_duplicates(store, shard).column("represented_by").to_pylist() == ["p01"]


@pytest.mark.parametrize("kind", ["faiss", "ids.arrow", "vectors.arrow"])
def test_other_bytes_or_none_are_refused_by_name(store: Store, shard: ShardRecord, kind: str, cache: Path) -> None:
    place = f"{FOLDER}/shard-00000.{kind}"
    data = store.read(place)
    for wrong in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b"1"):
        store.write(place, wrong)
        expected = next(file.sha256 for file in shard.files if file.name == f"shard-00000.{kind}")
        message = rf"published file \({place}\) must have sha256 {expected[:16]}, got [0-9a-f]{{16}}; restore it"
        with pytest.raises(DamagedFile, match=message):
            own_nearest(store, shard)
    store.delete([place])
    with pytest.raises(DamagedFile, match=rf"\({place}\) must have sha256 \w+, got no file; restore it"):
        own_nearest(store, shard)
    assert not list(cache.glob(f"*{PARTIAL}"))
    store.write(place, data)
    assert own_nearest(store, shard) == IDS


def test_files_from_object_storage_are_fetched_once_and_checked_each_time(
    s3_server: S3Server, cache: Path, tmp_path: Path
) -> None:
    store = S3Store(s3_server.bucket(), "root")
    shard = published_shard(store, tmp_path / "built")
    place = f"{store.bucket}/root/{FOLDER}"
    assert own_nearest(store, shard) == IDS == own_nearest(S3Store(store.bucket, "root"), shard)
    assert [gets(s3_server, f"{place}/{file.name}") for file in shard.files] == [0, 1, 1, 0, 1]
    assert sorted(path.name for path in cache.iterdir() if path.is_file()) == sorted(
        shard.files[position].sha256 for position in (1, 2, 4)
    )
    damaged = cache / shard.files[1].sha256
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    assert own_nearest(store, shard) == IDS
    assert gets(s3_server, f"{place}/{shard.files[1].name}") == 2


# ---- the cache


@pytest.fixture
def files(tmp_path: Path) -> tuple[LocalStore, list[FileRecord]]:
    """A store with five files of 1,000 bytes; what the cache does is the same for every store."""
    root = tmp_path / "store"
    root.mkdir()
    for number in range(5):
        (root / str(number)).write_bytes(bytes([number]) * 1000)
    return LocalStore(root), [record_of(root / str(number)) for number in range(5)]


def cached(folder: Path, records: list[FileRecord]) -> list[int]:
    return [number for number, record in enumerate(records) if (folder / record.sha256).exists()]


def test_least_recently_opened_files_go_first(files: tuple[LocalStore, list[FileRecord]], tmp_path: Path) -> None:
    store, records = files
    cache = FileCache(tmp_path / "cache", 3000)
    for number in (0, 1, 2, 0, 3):  # 0 is opened again: 1 is the oldest when 3 needs room
        with cache.hold(store, str(number), records[number]) as path:
            assert path.read_bytes() == bytes([number]) * 1000
        time.sleep(0.02)  # beyond the resolution of file times
    assert cached(cache.folder, records) == [0, 2, 3]


def test_files_that_are_open_stay_and_the_limit_is_told(
    files: tuple[LocalStore, list[FileRecord]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, records = files
    cache = FileCache(tmp_path / "cache", 2000)
    with ExitStack() as held:
        for number in range(3):
            held.enter_context(cache.hold(store, str(number), records[number]))
        assert cached(cache.folder, records) == [0, 1, 2]
        assert "goes beyond its limit of 2000 bytes by 1000" in caplog.text
    with cache.hold(store, "3", records[3]):
        assert cached(cache.folder, records) == [2, 3]


def test_a_searcher_holds_its_files_for_as_long_as_it_lives(
    s3_server: S3Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_LIMIT_VARIABLE, "1")
    store = S3Store(s3_server.bucket(), "root")
    shard = published_shard(store, tmp_path / "built")
    searcher = open_searcher(store, shard, Family.FLAT, Metric.COSINE)
    rows = open_rows(store, shard)
    assert sum(path.is_file() for path in cache.iterdir()) == 4
    assert searcher.search(VECTORS, 1, SearchParameters()).ids[:, 0].tolist() == IDS
    del searcher
    with hold_file(store, FOLDER, shard.files[0]):
        left = {path.name for path in cache.iterdir() if path.is_file()}
    assert left == {shard.files[0].sha256, shard.files[3].sha256}
    assert rows.column("text").to_pylist() == IDS


def test_threads_that_want_one_file_fetch_it_once(s3_server: S3Server, cache: Path, tmp_path: Path) -> None:
    store = S3Store(s3_server.bucket(), "root")
    shard = published_shard(store, tmp_path / "built")
    s3_server.faults([{"do": "slow:0.2", "method": "GET", "match": store.bucket, "count": 100}])
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: own_nearest(store, shard), range(8)))
    finally:
        s3_server.faults([])
    assert found == [IDS] * 8
    assert gets(s3_server, store.bucket) == 3


def test_a_killed_process_leaves_neither_locks_nor_half_files(
    files: tuple[LocalStore, list[FileRecord]], tmp_path: Path
) -> None:
    store, records = files
    (store.root / "first").write_bytes((store.root / "0").read_bytes())
    os.mkfifo(store.root / "second")  # the download stands still half way
    cache = FileCache(tmp_path / "cache", 1000)
    arguments = [str(store.root), str(cache.folder), records[0].sha256, records[1].sha256, "1000"]
    with subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (store.root / "second").open("wb") as half:
            half.write(bytes(500))
            half.flush()
            with cache.hold(store, "2", records[2]):  # no room, but both files of the other process stay
                assert cached(cache.folder, records) == [0, 2]
                assert (cache.folder / f"{records[1].sha256}{PARTIAL}").exists()
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with cache.hold(store, "3", records[3]):
        assert [path.name for path in cache.folder.iterdir() if path.is_file()] == [records[3].sha256]
    (cache.folder / f"{records[1].sha256}{PARTIAL}").write_bytes(bytes(2000))
    with cache.hold(store, "1", records[1]) as path:
        assert path.read_bytes() == bytes([1]) * 1000
    assert [path.name for path in cache.folder.iterdir() if path.is_file()] == [records[1].sha256]


@pytest.mark.parametrize("value", ["20GiB", "0", "-1", ""])
def test_a_limit_that_is_no_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_LIMIT_VARIABLE, value)
    with pytest.raises(ValueError, match=rf"PENSTOCK_CACHE_BYTES \({value}\) must be a number of bytes above 0"):
        cache_limit_bytes()
