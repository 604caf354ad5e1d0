"""A mixed version, opened for searching: passages that were embedded again come from the new part, the others from the
old one, and similarities of two vector spaces never meet."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar, assert_never

import numpy as np
import pyarrow as pa

from penstock.cluster.catalog import Catalog
from penstock.cluster.file_cache import DamagedFile
from penstock.cluster.jobs.shards import FileRecord
from penstock.cluster.jobs.superseded import LINKS, NAMES, SUPERSEDED, open_links, open_names, open_superseded
from penstock.cluster.published import hold_file
from penstock.cluster.storage import Store
from penstock.operators.adapters import Adapter
from penstock.operators.bridging import BridgeRecord, Direction
from penstock.operators.encoding import ModelMismatch
from penstock.operators.mixed_spaces import (
    AdaptedVectors,
    QueryMode,
    SpacedHits,
    compared_again,
    fill_places,
    merge_within_space,
)
from penstock.operators.models import ModelUnavailable
from penstock.operators.searching import Hits, SearchParameters, StoredVectors, empty_hits, merge_hits
from penstock.pipelines.mixed_format import MixedParts
from penstock.pipelines.model_identity import is_one_space
from penstock.pipelines.opened import (
    Found,
    Lazily,
    LiveRows,
    Opened,
    OpenShard,
    OpenVersion,
    Request,
    Searched,
    links_to,
    merge_readable,
    opened,
    query_vectors,
)
from penstock.pipelines.query_encoder import CodeNotTrusted, QueryEncoder

# Old passages that are compared again in the new space, for each of k. Between spaces that an adapter passes between
# (384 and 256 dimensions, mean and first token; 4,000 abstracts and docstrings, a tenth embedded again) 4 find 0.997
# and 0.83 to 0.92 of what comparing all would, and from 2 on nDCG@10 is that of all within 0.003.
COMPARED_PER_HIT = 4

TRIED_TEXT = "a"  # as good as any other: whether texts become queries does not depend on them

T = TypeVar("T")


class Way(StrEnum):
    """How hits of the two parts become one ranking."""

    ONE_SPACE = "one space"
    ADAPTED = "adapted"
    PLACES = "places"


@dataclass(frozen=True, eq=False)
class Bridge:
    """An adapter, and what its images are to be multiplied by where they are compared with vectors of their space."""

    adapter: Adapter
    length: float

    @classmethod
    def read(cls, store: Store, folder: str, files: tuple[FileRecord, FileRecord], spaces: tuple[str, str]) -> "Bridge":
        """From the files of a mixed version, adapter and record, whose hashes are compared.

        Raises:
            WrongSpace: it leads between other spaces than these, from the first to the second.
        """
        data = []
        for file in files:
            with hold_file(store, folder, file) as path:
                data.append(path.read_bytes())
        adapter, record = Adapter.from_bytes(data[0]), BridgeRecord.from_json(json.loads(data[1]))
        record.refuse_other(adapter, *spaces)
        return cls(adapter, record.length)


@dataclass(frozen=True, eq=False)
class _Merging:
    """The way of one search, and the adapter of old vectors that it needs: None but for ADAPTED."""

    way: Way
    documents: Bridge | None = None


@dataclass(frozen=True, eq=False)
class _Asked:
    """Query vectors of the spaces that are searched: float32 (q, d) each, None where none is."""

    new: np.ndarray | None
    old: np.ndarray | None
    merging: _Merging


class OpenMixed:
    """A mixed version, opened for searching; threads may share it.

    Shards of the new part keep their numbers, and those of the old one follow.

    Args:
        encoder: of the model that the manifest names: the new one.
        old, new: the open parts, which other mixed versions may share; new is None where nothing is embedded yet.
    """

    def __init__(
        self,
        catalog: Catalog,
        manifest: dict[str, Any],
        encoder: QueryEncoder,
        old: OpenVersion,
        new: OpenVersion | None,
    ) -> None:
        self.manifest, self.encoder, self.old, self.new = manifest, encoder, old, new
        self._named = MixedParts.of(manifest)
        folder = catalog.version_folder(manifest["version"])
        self._live = _live_rows(catalog.store, folder, self._named)
        self._links = _by_shard(catalog.store, folder, self._named, LINKS, open_links)
        self._names = _by_shard(catalog.store, folder, self._named, NAMES, open_names)
        self._bridges = self._lazy_bridges(catalog.store, folder)
        self._first_old = max(new.shards) + 1 if new else 0
        self._shards: dict[int, OpenShard] = {**(new.shards if new else {}), **self._renumbered(old.shards)}

    @property
    def version(self) -> str:
        return str(self.manifest["version"])

    @property
    def operating_point(self) -> SearchParameters:
        """That of the new part; each part is searched at its own."""
        return self.main.operating_point

    @property
    def parts(self) -> dict[str, OpenVersion]:
        return self.old.parts | (self.new.parts if self.new else {})

    @property
    def main(self) -> OpenVersion:
        return self.new or self.old

    @property
    def encoders(self) -> tuple[QueryEncoder, ...]:
        return (self.encoder, self.old.encoder)

    @property
    def way(self) -> Way:
        """How this version's hits are merged now: fixed by what is in it, whatever a degraded search has to do without,
        but that without its adapter of documents, while that cannot be read, new hits take places."""
        return self._merging().way

    def _merging(self) -> _Merging:
        if not (self._named.old_live and self._named.new_live) or self._one_space:
            return _Merging(Way.ONE_SPACE)
        stored = self.old.manifest["stored"] is not None
        bridge = self._bridge(Direction.DOCUMENTS_TO_NEW) if stored else None
        return _Merging(Way.PLACES) if bridge is None else _Merging(Way.ADAPTED, bridge)

    def _bridge(self, direction: Direction) -> Bridge | None:
        """An adapter; None where there is none, or while it cannot be read: the log says why."""
        bridge = self._bridges.get(direction)
        return None if bridge is None else bridge.attempt()

    def search(self, queries: str | Sequence[str] | np.ndarray, request: Request) -> Found:
        """See `OpenIndex.search`."""
        asked = self._asked(queries)
        searched = self._find(asked, request)

        def merge(parts: dict[int, Hits]) -> Hits:
            return self._merged(parts, asked, request.k)

        hits, rows = merge_readable(searched.hits, merge, self._shards, request, self.version)
        coverage = searched.coverage(searched.hits)
        return Found(hits.ids, hits.similarities, self.version, coverage, rows, asked.merging.way is Way.PLACES)

    def duplicates(self, ids: Sequence[str]) -> pa.Table:
        """See `OpenIndex.duplicates`; a passage that is a row of the new part is nobody's duplicate any more."""
        tables = [shard.duplicates.get() for shard in (self.new.shards.values() if self.new else ())]
        tables += [
            self._links[number].get() if number in self._links else shard.duplicates.get()
            for number, shard in self.old.shards.items()
        ]
        return links_to(tables, ids)

    def warm(self, before: Opened, by_vectors: bool = False) -> None:
        """Open what of an earlier version was in use: shards with what is superseded, adapters, models for texts.

        Args:
            by_vectors: whether queries are vectors, too.

        Raises:
            DamagedFile: the adapter of queries cannot be read, and queries of the kind that is asked have no other way.
            ModelMismatch: vectors are asked, and there is no adapter for them.
        """
        for part, live in ((self.new, self._named.new_live), (self.old, self._named.old_live)):
            if part is not None and live:
                part.warm_shards(before.main)
        for number, shard in self.old.shards.items():
            if shard.searcher.ready:
                for files in (self._live.masks, self._names):
                    if number in files:
                        files[number].get()
        for direction in self._bridges:
            self._bridge(direction)
        if any(encoder.loaded for encoder in before.encoders):
            self._asked([TRIED_TEXT])  # which loads the models that texts need
        if by_vectors:
            self._asked(np.ones((1, self.manifest["dimension"]), np.float32))

    # ---- queries

    def _encoders_of_texts(self) -> list[QueryEncoder]:
        """The models that texts need."""
        by_one = self._named.queries is not QueryMode.BOTH
        by_new = [self.encoder] if by_one or self._named.new_live else []
        return by_new if by_one or not self._named.old_live else [*by_new, self.old.encoder]

    def _asked(self, queries: str | Sequence[str] | np.ndarray) -> _Asked:
        if isinstance(queries, np.ndarray) or self.encoder in self._encoders_of_texts():
            new = query_vectors(queries, self.manifest, self.encoder)
            return _Asked(new, self._old_queries(queries, new), self._merging())
        return _Asked(None, self.old.vectors(queries), self._merging())

    def _old_queries(self, queries: str | Sequence[str] | np.ndarray, new: np.ndarray) -> np.ndarray | None:
        """The queries in the old part's space; None where nothing of it counts."""
        texts, one_space = not isinstance(queries, np.ndarray), self._one_space
        if not self._named.old_live:
            return None
        if self._named.queries is QueryMode.DIRECT:
            return new
        if one_space and (not texts or self.encoder is self.old.encoder):
            return new
        if texts and (one_space or self._named.queries is QueryMode.BOTH):
            return self.old.vectors(queries)
        bridge = self._bridge(Direction.QUERIES_TO_OLD)
        return self._without_bridge(queries) if bridge is None else bridge.adapter.apply(new)

    def _without_bridge(self, queries: str | Sequence[str] | np.ndarray) -> np.ndarray:
        """The queries in the old space without the adapter of queries, which is not there or cannot be read: texts by
        the old model."""
        old, new = self.old.manifest["model"], self.manifest["model"]
        unreadable = f"its adapter {Direction.QUERIES_TO_OLD} cannot be read, the log says why"
        if not isinstance(queries, np.ndarray):
            try:
                return self.old.vectors(queries)
            except (ModelUnavailable, ModelMismatch, CodeNotTrusted) as error:
                raise DamagedFile(
                    f"version {self.version} cannot be asked with texts: {unreadable}, and the old model "
                    f"{old['reference']}, which does without it, is not at hand: {error}"
                ) from error
        refused = (
            f"queries given as vectors of {new['reference']} (space {new['space'][:16]}) cannot be compared with "
            f"the {self._named.old_live} passages of version {self.version} that are in space {old['space'][:16]} "
            f"of {old['reference']}, as "
        )
        if Direction.QUERIES_TO_OLD in self._bridges:
            raise DamagedFile(f"{refused}{unreadable}; ask with texts, or restore it")
        raise ModelMismatch(f"{refused}it has no adapter of queries; ask with texts, or wait for the upgrade's end")

    def _lazy_bridges(self, store: Store, folder: str) -> dict[Direction, Lazily[Bridge]]:
        spaces = (self._new_space, self._old_space)
        return {
            direction: Lazily(
                f"adapter {direction} of {folder}",
                partial(
                    Bridge.read, store, folder, files, spaces if direction is Direction.QUERIES_TO_OLD else spaces[::-1]
                ),
            )
            for direction in Direction
            if (files := self._named.adapter_files(direction)) is not None
        }

    # ---- answers

    def _find(self, asked: _Asked, request: Request) -> Searched:
        """What the shards of both parts answer, each in its own space."""
        found, way = [], asked.merging.way
        if self.new and self._named.new_live and asked.new is not None:
            found.append(self.new.find(asked.new, request))
        if asked.old is not None:
            places = way is Way.PLACES
            old = self._find_places(asked.old, request) if places else self._find_live(asked.old, request, way)
            found.append(old.renumbered(self._first_old))
        return Searched(
            {number: rows for part in found for number, rows in part.rows.items()},
            np.concatenate([part.needed for part in found], axis=1),
            {number: hits for part in found for number, hits in part.hits.items()},
        )

    def _find_live(self, queries: np.ndarray, request: Request, way: Way) -> Searched:
        """Of the old part what counts: more than k, where hits are compared again."""
        deeper = replace(request, k=_depth(request.k, way))
        return self._named_now(self.old.find(queries, deeper, self._live), request)

    def _find_places(self, queries: np.ndarray, request: Request) -> Searched:
        """The old ranking of all rows, as before; without shards of which it cannot be told what is superseded."""
        searched = self.old.find(queries, request)
        for number in self._live.masks.keys() & searched.hits.keys():
            if opened(self._live.masks[number], request.degraded) is None:
                del searched.hits[number]
        return self._named_now(searched, request)

    def _named_now(self, searched: Searched, request: Request) -> Searched:
        """With the ids that rows go by which stand in for other documents than their own."""
        for number in self._names.keys() & searched.hits.keys():
            names = opened(self._names[number], request.degraded)
            if names is None:
                del searched.hits[number]
                continue
            rows, ids = names
            hits = searched.hits[number]
            place = np.searchsorted(rows, hits.rows).clip(max=len(rows) - 1)
            searched.hits[number] = replace(hits, ids=np.where(rows[place] == hits.rows, ids[place], hits.ids))
        return searched

    def _merged(self, parts: dict[int, Hits], asked: _Asked, k: int) -> Hits:
        found_new = [hits for number, hits in parts.items() if number < self._first_old]
        found_old = [hits for number, hits in parts.items() if number >= self._first_old]
        new = SpacedHits(self._new_space, merge_hits(found_new, k)) if found_new else None
        old = SpacedHits(self._old_space, merge_hits(found_old, _depth(k, asked.merging.way))) if found_old else None
        if asked.merging.way is Way.PLACES:
            return self._in_places(old, new, k)
        spaced = [new, self._comparable(old, asked) if old else None]
        return merge_within_space([part for part in spaced if part], k).hits

    def _in_places(self, old: SpacedHits | None, new: SpacedHits | None, k: int) -> Hits:
        """The old ranking, with new hits in the places of superseded rows; what a degraded search lacks is empty."""
        given = old or new
        if given is None:
            raise ValueError(f"hits to merge of version {self.version} must be of one shard at least, got none")
        nothing = empty_hits(*given.hits.rows.shape)
        before = old or SpacedHits(self._old_space, nothing)
        after = new or SpacedHits(self._new_space, nothing)
        return fill_places(before, self._superseded(before.hits), after, k)

    def _superseded(self, hits: Hits) -> np.ndarray:
        """bool (q, k): which hits of the old part count no more."""
        superseded = np.zeros(hits.rows.shape, bool)
        for number, mask in self._live.masks.items():
            own = hits.shards == number + self._first_old
            if own.any():
                superseded[own] = ~mask.get()[hits.rows[own]]
        return superseded

    def _comparable(self, old: SpacedHits, asked: _Asked) -> SpacedHits:
        """Hits of the old part in the space that they are merged in, where there is a way into it."""
        bridge = asked.merging.documents
        if bridge is None or asked.new is None:
            return old
        vectors = {
            number: AdaptedVectors(stored, bridge.adapter, bridge.length)
            for number in np.unique(old.hits.shards[old.hits.shards >= 0]).tolist()
            if (stored := self._stored(number)) is not None
        }
        return compared_again(old, np.ascontiguousarray(asked.new), vectors, self._new_space)

    def _stored(self, number: int) -> StoredVectors | None:
        return self._shards[number].searcher.get().vectors

    @property
    def _one_space(self) -> bool:
        return is_one_space(self.manifest["model"], self.old.manifest["model"])

    @property
    def _new_space(self) -> str:
        return str(self.manifest["model"]["space"])

    @property
    def _old_space(self) -> str:
        return str(self.old.manifest["model"]["space"])

    def _renumbered(self, shards: dict[int, OpenShard]) -> dict[int, OpenShard]:
        return {number + self._first_old: shard for number, shard in shards.items()}


def _depth(k: int, way: Way) -> int:
    """How many hits of the old part are asked for."""
    match way:
        case Way.ADAPTED:
            return k * COMPARED_PER_HIT
        case Way.ONE_SPACE | Way.PLACES:
            return k
        case _:
            assert_never(way)


def _live_rows(store: Store, folder: str, named: MixedParts) -> LiveRows:
    def mask(store: Store, folder: str, file: FileRecord) -> np.ndarray:
        return ~open_superseded(store, folder, file)

    counts = {shard.shard: shard.live for shard in named.shards}
    masks = _by_shard(store, folder, named, SUPERSEDED, mask)
    fewer = {shard.shard for shard in named.shards if shard.superseded}
    return LiveRows(counts, {number: masks[number] for number in masks.keys() & fewer})


def _by_shard(
    store: Store, folder: str, named: MixedParts, kind: str, read: Callable[[Store, str, FileRecord], T]
) -> dict[int, Lazily[T]]:
    """What the old shards that have such a file hold in it."""
    return {
        shard.shard: Lazily(f"{file.name} of {folder}", partial(read, store, folder, file))
        for shard in named.shards
        if (file := shard.file(kind)) is not None
    }
