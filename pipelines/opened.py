"""One published version, opened for searching: each shard when it is first needed, by one thread, once."""

import logging
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.catalog import Catalog
from penstock.cluster.file_cache import DamagedFile
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.published import VersionFiles, open_duplicates, open_rows, open_searcher
from penstock.cluster.storage import StorageUnavailable, Store
from penstock.operators.entrance import Entrance
from penstock.operators.filtering import Condition, bind, matching_rows
from penstock.operators.indexing import Codec, Family, Metric, refuse_missing_engine
from penstock.operators.lengths import refuse_unfit_lengths
from penstock.operators.routing import Probes, Routing
from penstock.operators.searching import Hits, SearchParameters, merge_hits, normalize, spread_hits
from penstock.operators.transforms import Chain
from penstock.pipelines.publishing import FORMAT, files_of, how_built, shards_of
from penstock.pipelines.query_encoder import QueryEncoder

RETRY_PAUSE_S = 30.0  # a damaged shard is fetched again at most twice a minute
CACHED_FILTERS = 8  # masks of a byte per row: 8 MB per million rows
UNAVAILABLE = (DamagedFile, StorageUnavailable, OSError)  # what a degraded search answers without

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """How much of what a search had to look through it did.

    Attributes:
        share: rows of the shards that were searched over rows of those that the queries need.
        missing: numbers of the shards that could not be opened.
    """

    share: float = 1.0
    missing: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found for q queries, most similar first.

    Attributes:
        ids: object (q, k) of str, None where there are fewer than k rows.
        similarities: float32 (q, k), NaN there.
        version: the version that answered, all of it.
        coverage: what was searched; less than everything only where `degraded` was asked for.
        rows: for each query a table of the found rows (id, similarity, document_id, start, end, text, kept columns),
        if asked for.
        ranks_fused: whether passages of two vector spaces were ordered by their ranks in each: such an order has no
        similarities, which are NaN, in `rows` null.
    """

    ids: np.ndarray
    similarities: np.ndarray
    version: str
    coverage: Coverage = field(default_factory=Coverage)
    rows: list[pa.Table] | None = None
    ranks_fused: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked of a version, besides the queries; see `OpenIndex.search`. Without `parameters` a version takes its
    own operating point."""

    k: int
    parameters: SearchParameters | None
    rows: bool
    where: tuple[Condition, ...]
    degraded: bool


class Lazily(Generic[T]):
    """A value that the first thread to need it makes, while the others wait."""

    def __init__(self, what: str, make: Callable[[], T]) -> None:
        self._what, self._make = what, make
        self._lock = threading.Lock()
        self._made: T | None = None
        self._retry_s = 0.0

    @property
    def ready(self) -> bool:
        return self._made is not None

    def get(self) -> T:
        """The value; raises what making it raises, and then tries again at the next call."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def attempt(self) -> T | None:
        """The value, or None while it is unavailable: after a failure one call every RETRY_PAUSE_S tries again."""
        if self._made is not None:
            return self._made
        if not self._lock.acquire(blocking=self._retry_s == 0.0):
            return None  # somebody else is trying again, which can take minutes
        try:
            if self._made is None and time.monotonic() >= self._retry_s:
                self._made = self._make()
        except UNAVAILABLE as error:
            self._retry_s = time.monotonic() + RETRY_PAUSE_S
            logger.warning("%s cannot be opened, next try in %g s: %s", self._what, RETRY_PAUSE_S, error)
        finally:
            self._lock.release()
        return self._made


@dataclass(frozen=True, eq=False)
class Maybe(Generic[T]):
    """What a version may have or not."""

    value: T | None


@dataclass(frozen=True, eq=False)
class LiveRows:
    """Which rows of a version count, where another version has taken some over.

    Attributes:
        counts: live rows by the number of the shard.
        masks: bool (rows,), True for live ones, of the shards that have others.
    """

    counts: Mapping[int, int]
    masks: Mapping[int, Lazily[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Searched:
    """What the shards of a version answered.

    Attributes:
        rows: those that count of each shard, by its number.
        needed: bool (q, shards), which shards the queries need, in the order of `rows`.
        hits: of all queries, by the number of the shard, but for shards that a degraded search has to do without.
    """

    rows: Mapping[int, int]
    needed: np.ndarray
    hits: dict[int, Hits]

    def coverage(self, answering: Container[int]) -> Coverage:
        """What was searched where only some shards could answer."""
        rows = np.array(list(self.rows.values()), np.int64)
        searched = np.array([number in answering for number in self.rows], bool)
        missing = [number for number, lost in zip(self.rows, self.needed.any(axis=0) & ~searched, strict=True) if lost]
        whole, part = int((self.needed @ rows).sum()), int((self.needed @ (rows * searched)).sum())
        return Coverage(part / whole if whole else 1.0, tuple(missing))

    def renumbered(self, first: int) -> "Searched":
        """The same with numbers of shards that begin at `first`."""
        hits = {
            number + first: replace(hits, shards=np.where(hits.shards >= 0, hits.shards + np.int32(first), hits.shards))
            for number, hits in self.hits.items()
        }
        return Searched({number + first: rows for number, rows in self.rows.items()}, self.needed, hits)


class ShardRows:
    """The rows of a shard, and which of them the last few filters allow."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._mask = lru_cache(CACHED_FILTERS)(partial(matching_rows, table))

    def allowed(self, conditions: Sequence[Condition]) -> np.ndarray:
        """bool (rows,): those that meet all conditions."""
        return self._mask(bind(conditions, self.table.schema))


class OpenShard:
    """One shard of a version, and what of it is open."""

    def __init__(
        self, store: Store, record: ShardRecord, family: Family, metric: Metric, chain: "Lazily[Maybe[Chain]]"
    ) -> None:
        self.record = record
        what = f"shard {record.shard} of {record.folder}"
        self.searcher = Lazily(what, lambda: open_searcher(store, record, family, metric, chain.get().value))
        self.rows = Lazily(what, lambda: ShardRows(open_rows(store, record)))
        self.duplicates = Lazily(what, partial(open_duplicates, store, record))

    def search(
        self,
        vectors: np.ndarray,
        request: Request,
        parameters: SearchParameters,
        probes: Probes | None,
        live: Lazily[np.ndarray] | None,
    ) -> Hits | None:
        """The hits of the queries (q, d), in given cells or those it finds, among the live rows if not all are; None
        where a degraded search has to do without this shard."""
        searcher = opened(self.searcher, request.degraded)
        rows = opened(self.rows, request.degraded) if request.where else None
        mask = opened(live, request.degraded) if live else None
        if searcher is None or (request.where and rows is None) or (live and mask is None):
            return None
        allowed = rows.allowed(request.where) if rows else None
        if mask is not None:
            allowed = mask if allowed is None else allowed & mask
        return searcher.search(vectors, request.k, parameters, allowed, probes)


class OpenVersion:
    """A published version, opened for searching; threads may share it.

    Nothing is closed by hand: its files, memory and threads go with the last reference to it.

    Args:
        pool: searches the shards; the versions that follow each other share one.
    """

    def __init__(self, store: Store, manifest: dict[str, Any], encoder: QueryEncoder, pool: ThreadPoolExecutor) -> None:
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"format of the version ({manifest['format']}) must be {FORMAT}; open it with another release"
            )
        self.manifest, self.encoder, self.pool = manifest, encoder, pool
        self._metric = Metric(manifest["metric"])
        built = how_built(manifest)
        family = Family(built["family"])
        refuse_missing_engine(family, Codec(built["codec"]))
        folder = Catalog(store, manifest["index"]).version_folder(manifest["version"])
        files = VersionFiles(folder, files_of(manifest))
        self._chain = Lazily(f"transforms of {folder}", lambda: Maybe(files.open_chain(store)))
        self._router = Lazily(f"routing of {folder}", lambda: Maybe(files.open_router(store)))
        self.shards = {
            record.shard: OpenShard(store, record, family, self._metric, self._chain)
            for record in shards_of(manifest, folder)
        }

    @property
    def version(self) -> str:
        return str(self.manifest["version"])

    @property
    def operating_point(self) -> SearchParameters:
        return SearchParameters.from_json(self.manifest["operating_point"]["parameters"])

    @property
    def parts(self) -> dict[str, "OpenVersion"]:
        """The versions that are open with this one, which the next may share: itself."""
        return {self.version: self}

    @property
    def main(self) -> "OpenVersion":
        """The version whose shards in use tell which of the next are to be opened first."""
        return self

    @property
    def encoders(self) -> tuple[QueryEncoder, ...]:
        return (self.encoder,)

    def search(self, queries: str | Sequence[str] | np.ndarray, request: Request) -> Found:
        """See `OpenIndex.search`."""
        searched = self.find(self.vectors(queries), request)

        def merge(parts: dict[int, Hits]) -> Hits:
            return merge_hits(list(parts.values()), request.k)

        hits, rows = merge_readable(searched.hits, merge, self.shards, request, self.version)
        return Found(hits.ids, hits.similarities, self.version, searched.coverage(searched.hits), rows)

    def find(self, vectors: np.ndarray, request: Request, live: LiveRows | None = None) -> Searched:
        """The hits of each shard for query vectors (q, d), among the live rows if not all are.

        All shards are asked where only some rows may be found, as near cells may hold none of them.
        """
        parameters = request.parameters or self.operating_point
        masks = live.masks if live else {}
        routing = None if masks else self._route(vectors, request, parameters)
        counts = live.counts if live else {number: shard.record.rows for number, shard in self.shards.items()}
        needed = np.ones((len(vectors), len(self.shards)), dtype=bool) if routing is None else routing.shards
        if masks:
            needed = needed & (np.array([counts[number] for number in self.shards]) > 0)

        def search(number: int, queries: np.ndarray) -> Hits | None:
            probes = routing.probes(number, queries) if routing else None
            hits = self.shards[number].search(vectors[queries], request, parameters, probes, masks.get(number))
            return None if hits is None else spread_hits(hits, queries, len(vectors))

        return Searched(counts, needed, self._search_shards(search, needed))

    def _route(self, vectors: np.ndarray, request: Request, parameters: SearchParameters) -> Routing | None:
        """Where the queries are answered; None for all shards, as also where a filter may leave near cells empty, and
        where a degraded search has to do without routing."""
        if request.where or len(vectors) == 0:
            return None
        router = opened(self._router, request.degraded)
        if router is None or router.value is None:
            return None
        refuse_unfit_lengths(vectors, self._metric, "query")
        return Entrance(self._chain.get().value, router.value).route(vectors, parameters)

    def duplicates(self, ids: Sequence[str]) -> pa.Table:
        """See `OpenIndex.duplicates`."""
        return links_to([shard.duplicates.get() for shard in self.shards.values()], ids)

    def warm(self, before: "Opened", by_vectors: bool = False) -> None:
        """Open what of an earlier version was in use: the shards of the same numbers, or all; the model for texts."""
        self.warm_shards(before.main)
        if any(encoder.loaded for encoder in before.encoders):
            self.encoder.load()

    def warm_shards(self, before: "OpenVersion") -> None:
        """Open the shards whose like was in use before."""
        for number in self._counterparts(before, [shard.searcher.ready for shard in before.shards.values()]):
            self.shards[number].searcher.get()
        for number in self._counterparts(before, [shard.rows.ready for shard in before.shards.values()]):
            self.shards[number].rows.get()

    def _counterparts(self, before: "OpenVersion", used: list[bool]) -> list[int]:
        if all(used):
            return list(self.shards)
        return [number for number, in_use in zip(before.shards, used, strict=True) if in_use and number in self.shards]

    def vectors(self, queries: str | Sequence[str] | np.ndarray) -> np.ndarray:
        """Query vectors float32 (q, d) in this version's space; of unit length under cosine."""
        return query_vectors(queries, self.manifest, self.encoder)

    def _search_shards(self, search: Callable[[int, np.ndarray], Hits | None], needed: np.ndarray) -> dict[int, Hits]:
        """Shard number → hits of all queries, but for shards that a degraded search has to do without."""
        asked = {number: np.flatnonzero(column) for number, column in zip(self.shards, needed.T, strict=True)}
        asked = {number: queries for number, queries in asked.items() if len(queries) or len(needed) == 0}
        several = len(asked) > 1
        answers = self.pool.map(search, asked, asked.values()) if several else [search(*one) for one in asked.items()]
        return {number: hits for number, hits in zip(asked, answers, strict=True) if hits is not None}


class Opened(Protocol):
    """An open version, of whatever format, as `OpenIndex` and the version after it use it."""

    manifest: dict[str, Any]
    encoder: QueryEncoder

    @property
    def version(self) -> str: ...

    @property
    def operating_point(self) -> SearchParameters: ...

    @property
    def parts(self) -> dict[str, OpenVersion]: ...

    @property
    def main(self) -> OpenVersion: ...

    @property
    def encoders(self) -> tuple[QueryEncoder, ...]: ...

    def search(self, queries: str | Sequence[str] | np.ndarray, request: Request) -> Found: ...

    def duplicates(self, ids: Sequence[str]) -> pa.Table: ...

    def warm(self, before: "Opened", by_vectors: bool = False) -> None: ...


def opened(lazily: Lazily[T], degraded: bool) -> T | None:
    """What is opened at first use; None where it is unavailable and a degraded search goes on without."""
    return lazily.attempt() if degraded else lazily.get()


def query_vectors(
    queries: str | Sequence[str] | np.ndarray, manifest: Mapping[str, Any], encoder: QueryEncoder
) -> np.ndarray:
    """Texts encoded, or vectors (q, d) as float32, as a manifest's metric wants them.

    Raises:
        ValueError: vectors of another dimension.
    """
    if isinstance(queries, np.ndarray):
        vectors = np.atleast_2d(queries).astype(np.float32)
        if vectors.shape[1] != manifest["dimension"]:
            raise ValueError(
                f"queries of {vectors.shape[1]} dimensions must have the index's {manifest['dimension']}; "
                f"encode them with {manifest['model']['reference']}"
            )
    else:
        vectors = encoder.encode([queries] if isinstance(queries, str) else queries)
    return normalize(vectors) if Metric(manifest["metric"]) is Metric.COSINE else vectors


def merge_readable(
    parts: dict[int, Hits],
    merge: Callable[[dict[int, Hits]], Hits],
    shards: Mapping[int, OpenShard],
    request: Request,
    version: str,
) -> tuple[Hits, list[pa.Table] | None]:
    """The best hits of all shards, and their rows if asked for; drops from `parts` shards whose rows are lost.

    Args:
        merge: of the hits of some shards, by number.
    """
    while parts:
        hits = merge(parts)
        if not request.rows:
            return hits, None
        numbers = np.unique(hits.shards[hits.shards >= 0]).tolist() or list(parts)[:1]
        tables = {number: opened(shards[number].rows, request.degraded) for number in numbers}
        found = {number: rows.table for number, rows in tables.items() if rows is not None}
        if len(found) == len(tables):
            return hits, [_rows_of(hits, query, found) for query in range(len(hits.ids))]
        for number in tables.keys() - found.keys():
            del parts[number]
    raise DamagedFile(
        f"version ({version}): a degraded search needs one shard at least, got none that can be opened; "
        "the log says why"
    )


def links_to(tables: Sequence[pa.Table], ids: Sequence[str]) -> pa.Table:
    """Of tables of links, those to passages that the ids represent."""
    wanted = pa.array(list(ids), pa.string())
    return pa.concat_tables([table.filter(pc.is_in(table.column("represented_by"), wanted)) for table in tables])


def _rows_of(hits: Hits, query: int, tables: dict[int, pa.Table]) -> pa.Table:
    """The found rows of one query, most similar first; columns that only some of the tables have are null in others.

    The document is that of the id, which need not be the row's own: see mark_superseded.
    """
    found = hits.shards[query] >= 0
    places = zip(hits.shards[query, found].tolist(), hits.rows[query, found].tolist(), strict=True)
    parts = [tables[shard].slice(row, 1) for shard, row in places]
    every = pa.concat_tables(parts, promote_options="permissive") if parts else next(iter(tables.values())).slice(0, 0)
    ids = pa.array(hits.ids[query, found], pa.string())
    near = pa.array(hits.similarities[query, found], pa.float32(), from_pandas=True)
    documents = pa.array([name.rpartition("#")[0] for name in hits.ids[query, found]], pa.string())
    every = every.set_column(every.schema.get_field_index("document_id"), "document_id", documents)
    return every.drop_columns(["passage_id"]).add_column(0, "id", ids).add_column(1, "similarity", near)
