"""The soak in small: mixed load with clients that leave, bad requests, swaps and store faults; nothing is left over.

The command's own load and misfortunes, over HTTP, on a server in this process, so that engine and store can be recounted.
"""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import psutil
import pytest

from rekindle.api.server import running
from rekindle.lab.soak.faults import Misfortune
from rekindle.lab.soak.load import Tally, Wishes, drive
from rekindle.lab.soak.run import held_by, left_over
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
        if tally.total // STRIKE_EVERY > struck:
            struck += 1
            misfortune.strike()
        return tally.total >= requests

    with Service.open(settings) as service:
        with running(service) as url:
            wishes = Wishes(seed, service.num_cells)
            asyncio.run(drive(url, wishes, clients=10, enough=enough, tally=tally, exact=exact))
            misfortune.mend()
            assert tally.faults == []
            recount(service)
            assert left_over(url) == []
            recount(service)
        assert service.metrics.num_running == service.metrics.num_queued == 0
    assert misfortune.counts
    return tally


@pytest.fixture
def nothing_stays() -> object:
    """Threads and files of this process are as before."""
    before = held_by(os.getpid())
    yield None
    gc.collect()
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
    tally = soak(settings, 600, 7, exact=True)
    kinds = tally.kinds
    assert min(kinds["answered"], kinds["left"], kinds["refused"], kinds["busy"]) > 0
    assert len(tally.answers) > 50


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
    kinds = soak(settings, 400, 8, exact=False).kinds
    assert min(kinds["answered"], kinds["left"], kinds["refused"]) > 0
