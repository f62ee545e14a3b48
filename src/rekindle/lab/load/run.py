"""The arms: starts servers, has a workload asked of each, and gathers what came of it.

Workloads that are asked in short turns (`measures.py`) have all servers up, for all rounds; `turns.py` says why. Sessions
have one server up at a time, started afresh for each round, A B A B: an open loop can't stop for another server's turn, a
pause would be rest for the clients of a closed one, and what sessions measure, how much of a conversation is still there
when it goes on, hangs on all that the server was asked before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from rekindle.errors import InvalidRequest, nearest
from rekindle.lab.decode import weight_bytes_per_token
from rekindle.lab.load.client import ServerError, Target
from rekindle.lab.load.drive import Answers, Load, drive_closed, drive_open
from rekindle.lab.load.figures import Figure, Run, total
from rekindle.lab.load.measures import MEASURES, Measure, Piece
from rekindle.lab.load.servers import Server, Setup, Start, find_model, peer_starter, rekindle_server
from rekindle.lab.load.texts import Texts
from rekindle.lab.load.turns import Arm, Turn, take_turns
from rekindle.lab.load.workloads import SESSIONS, Sizes, Workload
from rekindle.lab.machine import Machine, read_bandwidth, this_machine, usable_cores
from rekindle.serve.budget import free_bytes

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

    @property
    def takes_turns(self) -> bool:
        """Whether servers are up together and asked piece by piece, or one at a time."""
        return self.workload in MEASURES


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
    servers: list[Server] = []  # of the first round
    rounds = _Rounds(wish, progress)
    if wish.takes_turns:
        _check_memory(wish, setup)
        with ExitStack() as stack:
            servers = [stack.enter_context(start()) for start in starts]
            for number in range(wish.rounds):
                rounds.run(number, servers)
    else:
        for number in range(wish.rounds):
            for start in starts:
                with start() as server:
                    rounds.run(number, [server])
                servers = [*servers, server][: len(starts)]
    runs = _told_apart(rounds.runs, len(starts))
    assert rounds.texts is not None
    if bandwidth is not None and setup is not None:
        # the better of two measurements: what else the machine does may slow one down, and a limit must not be too low
        rate = max(bandwidth, read_bandwidth(setup.threads)) / weight_bytes_per_token(setup.model)
        runs = [_with_decode_limit(run, rate) for run in runs]
    return LoadReport(
        wish=wish,
        machine=this_machine(),
        setup=setup,
        servers=tuple(replace(server, name=run.server) for server, run in zip(servers, runs, strict=False)),
        tokens_per_word=rounds.texts.tokens_per_word,
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


def _check_memory(wish: Wish, setup: Setup | None) -> None:
    """Raises ServerError if two servers can't both hold the model, each in a copy of its own: llama.cpp repacks weights."""
    if setup is None or wish.url is not None or wish.peer is None:
        return
    need, free = 2 * setup.model.stat().st_size, free_bytes()
    if free < need:
        raise ServerError(
            f"{wish.workload} is asked in turn with both servers up, each with its own weights: expected at least "
            f"{need / 1e9:.1f} GB of free memory, got {free / 1e9:.1f} GB; take a smaller model, or end other programs"
        )


def _told_apart(runs: Sequence[Run], num_arms: int) -> list[Run]:
    """With names that differ, although both servers may be of a kind."""
    is_same = num_arms > 1 and runs[0].server == runs[1].server
    return [
        replace(run, server=f"{run.server} (peer)") if is_same and number % num_arms else run
        for number, run in enumerate(runs)
    ]


@dataclass
class _Rounds:
    """One workload, round by round, on one server or on several that take turns."""

    wish: Wish
    progress: Progress | None
    runs: list[Run] = field(default_factory=list)
    texts: Texts | None = None  # of the first arm: later ones get words for the same tokenizer
    _done: int = 0  # requests of this round
    _total: int = 0

    def run(self, number: int, servers: Sequence[Server]) -> None:
        """A round; its runs in the order of the servers. Raises ServerError."""
        asyncio.run(self._run(number, servers))

    async def _run(self, number: int, servers: Sequence[Server]) -> None:
        async with AsyncExitStack() as stack:
            arms = [await self._arm(number, server, stack) for server in servers]
            assert self.texts is not None
            texts = replace(self.texts, seed=self.wish.seed * 1_000 + number)
            turns, requests = _turns(self.wish, texts)
            self._done, self._total = 0, requests * len(arms)
            arms[0].load.tick(0)
            await take_turns(arms, turns, first=number)
            self.runs += [_run_of(arm, number) for arm in arms]

    async def _arm(self, number: int, server: Server, stack: AsyncExitStack) -> Arm:
        """The server, connected."""
        is_given = not server.name  # a running server, which says itself what it is
        try:
            target = await stack.enter_async_context(
                Target(
                    server.url,
                    api_key=self.wish.api_key if is_given else None,
                    model=self.wish.api_model if is_given else None,
                    timeout_seconds=self.wish.timeout_seconds,
                )
            )
            await target.connect()
            tokens_per_word = await target.tokens_per_word()  # on every server, so that all are as warm
        except ServerError as error:
            raise error if is_given else ServerError(f"{server.name}: {error}") from None  # else it says its address
        self.texts = self.texts or Texts(seed=0, tokens_per_word=tokens_per_word)
        name = server.name or target.name

        def tick(count: int) -> None:
            self._done += count
            if self.progress is not None:
                self.progress(f"{name}, round {number + 1} of {self.wish.rounds}", self._done, self._total)

        return Arm(name=name, server=server, load=Load(target, tick, server.cpu_seconds))


def _turns(wish: Wish, texts: Texts) -> tuple[list[Turn], int]:
    """Of a round, and how many requests they hold."""
    plan = workload_named(wish.workload)
    if isinstance(plan, Measure):
        return [_bound(piece, wish.sizes, texts) for piece in plan.turns], plan.requests(wish.sizes)
    sessions = plan.sessions(wish.sizes, texts)

    async def drive(load: Load) -> list[Figure]:
        if wish.rate is None:
            await drive_closed(load, sessions, wish.sizes.clients, wish.answers)
        else:
            await drive_open(load, sessions, wish.rate, texts.seed, wish.answers)
        return []

    return [drive], sum(len(session.steps) for session in sessions)


def _bound(piece: Piece, sizes: Sizes, texts: Texts) -> Turn:
    return lambda load: piece(load, sizes, texts)


def _run_of(arm: Arm, number: int) -> Run:
    idle = total(arm.idle_cpu_seconds)
    return Run(
        server=arm.name,
        round=number,
        seconds=arm.load.seconds,
        answers=tuple(arm.load.answers),
        skipped=arm.load.skipped,
        figures=tuple(arm.figures),
        cpu_seconds=total(arm.cpu_seconds),
        idle_share=None if idle is None else idle / arm.idle_seconds,
        fixes_length=arm.load.target.fixes_length,
    )


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
