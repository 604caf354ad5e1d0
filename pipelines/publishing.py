"""Make a built and measured index a version: its manifest, written last, and the alias that readers follow."""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.catalog import AliasEntry, Catalog, PublishConflict
from penstock.cluster.jobs.placement import owners_path
from penstock.cluster.jobs.shards import DUPLICATES, FAISS, IDS, ROWS, SVS, VECTORS, FileRecord, ShardRecord
from penstock.cluster.jobs.training import read_trained
from penstock.cluster.jobs.transforms import chain_path
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, shard_file
from penstock.cluster.published import OWNERS_FILE, ROUTING_FILE, TRANSFORMS_FILE, VERSION_FILES, VersionFiles
from penstock.cluster.storage import Store
from penstock.operators.indexing import Family, IndexSpec
from penstock.operators.sharding import Sharding
from penstock.operators.transforms import step_to_json
from penstock.operators.vamana import svs_version
from penstock.pipelines.gate import Check
from penstock.pipelines.ledger import StageEntry
from penstock.pipelines.model_identity import model_facts
from penstock.pipelines.planning import ENCODED, Chain, Resolved

FORMAT = "penstock-index/1"
LINEAGE = "lineage.parquet"
SHA256 = re.compile(r"[0-9a-f]{64}")
SHARD_FILE_KINDS = (FAISS, SVS, IDS, ROWS, VECTORS, DUPLICATES)


@dataclass(frozen=True)
class Placed:
    """What lies in a version's folder: its shards, what these share, and where it came from."""

    shards: Sequence[ShardRecord]
    files: tuple[FileRecord, ...]
    lineage: FileRecord


def make_manifest(
    resolved: Resolved,
    chain: Chain,
    run_id: str,
    placed: Placed,
    evaluation: dict[str, Any],
    checks: Sequence[Check],
    entries: Sequence[StageEntry],
) -> dict[str, Any]:
    """All that a reader needs to open and query the version, and all that says how it came about."""
    shards, lineage = placed.shards, placed.lineage
    rows = sum(shard.rows for shard in shards)
    return {
        "format": FORMAT,
        "index": resolved.pipeline.name,
        "version": chain.version,
        "run_id": run_id,
        "rows": rows,
        "documents": entries[0].rows_out,
        "duplicates": sum(shard.duplicates for shard in shards),
        "metric": resolved.metric.value,
        "dimension": resolved.encoder.dimension,
        "model": model_of(resolved),
        "transforms": [step_to_json(step) for step in resolved.pipeline.index.steps()],
        **_built(chain.spec),
        "rerank": resolved.pipeline.index.rerank,
        "stored": stored.value if (stored := resolved.stored) else None,
        "bytes_per_vector": round(index_bytes(shards, placed.files) / max(rows, 1), 1),
        "operating_point": evaluation["default"],
        "evaluation": evaluation,
        "gate": [check.to_json() for check in checks],
        "sharding": _sharding(resolved, shards, evaluation),
        "files": [vars(file) for file in placed.files],
        "shards": [_shard(shard) for shard in shards],
        "lineage": vars(lineage) | {"stages": chain.stages(resolved)},
    }


def place_files(store: Store, folder: str, resolved: Resolved, chain: Chain) -> VersionFiles:
    """Copy into a version's folder what its shards share: transforms, and what routes queries to them."""
    sources = {}
    if chain.transforms_fingerprint is not None:
        sources[TRANSFORMS_FILE] = store.read(chain_path(chain.transforms_fingerprint))
    if resolved.pipeline.index.sharding is Sharding.CLUSTER:
        sources[ROUTING_FILE] = read_trained(store, chain.training_fingerprint)
        sources[OWNERS_FILE] = store.read(owners_path(chain.shards_fingerprint))
    present = store.names(folder)
    for name, data in sources.items():
        if name not in present:
            store.write(f"{folder}/{name}", data)
    return VersionFiles(
        folder,
        tuple(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sources.items()),
    )


def files_of(manifest: dict[str, Any]) -> tuple[FileRecord, ...]:
    """The files of a version that are of no single shard.

    Raises:
        ValueError: a file name or hash that this format does not have.
    """
    return tuple(checked_file(file, set(VERSION_FILES), "a version") for file in manifest.get("files", ()))


def index_bytes(shards: Sequence[ShardRecord], shared: Sequence[FileRecord]) -> int:
    """Size of the index files and of what shards share (transforms, routing): what a searching process holds in
    memory."""
    indexes = sum(file.size_bytes for shard in shards for file in shard.files if file.name.endswith((FAISS, SVS)))
    return indexes + sum(file.size_bytes for file in shared)


def how_built(manifest: dict[str, Any]) -> dict[str, Any]:
    """The family, codec and factory string of a version's shards, whatever library made them."""
    return dict(manifest["svs"] if "svs" in manifest else manifest["faiss"])


def _built(spec: IndexSpec) -> dict[str, Any]:
    built = {
        "family": spec.family.value,
        "codec": spec.codec.value,
        "factory": spec.factory,
        "dimension": spec.dimension,
    }
    if spec.family is Family.VAMANA:
        return {"svs": built | {"ef_construction": spec.ef_construction, "version": svs_version()}}
    return {"faiss": built | {"seed": spec.seed}}


def write_lineage(store: Store, folder: str, resolved: Resolved, chain: Chain) -> FileRecord:
    """The table (stage, fragment) of the stage outputs that a version was made of: what clean-up must leave."""
    passages = [fact.passages for fact in chain.facts]
    embeddings = sorted(chain.embeddings.values())
    stages = [PASSAGES] * len(passages) + [EMBEDDINGS] * len(embeddings)
    if chain.encoded is not None:
        encoded = sorted(chain.encoded.embeddings.values())
        stages, embeddings = stages + [ENCODED] * len(encoded), embeddings + encoded
    table = pa.table({"stage": stages, "fragment": passages + embeddings})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    store.write(f"{folder}/{LINEAGE}", data)
    return FileRecord(LINEAGE, len(data), hashlib.sha256(data).hexdigest())


def lineage_fragments(catalog: Catalog, version: str, stage: str) -> list[str]:
    """The fragments of a stage that a version was made of."""
    table = pq.read_table(io.BytesIO(catalog.store.read(f"{catalog.version_folder(version)}/{LINEAGE}")))
    fragments: list[str] = table.filter(pc.equal(table.column("stage"), stage)).column("fragment").to_pylist()
    return fragments


def place_shards(store: Store, folder: str, shards: Sequence[ShardRecord]) -> list[ShardRecord]:
    """Copy into the version's folder the files of shards that were built for another version with the same contents."""
    placed = []
    for shard in shards:
        if shard.folder != folder:
            present = store.names(folder)
            for file in shard.files:
                if file.name not in present:
                    store.copy(f"{shard.folder}/{file.name}", f"{folder}/{file.name}")
        placed.append(ShardRecord(shard.shard, shard.rows, shard.duplicates, folder, shard.files))
    return placed


def publish_manifest(catalog: Catalog, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, or take the one that is there: it must name the same files.

    Raises:
        PublishConflict: a manifest of this version names other files.
    """
    version = str(manifest["version"])
    stored = catalog.publish_manifest(version, manifest)
    if _contents(stored) != _contents(manifest):
        raise PublishConflict(
            f"version {version} of index {catalog.index} is there already, with other files (run {stored['run_id']}); "
            "the published one stays as it is, and this run's manifest was not written"
        )
    return stored


def shards_of(manifest: dict[str, Any], folder: str) -> list[ShardRecord]:
    """The shards that a manifest lists, in order; a manifest is read from storage and so is not trusted.

    Raises:
        ValueError: a file name or hash that this format does not have.
    """
    return [
        ShardRecord(
            shard["shard"],
            shard["rows"],
            shard["duplicates"],
            folder,
            tuple(_checked_shard_file(file, int(shard["shard"])) for file in shard["files"]),
        )
        for shard in manifest["shards"]
    ]


def move_alias(catalog: Catalog, alias: str, version: str, expected: int, run_id: str) -> AliasEntry:
    """Point the alias to the version, if nobody moved it since `expected` was read."""
    return catalog.move(alias, version, expected=expected, run_id=run_id, reason="publish")


def _contents(manifest: dict[str, Any]) -> str:
    """What must agree between two manifests of one version: the rows and the hashes of the files."""
    listed = [file for shard in manifest["shards"] for file in shard["files"]] + manifest.get("files", [])
    files = sorted((file["name"], file["sha256"]) for file in listed)
    return json.dumps([manifest["format"], manifest["version"], manifest["rows"], files])


def _checked_shard_file(file: dict[str, Any], shard: int) -> FileRecord:
    return checked_file(file, {shard_file(shard, kind) for kind in SHARD_FILE_KINDS}, f"shard {shard}")


def checked_file(file: Mapping[str, Any], known: set[str], owner: str) -> FileRecord:
    """A file of a manifest, with a name that is known and a hash that is one.

    Raises:
        ValueError: another name or hash.
    """
    record = FileRecord(str(file["name"]), int(file["size_bytes"]), str(file["sha256"]))
    if record.name not in known:
        raise ValueError(
            f"manifest: file {record.name!r} is none that {owner} has; the manifest was not written by a run"
        )
    if not SHA256.fullmatch(record.sha256):
        raise ValueError(f"manifest: sha256 of {record.name} must be 64 hexadecimal digits, got {record.sha256[:80]!r}")
    return record


def _sharding(resolved: Resolved, shards: Sequence[ShardRecord], evaluation: dict[str, Any]) -> dict[str, Any]:
    rule, rows = resolved.pipeline.index.sharding, [shard.rows for shard in shards]
    return {
        "rule": rule.value,
        "shards": len(shards),
        "imbalance": round(max(rows) * len(rows) / max(sum(rows), 1), 4),
        "shards_touched": evaluation.get("shards_touched", len(shards)),
    }


def _shard(shard: ShardRecord) -> dict[str, Any]:
    return {
        "shard": shard.shard,
        "rows": shard.rows,
        "duplicates": shard.duplicates,
        "files": [vars(file) for file in shard.files],
    }


def model_of(resolved: Resolved) -> dict[str, Any]:
    """The model as a reader must load it to ask in the same space; with its revision at the Hub, for people: weights
    are told apart by their hash."""
    facts = model_facts(resolved.encoder, resolved.query_encoder)
    return facts | {"revision": resolved.card.revision}
