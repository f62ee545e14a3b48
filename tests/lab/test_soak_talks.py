"""The soak's live clients, on a server in this process: all ends of talks come up, and nothing is left of any."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.lab.test_soak import recount

from rekindle.api.server import running
from rekindle.lab.soak.load import Tally, Wishes, drive
from rekindle.lab.soak.run import left_over, still_busy
from rekindle.lab.soak.talks import talk
from rekindle.serve.service import Service
from rekindle.settings import Settings

SETTINGS = {
    "engine": "toy",
    "context": 1024,
    "max_running": 4,
    "max_residents": 8,
    "max_queue": 6,
    "max_sessions": 8,
    "session_idle_seconds": 0.5,
    "session_files": 10,
    "policy": "priority",
    "block_tokens": 16,
}


@pytest.mark.parametrize("others", [0, 4])
def test_talks_of_every_kind_leave_nothing(tmp_path: Path, others: int) -> None:
    tally = Tally()

    def enough(tally: Tally) -> bool:
        kinds = tally.kinds
        return bool(tally.faults) or (kinds["talked"] >= 20 and min(kinds["cut off"], kinds["left"]) >= 5)

    async def both(url: str) -> None:
        load = drive(url, Wishes(5, 1024), clients=others, enough=enough, tally=tally, exact=False)
        await asyncio.gather(load, talk(url, 5, talkers=4, enough=enough, tally=tally))

    with Service.open(Settings.load(None, {}, store=str(tmp_path / "store"), **SETTINGS)) as service:
        with running(service) as url:
            asyncio.run(both(url))
            assert tally.faults == []
            assert tally.kinds["resumed"] > 0
            assert still_busy(url) == []
            recount(service)
            assert left_over(url) == []
        service.check_integrity()


def test_who_finds_no_room_for_a_session_comes_again() -> None:
    """It is no fault."""
    tally = Tally()
    settings = SETTINGS | {"max_sessions": 1}
    with Service.open(Settings.load(None, {}, store="none", **settings)) as service, running(service) as url:
        asyncio.run(talk(url, 1, talkers=3, enough=lambda tally: tally.kinds["busy"] >= 5, tally=tally))
    assert tally.kinds["busy"] >= 5, "there is room for one session only, and somebody has it"
