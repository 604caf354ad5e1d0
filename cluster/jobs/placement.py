"""Rows to the shards that own their cells: cells shared out, then each fragment's rows written in order of shards.

Fragments lie in order of hashes, so that a shard that owns cells has rows all over them. They are written once more, by
shard, so that building a shard reads no more than its own rows, however many shards there are.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.cluster.fragments import ROW_GROUP_ROWS, read_rows_with, vector_column, vectors_of, write_options
from penstock.cluster.jobs.cells import CellsJob, CellsTask, kept_trained, read_cells, write_cells
from penstock.cluster.jobs.sampling import sample_vectors
from penstock.cluster.jobs.shard_rows import FragmentPair, RowSource, or_one_empty, read_rows
from penstock.cluster.jobs.transforms import read_chain
from penstock.cluster.layout import EMBEDDINGS, PLACEMENT, SHARDS, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.cell_sharing import share_cells
from penstock.operators.indexing import faiss_threads
from penstock.operators.routing import CellOwners, index_centroids, nearest_of_index
from penstock.operators.sharding import shard_range

SHARD_COLUMN, VECTOR_COLUMN = " shard", " embedding"  # which no column of documents is called
# Cells that a query probes, for sharing them out: this times the root of their number. On 39,000 titles in 1,024 cells
# the 50 nearest hold 95 % of the 10 neighbours.
PROBED_PER_ROOT_CELL = 1.6
QUERIES_PER_CELL = 4
MOST_SHARING_QUERIES = 16_384
PLACED_ROWS = 16_384  # read and placed at once: a list column takes several times its values while it is decoded


@dataclass(frozen=True)
class SharingTask:
    """Share out the cells of a trained index to shards, by the rows of each cell, int64 (k,)."""

    root: str
    fingerprint: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    training_fingerprint: str
    transforms: str | None
    cell_rows: np.ndarray
    shards: int
    seed: int


@dataclass(frozen=True)
class PlacementJob:
    """What all fragments share; `fingerprint` is that of the shards to build."""

    source: RowSource
    fingerprint: str
    cells: CellsJob


@dataclass(frozen=True)
class PlacementTask:
    job: PlacementJob
    pair: FragmentPair


def owners_path(fingerprint: str) -> str:
    """Which shard owns each cell: JSON with `shard_of_cell`, `shards` and `imbalance`."""
    return f"{stage_folder(SHARDS, fingerprint)}/owners.json"


def read_owners(data: bytes) -> CellOwners:
    """What share_out wrote."""
    record = json.loads(data)
    return CellOwners(np.array(record["shard_of_cell"], np.int32), int(record["shards"]))


def share_out(task: SharingTask) -> float:
    """Write which shard owns each cell; returns the imbalance of their rows. Memory: a sample of MOST_SHARING_QUERIES
    vectors at most, and 8 bytes for each of them and shard."""
    store = connect(task.root)
    index = kept_trained(task.root, task.training_fingerprint)
    centroids = index_centroids(index)
    paths = [fragment_path(EMBEDDINGS, task.embeddings_fingerprint, fragment) for fragment in task.fragments]
    wanted = min(QUERIES_PER_CELL * len(centroids), MOST_SHARING_QUERIES)
    sample = sample_vectors(store, paths, task.rows, wanted, task.seed)
    chain = read_chain(store, task.transforms)
    probed = max(1, min(len(centroids), round(PROBED_PER_ROOT_CELL * len(centroids) ** 0.5)))
    with faiss_threads(1):
        cells = nearest_of_index(index, chain.apply_documents(sample) if chain else sample, probed)
    shares = share_cells(centroids, task.cell_rows, task.shards, cells)
    record = {"shard_of_cell": shares.shard_of_cell.tolist(), "shards": task.shards, "imbalance": shares.imbalance}
    store.write(owners_path(task.fingerprint), json.dumps(record).encode())
    return shares.imbalance


def place_rows(task: PlacementTask) -> int:
    """Write a fragment's rows in order of shards, passages and embeddings together; returns its rows. Memory: about
    PLACED_ROWS rows, and the cells of all."""
    job, store = task.job, connect(task.job.source.root)
    owners = read_owners(store.read(owners_path(job.fingerprint)))
    shards = owners.shard_of_cell[_cells(store, job.cells, task.pair.embeddings)]
    path = fragment_path(PLACEMENT, job.fingerprint, task.pair.embeddings)
    with tempfile.TemporaryDirectory(prefix="penstock-place-") as place:
        file = Path(place) / "rows.parquet"
        _write_groups(file, _parts(store, job.source, task.pair, len(shards)), shards)
        store.upload(file, path)
    return len(shards)


def _parts(store: Store, source: RowSource, pair: FragmentPair, rows: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(embeddings, passages) of a fragment in order of hashes, about PLACED_ROWS at once."""
    count = max(1, -(-rows // PLACED_ROWS))
    for number in range(count):
        yield read_rows(store, source, pair, *shard_range(number, count))


def read_placed(
    store: Store, fingerprint: str, pairs: tuple[FragmentPair, ...], shard: int
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(embeddings, passages) of a shard from each fragment that holds any of its rows; one empty pair where none
    does."""
    return or_one_empty(_placed_rows(store, fingerprint, pair, shard) for pair in pairs)


def _placed_rows(store: Store, fingerprint: str, pair: FragmentPair, shard: int) -> tuple[pa.Table, pa.Table]:
    path = fragment_path(PLACEMENT, fingerprint, pair.embeddings)
    table = read_rows_with(store, path, SHARD_COLUMN, shard).combine_chunks()
    passages = table.drop_columns([SHARD_COLUMN, VECTOR_COLUMN])
    embedded = passages.select(["passage_id", "text_hash"]).append_column("embedding", table.column(VECTOR_COLUMN))
    return embedded, passages


def _cells(store: Store, job: CellsJob, fragment: str) -> np.ndarray:
    """The cell of each row of a fragment, found now where clean-up took what was found before."""
    try:
        return read_cells(store, job.fingerprint, fragment)
    except FileNotFoundError:
        write_cells(CellsTask(job, fragment))
        return read_cells(store, job.fingerprint, fragment)


def _write_groups(path: Path, parts: Iterator[tuple[pa.Table, pa.Table]], shards: np.ndarray) -> None:
    """A Parquet file of rows by part and shard, in which no row group holds rows of two shards."""
    writer, first = None, 0
    for embedded, passages in parts:
        vectors = vectors_of(embedded.column("embedding"))
        if writer is None:
            schema = _placed(passages, vectors, np.empty(0, np.int64), 0).schema
            writer = pq.ParquetWriter(path, schema, **write_options(schema))
        own = shards[first : first + len(vectors)]
        first += len(vectors)
        for shard in np.unique(own).tolist():
            table = _placed(passages, vectors, np.flatnonzero(own == shard), shard)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    if writer is not None:
        writer.close()
    if first != len(shards):
        raise ValueError(f"fragment ({first} rows) must have as many as its {len(shards)} cells; find its cells again")


def _placed(passages: pa.Table, vectors: np.ndarray, rows: np.ndarray, shard: int) -> pa.Table:
    """Some of the rows, with their vectors and their shard."""
    table = passages.take(pa.array(rows, pa.int64()))
    table = table.append_column(VECTOR_COLUMN, vector_column(vectors[rows]))
    return table.append_column(SHARD_COLUMN, pa.array(np.full(len(rows), shard, np.int32)))
