"""Minutes of load with every fault in turn: nothing that is held grows, and nothing is lost.

SOAK_MINUTES says how many; the figures of its beginning and end are printed (pytest -s).
"""
import os
import pathlib
import re
import time
from dataclasses import asdict, dataclass

import pytest

from tests.conftest import execute, unique
from tests.faults import ENV, FAULTS, Rig, strike

# The mail server that is stopped leaves its clients' sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MINUTES = float(os.environ.get("SOAK_MINUTES", 2))
THREADS = 16


@dataclass
class Sample:
    """What the shop holds. Of the workers it is the oldest, who lives through everything."""

    memory: float  # MB of the worker's own, and its part of what is shared
    threads: int
    files: int
    connections: int
    keys: int
    keys_without_end: int
    redis_memory: float
    temporary: int
    logs: int

    @classmethod
    def of(cls, rig, folder):
        time.sleep(2)  # who was asked last is done
        process = pathlib.Path(f"/proc/{rig.server.worker_pids[0]}")
        pss = re.search(r"^Pss: +(\d+)", (process / "smaps_rollup").read_text(), re.M)[1]
        keys = list(rig.memory.scan_iter(count=1000))
        return cls(
            memory=int(pss) / 1024, threads=len(os.listdir(process / "task")),
            files=len(os.listdir(process / "fd")),
            connections=execute(rig.url, "SELECT count(*) FROM pg_stat_activity "
                                         "WHERE application_name = 'shopfront'")[0][0],
            keys=len(keys), keys_without_end=sum(rig.memory.ttl(key) == -1 for key in keys),
            redis_memory=rig.memory.info("memory")["used_memory"] / 2**20,
            temporary=sum(1 for path in (folder / "tmp").rglob("*") if path.is_file()),
            # Rotated ones are packed, and kept for days.
            logs=sum(1 for path in (folder / "logs").iterdir() if path.suffix == ".log"),
        )


@pytest.fixture
def folder(tmp_path):
    for name in ("tmp", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def rig(run_folder, serve, folder):
    rig = Rig(run_folder / unique("s"), serve, LOG_LEVEL="INFO", LOG_DIR=str(folder / "logs"),
              TMPDIR=str(folder / "tmp"), WEB_THREADS=str(THREADS), STATEMENT_TIMEOUT_MS="3000")
    yield rig
    rig.close()


def round_of_faults(rig):
    """Every fault under load. How many requests were answered."""
    answered = 0
    for fault in FAULTS:
        if fault.possible(rig):
            result = strike(rig, fault)
            assert not result.load.crashed
            assert not result.load.stale
            assert {outcome for _, outcome in result.outcomes} <= {"ok", *fault.seen}
            answered += sum(result.load.counts.values())
    return answered


@pytest.mark.long
def test_nothing_grows_and_nothing_is_lost(rig, folder):
    end = time.monotonic() + MINUTES * 60
    answered, rounds = round_of_faults(rig), 1  # a worker is warm after that
    first = Sample.of(rig, folder)
    while time.monotonic() < end or rounds < 2:
        answered, rounds = answered + round_of_faults(rig), rounds + 1
    last = Sample.of(rig, folder)
    print(f"\n{rounds} rounds, {answered} requests, {len(rig.sales)} sales")
    for name, before in asdict(first).items():
        print(f"{name:20} {before:8.1f} {asdict(last)[name]:8.1f}")
    assert rig.books() == {}
    assert last.memory < first.memory * 1.1 + 4
    assert last.threads <= THREADS + 12
    assert last.files <= first.files + THREADS
    assert last.connections <= 2 * (int(ENV["POOL_MAX_SIZE"]) + 2 + 2)
    assert last.keys_without_end == 0
    assert last.keys < 3000
    assert last.redis_memory < first.redis_memory + 4
    assert last.temporary <= first.temporary
    assert last.logs <= first.logs + 1  # one may just be packed
