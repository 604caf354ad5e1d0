"""Leases: one holder at a time, a dead one is succeeded, a late one finds out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

from penstock.cluster.leases import KEPT_LEASES, Lease, LeaseHeld, LeaseLost, acquire
from penstock.cluster.local_store import LocalStore
from penstock.cluster.s3_client import S3Limits
from penstock.cluster.s3_store import S3Store
from penstock.cluster.storage import Store

from ..conftest import RACERS, S3Server, running_s3_server

DAY_S = 86_400
LONG_TTL_S = 3600.0
SHORT_TTL_S = 0.5
CLOCK_STEP_S = 1.1  # S3 tells times in whole seconds


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


def change_record(store: Store, **changes: object) -> None:
    path = "leases/wiki/00000001.json"
    store.write(path, json.dumps({**json.loads(store.read(path)), **changes}).encode())


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
    with pytest.raises(LeaseHeld, match="run late"):
        acquire(store, "wiki", "next")
    change_record(store, machine="other", ttl_s=SHORT_TTL_S)
    time.sleep(SHORT_TTL_S + CLOCK_STEP_S)
    with acquire(store, "wiki", "next") as lease:
        assert lease.number == 2
        with pytest.raises(LeaseLost, match="run next .* took it over as number 2"):
            late.check()
        late.release()
        lease.check()


def test_a_held_lease_beats(store: Store) -> None:
    with acquire(store, "wiki", "first", ttl_s=4.0):
        started = store.info("leases/wiki/00000001.json")
        assert started is not None
        for _ in range(100):
            beat = store.info("leases/wiki/00000001.heartbeat")
            if beat is not None and beat.modified > started.modified:
                return
            time.sleep(0.1)
    pytest.fail("no heartbeat within 10 s")


def test_a_heartbeat_keeps_a_lease(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    taken_elsewhere(store, 1, LONG_TTL_S)
    os.utime(tmp_path / "leases/wiki/00000001.json", (0, 0))
    store.write("leases/wiki/00000001.heartbeat", b"far")
    with pytest.raises(LeaseHeld, match="run far"):
        acquire(store, "wiki", "next")
    os.utime(tmp_path / "leases/wiki/00000001.heartbeat", (0, 0))
    acquire(store, "wiki", "next").release()


def test_the_holder_is_told_when_its_heartbeats_fail(s3_server: S3Server) -> None:
    store = S3Store(s3_server.bucket(), "p", S3Limits(deadline_s=2.0))
    lease = acquire(store, "wiki", "first", ttl_s=1.0)
    s3_server.faults([{"match": f"{store.bucket}.*heartbeat", "do": "503", "count": 10_000}])
    time.sleep(3.0)  # the first heartbeat is due after a quarter of a second, and fails at the deadline
    with pytest.raises(LeaseLost, match="got none for .*heartbeat.*failed"):
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
    change_record(store, started_s=-100.0)
    assert acquire(store, "wiki", "second").number == 2


@pytest.mark.parametrize("offset_s", [DAY_S, -DAY_S])
def test_the_local_clock_does_not_matter(offset_s: int) -> None:
    with running_s3_server("--clock-offset-s", str(offset_s)) as server:
        store = S3Store(server.bucket())
        assert abs(store.clock().timestamp() - time.time() - offset_s) < 30
        taken_elsewhere(store, 1, LONG_TTL_S)
        with pytest.raises(LeaseHeld, match="far-away"):
            acquire(store, "wiki", "early")
        taken_elsewhere(store, 2, SHORT_TTL_S)
        time.sleep(SHORT_TTL_S + CLOCK_STEP_S)
        assert acquire(store, "wiki", "next").number == 3


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
    return lease.number


def test_of_racing_processes_exactly_one_takes_over(store: Store, racers: Pool) -> None:
    taken_elsewhere(store, 1, SHORT_TTL_S)
    time.sleep(SHORT_TTL_S + CLOCK_STEP_S)
    outcomes = racers.starmap(_try_to_acquire, [(store, racer) for racer in range(RACERS)], chunksize=1)
    assert [number for number in outcomes if number is not None] == [2]
