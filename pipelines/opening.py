"""Open a version of whatever format, sharing what the one before it has open."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.pipelines.mixed_format import MixedParts, is_mixed
from penstock.pipelines.opened import Opened, OpenVersion
from penstock.pipelines.opened_mixed import OpenMixed
from penstock.pipelines.query_encoder import QueryEncoder


@dataclass(frozen=True, eq=False)
class Opening:
    """Opens versions of one index, one after the other.

    Attributes:
        pool: searches their shards.
    """

    catalog: Catalog
    trust_remote_code: bool
    pool: ThreadPoolExecutor

    def open(self, manifest: dict[str, Any], before: Opened | None = None) -> Opened:
        """The version of a manifest: versions that it consists of and models are those of the one before, where this
        has them open."""
        parts = before.parts if before else {}
        encoders = before.encoders if before else ()
        if not is_mixed(manifest):
            return self._version(manifest, parts, encoders)
        named = MixedParts.of(manifest)
        old = self._version(self.catalog.manifest(named.old), parts, encoders)
        encoders += old.encoders
        new = None if named.new is None else self._version(self.catalog.manifest(named.new), parts, encoders)
        encoders += () if new is None else new.encoders
        encoder = self._encoder(manifest["model"], encoders)
        return OpenMixed(self.catalog, manifest, encoder, old, new)

    def _version(
        self, manifest: dict[str, Any], parts: dict[str, OpenVersion], encoders: tuple[QueryEncoder, ...]
    ) -> OpenVersion:
        if manifest["version"] in parts:
            return parts[manifest["version"]]
        encoder = self._encoder(manifest["model"], encoders)
        return OpenVersion(self.catalog.store, manifest, encoder, self.pool)

    def _encoder(self, model: dict[str, Any], encoders: tuple[QueryEncoder, ...]) -> QueryEncoder:
        known = (encoder for encoder in encoders if encoder.model == model)
        return next(known, None) or QueryEncoder(model, self.trust_remote_code)
