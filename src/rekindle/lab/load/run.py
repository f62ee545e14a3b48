"""The arms in turn: starts servers, drives a workload at each, and gathers what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from rekindle.errors import InvalidRequest, nearest
from rekindle.lab.decode import weight_bytes_per_token
from rekindle.lab.load.client import ServerError, Target
from rekindle.lab.load.drive import Answers, Load, drive_closed, drive_open
from rekindle.lab.load.figures import Figure, Run
from rekindle.lab.load.measures import MEASURES, Measure
from rekindle.lab.load.servers import Server, Setup, Start, find_model, peer_starter, rekindle_server
from rekindle.lab.load.texts import Texts
from rekindle.lab.load.workloads import SESSIONS, Sizes, Workload
from rekindle.lab.machine import Machine, read_bandwidth, this_machine, usable_cores

Progress = Callable[[str, int, int], None]  # what runs now, requests done, of how many in it
WORKLOADS: dict[str, Workload | Measure] = {**SESSIONS, **MEASURES}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be run. Checked when it is made: raises InvalidRequest."""

    workload: str = "chat"
    sizes: Sizes
    rate: float | None = None  # sessions per second, for an open loop
    rounds: int = 1
    seed: int = 0
    answers: Answers = "own"  # what goes into transcripts: the server's own answers, or the same texts for all
    url: str | None = None  # a running server; without one, rekindle is started
    peer: str | None = None  # started too, and run in turn with the first
    api_key: str | None = None
    api_model: str | None = None  # as the server at the URL calls it
    timeout_seconds: float = 600.0  # for one request

    def __post_init__(self) -> None:
        if self.rate is not None:
            if not 0 < self.rate < float("inf"):
                raise InvalidRequest(f"rate: expected more than 0 sessions per second, got {self.rate}", param="rate")
            if self.workload in MEASURES:
                raise InvalidRequest(f"the workload {self.workload} has times of its own; leave rate out", param="rate")
        if self.workload == "trace" and self.sizes.trace is None:
            raise InvalidRequest("the workload trace needs a file: --trace FILE", param="trace")
        if self.answers not in ("own", "scripted"):
            raise InvalidRequest(f"answers: expected own or scripted, got {self.answers!r}", param="answers")
        if self.answers == "scripted" and "turns" not in workload_named(self.workload).reads:
            raise InvalidRequest(f"the workload {self.workload} has no transcripts; leave answers out", param="answers")
        if self.rounds < 1 or self.timeout_seconds <= 0:
            raise InvalidRequest("rounds and timeout must be more than 0")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """All runs, and what a reader needs to place them."""

    wish: Wish
    machine: Machine
    setup: Setup | None  # of servers that were started
    servers: tuple[Server, ...]
    tokens_per_word: float
    runs: tuple[Run, ...]


def workload_named(name: str) -> Workload | Measure:
    """Raises InvalidRequest for an unknown name."""
    found = WORKLOADS.get(name)
    if found is None:
        raise InvalidRequest(f"no workload is called {name!r}{nearest(name, WORKLOADS)}", param="workload")
    return found


def sizes_for(workload: str, given: Mapping[str, Any]) -> Sizes:
    """A workload's sizes, with those given that are not None. Raises InvalidRequest for one that it does not read."""
    plan = workload_named(workload)
    for name, value in given.items():
        if value is not None and name not in plan.reads:
            own = ", ".join(sorted(each for each in plan.reads if each in given))
            raise InvalidRequest(f"the workload {workload} has no {name}; its sizes are {own}", param=name)
    return plan.defaults.with_(**given)


def make_setup(
    workload: str,
    sizes: Sizes,
    *,
    model: str,
    threads: int | None = None,
    context: int | None = None,
    parallel: int | None = None,
    options: dict[str, Any] | None = None,
) -> Setup:
    """What started servers get; the workload says what is not given. Raises ModelError for a model that is not there."""
    plan = workload_named(workload)
    return Setup(
        model=find_model(model),
        threads=threads or usable_cores(),
        context=context or plan.cells(sizes),
        parallel=parallel or plan.parallel(sizes),
        options=options or {},
    )


def run_load(wish: Wish, setup: Setup | None, progress: Progress | None = None) -> LoadReport:
    """Run every arm of every round. `setup` may be None if nothing is to be started.

    Raises ServerError if a server can't be used at all or a measurement can't be made; requests that fail are counted.
    """
    starts = _arms(wish, setup)
    bandwidth = _bandwidth(wish, setup)
    servers: dict[str, Server] = {}
    runs: list[Run] = []
    texts: Texts | None = None
    for number in range(wish.rounds):
        for arm, start in enumerate(starts):
            with start() as server:
                run, texts = _Arm(wish, server, number, progress).run(texts)
                if arm and run.server == runs[-1].server:  # two of a kind
                    run = replace(run, server=f"{run.server} (peer)")
                servers.setdefault(run.server, replace(server, name=run.server))
                runs.append(run)
    assert texts is not None
    if bandwidth is not None and setup is not None:
        # the better of two measurements: what else the machine does may slow one down, and a limit must not be too low
        rate = max(bandwidth, read_bandwidth(setup.threads)) / weight_bytes_per_token(setup.model)
        runs = [_with_decode_limit(run, rate) for run in runs]
    return LoadReport(
        wish=wish,
        machine=this_machine(),
        setup=setup,
        servers=tuple(servers.values()),
        tokens_per_word=texts.tokens_per_word,
        runs=tuple(runs),
    )


def _arms(wish: Wish, setup: Setup | None) -> list[Start]:
    starts: list[Start] = []
    if wish.url is not None:
        running = Server(name="", url=wish.url)
        starts.append(lambda: nullcontext(running))
    if setup is None:
        assert wish.url is not None and wish.peer is None, "servers that are started need a setup"
        return starts
    if wish.url is None:
        starts.append(lambda: rekindle_server(setup))
    if wish.peer is not None:
        starts.append(peer_starter(wish.peer, setup))
    return starts


@dataclass(frozen=True)
class _Arm:
    """One workload on one server, once."""

    wish: Wish
    server: Server
    round: int
    progress: Progress | None

    def run(self, texts: Texts | None) -> tuple[Run, Texts]:
        """The run, and the texts of the first: later arms get words for the same tokenizer."""
        try:
            return asyncio.run(self._measure(texts))
        except ServerError as error:
            named = f"{self.server.name}: " if self.server.name else ""  # one that was given is named by its address
            raise ServerError(f"{named}{error}") from None

    async def _measure(self, texts: Texts | None) -> tuple[Run, Texts]:
        is_given = not self.server.name  # a running server, which says itself what it is
        async with Target(
            self.server.url,
            api_key=self.wish.api_key if is_given else None,
            model=self.wish.api_model if is_given else None,
            timeout_seconds=self.wish.timeout_seconds,
        ) as target:
            await target.connect()
            tokens_per_word = await target.tokens_per_word()  # on every server, so that all are as warm
            texts = replace(
                texts or Texts(seed=0, tokens_per_word=tokens_per_word), seed=self.wish.seed * 1_000 + self.round
            )
            name = self.server.name or target.name
            before = self.server.cpu_seconds()
            load, figures = await self._drive(target, texts, name)
            after = self.server.cpu_seconds()
        run = Run(
            server=name,
            round=self.round,
            seconds=load.seconds,
            answers=tuple(load.answers),
            skipped=load.skipped,
            figures=tuple(figures),
            cpu_seconds=None if before is None or after is None else after - before,
            fixes_length=target.fixes_length,
        )
        return run, texts

    async def _drive(self, target: Target, texts: Texts, name: str) -> tuple[Load, list[Figure]]:
        wish, plan = self.wish, workload_named(self.wish.workload)
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(f"{name}, round {self.round + 1} of {wish.rounds}", done, total)

        load = Load(target, tick, self.server.cpu_seconds)
        if isinstance(plan, Measure):
            total = plan.requests(wish.sizes)
            tick(0)
            return load, await plan.run(load, wish.sizes, texts)
        sessions = plan.sessions(wish.sizes, texts)
        total = sum(len(session.steps) for session in sessions)
        tick(0)
        if wish.rate is None:
            await drive_closed(load, sessions, wish.sizes.clients, wish.answers)
        else:
            await drive_open(load, sessions, wish.rate, texts.seed, wish.answers)
        return load, []


def _bandwidth(wish: Wish, setup: Setup | None) -> float | None:
    """Bytes per second, where a workload has use for them and the model's file is known."""
    return read_bandwidth(setup.threads) if wish.workload == "cold" and setup is not None else None


def _with_decode_limit(run: Run, rate: float) -> Run:
    """The run, with the tokens per second that reading the weights allows beside those of one stream."""
    why = "memory bandwidth / bytes of weights"
    figures = (
        replace(each, expected=rate, why=why) if each.name == "decode_tokens_per_second" else each
        for each in run.figures
    )
    return replace(run, figures=tuple(figures))
