"""Leases: one holder at a time, a dead one is succeeded, a late one finds out."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import S3Server, running_s3_server

from penstock.cluster.leases import KEPT_LEASES, Lease, LeaseHeld, LeaseLost, acquire
from penstock.cluster.storage import LocalStore, S3Limits, S3Store, Store

RACERS = 8
DAY_S = 86_400
LONG_TTL_S = 3600.0
SHORT_TTL_S = 2.0  # S3 tells times in whole seconds


def taken_elsewhere(store: Store, number: int, ttl_s: float) -> None:
    """A lease whose holder runs on another machine, so that only its silence can tell that it is gone."""
    holder = {
        "run_id": "far",
        "host": "far-away",
        "pid": os.getpid(),
        "started_s": 1.0,
        "machine": "other",
        "ttl_s": ttl_s,
    }
    store.create(f"leases/wiki/{number:08d}.json", holder)


def test_one_holder_at_a_time(store: Store) -> None:
    with acquire(store, "wiki", "first") as lease:
        lease.check()
        with pytest.raises(LeaseHeld) as refused:
            acquire(store, "wiki", "second")
        for part in ("run first", socket.gethostname(), f"pid {os.getpid()}", "since 20", "wait for it"):
            assert part in str(refused.value)
        with acquire(store, "other", "third") as other:
            assert other.number == 1
    with acquire(store, "wiki", "second") as lease:
        assert lease.number == 2


def test_a_released_lease_is_no_longer_held(store: Store) -> None:
    lease = acquire(store, "wiki", "first")
    lease.release()
    lease.release()
    with pytest.raises(LeaseLost, match="was released"):
        lease.check()


def test_a_lease_is_released_when_its_block_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), acquire(store, "wiki", "first"):
        _ = 1 / 0
    acquire(store, "wiki", "second").release()


def test_a_silent_holder_is_succeeded_and_fenced(store: Store) -> None:
    late = acquire(store, "wiki", "late", ttl_s=LONG_TTL_S)
    record = json.loads(store.read("leases/wiki/00000001.json"))
    store.write("leases/wiki/00000001.json", json.dumps({**record, "machine": "other", "ttl_s": SHORT_TTL_S}).encode())
    with pytest.raises(LeaseHeld, match="run late"):
        acquire(store, "wiki", "next")
    time.sleep(SHORT_TTL_S + 1.2)
    with acquire(store, "wiki", "next") as lease:
        assert lease.number == 2
        with pytest.raises(LeaseLost, match="run next .* took it over as number 2"):
            late.check()
        late.release()
        lease.check()


def test_heartbeats_keep_a_lease(store: Store) -> None:
    with acquire(store, "wiki", "first", ttl_s=SHORT_TTL_S) as lease:
        record = json.loads(store.read("leases/wiki/00000001.json"))
        store.write("leases/wiki/00000001.json", json.dumps({**record, "machine": "other"}).encode())
        time.sleep(2.0 * SHORT_TTL_S)
        lease.check()
        with pytest.raises(LeaseHeld):
            acquire(store, "wiki", "second")


def test_the_holder_is_told_when_its_heartbeats_fail(s3_server: S3Server) -> None:
    store = S3Store(s3_server.bucket(), "p", S3Limits(deadline_s=0.3))
    lease = acquire(store, "wiki", "first", ttl_s=0.8)
    s3_server.faults([{"match": f"{store.bucket}.*heartbeat", "do": "503", "count": 10_000}])
    time.sleep(1.2)
    with pytest.raises(LeaseLost, match="got none for .*SlowDown"):
        lease.check()
    s3_server.faults([])
    lease.release()


HOLD = """
import sys, time
from penstock.cluster.leases import acquire
from penstock.cluster.storage import open_store
acquire(open_store(sys.argv[1]), "wiki", "doomed", ttl_s=3600)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_holder_of_this_machine_is_succeeded_at_once(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, store.url], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeld, match=f"run doomed .*pid {holder.pid}"):
            acquire(store, "wiki", "next")
        os.kill(holder.pid, signal.SIGKILL)
        for _ in range(100):
            try:  # before anybody has waited for it: a zombie holds nothing
                acquire(store, "wiki", "next").release()
                break
            except LeaseHeld:
                time.sleep(0.02)
        else:
            pytest.fail("the lease of a killed process stayed held")


def test_a_reused_pid_is_not_the_holder(store: Store) -> None:
    acquire(store, "wiki", "first", ttl_s=LONG_TTL_S)
    record = json.loads(store.read("leases/wiki/00000001.json"))
    changed = {**record, "started_s": record["started_s"] - 100}
    store.write("leases/wiki/00000001.json", json.dumps(changed).encode())
    assert acquire(store, "wiki", "second").number == 2


@pytest.mark.parametrize("offset_s", [DAY_S, -DAY_S])
def test_the_local_clock_does_not_matter(offset_s: int) -> None:
    with running_s3_server("--clock-offset-s", str(offset_s)) as server:
        store = S3Store(server.bucket())
        assert abs(store.clock().timestamp() - time.time() - offset_s) < 30
        taken_elsewhere(store, 1, SHORT_TTL_S)
        with pytest.raises(LeaseHeld, match="far-away"):
            acquire(store, "wiki", "early")
        time.sleep(SHORT_TTL_S + 1.2)
        assert acquire(store, "wiki", "next").number == 2


def test_a_junk_lease_is_held_for_the_default_ttl(store: Store) -> None:
    store.write("leases/wiki/00000004.json", b"junk")
    with pytest.raises(LeaseHeld, match="held by an unknown run"):
        acquire(store, "wiki", "next")


def test_an_old_junk_lease_is_succeeded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("leases/wiki/00000004.json", b"junk")
    os.utime(tmp_path / "leases/wiki/00000004.json", (0, 0))
    assert acquire(store, "wiki", "next").number == 5


def test_old_leases_are_pruned_and_numbers_go_on(store: Store) -> None:
    for number in range(1, KEPT_LEASES + 4):
        with acquire(store, "wiki", f"run-{number}") as lease:
            assert lease.number == number
    numbers = {int(name[:8]) for name in store.names("leases/wiki")}
    assert numbers == set(range(4, KEPT_LEASES + 4))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A"])
def test_lease_names_are_checked(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="lease \\("):
        acquire(store, name, "run")


def test_a_ttl_is_positive(store: Store) -> None:
    with pytest.raises(ValueError, match="ttl"):
        acquire(store, "wiki", "run", ttl_s=0)


def _try_to_acquire(store: Store, racer: int) -> int | None:
    try:
        lease: Lease = acquire(store, "wiki", f"run-{racer}", ttl_s=LONG_TTL_S)
    except LeaseHeld:
        return None
    time.sleep(1.0)  # hold it until all have tried
    return lease.number


def test_of_racing_processes_exactly_one_takes_over(store: Store) -> None:
    taken_elsewhere(store, 1, ttl_s=0.001)
    time.sleep(1.2)
    with multiprocessing.get_context("spawn").Pool(RACERS) as pool:
        outcomes = pool.starmap(_try_to_acquire, [(store, racer) for racer in range(RACERS)], chunksize=1)
    assert [number for number in outcomes if number is not None] == [2]
