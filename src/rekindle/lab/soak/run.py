"""`rekindle lab soak`: a server in a process of its own, under mixed load and store faults for some minutes.

What is watched is what leaks: memory, file handles and threads of the process, cells and sequences of the engine, blocks
of the store. The first part of the time is warm-up, in which caches fill to their limits, which are set low for that; after
it the process's memory may grow by no more than `MAX_GROWTH`. When the load has ended, nothing may run or wait, and no more
files be open than before it; when the cache is cleared, no cell and no block may be held; a recount must find nothing;
and the server must end by itself with exit code 0. Each of these is a `Bound`: the report says of each whether it held.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from rekindle.lab.load.client import ServerError
from rekindle.lab.load.servers import find_model
from rekindle.lab.machine import Machine, this_machine
from rekindle.lab.soak.faults import Misfortune
from rekindle.lab.soak.load import Tally, Wishes, drive
from rekindle.lab.soak.talks import TALKERS, talk

MAX_GROWTH = 0.03
WARM_UP = 0.25  # share of the time
CLIENTS = 12
CELLS = 1024
SETTINGS = {  # caches that are full soon, and a queue that overflows now and then
    "port": 0,
    "context": CELLS,
    "max_running": 4,
    "max_queue": 6,
    "max_residents": 8,
    "max_sessions": 12,
    "session_idle_seconds": 2.0,
    "session_files": 40,
    "store_memory": "32MiB",
    "store_disk": "128MiB",
    "policy": "priority",
    "log_level": "error",
}
WRONG = 3  # the server's exit code if its recount found something
_LISTENS = re.compile(r"listening on (http://\S+)\s")
_KEPT_ALIVE = 4  # connections that we keep to ask how it is
_POOLED = 16  # threads that pools start when they are first needed, and keep
_SAMPLE_SECONDS = 1.0
_STRIKE_SECONDS = 3.0
_IDLE_SECONDS = 60.0

Progress = Callable[[float], None]  # share of the time that is over


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment."""

    rss_bytes: int
    files: int
    threads: int


def held_by(pid: int) -> Held:
    """Raises psutil.Error if there is no such process."""
    process = psutil.Process(pid)
    with process.oneshot():
        return Held(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass(frozen=True)
class Bound:
    """One thing that was to hold."""

    name: str
    problems: tuple[str, ...]  # why it did not, in words; empty if it held

    @property
    def held(self) -> bool:
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """What was done, and what was left over."""

    model: str
    minutes: float
    seed: int
    requests: dict[str, int]  # by what came of them
    misfortunes: dict[str, int]
    swaps: int
    rss_bytes: tuple[int, int]  # after the warm-up, and at the end; medians
    rss_curve: tuple[int, ...]  # twenty moments, the warm-up included
    files: tuple[int, int]  # before the load, and after it
    threads: tuple[int, int]
    seen: tuple[Bound, ...]  # what the server's answers and its end have shown
    machine: Machine = field(default_factory=this_machine)

    @property
    def growth(self) -> float:
        """Of memory, as a share."""
        return self.rss_bytes[1] / self.rss_bytes[0] - 1

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """All that was to hold."""
        return (*_leaks(self), *self.seen)

    @property
    def problems(self) -> list[str]:
        """Empty if all is well."""
        return [problem for bound in self.bounds for problem in bound.problems]


def run_soak(model: str, *, minutes: float, seed: int, threads: int, progress: Progress) -> SoakReport:
    """Raises ModelError, ServerError if the server does not start."""
    find_model(model)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        with _server({"model": model, "threads": threads, "store": str(store)}) as (process, url):
            watch = _Watch(process.pid, minutes * 60, progress)
            misfortune, tally = Misfortune(store, seed), Tally()
            before = held_by(process.pid)
            asyncio.run(_soak(url, seed, tally, watch, misfortune))
            stuck = tuple(still_busy(url))
            after = held_by(process.pid)
            swaps = int(metric(url, "rekindle_swaps_total"))
            left = tuple(left_over(url))
            integrity, end = end_of(process)
    return SoakReport(
        model=model,
        minutes=minutes,
        seed=seed,
        requests={str(kind): count for kind, count in tally.kinds.items()},
        misfortunes=misfortune.counts,
        swaps=swaps,
        rss_bytes=watch.growth_of_memory(),
        rss_curve=watch.curve(),
        files=(before.files, after.files),
        threads=(before.threads, after.threads),
        seen=(
            Bound("answers", tuple(tally.of("faulty"))),
            Bound("nothing stuck", (*tally.of("stuck"), *stuck)),
            Bound("cells and blocks", left),
            integrity,
            end,
        ),
    )


@contextmanager
def _server(settings: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL. Raises ServerError if it does not start."""
    command = [sys.executable, "-m", "rekindle.cli.soak_server", json.dumps(SETTINGS | settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            announced = _LISTENS.search(process.stdout.readline())  # ends without a line if the process does
            if announced is None:
                raise ServerError(f"the server ended before it listened (exit code {process.wait()})")
            yield process, announced[1]
        finally:
            process.kill()


class _Watch:
    """Looks at the process once a second, and knows when the time is over."""

    def __init__(self, pid: int, seconds: float, progress: Progress) -> None:
        self._pid = pid
        self._seconds = seconds
        self._progress = progress
        self._began = time.monotonic()
        self._rss: list[int] = []

    @property
    def share(self) -> float:
        return (time.monotonic() - self._began) / self._seconds

    async def run(self) -> None:
        while self.share < 1:
            self._rss.append(held_by(self._pid).rss_bytes)
            self._progress(self.share)
            await asyncio.sleep(_SAMPLE_SECONDS)

    def growth_of_memory(self) -> tuple[int, int]:
        """Medians of equal spans: after the warm-up, and at the end."""
        span, start = max(1, len(self._rss) // 10), int(len(self._rss) * WARM_UP)
        return int(statistics.median(self._rss[start : start + span])), int(statistics.median(self._rss[-span:]))

    def curve(self) -> tuple[int, ...]:
        last = len(self._rss) - 1
        return tuple(self._rss[index * last // 19] for index in range(20))


async def _soak(url: str, seed: int, tally: Tally, watch: _Watch, misfortune: Misfortune) -> None:
    async def strike() -> None:
        while watch.share < 1:
            await asyncio.sleep(_STRIKE_SECONDS)
            misfortune.strike()
        misfortune.mend()

    def enough(_: Tally) -> bool:
        return watch.share >= 1

    load = drive(url, Wishes(seed, CELLS), clients=CLIENTS, enough=enough, tally=tally, exact=False)
    live = talk(url, seed, talkers=TALKERS, enough=enough, tally=tally)
    await asyncio.gather(load, live, watch.run(), strike())


def metric(url: str, name: str) -> float:
    """The sum over all labels of a metric."""
    text = httpx.get(f"{url}/metrics", headers={"accept": "text/plain"}, timeout=_IDLE_SECONDS).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def still_busy(url: str) -> list[str]:
    """What runs or waits although nobody asks for anything, in words."""
    busy = ("rekindle_requests_running", "rekindle_requests_queued", "rekindle_requests_swapped")
    deadline = time.monotonic() + _IDLE_SECONDS
    while any(metric(url, name) for name in busy) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{name} is {metric(url, name):.0f} with nobody there" for name in busy if metric(url, name)]


def left_over(url: str) -> list[str]:
    """What a server still holds once its cache is cleared, in words."""
    httpx.post(f"{url}/cache/verify", json={"repair": True}, timeout=_IDLE_SECONDS)  # what misfortune has spoilt
    cleared = httpx.post(f"{url}/cache/clear", json={}, timeout=_IDLE_SECONDS)
    if cleared.status_code != 200:
        return [f"/cache/clear says {cleared.text}"]
    held = ("rekindle_cells_used", "rekindle_sequences_used", "rekindle_residents", "rekindle_tier_blocks")
    problems = [f"{name} is {metric(url, name):.0f} after clearing" for name in held if metric(url, name)]
    health = httpx.get(f"{url}/health", timeout=_IDLE_SECONDS)
    return problems if health.status_code == 200 else [*problems, f"/health says {health.text}"]


def end_of(process: subprocess.Popen[str]) -> tuple[Bound, Bound]:
    """Ask the process to end: what its recount has found, and whether it did."""
    process.terminate()
    try:
        said, _ = process.communicate(timeout=_IDLE_SECONDS)
    except subprocess.TimeoutExpired:
        never = f"the server has not ended {_IDLE_SECONDS:.0f} s after SIGTERM"
        return Bound("integrity", ("nothing was recounted",)), Bound("end", (never,))
    if (code := process.returncode) == 0:
        return Bound("integrity", ()), Bound("end", ())
    wrong = f"the recount says: {said.strip()}" if code == WRONG else "nothing was recounted"
    return Bound("integrity", (wrong,)), Bound("end", (f"the server ended with code {code}",))


def _leaks(report: SoakReport) -> Iterator[Bound]:
    """What the process itself holds."""
    grown = f"memory has grown by {report.growth:.1%} after the warm-up, more than {MAX_GROWTH:.0%}"
    yield Bound("memory", (grown,) if report.growth > MAX_GROWTH else ())
    for name, (before, after), more in (("files", report.files, _KEPT_ALIVE), ("threads", report.threads, _POOLED)):
        yield Bound(name, (f"{name} have grown from {before} to {after}",) if after > before + more else ())


def print_soak_report(report: SoakReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    table = Table("what", "before", "after", title=f"{report.minutes:g} minutes, {report.model}")
    table.add_row("memory under load, MB (warm-up / end)", *(f"{value / 1e6:.1f}" for value in report.rss_bytes))
    table.add_row("open files, nobody there", *map(str, report.files))
    table.add_row("threads, nobody there", *map(str, report.threads))
    console.print(table)
    lines = [
        "requests: " + ", ".join(f"{count} {kind}" for kind, count in sorted(report.requests.items())),
        "the store's folder " + ", ".join(f"{name} {n} times" for name, n in report.misfortunes.items()),
        f"requests swapped out: {report.swaps}; memory grew by {report.growth:.2%}",
        ", ".join(f"{bound.name}: {'held' if bound.held else 'BROKEN'}" for bound in report.bounds),
        *(f"problem: {problem}" for problem in report.problems),
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    facts = asdict(report) | {
        "growth": round(report.growth, 4),
        "bounds": {bound.name: bound.held for bound in report.bounds},
        "problems": report.problems,
    }
    del facts["seen"]
    console.print(json.dumps(facts), markup=False, highlight=False, soft_wrap=True)
