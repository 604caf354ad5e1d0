"""Measure an index through its published files: against exact search, and against relevance judgements."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import open_fragment, read_hash_range, vectors_of
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect, model_folder
from penstock.cluster.published import VersionFiles, open_searcher
from penstock.operators.encoder_worker import QUERY_BATCH_TOKENS, EncoderWorker
from penstock.operators.encoding import Encoder
from penstock.operators.entrance import Entrance
from penstock.operators.evaluation import Neighbours, exact_neighbours
from penstock.operators.indexing import Family, Metric
from penstock.operators.routing import NearCells
from penstock.operators.searching import Hits, SearchParameters, ShardSearcher, spread_hits
from penstock.operators.sharding import hash_range

TIMED_QUERIES = 50
WARM_UP_QUERIES = 5
MAX_QUERY_FILE_BYTES = 67_108_864


class QueriesInvalid(Exception):
    """A file of queries or judgements that cannot be used."""


@dataclass(frozen=True)
class Queries:
    """Query vectors float32 (q, d). `ids` are the queries' own; `exclude` the passages that they are, if they are
    passages."""

    ids: tuple[str, ...]
    vectors: np.ndarray
    exclude: tuple[str | None, ...]


@dataclass(frozen=True)
class SampleTask:
    """Ask for `count` of the stored embeddings as queries, from a seeded range of the hash space."""

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    count: int
    seed: int
    metric: Metric


@dataclass(frozen=True)
class EncodeQueriesTask:
    """Encode the queries of a JSONL file (store URL and path within)."""

    store_url: str
    path: str
    encoder: Encoder


@dataclass(frozen=True)
class ExactTask:
    """Exact neighbours among some of the embeddings fragments."""

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    queries: Queries
    k: int
    metric: Metric


@dataclass(frozen=True)
class MeasureTask:
    """Search one shard at each of several operating points, with the queries that need it.

    Attributes:
        queries: float32 (q, d), before transforms.
        files: what the shards of the version share.
        ids: passages of which to tell which lie in this shard.
    """

    root: str
    shard: ShardRecord
    files: VersionFiles
    family: Family
    metric: Metric
    queries: np.ndarray
    k: int
    points: tuple[SearchParameters, ...]
    timed: bool
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What one shard answered, per operating point: hits, median milliseconds of a single query, and which queries
    needed this shard, bool (q,); and which of the passages asked for lie in it."""

    shard: int
    hits: tuple[Hits, ...]
    latency_ms: tuple[float, ...]
    asked: tuple[np.ndarray, ...]
    own_ids: frozenset[str]


def sample_queries(task: SampleTask) -> Queries:
    """Stored embeddings as queries; those that a seed picks are the same for any cut into fragments."""
    store = connect(task.root)
    # A range holds about as many rows as asked for: ask for more, then cut by hash.
    share = min(1.0, (task.count * 1.3 + 20) / max(task.rows, 1))
    ids: list[str] = []
    hashes: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for first, last in hash_range(share, task.seed):
        for fragment in task.fragments:
            path = fragment_path(EMBEDDINGS, task.embeddings_fingerprint, fragment)
            table = read_hash_range(store, path, first, last, ["passage_id", "embedding"])
            if table.num_rows:
                ids += table.column("passage_id").to_pylist()
                hashes.append(table.column("row_hash").to_numpy())
                vectors.append(vectors_of(table.column("embedding")).astype(np.float32))
    order = np.argsort(np.concatenate(hashes), kind="stable")[: task.count]
    chosen = tuple(ids[row] for row in order)
    return Queries(chosen, _renormalized(np.concatenate(vectors)[order], task.metric), chosen)


def encode_queries(task: EncodeQueriesTask) -> Queries:
    """Read and encode a file of queries: one JSON object a line, with `text` and an optional `id` (or `_id`)."""
    ids, texts = read_queries(task.store_url, task.path)
    encoder = replace(task.encoder, batch_tokens=QUERY_BATCH_TOKENS)
    worker = EncoderWorker(encoder, model_folder(encoder.model), device="cpu")
    return Queries(tuple(ids), worker.encode(texts).require(), tuple(None for _ in ids))


def find_exact(task: ExactTask) -> Neighbours:
    return exact_neighbours(task.queries.vectors, _batches(task), task.k, task.metric, task.queries.exclude)


def measure_shard(task: MeasureTask) -> Measured:
    """Open the shard as a reader does, then search it at each point; memory: the shard."""
    store = connect(task.root)
    entrance = task.files.open_entrance(store)
    searcher = open_searcher(store, task.shard, task.family, task.metric, entrance.chain)
    whole = _RoutedShard(searcher, entrance, task.shard.shard, task.k)
    single = replace(whole)
    hits, latencies, needing = [], [], []
    for point in task.points:
        found, asked = whole.search(task.queries, point)
        hits.append(found)
        needing.append(np.isin(np.arange(len(task.queries)), asked))
        times_ms = []
        for query in task.queries[asked[: TIMED_QUERIES if task.timed else 0]]:
            started = time.perf_counter()
            single.search(query[None, :], point)
            times_ms.append(1000 * (time.perf_counter() - started))
        latencies.append(float(np.median(times_ms[WARM_UP_QUERIES:])) if len(times_ms) > WARM_UP_QUERIES else 0.0)
    return Measured(task.shard.shard, tuple(hits), tuple(latencies), tuple(needing), searcher.own_ids(task.ids))


@dataclass
class _RoutedShard:
    """One shard, searched with the queries that need it; their cells are found once for each number of them."""

    searcher: ShardSearcher
    entrance: Entrance
    shard: int
    k: int
    _queries: np.ndarray | None = None
    _nprobe: int | None = None
    _near: NearCells | None = None

    def search(self, queries: np.ndarray, point: SearchParameters) -> tuple[Hits, np.ndarray]:
        """Hits of all queries that need the shard, and which these are, int64 (n,)."""
        router = self.entrance.router
        if router is None:
            return self.searcher.search(queries, self.k, point), np.arange(len(queries))
        if self._near is None or self._queries is not queries or self._nprobe != point.nprobe:
            self._near = router.near_cells(self.entrance.transformed(queries), point)
            self._queries, self._nprobe = queries, point.nprobe
        routing = router.choose(self._near, point)
        asked = np.flatnonzero(routing.shards[:, self.shard])
        hits = self.searcher.search(queries[asked], self.k, point, probes=routing.probes(self.shard, asked))
        return spread_hits(hits, asked, len(queries)), asked


def read_relevance(store_url: str, path: str) -> dict[str, dict[str, float]]:
    """Judgements of a BEIR TSV (query-id, corpus-id, score; a header is skipped): query id → document id →
    relevance."""
    judged: dict[str, dict[str, float]] = {}
    lines = connect(store_url).read(path).decode("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and fields[-1].strip().lower() in ("score", "relevance", "label")):
            continue
        try:
            query, document, relevance = fields[0], fields[-2], float(fields[-1])
            if not math.isfinite(relevance):
                raise ValueError("not a finite number")
        except (IndexError, ValueError) as error:
            raise QueriesInvalid(
                f"evaluate.relevance ({path}, line {number}) must hold query-id, corpus-id and a number "
                f"between tabs, got {line[:80]!r}"
            ) from error
        judged.setdefault(query, {})[document] = relevance
    return judged


def read_queries(store_url: str, path: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a JSONL file of queries, which has one JSON object a line, with `text` and an optional `id` (or
    `_id`).

    Raises:
        QueriesInvalid: no such file, or one that holds other things.
    """
    store = connect(store_url)
    info = store.info(path)
    if info is None or info.size_bytes > MAX_QUERY_FILE_BYTES:
        got = "no such file" if info is None else f"{info.size_bytes} bytes"
        raise QueriesInvalid(
            f"evaluate.queries ({path}) must be a file of at most {MAX_QUERY_FILE_BYTES} bytes, got {got}"
        )
    ids, texts = [], []
    for number, line in enumerate(store.read(path).decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        query = _parsed(path, number, line)
        texts.append(query["text"])
        ids.append(str(query.get("id", query.get("_id", number))))
    if not texts:
        raise QueriesInvalid(f"evaluate.queries ({path}) must hold at least one query, got none")
    return ids, texts


def _parsed(path: str, number: int, line: str) -> dict[str, str]:
    try:
        query = json.loads(line)
    except ValueError:
        query = None
    if not isinstance(query, dict) or not isinstance(query.get("text"), str) or not query["text"].strip():
        raise QueriesInvalid(
            f"evaluate.queries ({path}, line {number}) must be a JSON object with a text, "
            'as {"id": "1", "text": "..."}'
        )
    return query


def _batches(task: ExactTask) -> Iterator[tuple[pa.Array, np.ndarray]]:
    store = connect(task.root)
    for fragment in task.fragments:
        with open_fragment(store, fragment_path(EMBEDDINGS, task.embeddings_fingerprint, fragment)) as file:
            for batch in file.iter_batches(8192, columns=["passage_id", "embedding"]):
                table = pa.Table.from_batches([batch])
                yield batch.column("passage_id"), vectors_of(table.column("embedding")).astype(np.float32)


def _renormalized(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Stored float16 vectors are of unit length to about 1e-4; as queries they are made exactly so."""
    if metric is not Metric.COSINE:
        return vectors
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32)
