"""Records of runs: what was asked for, what was read, how it ended."""

import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.fragments import read_fragment, write_fragment
from penstock.cluster.layout import run_folder
from penstock.cluster.storage import Store
from penstock.operators.deadletters import DEAD_LETTER_SCHEMA
from penstock.operators.documents import WHOLE_FILE
from penstock.pipelines.sources import SourceFile


class Status(StrEnum):
    """How a run ended, or that it has not."""

    RUNNING = "running"
    PUBLISHED = "published"
    UNPUBLISHED = "finished without an alias"
    GATE_FAILED = "gate failed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class PastRun:
    """A run that was recorded, with the parameters and files that it saw."""

    store: Store
    record: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.record["run_id"])

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        parameters: dict[str, dict[str, Any]] = self.record["parameters"]
        return parameters

    @cached_property
    def files(self) -> dict[str, str]:
        """Source → content identity of every file that the run saw."""
        table = read_fragment(self.store, f"{run_folder(self.run_id)}/sources.parquet")
        return dict(zip(table.column("source").to_pylist(), table.column("content").to_pylist(), strict=True))


def new_run_id(name: str) -> str:
    """A name for people to sort by time, unique by its random part (two runs may start in the same second)."""
    return f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def run_ids(store: Store, name: str | None = None) -> list[str]:
    """Ids of recorded runs, of one pipeline or of all, oldest first."""
    found = [run for run in store.folders("runs") if name is None or run.rsplit("-", 2)[0] == name]
    return sorted(found, key=lambda run: run.rsplit("-", 2)[1:])


def read_run(store: Store, run_id: str) -> dict[str, Any] | None:
    """The record of a run; None when it stopped before it wrote one."""
    try:
        record: dict[str, Any] = json.loads(store.read(f"{run_folder(run_id)}/run.json"))
    except (FileNotFoundError, ValueError):
        return None
    return record


def last_run(store: Store, name: str) -> PastRun | None:
    """The newest recorded run of a pipeline."""
    for run_id in reversed(run_ids(store, name)):
        record = read_run(store, run_id)
        if record is not None:
            return PastRun(store, record)
    return None


def write_run(store: Store, record: dict[str, Any]) -> None:
    """Write a run's record, anew each time that its state changes."""
    data = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode()
    store.write(f"{run_folder(record['run_id'])}/run.json", data)


def write_sources(store: Store, run_id: str, files: Sequence[SourceFile]) -> None:
    """Record which files the run saw, so that the next plan can say what is new."""
    columns = {"source": [file.source for file in files], "content": [file.content for file in files]}
    schema = pa.schema([("source", pa.string()), ("content", pa.string())])
    write_fragment(store, f"{run_folder(run_id)}/sources.parquet", pa.table(columns, schema=schema))


def write_dead_letters(store: Store, run_id: str, paths: Sequence[str]) -> int:
    """Gather the dead letters of all current fragments into one table of the run, streaming fragment by fragment;
    returns
    how many of them stand for a whole file."""
    if not paths:
        return 0
    files = 0
    with tempfile.TemporaryDirectory(prefix="penstock-letters-") as folder:
        local = Path(folder) / "dead-letters.parquet"
        with pq.ParquetWriter(local, DEAD_LETTER_SCHEMA, write_page_checksum=True, compression="zstd") as writer:
            for path in paths:
                letters = read_fragment(store, path).cast(DEAD_LETTER_SCHEMA)
                files += pc.sum(pc.equal(letters.column("position"), WHOLE_FILE)).as_py() or 0
                writer.write_table(letters)
        store.upload(local, f"{run_folder(run_id)}/dead-letters.parquet")
    return files
