"""Fixtures: stores that are real folders and a real S3 server in its own process."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest
from hypothesis import settings

from penstock.cluster.local_store import LocalStore
from penstock.cluster.s3_store import S3Store
from penstock.cluster.storage import Store

SERVER = Path(__file__).parent / "cluster" / "s3_server.py"
RACERS = 8

# A busy machine is no defect of what is tested: examples have no time limit.
settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")


@dataclass(frozen=True)
class S3Server:
    """A running test server; see s3_server.py for the rules of faults."""

    url: str

    def faults(self, rules: Sequence[Mapping[str, object]]) -> None:
        """Replace the rules; an empty list ends all faults."""
        self._ask("PUT", "/__faults", json.dumps(rules).encode())

    def log(self) -> list[dict[str, Any]]:
        """Every request so far: method, target (path?query), action."""
        entries: list[dict[str, Any]] = json.loads(self._ask("GET", "/__log"))
        return entries

    def bucket(self) -> str:
        """The name of a fresh bucket."""
        name = f"bucket-{uuid4().hex}"
        self._ask("PUT", f"/{name}")
        return name

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        with urlopen(Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)) as reply:
            answer: bytes = reply.read()
        return answer


@contextmanager
def running_s3_server(*arguments: str) -> Iterator[S3Server]:
    """A server process with the given command line, and the environment by which S3 clients find it."""
    with subprocess.Popen(
        [sys.executable, SERVER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().decode().strip()
            assert port, "the S3 server did not start; run tests/cluster/s3_server.py by hand to see why"
            server = S3Server(f"http://127.0.0.1:{port}")
            with environment(s3_environment(server.url)):
                yield server
        finally:
            process.terminate()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process (its children inherit them), and restore them at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def s3_environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testing123",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="session", autouse=True)
def node_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of this session's own: batch sizes measured beside other tests must not outlive them."""
    os.environ["PENSTOCK_CACHE"] = str(tmp_path_factory.getbasetemp() / "node-cache")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with running_s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def racers(s3_server: S3Server) -> Iterator[Pool]:
    """RACERS other processes, which know the S3 server."""
    with multiprocessing.get_context("spawn").Pool(RACERS) as pool:
        yield pool


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind."""
    if request.param == "local":
        yield LocalStore(tmp_path / "store")
        return
    server: S3Server = request.getfixturevalue("s3_server")
    yield S3Store(server.bucket(), "some/prefix")
    server.faults([])
