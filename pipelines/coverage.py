"""What an alias is not moved without: every file of a version whole, every live passage in it exactly once.

It holds for the flip of an upgrade and for `penstock reindex`, whose version replaces one that is good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.coverage import CoverageSource, CoverageTask, FileTask, cover_rows, damage_of
from penstock.cluster.jobs.encoded_texts import EncodedTexts, count_encoded
from penstock.cluster.jobs.selection import bucket_count
from penstock.cluster.jobs.shards import FileRecord
from penstock.cluster.layout import EMBEDDINGS, KEPT, PASSAGES, SELECTION, stage_folder, stage_record_path
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.coverage import RowCoverage
from penstock.operators.sharding import shard_range
from penstock.pipelines.decisions import read_decision
from penstock.pipelines.gate import Check, failed
from penstock.pipelines.planning import ENCODED, finished_fragments, read_facts
from penstock.pipelines.publishing import files_of, lineage_fragments, shards_of
from penstock.pipelines.records import read_json

# What the record of an embeddings stage and a manifest call the same fact of a model.
MODEL_FACTS = {
    "weights": "weights_sha256",
    "tokenizer": "tokenizer_sha256",
    "configuration": "configuration_sha256",
    "max_tokens": "max_tokens",
    "dimension": "dimension",
    "prompt": "document_prompt",
    "normalize": "normalize",
    "precision": "precision",
    "layers": "layers",
    "backend": "backend",
}
KINDS = {
    "missing": "passages missing",
    "doubled": "passages there twice",
    "foreign": "passages that should not be there",
    "without_vector": "passages without a vector of the model",
}
DAMAGED = "damaged files"
REMEDY = "restore its files from a copy, or remove the folder of the version, and run again to build it anew"


class CoverageUnknown(Exception):
    """What a version should hold cannot be told any more, as outputs of its stages are gone."""


@dataclass(frozen=True)
class Coverage:
    """What was found of a version.

    Attributes:
        model: identity of the space that its vectors are in.
        damaged: what is wrong with which file; rows are compared only where none is.
        encoded: what encoders made for all fragments of the version's space.
    """

    model: str
    files: int
    damaged: tuple[str, ...]
    rows: RowCoverage
    encoded: EncodedTexts

    def checks(self) -> list[Check]:
        """Figures that must all be 0."""
        found = [Check(DAMAGED, len(self.damaged), 0, at_least=False)]
        return found + [Check(words, getattr(self.rows, name), 0, at_least=False) for name, words in KINDS.items()]

    def problems(self) -> str:
        """What is wrong, with names and counts; empty where nothing is."""
        wrong = self.rows.wrong()
        found = [*self.damaged, *(f"{count:,} {KINDS[name]}" for name, count in wrong.items())]
        names = f" ({', '.join(self.rows.names)})" if self.rows.names else ""
        return "; ".join(found) + names

    def to_json(self) -> dict[str, Any]:
        rows = self.rows
        return {
            "files": self.files,
            "damaged": list(self.damaged),
            "expected": rows.expected,
            "rows": rows.rows,
            **{name: getattr(rows, name) for name in KINDS},
            "names": list(rows.names),
            "rows_by_model": {self.model: rows.of_model},
            "encoded": vars(self.encoded),
        }


def cover(session: Session, catalog: Catalog, manifest: dict[str, Any]) -> Coverage:
    """Hash the files that a version's manifest names, and compare its rows with what should be in it.

    Raises:
        CoverageUnknown: outputs of its stages are gone.
    """
    store, folder = catalog.store, catalog.version_folder(manifest["version"])
    files = _files(manifest, folder)
    tasks = [FileTask(store.url, folder, file) for file in files]
    damaged = tuple(sorted(found for found in session.stream(damage_of, tasks) if found is not None))
    stages = manifest["lineage"]["stages"]
    encoded = stages.get(ENCODED, stages[EMBEDDINGS])
    rows = RowCoverage() if damaged else _rows(session, catalog, manifest, encoded)
    fragments = sorted(finished_fragments(store, EMBEDDINGS, encoded))
    counted = count_encoded(session, store.url, encoded, fragments)
    return Coverage(manifest["model"]["space"], len(files), damaged, rows, counted)


def is_whole(checks: Sequence[Check]) -> bool:
    """Whether none of the checks of a coverage is among those that failed."""
    return not any(check.name in (DAMAGED, *KINDS.values()) for check in failed(checks))


def _files(manifest: dict[str, Any], folder: str) -> Sequence[FileRecord]:
    stated = manifest["lineage"]
    lineage = FileRecord(stated["name"], stated["size_bytes"], stated["sha256"])
    shards = [file for shard in shards_of(manifest, folder) for file in shard.files]
    return [*shards, *files_of(manifest), lineage]


def _rows(session: Session, catalog: Catalog, manifest: dict[str, Any], encoded: str) -> RowCoverage:
    """The rows of all ranges; of a stage of another model than the manifest's none has a vector."""
    source = _source(catalog, manifest, encoded)
    shards = tuple(shards_of(manifest, catalog.version_folder(manifest["version"])))
    ranges = bucket_count(manifest["rows"])
    tasks = [CoverageTask(source, shards, *shard_range(number, ranges)) for number in range(ranges)]
    found = reduce(RowCoverage.add, session.stream(cover_rows, tasks), RowCoverage())
    if _is_of_model(catalog.store, encoded, manifest["model"]):
        return found
    return replace(found, of_model=0, without_vector=found.of_model + found.without_vector)


def _source(catalog: Catalog, manifest: dict[str, Any], encoded: str) -> CoverageSource:
    store, stages, version = catalog.store, manifest["lineage"]["stages"], str(manifest["version"])
    facts = read_facts(store, stages[SELECTION])
    decision = read_decision(store, stages[KEPT]) if KEPT in stages else None
    if facts is None or (KEPT in stages and decision is None):
        raise CoverageUnknown(
            f"version {version} must be compared with the passages that it was made of; the record of its "
            f"{SELECTION if facts is None else 'deduplication'} is gone: run the pipeline again"
        )
    stage = ENCODED if ENCODED in stages else EMBEDDINGS
    names = store.names(stage_folder(EMBEDDINGS, encoded))
    made = lineage_fragments(catalog, version, stage)
    return CoverageSource(
        root=store.url,
        passages_fingerprint=stages[PASSAGES],
        selection_fingerprint=stages[SELECTION],
        passages=tuple((fact.passages, fact.kept < fact.passages_in) for fact in facts if fact.kept),
        encoded=encoded,
        letters=tuple(name for name in made if f"{name}.dropped.parquet" in names),
        embeddings=(stages[EMBEDDINGS], tuple(lineage_fragments(catalog, version, EMBEDDINGS))),
        kept=None if decision is None else (decision.kept, tuple(sorted(decision.links.values()))),
    )


def _is_of_model(store: Store, encoded: str, model: dict[str, Any]) -> bool:
    """Whether the record of an embeddings stage names the model of a manifest."""
    record = read_json(store, stage_record_path(EMBEDDINGS, encoded)) or {"parameters": {}}
    return all(record["parameters"].get(name, "") == model[stated] for name, stated in MODEL_FACTS.items())
