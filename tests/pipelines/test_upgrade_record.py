"""How long an upgrade counts as one that goes on."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from penstock.cluster.local_store import LocalStore
from penstock.pipelines.records import read_json
from penstock.pipelines.upgrade_record import note, stages_in_use

FOLDER = "upgrades/test/0123456789abcdef"
STAGES = {("passages", "p"), ("embeddings", "e")}


def aged(path: Path, days: float) -> None:
    moment = time.time() - days * 86_400
    os.utime(path, (moment, moment))


@pytest.mark.parametrize(
    ("worked_days", "flipped_days", "used"),
    [
        (59, None, True),
        (61, None, False),
        (9, 8, False),
        (8, 9, True),  # rolled back after its flip, and begun again
    ],
)
def test_an_upgrade_uses_its_stages_until_its_last_flip(
    tmp_path: Path, worked_days: float, flipped_days: float | None, used: bool
) -> None:
    store = LocalStore(tmp_path)
    note(store, FOLDER, {"keep": sorted(STAGES)})
    aged(tmp_path / FOLDER / "upgrade.json", worked_days)
    if flipped_days is not None:
        store.write(f"{FOLDER}/flip.json", b"{}")
        aged(tmp_path / FOLDER / "flip.json", flipped_days)
    since = store.clock() - timedelta(days=60)
    assert stages_in_use(store, "test", since) == (STAGES if used else set())
    assert stages_in_use(store, "other", since) == set()
    note(store, FOLDER, {})
    assert stages_in_use(store, "test", since) == STAGES, "it is worked on again"
    assert read_json(store, f"{FOLDER}/upgrade.json") == {"keep": [list(stage) for stage in sorted(STAGES)]}
