"""The health of a published version's vector space, from its vectors alone; and how it drifted from another's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.stored_sample import (
    EmbeddingsSampleTask,
    ReportTask,
    merge_stored,
    report_space,
    sample_embeddings,
    sample_stored,
)
from penstock.cluster.layout import EMBEDDINGS
from penstock.cluster.session import Session
from penstock.operators.indexing import Metric
from penstock.operators.space_health import MOST_SIZE_DIFFERENCE, alarms, drift
from penstock.operators.space_report import SpaceReport
from penstock.pipelines.mixed_format import MixedParts, is_mixed
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import lineage_fragments
from penstock.pipelines.version_samples import sample_tasks

SAMPLE_ROWS = 25_000  # effective ranks of fewer rows depend on how many there are


@dataclass(frozen=True)
class HealthCheck:
    """How versions of an index are looked at."""

    session: Session
    reporter: Reporter
    catalog: Catalog
    sample_rows: int = SAMPLE_ROWS
    seed: int = 0

    def report(self, version: str, against: str | None = None) -> dict[str, Any]:
        """The report of a version, as JSON; with `against` that of another one too, and what drifted between them.

        Of a mixed version the old part is reported on, whose vectors are of one space and a whole corpus; the report
        names that version.

        All figures are of a sample of rows, drawn by the hash of their ids: two versions that share rows share most of
        the sample.

        Raises:
            ValueError: a version has no vectors left to look at, or fewer rows than neighbours are counted among.
        """
        manifests = {name: self._in_one_space(name) for name in (version, against) if name is not None}
        wanted = min([self.sample_rows, *(manifest["rows"] for manifest in manifests.values())])
        found = {}
        with self.reporter.stage("health", len(manifests), "versions") as advance:
            for name, manifest in manifests.items():
                found[name] = self._version(manifest, wanted)
                advance(1, name)
        reports = {name: one | {"report": one["report"].to_json()} for name, one in found.items()}
        record = {"index": self.catalog.index, "seed": self.seed, **reports[version]}
        if against is None:
            return record
        return record | {"against": reports[against]} | _drift(found[against], found[version])

    def _in_one_space(self, version: str) -> dict[str, Any]:
        """The manifest of a version, or of the old part of a mixed one."""
        manifest = self.catalog.manifest(version)
        if not is_mixed(manifest):
            return manifest
        old = MixedParts.of(manifest).old
        self.reporter.note(f"version {version} is mixed of two spaces: the report is of its old part, version {old}")
        return self.catalog.manifest(old)

    def _version(self, manifest: Mapping[str, Any], wanted: int) -> dict[str, Any]:
        source, vectors = self._vectors(manifest, wanted)
        task = ReportTask(vectors, Metric(manifest["metric"]), self.seed)
        # A few rows are looked at sooner here than Ray starts.
        report = self.session.run(report_space, task) if wanted == self.sample_rows else report_space(task)
        return {
            "version": manifest["version"],
            "model": manifest["model"]["reference"],
            "space": manifest["model"]["space"],
            "document_prompt": manifest["model"]["document_prompt"],
            "rows": manifest["rows"],
            "sample_rows": len(vectors),
            "vectors_from": source,
            "report": report,
        }

    def _vectors(self, manifest: Mapping[str, Any], wanted: int) -> tuple[str, np.ndarray]:
        """What the vectors are, and a sample of them, float32 (n, d)."""
        if manifest["stored"] is not None:
            return f"stored vectors ({manifest['stored']})", self._stored(manifest, wanted)
        try:
            return "embeddings that the version was built from", self._embeddings(manifest, wanted)
        except FileNotFoundError as error:
            raise ValueError(
                f"version ({manifest['version']}) must have vectors to report on: it stores none (index.rerank is "
                f"false), and the embeddings it was built from are gone ({error}); publish it with index.rerank: true"
            ) from error

    def _stored(self, manifest: Mapping[str, Any], wanted: int) -> np.ndarray:
        tasks = sample_tasks(self.catalog, manifest, wanted, self.seed)
        local = wanted < self.sample_rows
        parts = map(sample_stored, tasks) if local else self.session.stream(sample_stored, tasks)
        return merge_stored(list(parts), wanted, self.seed)

    def _embeddings(self, manifest: Mapping[str, Any], wanted: int) -> np.ndarray:
        names = tuple(lineage_fragments(self.catalog, manifest["version"], EMBEDDINGS))
        stage = manifest["lineage"]["stages"][EMBEDDINGS]
        task = EmbeddingsSampleTask(self.catalog.store.url, stage, names, manifest["rows"], wanted, self.seed)
        return sample_embeddings(task) if wanted < self.sample_rows else self.session.run(sample_embeddings, task)


def _drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What changed for the worse, where that can be said: between two versions of one space."""
    one, other = before["report"], after["report"]
    why = _why_not_compared(before, after, one, other)
    if why is not None:
        return {"drift": [], "alarms": [], "why": why}
    rules = drift(one.health, other.health)
    return {"drift": [rule.to_json() for rule in rules], "alarms": [rule.figure for rule in alarms(rules)], "why": None}


def _why_not_compared(
    before: Mapping[str, Any], after: Mapping[str, Any], one: SpaceReport, other: SpaceReport
) -> str | None:
    if before["space"] != after["space"]:
        return f"the versions are of two models, {before['model']} and {after['model']}: figures stand side by side"
    prompts = before["document_prompt"], after["document_prompt"]
    if prompts[0] != prompts[1]:
        return (
            f"the versions' documents have two prompts, {prompts[0]!r} and {prompts[1]!r}: figures stand side by side"
        )
    sizes = sorted((one.health.sample_rows, other.health.sample_rows))
    if sizes[1] - sizes[0] > MOST_SIZE_DIFFERENCE * sizes[1]:
        return f"the samples hold {sizes[0]} and {sizes[1]} rows, too different to compare"
    return None
