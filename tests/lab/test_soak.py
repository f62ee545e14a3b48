"""The soak in small: mixed load with clients that leave, bad requests, swaps and store faults; nothing is left over.

The command's own load and misfortunes, over HTTP, on a server in this process, so that engine and store can be recounted.
"""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from rekindle.api.server import running
from rekindle.lab.soak.faults import Misfortune
from rekindle.lab.soak.load import Tally, Wishes, drive
from rekindle.lab.soak.run import Bound, SoakReport, end_of, held_by, left_over, print_soak_report, run_soak, still_busy
from rekindle.serve.service import Service
from rekindle.settings import Settings

STRIKE_EVERY = 40  # requests


def recount(service: Service) -> None:
    """All but the folder, in which spoilt files may still lie that nobody has asked for."""
    service.run_on_engine(lambda engine: engine.check_integrity())
    service._worker.call(lambda scheduler: scheduler._state.check_integrity())
    service._store._memory.check_integrity()


def soak(settings: Settings, requests: int, seed: int, *, exact: bool) -> Tally:
    """Put a server under load; it must be clean afterwards."""
    folder = Path(settings.store)
    misfortune, tally = Misfortune(folder, seed), Tally()
    struck = 0

    def enough(tally: Tally) -> bool:
        nonlocal struck
        done = tally.total - tally.kinds["busy"]  # of which a slow machine says more
        if done // STRIKE_EVERY > struck:
            struck += 1
            misfortune.strike()
        return done >= requests

    with Service.open(settings) as service:
        with running(service) as url:
            wishes = Wishes(seed, service.num_cells)
            asyncio.run(drive(url, wishes, clients=12, enough=enough, tally=tally, exact=exact))
            misfortune.mend()
            assert tally.faults == []
            recount(service)
            assert still_busy(url) == [] and left_over(url) == []
            service.check_integrity()
        assert service.metrics.num_running == service.metrics.num_queued == 0
    assert misfortune.counts
    return tally


@pytest.fixture
def nothing_stays() -> object:
    """Threads and files of this process are as before; but for what its first event loop opens for good."""
    with Service.open(Settings(engine="toy", store="none")) as service, running(service):
        pass
    before = held_by(os.getpid())
    yield None
    gc.collect()
    deadline = time.monotonic() + 60
    while held_by(os.getpid()).threads > before.threads + 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # of one that has been joined the system may still know for a moment
    after = held_by(os.getpid())
    assert after.threads <= before.threads + 1  # a pool of the system's resolver may stay
    assert after.files <= before.files + 1, [file.path for file in psutil.Process().open_files()]


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("policy", ["fifo", "priority", "cache-aware"])
def test_a_toy_survives_hundreds_of_requests(tmp_path: Path, policy: str) -> None:
    settings = Settings(
        engine="toy",
        context=300,
        policy=policy,  # type: ignore[arg-type]
        max_running=4,
        max_residents=5,
        max_queue=6,
        block_tokens=16,
        store=str(tmp_path / "store"),
        store_memory=20_000,  # type: ignore[arg-type]
        store_disk=200_000,  # type: ignore[arg-type]
    )
    tally = soak(settings, 300, 7, exact=True)
    kinds = tally.kinds
    assert min(kinds["answered"], kinds["left"], kinds["refused"], kinds["busy"]) > 0
    assert len(tally.answers) > 15


@pytest.mark.usefixtures("nothing_stays")
def test_the_built_in_model_survives_them_too(tmp_path: Path) -> None:
    settings = Settings(
        threads=1,
        context=512,
        policy="priority",
        max_running=4,
        max_residents=5,
        max_queue=6,
        store=str(tmp_path / "store"),
        store_memory=8 << 20,  # type: ignore[arg-type]
        store_disk=32 << 20,  # type: ignore[arg-type]
    )
    kinds = soak(settings, 280, 8, exact=False).kinds
    assert min(kinds["answered"], kinds["left"], kinds["refused"]) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_minutes_of_it_with_live_clients_hold_every_bound() -> None:
    """But for memory's, which takes longer to come to rest, and that of pools of threads, which grow with the cores."""
    out = io.StringIO()
    report = run_soak("builtin", minutes=2, seed=3, threads=1, progress=lambda share: None)
    print_soak_report(report, Console(file=out, width=200))
    assert [bound.problems for bound in report.bounds if bound.name not in ("memory", "threads")] == [()] * 6
    assert report.growth < 0.2 and report.threads[1] < 100
    assert min(report.requests[kind] for kind in ("answered", "left", "refused", "talked", "cut off", "resumed")) > 0
    facts = json.loads(out.getvalue().splitlines()[-1])
    names = ["memory", "files", "threads", "answers", "nothing stuck", "cells and blocks", "integrity", "end"]
    assert list(facts["bounds"]) == names and facts["bounds"]["integrity"] and facts["bounds"]["end"]
    assert "integrity: held" in out.getvalue() and sum(facts["requests"].values()) > 0


def test_what_has_grown_is_said() -> None:
    report = SoakReport(
        model="builtin",
        minutes=1,
        seed=0,
        requests={},
        misfortunes={},
        swaps=0,
        rss_bytes=(1_000, 1_031),
        rss_curve=(),
        files=(10, 15),
        threads=(5, 21),
        seen=(Bound("end", ()),),
    )
    assert {bound.name: bound.held for bound in report.bounds} == {
        "memory": False,
        "files": False,
        "threads": True,
        "end": True,
    }
    assert report.problems[1] == "files have grown from 10 to 15"


def test_a_recount_that_finds_something_is_a_broken_bound() -> None:
    spoilt = """
from rekindle.cli import soak_server
from rekindle.engine.toy import ToyEngine
def spoil(self): assert False, "two cells too many"
ToyEngine.check_integrity = spoil
raise SystemExit(soak_server.main())
"""
    settings = json.dumps({"engine": "toy", "port": 0, "store": "none"})
    with subprocess.Popen([sys.executable, "-c", spoilt, settings], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "listening on" in process.stdout.readline()
        integrity, end = end_of(process)
    assert integrity.problems == ("the recount says: two cells too many",)
    assert end.problems == ("the server ended with code 3",)


def test_a_server_that_ends_by_itself_was_not_recounted() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], stdout=subprocess.PIPE, text=True) as process:
        process.wait()
        integrity, end = end_of(process)
    assert (integrity.problems, end.problems) == (("nothing was recounted",), ("the server ended with code 1",))
