"""Versions and aliases: one of two publishers wins, junk is skipped, a rollback undoes."""

import time
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

from penstock.cluster.catalog import AliasEntry, Catalog, PublishConflict, undo_stack
from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import Store

from ..conftest import RACERS


def published(store: Store, *versions: str) -> Catalog:
    catalog = Catalog(store, "wiki")
    for version in versions:
        catalog.publish_manifest(version, {"version": version})
    return catalog


def point(catalog: Catalog, *versions: str) -> None:
    for version in versions:
        catalog.move("live", version, expected=None, run_id=f"run-{version}", reason="publish")


def current(catalog: Catalog) -> AliasEntry:
    entry = catalog.alias("live")
    assert entry is not None
    return entry


def test_a_version_exists_when_its_manifest_does(store: Store) -> None:
    catalog = Catalog(store, "wiki")
    assert catalog.versions() == catalog.aliases() == []
    store.write(f"{catalog.version_folder('v1')}/shard-00000.faiss", b"1")
    assert not catalog.has_manifest("v1")
    assert catalog.versions() == []
    with pytest.raises(FileNotFoundError, match=r"v1/manifest\.json"):
        catalog.manifest("v1")
    stored = catalog.publish_manifest("v1", {"rows": 7})
    assert catalog.manifest("v1") == stored
    assert stored["rows"] == 7
    assert catalog.versions() == ["v1"]


def test_a_published_manifest_is_not_replaced(store: Store) -> None:
    catalog = Catalog(store, "wiki")
    first = catalog.publish_manifest("v1", {"rows": 7})
    assert catalog.publish_manifest("v1", {"rows": 8}) == first
    assert catalog.manifest("v1") == first


def test_an_alias_moves_by_number(store: Store) -> None:
    catalog = published(store, "v1", "v2")
    assert catalog.alias("live") is None
    first = catalog.move("live", "v1", expected=0, run_id="r1", reason="publish")
    assert (first.number, first.version, first.run_id, first.previous, first.reason) == (1, "v1", "r1", None, "publish")
    second = catalog.move("live", "v2", expected=1, run_id="r2", reason="promote")
    assert (second.number, second.previous) == (2, "v1")
    assert catalog.alias("live") == second
    assert catalog.history("live") == [first, second]
    assert catalog.aliases() == ["live"]


def test_a_stale_publisher_is_told_who_won(store: Store) -> None:
    catalog = published(store, "v1", "v2")
    catalog.move("live", "v1", expected=0, run_id="fast", reason="publish")
    with pytest.raises(
        PublishConflict, match="alias live of index wiki: entry 1 was wanted, but run fast .* version v1"
    ):
        catalog.move("live", "v2", expected=0, run_id="slow", reason="publish")
    assert current(catalog).version == "v1"


def test_an_alias_never_points_to_an_unpublished_version(store: Store) -> None:
    with pytest.raises(ValueError, match="version \\(v9\\)"):
        Catalog(store, "wiki").move("live", "v9", expected=0, run_id="r", reason="publish")


def test_a_junk_entry_is_skipped_and_its_number_never_reused(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    catalog = published(store, "v1", "v2")
    point(catalog, "v1")
    whole = store.read("indexes/wiki/aliases/live/00000001.json")
    junk = [b"", whole[: len(whole) // 2], b"[]", b'{"version": "../../etc"}', whole.replace(b'"v1"', b'"v7"')]
    for number, data in enumerate(junk, 2):
        store.write(f"indexes/wiki/aliases/live/{number:08d}.json", data)
    assert current(catalog).number == 1
    assert caplog.text.count("skipped") == len(junk)
    entry = catalog.move("live", "v2", expected=1, run_id="r", reason="publish")
    assert entry.number == len(junk) + 2
    assert entry.previous == "v1"
    assert current(catalog) == entry


def test_an_entry_of_a_removed_version_is_skipped(store: Store) -> None:
    catalog = published(store, "v1", "v2")
    point(catalog, "v1", "v2")
    store.delete(["indexes/wiki/versions/v2/manifest.json"])
    assert current(catalog).version == "v1"
    assert [entry.version for entry in catalog.history("live")] == ["v1", "v2"]


def test_rollbacks_go_back_step_by_step(store: Store) -> None:
    catalog = published(store, "v1", "v2", "v3", "v4")
    point(catalog, "v1", "v2", "v3")
    assert catalog.rollback("live", "r").version == "v2"
    assert catalog.rollback("live", "r").version == "v1"
    with pytest.raises(ValueError, match="earlier published version"):
        catalog.rollback("live", "r")
    assert [(entry.number, entry.reason) for entry in catalog.history("live")][3:] == [(4, "rollback"), (5, "rollback")]


def test_a_publish_after_a_rollback_starts_from_there(store: Store) -> None:
    catalog = published(store, "v1", "v2", "v3", "v4")
    point(catalog, "v1", "v2", "v3")
    catalog.rollback("live", "r")
    point(catalog, "v4", "v4")
    assert catalog.rollback("live", "r").version == "v2"
    assert undo_stack(catalog.history("live")) == ["v1", "v2"]


def test_a_rollback_passes_over_removed_versions(store: Store) -> None:
    catalog = published(store, "v1", "v2", "v3")
    point(catalog, "v1", "v2", "v3")
    store.delete(["indexes/wiki/versions/v2/manifest.json"])
    assert catalog.rollback("live", "r").version == "v1"


def test_a_rollback_of_nothing_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="rollback"):
        Catalog(store, "wiki").rollback("live", "r")


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "/a", "A", "a\0", "a b", "x" * 64, "a\n"])
def test_names_are_checked(tmp_path: Path, name: str) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ValueError, match="index \\("):
        Catalog(store, name)
    catalog = published(store, "v1")
    with pytest.raises(ValueError, match="version \\("):
        catalog.publish_manifest(name, {})
    for look in (catalog.alias, catalog.history):
        with pytest.raises(ValueError, match="alias \\("):
            look(name)
    with pytest.raises(ValueError, match="alias \\("):
        catalog.move(name, "v1", expected=0, run_id="r", reason="publish")


def _publish_rounds(store: Store, racer: int, rounds: int) -> list[int]:
    catalog, won = Catalog(store, "wiki"), []
    for expected in range(rounds):
        while True:
            present = catalog.alias("live")
            if (present.number if present else 0) >= expected:
                break
            time.sleep(0.02)
        try:
            won.append(catalog.move("live", "v1", expected=expected, run_id=f"r{racer}", reason="publish").number)
        except PublishConflict:
            continue
    return won


def test_of_racing_publishers_exactly_one_gets_each_number(store: Store, racers: Pool) -> None:
    published(store, "v1")
    rounds = 3
    won = racers.starmap(_publish_rounds, [(store, racer, rounds) for racer in range(RACERS)], chunksize=1)
    assert sorted(number for numbers in won for number in numbers) == list(range(1, rounds + 1))
    assert [entry.number for entry in Catalog(store, "wiki").history("live")] == list(range(1, rounds + 1))


def test_a_rollback_passes_over_the_versions_of_a_backfill(store: Store) -> None:
    catalog = published(store, "v1", "v2", "v3", "v4")
    point(catalog, "v1")
    for version in ("v2", "v3"):
        catalog.move("live", version, expected=None, run_id="r", reason="backfill")
    assert undo_stack(catalog.history("live")) == ["v1", "v3"]
    catalog.move("live", "v4", expected=None, run_id="r", reason="upgrade")
    assert catalog.rollback("live", "r").version == "v1"


def test_a_rollback_ends_a_backfill(store: Store) -> None:
    catalog = published(store, "v1", "v2", "v3")
    point(catalog, "v1")
    for version in ("v2", "v3"):
        catalog.move("live", version, expected=None, run_id="r", reason="backfill")
    assert catalog.rollback("live", "r").version == "v1"
    with pytest.raises(ValueError, match="earlier published version"):
        catalog.rollback("live", "r")
