"""Embeddings → the cell of each row in the trained index."""

import functools
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import Receipt, Work, read_fragment, write_fragment
from penstock.cluster.jobs.training import read_trained
from penstock.cluster.jobs.transforms import read_chain, vector_batches
from penstock.cluster.layout import CELLS, EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.indexing import FaissObject, faiss_threads
from penstock.operators.routing import index_cells

_faiss: Any = faiss  # the type stubs of faiss 1.15 leave names out


@dataclass(frozen=True)
class CellsJob:
    """What all fragments of the cells share; `cells` is the number of lists of the trained index."""

    root: str
    fingerprint: str
    embeddings_fingerprint: str
    training_fingerprint: str
    cells: int
    transforms: str | None = None


@dataclass(frozen=True)
class CellsTask:
    job: CellsJob
    fragment: str


@dataclass(frozen=True)
class CountTask:
    job: CellsJob
    fragments: tuple[str, ...]


def write_cells(task: CellsTask) -> Work:
    """Write the cell of each row of an embeddings fragment, in the order of its rows: a column `cell` of int32."""
    started = time.perf_counter()
    job = task.job
    store = connect(job.root)
    index, chain = kept_trained(job.root, job.training_fingerprint), read_chain(store, job.transforms)
    cells = [np.empty(0, np.int32)]
    bytes_read = 0
    with faiss_threads(1):
        for vectors in vector_batches(
            store, fragment_path(EMBEDDINGS, job.embeddings_fingerprint, task.fragment), chain
        ):
            cells.append(index_cells(index, vectors))
            bytes_read += vectors.nbytes
    table = pa.table({"cell": pa.array(np.concatenate(cells))})
    receipt = Receipt(task.fragment, table.num_rows, table.num_rows)
    written = write_fragment(store, fragment_path(CELLS, job.fingerprint, task.fragment), table, receipt)
    busy_s = time.perf_counter() - started
    return Work(receipt, busy_s=busy_s, bytes_read=bytes_read, bytes_written=written)


def read_cells(store: Store, fingerprint: str, fragment: str) -> np.ndarray:
    """The cell, int32 (n,), of each row of an embeddings fragment."""
    cells: np.ndarray = read_fragment(store, fragment_path(CELLS, fingerprint, fragment)).column("cell").to_numpy()
    return cells


def count_cells(task: CountTask) -> np.ndarray:
    """Rows of each cell in fragments, int64 (k,)."""
    job, store = task.job, connect(task.job.root)
    rows = np.zeros(job.cells, np.int64)
    for fragment in task.fragments:
        rows += np.bincount(read_cells(store, job.fingerprint, fragment), minlength=job.cells)
    return rows


@functools.lru_cache(maxsize=1)
def kept_trained(root: str, fingerprint: str) -> FaissObject:
    """The trained index, once per process."""
    return _faiss.deserialize_index(np.frombuffer(read_trained(connect(root), fingerprint), np.uint8))
