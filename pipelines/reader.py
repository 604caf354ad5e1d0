"""Read a published index: open a version by its alias, ask with texts or vectors, get ids, similarities and rows."""

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from penstock.cluster.catalog import AliasEntry, Catalog
from penstock.cluster.storage import Store, open_store
from penstock.operators.encoding import ModelMismatch
from penstock.operators.filtering import conditions_of
from penstock.operators.searching import SearchParameters
from penstock.pipelines.model_identity import identity_words, is_one_space
from penstock.pipelines.opened import RETRY_PAUSE_S, Found, Opened, Request
from penstock.pipelines.opening import Opening

FOLLOW_EVERY_S = 10.0  # a look at an alias that has not moved is four small requests
FEWEST_THREADS = 8  # on few cores too: threads that fetch shards wait for the store

logger = logging.getLogger(__name__)


class AliasUnknown(Exception):
    """No such index or alias under the root."""


class OpenIndex:
    """A published version, opened for searching; threads may share it.

    Shards are fetched, verified and opened when a search first needs them; the model at the first search with texts.
    A context manager: leaving it, or `close`, ends its threads.

    Attributes:
        follow_error: what kept it from the version that its alias names at the last look, if anything did.
    """

    def __init__(self, catalog: Catalog, alias: str, manifest: dict[str, Any], trust_remote_code: bool = False) -> None:
        self._catalog, self._alias = catalog, alias
        self._refreshing, self._changing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._with_vectors = False
        self.follow_error: Exception | None = None
        pool = ThreadPoolExecutor(max(FEWEST_THREADS, os.cpu_count() or 1), "penstock-search")
        self._opening = Opening(catalog, trust_remote_code, pool)
        self._version: Opened | None = self._opening.open(manifest)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the version that answers now."""
        return self._present().manifest

    @property
    def version(self) -> str:
        """The version that answers now; `Found.version` is the one that answered."""
        return self._present().version

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def operating_point(self) -> SearchParameters:
        """The search parameters that were measured to reach the recall the pipeline file asks for."""
        return self._present().operating_point

    def search(
        self,
        queries: str | Sequence[str] | np.ndarray,
        k: int = 10,
        *,
        parameters: SearchParameters | None = None,
        rows: bool = False,
        where: Mapping[str, object] | None = None,
        degraded: bool = False,
    ) -> Found:
        """The k most similar passages of each query, over all shards that it needs.

        Args:
            queries: texts, encoded with the model and query prompt that the manifest names; or vectors (q, d) of that
            model.
            k: passages per query.
            parameters: search parameters instead of the default operating point.
            rows: also return the rows that were found.
            where: only passages whose kept columns, or `document_id`, meet all of these conditions: column → a value, a
            list of values, or {"min": value, "max": value} with one of the two or both.
            degraded: answer without shards that cannot be opened, and say so in `Found.coverage`.

        Raises:
            ModelMismatch: the model at hand is not the one the index was made with.
            DamagedFile: a file of the version is not what was published; with `degraded`, this goes for every shard.
            ValueError: a condition on an unknown column, or with a value of another type; vectors of another dimension.
        """
        # the reference keeps this version open until all is answered, wherever the alias goes
        version = self._present(with_vectors=isinstance(queries, np.ndarray))
        return version.search(queries, Request(k, parameters, rows, conditions_of(where or {}), degraded))

    def duplicates(self, ids: Sequence[str]) -> pa.Table:
        """The passages that those of `ids` stand for in the index: a table of id, document_id, represented_by, and
        similarity, which is null where the texts are the same."""
        return self._present().duplicates(ids)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Query vectors float32 (q, d) of texts."""
        return self._present(with_vectors=True).encoder.encode(texts)

    def refresh(self) -> bool:
        """Look the alias up, and change to its version once that is open; whether it was another one.

        What of the present version is in use is opened of the new one first. Searches under way end on the old one.

        Raises:
            AliasUnknown: the alias points to no published version any more.
            ModelMismatch: the new version has another vector space, and vectors of the old one are in use.
            DamagedFile and others: the new version cannot be opened. In all these cases the present one stays.
        """
        with self._refreshing:
            present = self._present()
            entry = _entry_of(self._catalog, self._alias)
            if entry.version != present.version:
                self._change(present, self._opened(entry.version, present))
            self.follow_error = None
            return entry.version != present.version

    def follow(self, every_s: float = FOLLOW_EVERY_S) -> None:
        """Look the alias up in the background, as `refresh` does, until the index is closed or out of use.

        What goes wrong is logged as a warning and kept in `follow_error`, and tried again after half a minute at least.
        """
        if every_s <= 0:
            raise ValueError(f"every_s ({every_s}) must be above 0")
        arguments = (weakref.ref(self), self._closed, every_s)
        threading.Thread(target=_follow, args=arguments, name="penstock-follow", daemon=True).start()

    def close(self) -> None:
        """Let go of files and threads as soon as the searches under way are answered; later ones are refused."""
        with self._changing:
            self._closed.set()
            self._version = None

    def _present(self, with_vectors: bool = False) -> Opened:
        """The version that answers; says whether vectors in its space are at hand from now on."""
        with self._changing:
            if self._version is None:
                raise ValueError(f"index ({self._catalog.index}) is closed; open it again")
            self._with_vectors |= with_vectors
            return self._version

    def _opened(self, version: str, present: Opened) -> Opened:
        """Another version, with what is in use of the present one."""
        new = self._opening.open(self._catalog.manifest(version), present)
        if self._with_vectors:
            _refuse_other_space(present, new)
        new.warm(present, self._with_vectors)
        return new

    def _change(self, present: Opened, new: Opened) -> None:
        with self._changing:
            if self._with_vectors:
                _refuse_other_space(present, new)
            if not self._closed.is_set():
                self._version = new

    def _look(self) -> bool:
        """One look in the background; whether all is well."""
        try:
            self.refresh()
        except Exception as error:  # whatever it is, the present version serves on, and somebody must be told
            if str(error) != str(self.follow_error) and not self._closed.is_set():
                logger.warning(
                    "alias %s of index %s cannot be followed, the version opened before is kept: %s",
                    self._alias,
                    self._catalog.index,
                    error,
                )
            self.follow_error = error.with_traceback(None)  # whose frames hold on to files
            return False
        return True


def open_index(
    root: str, alias: str, *, trust_remote_code: bool = False, follow: bool = False, every_s: float = FOLLOW_EVERY_S
) -> OpenIndex:
    """Open the version that an alias points to now.

    Args:
        root: where the pipeline keeps everything: a local folder or s3://bucket/prefix.
        alias: `alias`, or `index/alias` where several indexes under the root have that alias.
        trust_remote_code: run the Python code that the model's folder brings along, if the index was made with it.
        follow: change to another version when the alias moves; see `OpenIndex.follow`.
        every_s: seconds between looks at the alias.

    Raises:
        AliasUnknown: nothing by that name; the message lists what there is.
    """
    catalog, name = find_alias(open_store(root), alias)
    manifest = catalog.manifest(_entry_of(catalog, name).version)
    index = OpenIndex(catalog, name, manifest, trust_remote_code)
    if follow:
        index.follow(every_s)
    return index


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


def _entry_of(catalog: Catalog, alias: str) -> AliasEntry:
    entry = catalog.alias(alias)
    if entry is None:
        raise AliasUnknown(
            f"alias ({alias}) points to no published version under {catalog.store.url}; run or promote first"
        )
    return entry


def _refuse_other_space(present: Opened, new: Opened) -> None:
    """Vectors that were made for one model mean nothing to another."""
    models = [version.manifest["model"] for version in (present, new)]
    if not is_one_space(*models):
        before, after = map(identity_words, models)
        raise ModelMismatch(
            f"version {new.version} of index {new.manifest['index']} must have the vector space of version "
            f"{present.version} ({before}), as this reader is asked with vectors, got {after}; open the index again, "
            f"and encode queries with {new.manifest['model']['reference']}"
        )


def _follow(index: weakref.ref[OpenIndex], closed: threading.Event, every_s: float) -> None:
    """Looks until the index is closed or nobody has it any more."""
    pause_s = every_s
    while not closed.wait(pause_s):
        present = index()
        if present is None:
            return
        pause_s = every_s if present._look() else max(every_s, RETRY_PAUSE_S)
        del present  # or it would live through the wait
