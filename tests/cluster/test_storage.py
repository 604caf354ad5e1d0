"""One contract over both kinds of store, and what a store does when the network or the server misbehaves."""

import io
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from http.client import RemoteDisconnected
from multiprocessing.pool import Pool
from pathlib import Path
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster.corpus_files import glob_objects
from penstock.cluster.local_store import LocalStore
from penstock.cluster.s3_client import S3Limits
from penstock.cluster.s3_store import S3Store
from penstock.cluster.storage import AlreadyExists, StorageUnavailable, Store, StoreUnsuitable, open_store

from ..conftest import RACERS, S3Server, environment

HASTY = S3Limits(connect_timeout_s=1.0, read_timeout_s=1.0, deadline_s=30.0)
SMALLEST_PART_BYTES = 5 * 2**20  # of a multipart upload, by S3's rules


# ---- the contract


def test_write_read_replace(store: Store) -> None:
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"")
    assert store.read("a/b.bin") == b""
    store.write("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"second"


def test_an_absent_object_is_told_by_name(store: Store, tmp_path: Path) -> None:
    assert store.info("a/absent") is None
    store.write("a/present", b"1")
    for read in (store.read, store.open, lambda path: store.download(path, tmp_path / "x")):
        for path in ("a/absent", "a/present/below", "a"):
            with pytest.raises(FileNotFoundError, match=path):
                read(path)
    with pytest.raises(FileNotFoundError, match="a/absent"):
        store.copy("a/absent", "a/copy")
    assert not (tmp_path / "x").exists()


def test_info_uses_the_clock_of_the_store(store: Store) -> None:
    before = store.clock()
    store.write("x", b"12345")
    info = store.info("x")
    assert info is not None
    assert info.size_bytes == 5
    assert info.modified.tzinfo is UTC
    assert before - timedelta(seconds=1) <= info.modified <= store.clock() + timedelta(seconds=1)


def test_listing(store: Store) -> None:
    for path in ("a/1", "a/2", "a/b/3", "ab/4"):
        store.write(path, path.encode())
    assert sorted(info.path for info in store.list("")) == ["a/1", "a/2", "a/b/3", "ab/4"]
    assert sorted((info.path, info.size_bytes) for info in store.list("a")) == [("a/1", 3), ("a/2", 3), ("a/b/3", 5)]
    assert store.names("a") == {"1", "2"}
    assert store.folders("a") == {"b"}
    assert store.folders("") == {"a", "ab"}
    assert store.names("absent") == store.folders("absent") == set()
    assert list(store.list("absent")) == []


def test_delete_leaves_no_empty_folders(store: Store) -> None:
    store.write("a/b/c", b"1")
    store.write("a/d", b"1")
    store.delete(["a/b/c", "a/never"])
    assert store.folders("a") == set()
    store.delete(["a/d"])
    assert store.folders("") == set()
    store.delete([])


def test_upload_download_copy(store: Store, tmp_path: Path) -> None:
    local, back = tmp_path / "local", tmp_path / "below" / "back"
    local.write_bytes(os.urandom(100_000))
    store.upload(local, "x/up")
    store.copy("x/up", "y/copy")
    store.copy("x/up", "y/copy")
    store.write("x/up", b"replaced")
    store.download("y/copy", back)
    assert back.read_bytes() == local.read_bytes()
    assert store.read("x/up") == b"replaced"
    assert sorted(info.path for info in store.list()) == ["x/up", "y/copy"]


def test_open_serves_parquet_by_ranges(store: Store) -> None:
    table = pa.table({"number": range(200_000), "text": [f"passage {i}" for i in range(200_000)]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=20_000)
    store.write("t.parquet", sink.getvalue())
    with store.open("t.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(7, columns=["number"])["number"][0].as_py() == 140_000
        assert file.seek(-4, os.SEEK_END) == len(sink.getvalue()) - 4
        assert file.read() == b"PAR1"
        assert file.read() == b""
    with store.open("t.parquet") as file:
        assert pq.read_table(file).equals(table)


def test_create_gives_the_record_that_is_there(store: Store) -> None:
    stored = store.create("c/1.json", {"who": "first"})
    assert stored["who"] == "first"
    assert len(stored["commit_id"]) == 32
    with pytest.raises(AlreadyExists) as refused:
        store.create("c/1.json", {"who": "second"})
    assert refused.value.record == stored
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.path, again.record) == ("c/1.json", stored)
    store.write("c/2.json", b"not JSON")
    with pytest.raises(AlreadyExists) as refused:
        store.create("c/2.json", {})
    assert refused.value.record == {}


def test_probe_accepts_the_store_and_leaves_nothing(store: Store) -> None:
    store.probe()
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "path", ["../x", "a/../x", "/etc/passwd", "", "a//b", "a/", ".", "a/./b", "a\\b", "a\0b", "s3://other/key", ".."]
)
def test_paths_that_could_leave_the_root_are_refused(store: Store, path: str, tmp_path: Path) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: store.read(path),
        lambda: store.open(path),
        lambda: store.info(path),
        lambda: store.write(path, b""),
        lambda: store.create(path, {}),
        lambda: store.upload(Path(__file__), path),
        lambda: store.download(path, tmp_path / "x"),
        lambda: store.copy(path, "x"),
        lambda: store.copy("x", path),
        lambda: store.delete([path]),
    ]
    if path:
        attempts += [lambda: list(store.list(path)), lambda: store.names(path), lambda: store.folders(path)]
    for attempt in attempts:
        with pytest.raises(ValueError, match="object path"):
            attempt()


@given(path=st.text(max_size=12).map(lambda text: text.replace("a", "..").replace("b", "/")))
def test_no_text_names_a_file_outside_the_root(path: str) -> None:
    store = LocalStore(Path("/nowhere/root"))
    try:
        target = store._locate(path)
    except ValueError:
        return
    assert Path(os.path.normpath(target)).is_relative_to("/nowhere/root/")
    assert os.path.normpath(target) != "/nowhere/root"


def test_a_pickled_store_works_in_another_process(store: Store, racers: Pool) -> None:
    store.write("x", b"from the parent")
    assert racers.apply(Store.read, (store, "x")) == b"from the parent"


def test_threads_share_a_store(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: store.write(f"n/{i}", str(i).encode()), range(40)))
        assert list(threads.map(lambda i: store.read(f"n/{i}"), range(40))) == [str(i).encode() for i in range(40)]


def _race(store: Store, racer: int, rounds: int) -> list[bool]:
    won = []
    for number in range(rounds):
        try:
            store.create(f"race/{number}.json", {"racer": racer})
            won.append(True)
        except AlreadyExists:
            won.append(False)
    return won


def test_of_racing_processes_exactly_one_creates(store: Store, racers: Pool) -> None:
    rounds = 5
    outcomes = racers.starmap(_race, [(store, racer, rounds) for racer in range(RACERS)], chunksize=1)
    assert [sum(outcome[i] for outcome in outcomes) for i in range(rounds)] == [1] * rounds


# ---- local folders


def test_a_folder_of_many_objects_is_listed_fast(tmp_path: Path) -> None:
    store, folder = LocalStore(tmp_path), tmp_path / "many"
    folder.mkdir()
    for number in range(20_000):
        os.close(os.open(folder / f"{number}", os.O_CREAT))
    started_s = time.process_time()
    assert len(store.names("many")) == 20_000
    assert time.process_time() - started_s < 0.4  # 100,000 in 2 s


def test_what_a_killed_writer_leaves_is_never_listed(tmp_path: Path) -> None:
    writer = (
        "import os, pathlib, signal\nfrom penstock.cluster.local_files import replacing\n"
        f"with replacing(pathlib.Path({str(tmp_path)!r}, 'a', 'x')) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", writer], check=False).returncode == -9
    store = LocalStore(tmp_path)
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert list(store.list()) == []
    assert store.names("a") == set()
    assert store.remove_leftovers(grace_s=3600) == 0
    time.sleep(0.05)
    assert store.remove_leftovers(grace_s=0.01) == 1
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(ValueError, match="grace"):
        store.remove_leftovers(grace_s=0)


def test_links_out_of_a_local_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    store = LocalStore(tmp_path / "root")
    store.write("a/x", b"1")
    (tmp_path / "root" / "a" / "file").symlink_to(tmp_path / "outside" / "secret")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside")
    for path in ("a/file", "folder/secret"):
        with pytest.raises(ValueError, match="symbolic link"):
            store.read(path)
    with pytest.raises(ValueError, match="symbolic link"):
        store.write("folder/new", b"")
    assert [info.path for info in store.list()] == ["a/x"]
    assert store.names("a") == {"x"}
    assert store.folders("") == {"a"}


def test_creating_and_pruning_folders_at_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def churn(number: int) -> None:
        for _ in range(50):
            store.write(f"a/b/c/{number}", b"1")
            store.delete([f"a/b/c/{number}"])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(churn, range(4)))
    assert list(tmp_path.iterdir()) == []


# ---- S3: faults of network and server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Callable[..., S3Store]]:
    """Makes a hasty store in a fresh bucket, with these faults."""

    def make(*rules: dict[str, object], limits: S3Limits = HASTY) -> S3Store:
        s3_server.faults(rules)
        return S3Store(s3_server.bucket(), "p", limits)

    yield make
    s3_server.faults([])


def requests(server: S3Server, store: S3Store, action: str | None) -> int:
    return sum(entry["action"] == action and store.bucket in str(entry["target"]) for entry in server.log())


@pytest.mark.parametrize("fault", ["lost_reply", "409", "drop", "503", "500", "slow:3"])
def test_create_succeeds_once_through_a_fault(s3_server: S3Server, bucket: Callable[..., S3Store], fault: str) -> None:
    store = bucket({"method": "PUT", "match": "manifests/", "do": fault, "count": 2})
    stored = store.create("manifests/1.json", {"who": "me"})
    assert requests(s3_server, store, fault) == 2
    assert store._record_at("manifests/1.json") == stored
    with pytest.raises(AlreadyExists):
        store.create("manifests/1.json", {"who": "other"})


def test_a_drop_is_a_drop(s3_server: S3Server, bucket: Callable[..., S3Store]) -> None:
    bucket({"match": "dropped", "do": "drop"})
    with pytest.raises(RemoteDisconnected):
        urlopen(f"{s3_server.url}/dropped")


def test_create_learns_its_outcome_when_every_reply_to_it_is_lost(bucket: Callable[..., S3Store]) -> None:
    store = bucket(
        {"method": "PUT", "match": "x.json", "do": "lost_reply", "count": 1000}, limits=S3Limits(deadline_s=2.0)
    )
    stored = store.create("x.json", {})
    assert store._record_at("x.json") == stored


@pytest.mark.parametrize(("fault", "count"), [("503", 2), ("500", 2), ("drop", 2), ("slow:1.5", 1)])
def test_reads_and_listings_survive_a_fault(
    s3_server: S3Server, bucket: Callable[..., S3Store], fault: str, count: int
) -> None:
    store = bucket()
    store.write("a/x", b"1")
    s3_server.faults([{"method": "GET", "match": store.bucket, "do": fault, "count": count}])
    assert store.read("a/x") == b"1"
    s3_server.faults([{"method": "GET", "match": store.bucket, "do": fault, "count": count}])
    assert [info.path for info in store.list()] == ["a/x"]


def test_a_storm_ends_at_the_deadline_and_leaves_the_old_object(
    s3_server: S3Server, bucket: Callable[..., S3Store]
) -> None:
    store = bucket()
    store.write("x", b"old")
    impatient = S3Store(store.bucket, "p", S3Limits(deadline_s=2.0))
    s3_server.faults([{"method": "PUT", "match": store.bucket, "do": "503", "count": 1000}])
    started_s = time.monotonic()
    with pytest.raises(
        StorageUnavailable, match=r"writing `x` in s3://.* failed \d+ times in .* SlowDown.* run the same"
    ):
        impatient.write("x", b"new")
    assert time.monotonic() - started_s < 10.0
    assert 3 <= requests(s3_server, store, "503") <= 20
    assert store.read("x") == b"old"


def test_a_hanging_reply_ends_at_the_deadline(bucket: Callable[..., S3Store]) -> None:
    store = bucket({"method": "GET", "do": "slow:6", "count": 100}, limits=S3Limits(read_timeout_s=60, deadline_s=1.5))
    with pytest.raises(StorageUnavailable, match="reading `x`.*no reply in time"):
        store.read("x")


def test_no_bucket_no_access_and_no_credentials_fail_fast(s3_server: S3Server, bucket: Callable[..., S3Store]) -> None:
    absent = S3Store("no-such-bucket-here", "p")
    for attempt in (
        lambda: absent.write("x", b""),
        lambda: absent.read("x"),
        lambda: list(absent.list()),
        absent.probe,
    ):
        with pytest.raises(StoreUnsuitable, match="create the bucket `no-such-bucket-here`"):
            attempt()
    assert requests(s3_server, absent, None) == 4
    store = bucket()
    s3_server.faults([{"do": "403", "match": store.bucket, "count": 1000}])
    for attempt in (lambda: store.write("x", b""), lambda: store.info("x"), lambda: store.create("x", {})):
        with pytest.raises(StoreUnsuitable, match="AWS_ACCESS_KEY_ID"):
            attempt()
    assert requests(s3_server, store, "403") <= 5  # botocore looks twice for the region after a HEAD


def test_missing_credentials_are_named(s3_server: S3Server, tmp_path: Path) -> None:
    program = "from penstock.cluster.storage import open_store; open_store('s3://bucket').read('x')"
    hidden = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"}
    variables = {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert "StoreUnsuitable" in run.stderr
    assert "NoCredentialsError" in run.stderr
    assert "set" not in run.stdout


def test_probe_refuses_a_store_that_ignores_preconditions(bucket: Callable[..., S3Store]) -> None:
    store = bucket({"method": "PUT", "do": "ignore_preconditions", "count": 1000})
    with pytest.raises(StoreUnsuitable, match="created one object twice"):
        store.probe()
    assert list(store.list()) == []


def test_probe_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnsuitable, match="refuses to create"):
        LocalStore(tmp_path / "file" / "below").probe()


# ---- S3: large objects


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * SMALLEST_PART_BYTES + 12_345))
    return path


IN_PARTS = S3Limits(read_timeout_s=5.0, deadline_s=20.0, part_bytes=SMALLEST_PART_BYTES)


@pytest.mark.parametrize(
    ("method", "match", "do"),
    [
        ("PUT", "partNumber=2", "drop"),
        ("PUT", "partNumber=1", "lost_reply"),
        ("POST", "uploads", "503"),
        ("POST", "uploadId", "lost_reply"),  # completed, but the second try finds no such upload
    ],
)
def test_a_large_upload_survives_a_fault(
    bucket: Callable[..., S3Store], large: Path, tmp_path: Path, method: str, match: str, do: str
) -> None:
    store = bucket({"method": method, "match": match, "do": do}, limits=IN_PARTS)
    store.upload(large, "large")
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert store._request("listing", "list_multipart_uploads").get("Uploads") is None


def test_a_large_upload_that_fails_is_aborted(bucket: Callable[..., S3Store], large: Path) -> None:
    store = bucket({"method": "PUT", "match": "partNumber=2", "do": "403", "count": 9}, limits=IN_PARTS)
    with pytest.raises(StoreUnsuitable, match="part 2 of `large`"):
        store.upload(large, "large")
    assert store.info("large") is None
    assert store._request("listing", "list_multipart_uploads").get("Uploads") is None


def test_uploads_of_killed_writers_are_removed_after_a_grace(bucket: Callable[..., S3Store]) -> None:
    store = bucket()
    other = S3Store(store.bucket, "other", HASTY)
    for owner in (store, other):
        owner._request("starting", "create_multipart_upload", Key=owner._key("x"))
    assert store.remove_leftovers(grace_s=3600) == 1  # moto says that every upload began in 2010
    assert [left["Key"] for left in store._request("listing", "list_multipart_uploads")["Uploads"]] == ["other/x"]


def test_an_object_replaced_during_a_read_is_noticed(bucket: Callable[..., S3Store]) -> None:
    store = bucket()
    store.write("x", os.urandom(3 * 2**20))
    with store.open("x") as file:
        file.read(10)
        store.write("x", os.urandom(3 * 2**20))
        with pytest.raises(OSError, match="replaced during a read"):
            file.read()


# ---- credentials


@pytest.mark.parametrize("fault", ["403", "503", "drop"])
def test_nothing_shows_credentials(
    s3_server: S3Server,
    bucket: Callable[..., S3Store],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    canaries = {
        "AWS_ACCESS_KEY_ID": "CANARYID",
        "AWS_SECRET_ACCESS_KEY": "CANARYSECRET",
        "AWS_SESSION_TOKEN": "CANARYTOKEN",
    }
    store = bucket()
    impatient = S3Store(store.bucket, "p", S3Limits(deadline_s=1.0))
    shown = [repr(store), str(vars(store))]
    with environment(canaries):
        store.write("a", b"1")
        shown += [repr(pickle.dumps(store)), repr(list(store.list()))]
        s3_server.faults([{"do": fault, "match": store.bucket, "count": 1000}])
        with pytest.raises((StoreUnsuitable, StorageUnavailable)) as failed:
            impatient.write("b", b"")
        shown += [str(failed.getrepr(chain=True, style="native")), caplog.text, *capfd.readouterr()]
    assert "botocore" in caplog.text or "s3fs" in caplog.text
    assert [text for text in shown if "CANARYSECRET" in text or "CANARYTOKEN" in text] == []


def test_a_password_in_the_endpoint_is_not_shown(bucket: Callable[..., S3Store]) -> None:
    store = bucket(limits=S3Limits(deadline_s=0.5))
    with environment({"AWS_ENDPOINT_URL_S3": "http://user:CANARY@127.0.0.1:9", "AWS_ENDPOINT_URL": ""}):
        with pytest.raises(StorageUnavailable) as failed:
            store.write("x", b"")
    assert "CANARY" not in str(failed.getrepr(chain=True, style="native"))


# ---- names of stores


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gs://bucket/x",
        "https://host/x?X-Amz-Signature=CANARY",
        "s3://",
        "s3://k:CANARY@b/x",
        "s3://b/x?k=1",
        "s3://b/../c",
    ],
)
def test_other_stores_are_refused_without_repeating_secrets(url: str) -> None:
    with pytest.raises(ValueError, match=r"(store|object path) \(") as refused:
        open_store(url)
    assert "CANARY" not in str(refused.value)


def test_stores_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri(), "a b"):
        assert open_store(url).url == str(tmp_path / "a b")
    assert open_store("s3://bucket").url == "s3://bucket"
    assert open_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
    assert repr(open_store("s3://bucket/a/")) == "S3Store('s3://bucket/a')"


CORPUS = (
    "a/1.parquet",
    "a/2.parquet",
    "a/b/3.parquet",
    "a/x.csv",
    "a/_SUCCESS",
    "a/.x.parquet",
    "a/_b/4.parquet",
    "c/5",
)


GLOBS = (
    ("a/*.parquet", ["1.parquet", "2.parquet"]),
    ("a/**/*.parquet", ["1.parquet", "2.parquet", "b/3.parquet"]),
    ("**/*.parquet", ["a/1.parquet", "a/2.parquet", "a/b/3.parquet"]),
    ("a/[2-9].parquet", ["2.parquet"]),
    ("a/?.csv", ["x.csv"]),
    ("?/5", ["c/5"]),
    ("a", ["1.parquet", "2.parquet", "b/3.parquet", "x.csv"]),
    ("a/", ["1.parquet", "2.parquet", "b/3.parquet", "x.csv"]),
    ("a/x.csv", ["x.csv"]),
    ("a/_SUCCESS", ["_SUCCESS"]),
    ("absent/*", []),
    ("absent", []),
    ("*/b/**", ["a/b/3.parquet"]),
)


def test_globs(store: Store) -> None:
    for path in CORPUS:
        store.write(path, path.encode())
    for pattern, found in GLOBS:
        source, files = glob_objects(f"{store.url}/{pattern}")
        assert [info.path for info in files] == found, pattern
        assert all(source.read(info.path).decode().endswith(info.path) for info in files[:1])


def test_globs_from_the_working_folder_and_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("linked")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x[1].txt").symlink_to("../blobs/1")
    for pattern in ("data", "./data", "data/*", "*/x*", "data/x[1].txt", f"../{tmp_path.name}/data/*.txt"):
        store, files = glob_objects(pattern)
        assert [store.read(info.path) for info in files if "x" in info.path] == [b"linked"], pattern
    with pytest.raises(ValueError, match="pattern"):
        glob_objects("")
