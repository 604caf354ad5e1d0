"""The record of an upgrade, `upgrade.json` in its folder: what others need to know of it while it is under way."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from penstock.cluster.storage import Store
from penstock.pipelines.records import read_json, write_json

UPGRADES = "upgrades"


def note(store: Store, folder: str, facts: Mapping[str, Any]) -> None:
    """Add to the record of an upgrade, and thereby say that it is being worked on: clean-up looks at its time."""
    path = f"{folder}/upgrade.json"
    write_json(store, path, {**(read_json(store, path) or {}), **facts})


def stages_in_use(store: Store, index: str, since: datetime) -> set[tuple[str, str]]:
    """The stages, each with its fingerprint, that unfinished upgrades of an index say they need, as far as these were
    worked on since."""
    folders = (f"{UPGRADES}/{index}/{name}" for name in store.folders(f"{UPGRADES}/{index}"))
    found = [(read_json(store, f"{folder}/upgrade.json") or {}) for folder in folders if _goes_on(store, folder, since)]
    return {(stage, fingerprint) for record in found for stage, fingerprint in record.get("keep", ())}


def _goes_on(store: Store, folder: str, since: datetime) -> bool:
    """Whether an upgrade was worked on since, and after its flip, where it had one: one that was rolled back and is
    done again has the flip of the first time."""
    worked, flipped = (store.info(f"{folder}/{name}.json") for name in ("upgrade", "flip"))
    return worked is not None and worked.modified >= since and (flipped is None or flipped.modified < worked.modified)
