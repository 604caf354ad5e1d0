"""Clean-up: versions beyond those kept, stage outputs that no kept version needs, and old records."""

import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.catalog import Catalog, undo_stack
from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.leases import acquire
from penstock.cluster.storage import ObjectInfo, Store
from penstock.pipelines.history import new_run_id, read_run, run_ids
from penstock.pipelines.mixed_format import MixedParts, is_mixed, parts_of
from penstock.pipelines.planning import ENCODED
from penstock.pipelines.publishing import LINEAGE
from penstock.pipelines.upgrade_record import stages_in_use
from penstock.pipelines.waiting import upgrade_lease

DEFAULT_GRACE_HOURS = 24.0
KEPT_RUNS = 20
UNFINISHED_UPGRADE_DAYS = (
    60  # after it was last worked on: longer than any backfill pauses, shorter than storage is forgotten
)


class GraceTooShort(Exception):
    """A grace period that could take files from under a reader or a run."""


@dataclass(frozen=True)
class Removal:
    """Objects to remove, or removed, and what they are."""

    what: str
    paths: tuple[str, ...]
    size_bytes: int
    version: tuple[str, str] | None = None


def collect_garbage(store: Store, keep: int | None, grace_hours: float, dry_run: bool) -> list[Removal]:
    """Remove what no kept version needs and is older than the grace period, by the store's clock.

    Kept are, for each index, the versions that aliases point to and those that a rollback would return to, and the
    newest `keep` that passed their gate (None: as many as the index's last run asked for); of a mixed version those
    that it consists of too. Mixed versions and those of a part of the corpus that they consist of are not counted: they
    were steps on the way to others. So is what an unfinished upgrade will use, until it has rested for 60 days.
    Holds the lease of every index meanwhile, so that no run is under way.

    Raises:
        GraceTooShort: a grace period of nothing: readers may still be opening what a moved alias left.
        LeaseHeld: a run is under way.
    """
    if grace_hours <= 0:
        raise GraceTooShort(
            f"grace ({grace_hours} hours) must be above 0: readers may still open what an alias just left"
        )
    names = store.folders("indexes") | store.folders("leases")
    indexes = sorted(names - {upgrade_lease(name) for name in names})
    with ExitStack() as stack:
        if not dry_run:
            for index in indexes:
                stack.enter_context(acquire(store, index, new_run_id(f"{index}-gc")))
        limit = store.clock() - timedelta(hours=grace_hours)
        removals = [removal for removal in _removals(store, indexes, keep, limit) if removal.paths]
        if not dry_run:
            for removal in removals:
                if _is_aliased(store, removal):
                    continue
                # A manifest goes first: without it nothing is a version any more, whatever is left when this is cut
                # short.
                store.delete(sorted(removal.paths, key=lambda path: not path.endswith("manifest.json")))
            store.remove_leftovers(grace_hours * 3600)
    return removals


def _is_aliased(store: Store, removal: Removal) -> bool:
    """Whether an alias was moved to a version after clean-up decided on it: promote and rollback wait for no lease."""
    if removal.version is None:
        return False
    index, version = removal.version
    catalog = Catalog(store, index)
    return version in _with_parts(catalog, _named_by_aliases(catalog))


def _removals(store: Store, indexes: list[str], keep: int | None, limit: datetime) -> Iterator[Removal]:
    needed: dict[tuple[str, str], set[str]] = {}
    made_by: set[str] = set()
    upgraded_since = store.clock() - timedelta(days=UNFINISHED_UPGRADE_DAYS)
    for index in indexes:
        catalog = Catalog(store, index)
        kept = _kept_versions(store, catalog, index, keep)
        for version in kept:
            _add_lineage(store, catalog, version, needed)
            made_by.add(str(catalog.manifest(version)["run_id"]))
        needed |= {stage: {"*"} for stage in stages_in_use(store, index, upgraded_since)}
        # Mixed ones first: cut short, clean-up leaves none whose parts are gone.
        for version in sorted(store.folders(f"indexes/{index}/versions") - kept, key=partial(_mixed_first, catalog)):
            objects = list(store.list(catalog.version_folder(version)))
            if objects and max(info.modified for info in objects) < limit:
                yield replace(_removal(f"version {index}/{version}", objects), version=(index, version))
    yield from _stage_removals(store, needed, limit)
    yield from _run_removals(store, made_by, limit)


def _kept_versions(store: Store, catalog: Catalog, index: str, keep: int | None) -> set[str]:
    """What aliases point to and rollbacks would return to, the newest versions that passed their gate, and the newest
    of all, for people to look at."""
    versions = catalog.versions()
    manifests = {version: catalog.manifest(version) for version in versions}
    steps = {version for version, manifest in manifests.items() if is_mixed(manifest)}
    steps |= {str(MixedParts.of(manifests[version]).new) for version in steps}
    steps |= {version for version, manifest in manifests.items() if "part_of" in manifest}
    passed = [
        version
        for version, manifest in manifests.items()
        if version not in steps and all(check["passed"] for check in manifest["gate"])
    ]
    kept = _named_by_aliases(catalog) | set(passed[-(keep or _stated_keep(store, index)) :]) | set(versions[-1:])
    return _with_parts(catalog, kept)


def _named_by_aliases(catalog: Catalog) -> set[str]:
    """The versions that aliases point to, and below each the one that a rollback would return to."""
    found = {entry.version for alias in catalog.aliases() if (entry := catalog.alias(alias))}
    for alias in catalog.aliases():
        published = [version for version in undo_stack(catalog.history(alias)) if catalog.has_manifest(version)]
        found.update(published[-2:])
    return found


def _with_parts(catalog: Catalog, versions: set[str]) -> set[str]:
    """The versions, and those that mixed ones among them consist of."""
    return versions.union(*(parts_of(catalog.manifest(version)) for version in versions))


def _mixed_first(catalog: Catalog, version: str) -> tuple[bool, str]:
    """Sorts versions; a folder without a manifest is none that others consist of."""
    return not (catalog.has_manifest(version) and is_mixed(catalog.manifest(version))), version


def _stated_keep(store: Store, index: str) -> int:
    """`publish.keep` of the newest recorded run of an index."""
    for run_id in reversed(run_ids(store, index)):
        record = read_run(store, run_id)
        if record is not None:
            return int(record["pipeline"]["publish"]["keep"])
    return 3


def _add_lineage(store: Store, catalog: Catalog, version: str, needed: dict[tuple[str, str], set[str]]) -> None:
    manifest = catalog.manifest(version)
    if is_mixed(manifest):
        return  # which has that of its parts, and these are kept with it
    stages = manifest["lineage"]["stages"]
    table = pq.read_table(io.BytesIO(store.read(f"{catalog.version_folder(version)}/{LINEAGE}")))
    folders = {PASSAGES: PASSAGES, EMBEDDINGS: EMBEDDINGS, ENCODED: EMBEDDINGS}
    for stage in folders.keys() & stages.keys():
        fragments = table.filter(pc.equal(table.column("stage"), stage)).column("fragment").to_pylist()
        needed.setdefault((folders[stage], stages[stage]), set()).update(fragments)
    for stage in stages.keys() - folders.keys():
        needed[(stage, stages[stage])] = {"*"}


def _stage_removals(store: Store, needed: dict[tuple[str, str], set[str]], limit: datetime) -> Iterator[Removal]:
    for stage in sorted(store.folders("stages")):
        for fingerprint in sorted(store.folders(f"stages/{stage}")):
            wanted = needed.get((stage, fingerprint), set())
            if "*" in wanted:
                continue
            old = [
                info
                for info in store.list(f"stages/{stage}/{fingerprint}")
                if info.modified < limit and not _is_needed(info.path, wanted)
            ]
            yield _removal(f"{stage} {fingerprint[:12]}", old)


def _is_needed(path: str, wanted: set[str]) -> bool:
    """Whether an object of a stage belongs to a wanted fragment, or is the record beside wanted fragments."""
    name = path.rsplit("/", 1)[1].split(".", 1)[0]
    return name in wanted or (name == "record" and bool(wanted))


def _run_removals(store: Store, made_by: set[str], limit: datetime) -> Iterator[Removal]:
    """Runs beyond the newest of each pipeline, but those that made kept versions: an upgrade reads there how the
    version was made that it leads from."""
    names = {run.rsplit("-", 2)[0] for run in store.folders("runs")}
    for name in sorted(names):
        for run_id in run_ids(store, name)[:-KEPT_RUNS]:
            objects = list(store.list(f"runs/{run_id}"))
            if run_id not in made_by and objects and max(info.modified for info in objects) < limit:
                yield _removal(f"run {run_id}", objects)


def _removal(what: str, objects: list[ObjectInfo]) -> Removal:
    return Removal(what, tuple(info.path for info in objects), sum(info.size_bytes for info in objects))
