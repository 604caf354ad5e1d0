"""Compare two published versions: documents, answers, and the figures of their manifests."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.comparison import ComparisonTask, compare_versions
from penstock.cluster.jobs.selection import bucket_count
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.comparing import DocumentChanges, neighbour_churn
from penstock.pipelines.mixed_format import refuse_mixed
from penstock.pipelines.progress import Reporter
from penstock.pipelines.publishing import how_built, shards_of
from penstock.pipelines.reader import OpenIndex
from penstock.pipelines.version_samples import sampled_texts

K = 10
QUERIES = 100


@dataclass(frozen=True)
class Difference:
    """What a new version changes. `churn` is the share of the old version's ten answers that the new one does not give,
    over passages of the new one as queries."""

    old: dict[str, Any]
    new: dict[str, Any]
    documents: DocumentChanges
    churn: float | None
    queries: int

    def to_json(self) -> dict[str, Any]:
        return {
            "old": self.old,
            "new": self.new,
            "documents": asdict(self.documents),
            "neighbour_churn_at_10": self.churn,
            "queries": self.queries,
        }


def compare(
    store: Store, catalog: Catalog, old: str, new: str, session: Session, reporter: Reporter, trust: bool = False
) -> Difference:
    """The difference between two versions of an index.

    Raises:
        ModelMismatch, ModelUnavailable: a version's model is not at hand.
        MixedUnsupported: a version is mixed of others.
    """
    manifests = {version: catalog.manifest(version) for version in (old, new)}
    for manifest in manifests.values():
        refuse_mixed(manifest, "compare")
    changes = _documents(store, catalog, manifests[old], manifests[new], session, reporter)
    with reporter.stage("answers", 2, "versions") as advance:
        queries = sampled_texts(catalog, manifests[new], QUERIES)
        found = []
        for version in (old, new):
            with OpenIndex(catalog, version, manifests[version], trust) as index:
                found.append(index.search(queries, K).ids)
            advance(1, version)
    churn = neighbour_churn(*found)
    mean = None if np.isnan(churn).all() else float(np.nanmean(churn))
    return Difference(_figures(manifests[old]), _figures(manifests[new]), changes, mean, len(queries))


def _documents(
    store: Store, catalog: Catalog, old: dict[str, Any], new: dict[str, Any], session: Session, reporter: Reporter
) -> DocumentChanges:
    shards = [tuple(shards_of(one, catalog.version_folder(one["version"]))) for one in (old, new)]
    buckets = bucket_count(old["rows"] + new["rows"])
    tasks = [ComparisonTask(store.url, shards[0], shards[1], bucket, buckets) for bucket in range(buckets)]
    changes = DocumentChanges(0, 0, 0, 0, {})
    with reporter.stage("documents", buckets, "buckets") as advance:
        # One bucket is read sooner here than Ray starts.
        for found in session.stream(compare_versions, tasks) if buckets > 1 else map(compare_versions, tasks):
            changes = changes.add(found)
            advance(1, f"{changes.changed:,} changed")
    return changes


def _figures(manifest: dict[str, Any]) -> dict[str, Any]:
    sizes = [file["size_bytes"] for shard in manifest["shards"] for file in shard["files"]]
    point = manifest["operating_point"]
    return {
        "version": manifest["version"],
        "documents": manifest["documents"],
        "rows": manifest["rows"],
        "factory": how_built(manifest)["factory"],
        "shards": len(manifest["shards"]),
        "bytes_per_vector": manifest["bytes_per_vector"],
        "bytes": sum(sizes),
        "recall": manifest["evaluation"]["recall"],
        "latency_ms": point["latency_ms"],
        "model": manifest["model"]["reference"],
        "weights_sha256": manifest["model"]["weights_sha256"][:16],
    }
