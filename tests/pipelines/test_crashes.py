"""Kill -9 and Ctrl-C at work: the same command goes on, publishes the same, and redoes only what was in flight."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from .conftest import Document, Workspace, penstock, published_vectors, read_ledger

FRAGMENTS = 10
DEADLINE_S = 150
LEAVE_S = 10


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """200 documents in ten fragments."""
    workspace = Workspace(tmp_path_factory.mktemp("crowd"))
    for part in range(FRAGMENTS):
        rows: list[Document] = [
            {"id": f"d{i:03d}", "text": real_texts[i], "topic": "t"} for i in range(part * 20, part * 20 + 20)
        ]
        workspace.write(f"part-{part}.jsonl", rows)
    return workspace


@pytest.fixture(scope="module")
def clean(crowd: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """What an undisturbed run publishes."""
    root = tmp_path_factory.mktemp("clean") / "root"
    done = penstock("run", str(crowd.file(root=str(root))))
    assert done.returncode == 0, done.stderr
    return published_vectors(root)


class Attempt:
    """`penstock run` in a process of its own over a fresh root, to be disturbed."""

    def __init__(self, crowd: Workspace, folder: Path, command: str = "run") -> None:
        self.root = folder / "root"
        self.file = folder / "pipeline.yaml"
        self.file.write_text(crowd.yaml(root=str(self.root)), "utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penstock.pipelines.cli", command, str(self.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before it could be disturbed: {self.output()}"
            assert time.monotonic() < deadline, "the moment to disturb it never came"
            time.sleep(0.01)

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern))

    def embedded(self) -> int:
        return len(self.files("stages/embeddings/*/*.parquet"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def output(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def finish(self) -> dict[str, dict[str, object]]:
        """Run the same command again, to its end; the ledger of that run."""
        done = penstock("run", str(self.file))
        assert done.returncode == 0, done.stderr
        return read_ledger(self.root)


def rows_of(paths: list[Path]) -> int:
    return sum(pq.read_metadata(path).num_rows for path in paths)


def test_killed_driver_resumes_without_repeating(
    crowd: Workspace, clean: dict[str, list[float]], tmp_path: Path
) -> None:
    attempt = Attempt(crowd, tmp_path)
    attempt.wait_for(lambda: 2 <= attempt.embedded() < FRAGMENTS)
    attempt.kill()
    done_rows = rows_of(attempt.files("stages/embeddings/*/*.parquet"))
    ledger = attempt.finish()
    assert published_vectors(attempt.root) == clean
    assert ledger["embeddings"]["encoded"] <= len(clean) - done_rows
    assert ledger["embeddings"]["rows_out"] == len(clean)


@pytest.mark.slow
def test_killed_worker_is_replaced_and_its_fragment_redone(
    crowd: Workspace, clean: dict[str, list[float]], tmp_path: Path
) -> None:
    attempt = Attempt(crowd, tmp_path)
    attempt.wait_for(lambda: attempt.embedded() >= 1)
    workers = [child for child in psutil.Process(attempt.process.pid).children(recursive=True) if _is_encoder(child)]
    assert workers, "no encoder worker was found"
    for worker in workers:
        worker.kill()
    assert attempt.process.wait(DEADLINE_S) == 0, attempt.output()
    assert published_vectors(attempt.root) == clean
    assert read_ledger(attempt.root)["embeddings"]["encoded"] == len(clean)


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_run_leaves_soon_and_resumes(
    crowd: Workspace, clean: dict[str, list[float]], tmp_path: Path, stop: signal.Signals
) -> None:
    attempt = Attempt(crowd, tmp_path)
    attempt.wait_for(lambda: attempt.embedded() >= 1)
    os.kill(attempt.process.pid, stop)
    assert attempt.process.wait(LEAVE_S) == 130
    assert "run the same command again" in attempt.output()
    done_rows = rows_of(attempt.files("stages/embeddings/*/*.parquet"))
    ledger = attempt.finish()
    assert ledger["embeddings"]["encoded"] <= len(clean) - done_rows
    assert published_vectors(attempt.root) == clean


MOMENTS: dict[str, str] = {
    "before any stage": "runs/*/run.json",
    "while cutting passages": "stages/passages/*/*.parquet",
    "after selection": "stages/selection/*/fragments.parquet",
    "while embedding": "stages/embeddings/*/*.parquet",
    "after training": "stages/training/*/trained.faiss",
    "while building shards": "stages/shards/*/shard-*.json",
    "while uploading a shard": "indexes/test/versions/*/shard-*.faiss",
    "after evaluation": "stages/evaluation/*/evaluation.json",
    "while publishing": "indexes/test/versions/*/manifest.json",
}


WORKING_MOMENTS = ("while cutting passages", "while embedding", "while building shards", "after training")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "victim"),
    [(moment, "driver") for moment in MOMENTS] + [(moment, "workers") for moment in WORKING_MOMENTS],
)
def test_kill_at_any_stage(
    crowd: Workspace, clean: dict[str, list[float]], tmp_path: Path, moment: str, victim: str
) -> None:
    attempt = Attempt(crowd, tmp_path)
    attempt.wait_for(lambda: bool(attempt.files(MOMENTS[moment])) or attempt.process.poll() is not None)
    if victim == "driver":
        attempt.kill()
    else:
        for child in psutil.Process(attempt.process.pid).children(recursive=True):
            if child.name().startswith("ray::"):
                child.kill()
        attempt.process.wait(DEADLINE_S)
    done = attempt.files("stages/embeddings/*/*.parquet")
    done_rows = rows_of([path for path in done if not path.name.endswith(".dropped.parquet")])
    again = penstock("run", str(attempt.file))
    assert again.returncode == 0, again.stderr
    assert published_vectors(attempt.root) == clean
    if "Nothing to do" not in again.stdout:
        assert read_ledger(attempt.root)["embeddings"]["encoded"] <= len(clean) - done_rows


def _is_encoder(process: psutil.Process) -> bool:
    try:
        return "EncodeFragments" in " ".join(process.cmdline()) or "EncodeFragments" in process.name()
    except psutil.Error:
        return False
