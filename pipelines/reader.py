"""Read a published index: open a version by its alias, ask with texts or vectors, get ids, similarities and rows."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.shards import ShardRecord
from penstock.cluster.node import model_folder
from penstock.cluster.published import open_duplicates, open_rows, open_searcher
from penstock.cluster.storage import Store, open_store
from penstock.operators.encoder_worker import QUERY_BATCH_TOKENS, EncoderWorker
from penstock.operators.encoding import Backend, Encoder, Precision
from penstock.operators.indexing import Family, Metric
from penstock.operators.searching import Hits, SearchParameters, ShardSearcher, merge_hits, normalize
from penstock.pipelines.publishing import FORMAT, shards_of


class AliasUnknown(Exception):
    """No such index or alias under the root."""


class CodeNotTrusted(Exception):
    """The model of an index wants to run code that the reader did not agree to."""


@dataclass(frozen=True)
class Found:
    """What a search found for q queries, most similar first.

    Attributes:
        ids: object (q, k) of str, None where there are fewer than k rows.
        similarities: float32 (q, k), NaN there.
        rows: for each query a table of the found rows (id, similarity, document_id, start, end, text, kept columns),
        if asked for.
    """

    ids: np.ndarray
    similarities: np.ndarray
    rows: list[pa.Table] | None = field(default=None, compare=False)


class OpenIndex:
    """A published version, opened for searching; threads may share it.

    Shards are opened, after their hashes were checked, at the first search; the model at the first search with texts.
    """

    def __init__(self, store: Store, manifest: dict[str, Any], trust_remote_code: bool = False) -> None:
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"format of the version ({manifest['format']}) must be {FORMAT}; open it with another release"
            )
        self.manifest = manifest
        self._store = store
        self._trust_remote_code = trust_remote_code
        self._folder = Catalog(store, manifest["index"]).version_folder(manifest["version"])
        self._metric = Metric(manifest["metric"])
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        return str(self.manifest["version"])

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def operating_point(self) -> SearchParameters:
        """The search parameters that were measured to reach the recall the pipeline file asks for."""
        return SearchParameters.from_json(self.manifest["operating_point"]["parameters"])

    def search(
        self,
        queries: str | Sequence[str] | np.ndarray,
        k: int = 10,
        *,
        parameters: SearchParameters | None = None,
        rows: bool = False,
    ) -> Found:
        """The k most similar passages of each query, over all shards.

        Args:
            queries: texts, encoded with the model and query prompt that the manifest names; or vectors (q, d) of that
            model.
            k: passages per query.
            parameters: search parameters instead of the default operating point.
            rows: also return the rows that were found.

        Raises:
            ModelMismatch: the model at hand is not the one the index was made with.
            DamagedFile: a file of the version is not what was published.
        """
        vectors = self._vectors(queries)
        point = parameters or self.operating_point
        with ThreadPoolExecutor(max(1, len(self._searchers))) as pool:
            parts = list(pool.map(lambda searcher: searcher.search(vectors, k, point), self._searchers))
        hits = merge_hits(parts, k)
        return Found(hits.ids, hits.similarities, self._rows(hits) if rows else None)

    def duplicates(self, ids: Sequence[str]) -> pa.Table:
        """The passages that those of `ids` stand for in the index: a table of id, document_id and represented_by."""
        wanted = pa.array(list(ids), pa.string())
        links = [open_duplicates(self._store, shard) for shard in self._shards]
        return pa.concat_tables([table.filter(pc.is_in(table.column("represented_by"), wanted)) for table in links])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Query vectors float32 (q, d) of texts."""
        with self._lock:
            return self._encoder.encode(list(texts)).require()

    @cached_property
    def _shards(self) -> list[ShardRecord]:
        return shards_of(self.manifest, self._folder)

    @cached_property
    def _searchers(self) -> list[ShardSearcher]:
        family = Family(self.manifest["faiss"]["family"])
        return [open_searcher(self._store, shard, family, self._metric) for shard in self._shards]

    @cached_property
    def _tables(self) -> list[pa.Table]:
        return [open_rows(self._store, shard) for shard in self._shards]

    @cached_property
    def _encoder(self) -> EncoderWorker:
        encoder = query_encoder(self.manifest["model"], self._trust_remote_code)
        return EncoderWorker(replace(encoder, batch_tokens=QUERY_BATCH_TOKENS), model_folder(encoder.model))

    def _vectors(self, queries: str | Sequence[str] | np.ndarray) -> np.ndarray:
        if isinstance(queries, np.ndarray):
            vectors = np.atleast_2d(queries).astype(np.float32)
            if vectors.shape[1] != self.manifest["dimension"]:
                raise ValueError(
                    f"queries of {vectors.shape[1]} dimensions must have the index's {self.manifest['dimension']}; "
                    f"encode them with {self.manifest['model']['reference']}"
                )
        else:
            vectors = self.encode([queries] if isinstance(queries, str) else queries)
        return normalize(vectors) if self._metric is Metric.COSINE else vectors

    def _rows(self, hits: Hits) -> list[pa.Table]:
        return [self._rows_of(hits, query) for query in range(len(hits.ids))]

    def _rows_of(self, hits: Hits, query: int) -> pa.Table:
        found = [place for place in range(hits.ids.shape[1]) if hits.shards[query, place] >= 0]
        parts = [
            self._tables[hits.shards[query, place]].slice(int(hits.rows[query, place]), 1).drop_columns(["passage_id"])
            for place in found
        ]
        table = pa.concat_tables(parts) if parts else self._tables[0].slice(0, 0).drop_columns(["passage_id"])
        ids = pa.array([hits.ids[query, place] for place in found], pa.string())
        near = pa.array([float(hits.similarities[query, place]) for place in found], pa.float32())
        return table.add_column(0, "id", ids).add_column(1, "similarity", near)


def open_index(root: str, alias: str, *, trust_remote_code: bool = False) -> OpenIndex:
    """Open the version that an alias points to now.

    Args:
        root: where the pipeline keeps everything: a local folder or s3://bucket/prefix.
        alias: `alias`, or `index/alias` where several indexes under the root have that alias.
        trust_remote_code: run the Python code that the model's folder brings along, if the index was made with it.

    Raises:
        AliasUnknown: nothing by that name; the message lists what there is.
    """
    store = open_store(root)
    catalog, name = find_alias(store, alias)
    entry = catalog.alias(name)
    if entry is None:
        raise AliasUnknown(f"alias ({alias}) points to no published version under {store.url}; run or promote first")
    return OpenIndex(store, catalog.manifest(entry.version), trust_remote_code)


def find_alias(store: Store, alias: str) -> tuple[Catalog, str]:
    """The catalog and the plain name of `alias` or `index/alias`."""
    index, _, name = alias.rpartition("/")
    indexes = [index] if index else sorted(store.folders("indexes"))
    holders = [candidate for candidate in indexes if name in Catalog(store, candidate).aliases()]
    if len(holders) == 1:
        return Catalog(store, holders[0]), name
    known = [f"{one}/{known}" for one in sorted(store.folders("indexes")) for known in Catalog(store, one).aliases()]
    if holders:
        choices = ", ".join(f"{holder}/{name}" for holder in holders)
        raise AliasUnknown(f"alias ({alias}) must name one index, several have it; say which: {choices}")
    raise AliasUnknown(
        f"alias ({alias}) must be one of those under {store.url}: {', '.join(known) or 'there are none yet'}"
    )


def query_encoder(model: dict[str, Any], trust_remote_code: bool) -> Encoder:
    """The encoder of queries that a manifest's `model` describes. Whoever wrote the manifest cannot make a reader run
    code:
    that takes the reader's own word."""
    if model["trust_remote_code"] and not trust_remote_code:
        raise CodeNotTrusted(
            f"model ({model['reference']}) runs code of its own, which needs your word: open the index with "
            "trust_remote_code=True (--trust-remote-code), or ask with vectors"
        )
    return Encoder(
        model=model["reference"],
        weights_hash=model["weights_sha256"],
        tokenizer_hash=model["tokenizer_sha256"],
        configuration_hash=model["configuration_sha256"],
        max_tokens=model["max_tokens"],
        special_tokens=model["special_tokens"],
        dimension=model["dimension"],
        prompt=model["query_prompt"],
        normalize=model["normalize"],
        precision=Precision(model["precision"]),
        trust_remote_code=trust_remote_code,
        layers=model.get("layers"),
        backend=Backend(model.get("backend", Backend.TORCH)),
        task="query",
    )
