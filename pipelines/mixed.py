"""Make a mixed version: searchable and correct while a corpus is embedded again with another model.

It refers to the version that answered so far and to one of the new pipeline over the fragments that are embedded again,
and says which rows of the former the latter has taken over. Aliases point to it as to any version.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.shards import FileRecord
from penstock.cluster.jobs.superseded import PartSource, SupersededShard, SupersededTask, mark_superseded
from penstock.cluster.layout import PASSAGES, SELECTION
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.adapters import Adapter
from penstock.operators.bridging import BridgeRecord, Direction
from penstock.operators.encoding import ModelMismatch
from penstock.operators.identity import fingerprint
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines.bridges import read_compatibility
from penstock.pipelines.mixed_format import ADAPTER_KINDS, MIXED_FORMAT, adapter_file, refuse_mixed
from penstock.pipelines.model_identity import identity_words, is_one_space
from penstock.pipelines.publishing import lineage_fragments, publish_manifest, shards_of

VERSION_DIGITS = 16  # of a fingerprint, as of any version
SUPERSEDING_RULES = 2  # a number of its own for each change of mark_superseded: part of what a version is


class BridgeUnfit(Exception):
    """An adapter that did not pass its gate, or that is missing, was about to be published."""


class PartUnfit(Exception):
    """A version that failed its gate was about to become part of one that aliases may point to."""


def publish_mixed(
    session: Session,
    catalog: Catalog,
    run_id: str,
    old: str,
    new: str | None,
    bridge: str | None,
    queries: QueryMode,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Publish the mixed version of an old version and a new one; the manifest.

    The same inputs give the same version, which is made once. Its manifest is written last: a run that is cut short
    leaves no version, and the next one finishes it.

    Args:
        old: the version that answered so far.
        new: a version of the new pipeline over a part of the corpus; None while nothing is embedded.
        bridge: a folder of the store with `queries_to_old` and `documents_to_new`, each .safetensors and .json (a
            BridgeRecord): those that are there; for queries as they are, with the `record.json` that says that they
            may. None for none.
        queries: how texts become queries of the old version.
        model: the `model` of the new pipeline's manifests, where `new` is None; without it, and without adapters, the
            old one's.

    Raises:
        BridgeUnfit: an adapter's verdict does not pass, mode bridge without an adapter of queries, or mode direct where
            they were not measured to find more than the old model's.
        WrongSpace: an adapter, or what was measured, is between other spaces than those of the versions.
        ModelMismatch: `model` is not that of the new version.
        PartUnfit: a version that failed its gate.
        MixedUnsupported: a version that is mixed itself.
        ValueError: one version twice, or adapters to a model that is not given.
        FileNotFoundError: a version that is not published.
    """
    mixture = _Mixture.of(catalog, (old, new), model, bridge)
    adapters = _read_adapters(catalog.store, bridge, mixture)
    if queries is QueryMode.BRIDGE and not mixture.one_space and Direction.QUERIES_TO_OLD not in adapters:
        raise BridgeUnfit(
            f"queries ({queries}) need an adapter from {_named(mixture.model)} to {_named(mixture.old['model'])}, got "
            f"none in {bridge or 'no folder'}; fit one that passes its gate, or let both models encode queries"
        )
    measured = _compatibility(catalog.store, bridge, mixture) if queries is QueryMode.DIRECT else None
    version = _version(mixture, adapters, queries)
    if catalog.has_manifest(version):
        return catalog.manifest(version)
    folder = catalog.version_folder(version)
    files = _place_adapters(catalog.store, folder, adapters)
    shards = _superseded(session, catalog, folder, mixture)
    manifest = _manifest(mixture, version, run_id, queries, files, shards)
    return publish_manifest(catalog, manifest | ({"compatibility": measured} if measured else {}))


@dataclass(frozen=True)
class _Mixture:
    """The manifests of the parts, and the model that a reader's vectors are of."""

    old: dict[str, Any]
    new: dict[str, Any] | None
    model: dict[str, Any]

    @classmethod
    def of(
        cls, catalog: Catalog, versions: tuple[str, str | None], model: dict[str, Any] | None, bridge: str | None
    ) -> "_Mixture":
        old, new = versions
        manifests = [None if version is None else catalog.manifest(version) for version in versions]
        for manifest in manifests:
            if manifest is not None:
                refuse_mixed(manifest, "mix")
                _refuse_failed(manifest)
        before, after = manifests
        if before is None or old == new:
            raise ValueError(f"versions to mix ({old} and {new}) must be two; publish the new one as it is")
        own = before["model"] if after is None else after["model"]
        if model is not None and after is not None and model != own:
            raise ModelMismatch(
                f"version {new} must be of the model {_named(model)}, got {_named(own)}; embed all with one"
            )
        if model is None and after is None and bridge is not None:
            raise ValueError(
                f"adapters of {bridge} lead to a model that no version has yet: pass the `model` that its manifests "
                "will have"
            )
        return cls(before, after, model or own)

    @property
    def one_space(self) -> bool:
        return is_one_space(self.old["model"], self.model)

    @property
    def main(self) -> dict[str, Any]:
        """What the figures that only one version can have are taken from."""
        return self.new or self.old


def _refuse_failed(manifest: dict[str, Any]) -> None:
    missed = [f"{check['name']} {check['measured']:.4f}" for check in manifest["gate"] if not check["passed"]]
    if missed:
        raise PartUnfit(
            f"version {manifest['version']} must have passed its gate to be part of a mixed one, got "
            f"{', '.join(missed)}; see its manifest for the bounds"
        )


def _read_adapters(store: Store, bridge: str | None, mixture: _Mixture) -> dict[Direction, tuple[bytes, bytes]]:
    """The adapters of a folder and their records, as they are there; refuses what may not be used."""
    present = store.names(bridge) if bridge is not None else set()
    adapters = {}
    for direction in Direction:
        names = [adapter_file(direction, kind) for kind in ADAPTER_KINDS]
        if names[0] in present:
            data, record = (store.read(f"{bridge}/{name}") for name in names)
            _refuse_unfit(direction, Adapter.from_bytes(data), BridgeRecord.from_json(json.loads(record)), mixture)
            adapters[direction] = (data, record)
    return adapters


def _refuse_unfit(direction: Direction, adapter: Adapter, record: BridgeRecord, mixture: _Mixture) -> None:
    if record.direction is not direction:
        raise BridgeUnfit(f"adapter {direction} has the record of {record.direction}; fit both again")
    spaces = [str(model["space"]) for model in (mixture.model, mixture.old["model"])]
    source, target = spaces if direction is Direction.QUERIES_TO_OLD else spaces[::-1]
    record.refuse_other(adapter, source, target)
    if not record.verdict.passes:
        verdict = record.verdict
        raise BridgeUnfit(
            f"adapter {direction} from {record.source.model} to {record.target.model} must recover "
            f"{verdict.least_recovery:g} of the reference, and more than its control, got {verdict.recovery.low:.4f} "
            f"and {verdict.over_control.low:+.4f} as lower bounds; leave it out, or fit it to more pairs"
        )


def _compatibility(store: Store, bridge: str | None, mixture: _Mixture) -> dict[str, Any]:
    """What was measured of new queries in the old version, which is asked with them as they are."""
    spaces = (str(mixture.old["model"]["space"]), str(mixture.model["space"]))
    measured = read_compatibility(store, bridge, spaces)
    if measured is None:
        raise BridgeUnfit(
            f"queries ({QueryMode.DIRECT}) of {_named(mixture.model)} must be measured to find more in version "
            f"{mixture.old['version']} than those of {_named(mixture.old['model'])}, by the lower bound of the "
            f"difference, got none such in {bridge or 'no folder'}; let both models encode queries, or fit an adapter"
        )
    return measured


def _version(mixture: _Mixture, adapters: dict[Direction, tuple[bytes, bytes]], queries: QueryMode) -> str:
    whole = fingerprint(
        format=MIXED_FORMAT,
        rules=SUPERSEDING_RULES,
        old=mixture.old["version"],
        new=mixture.new["version"] if mixture.new else None,
        model=mixture.model,
        queries=queries.value,
        adapters={direction.value: [_sha256(data) for data in files] for direction, files in adapters.items()},
    )
    return whole[:VERSION_DIGITS]


def _place_adapters(store: Store, folder: str, adapters: dict[Direction, tuple[bytes, bytes]]) -> list[FileRecord]:
    placed = []
    for direction, files in adapters.items():
        for kind, data in zip(ADAPTER_KINDS, files, strict=True):
            name = adapter_file(direction, kind)
            store.write(f"{folder}/{name}", data)
            placed.append(FileRecord(name, len(data), _sha256(data)))
    return placed


def _superseded(session: Session, catalog: Catalog, folder: str, mixture: _Mixture) -> list[SupersededShard]:
    """What is left of each old shard, in order."""
    old, new = (
        tuple(shards_of(manifest, catalog.version_folder(manifest["version"]))) if manifest else ()
        for manifest in (mixture.old, mixture.new)
    )
    if not new:
        return [SupersededShard(shard.shard, shard.rows, 0, 0, 0, shard.duplicates, ()) for shard in old]
    part = _part_source(catalog, mixture.new)
    tasks = [SupersededTask(catalog.store.url, folder, shard, new, part) for shard in old]
    # One shard is read sooner here than Ray starts.
    found = session.stream(mark_superseded, tasks) if len(tasks) > 1 else map(mark_superseded, tasks)
    return sorted(found, key=lambda one: one.shard)


def _part_source(catalog: Catalog, new: dict[str, Any] | None) -> PartSource | None:
    """What a version of a part of the corpus was made of; None for one of a whole corpus."""
    if new is None or "part_of" not in new:
        return None
    passages = lineage_fragments(catalog, new["version"], PASSAGES)
    return PartSource(new["lineage"]["stages"][SELECTION], tuple(sorted(passages)))


def _manifest(
    mixture: _Mixture,
    version: str,
    run_id: str,
    queries: QueryMode,
    files: Sequence[FileRecord],
    shards: Sequence[SupersededShard],
) -> dict[str, Any]:
    old, new, main = mixture.old, mixture.new, mixture.main
    superseded = sum(shard.superseded for shard in shards)
    old_part = {"role": "old", **_part(old), "rows": old["rows"] - superseded, "superseded": superseded}
    parts = [old_part, {"role": "new", **_part(new), "rows": new["rows"], "superseded": 0}] if new else [old_part]
    rows = sum(part["rows"] for part in parts)
    index_bytes = sum(manifest["bytes_per_vector"] * manifest["rows"] for manifest in (old, new) if manifest)
    shard_count = sum(manifest["sharding"]["shards"] for manifest in (old, new) if manifest)
    return {
        "format": MIXED_FORMAT,
        "index": old["index"],
        "version": version,
        "run_id": run_id,
        "rows": rows,
        "documents": old["documents"] - sum(shard.documents for shard in shards) + (new["documents"] if new else 0),
        "duplicates": sum(shard.duplicates for shard in shards) + (new["duplicates"] if new else 0),
        "metric": main["metric"],
        "dimension": mixture.model["dimension"],
        "model": mixture.model,
        "parts": parts,
        "queries": queries.value,
        "bytes_per_vector": round(index_bytes / max(rows, 1), 1),
        "operating_point": main["operating_point"],
        "evaluation": {},
        "gate": [],
        "sharding": {"rule": "mixed", "shards": shard_count},
        "files": [vars(file) for file in files],
        "shards": [_left(shard) for shard in shards],
        "lineage": {"versions": [part["version"] for part in parts]},
    }


def _part(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"version": manifest["version"], "model": manifest["model"]}


def _left(shard: SupersededShard) -> dict[str, Any]:
    return {
        "shard": shard.shard,
        "rows": shard.rows,
        "superseded": shard.superseded,
        "standing_in": shard.standing_in,
        "duplicates": shard.duplicates,
        "files": [vars(file) for file in shard.files],
    }


def _named(model: dict[str, Any]) -> str:
    return identity_words(model)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
