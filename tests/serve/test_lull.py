"""When the worker does what nobody waits for: not before who goes on at once, not too late, and in small pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.serve.conftest import Stage, ids

from rekindle.engine.protocol import Payload, SequenceId
from rekindle.reuse.prompt import Prompt
from rekindle.serve.lull import Lull
from rekindle.serve.request import Done, Event, Generation, Piece, Sampling
from rekindle.serve.run import Clock, Run
from rekindle.serve.worker import Worker
from rekindle.tokens import as_tokens

LONG = 1000.0  # seconds that no test waits for
WAIT_SECONDS = 60.0


class Bench:
    """A worker on the toy engine, which notes in `order` what happens."""

    def __init__(self, lull: Lull) -> None:
        self.order: list[str] = []
        self.exported = threading.Semaphore(0)
        self.on_export: Callable[[], object] = lambda: None
        self.stage = Stage()
        self._export, self.stage.engine.export = self.stage.engine.export, self.export  # type: ignore[method-assign]
        self.worker = Worker(self.stage.scheduler, max_queue=8, lull=lull)

    def export(self, seq: SequenceId, start: int, stop: int) -> Payload:
        self.order.append("export")
        self.exported.release()
        self.on_export()
        return self._export(seq, start, stop)

    def submit(self, prompt: list[int], name: str) -> threading.Event:
        """Returns what is set at the end of the answer, which has one token."""
        done = threading.Event()

        def hear(event: Event) -> None:
            if isinstance(event, Piece) and event.tokens:
                self.order.append(name)
            elif isinstance(event, Done):
                done.set()

        generation = Generation(prompt=Prompt(as_tokens(prompt)), max_tokens=1, sampling=Sampling(temperature=0))
        now = time.perf_counter()
        self.worker.submit(Run(generation, hear, None, Clock(now, now)))
        return done

    def ask(self, prompt: list[int], name: str = "answer") -> None:
        assert self.submit(prompt, name).wait(WAIT_SECONDS)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.worker.stop()
    assert bench.worker.failure is None


patient = pytest.mark.parametrize("bench", [Lull(LONG, LONG)], indirect=True)
at_once = pytest.mark.parametrize("bench", [Lull(LONG, 0.0)], indirect=True)
soon = pytest.mark.parametrize("bench", [Lull(0.001, LONG)], indirect=True)


@patient
def test_who_asks_again_at_once_finds_the_worker_free(bench: Bench) -> None:
    prompt = ids(1, 200)
    for _ in range(4):
        bench.ask(prompt)
    bench.worker.call(lambda scheduler: None)
    assert bench.order == ["answer"] * 4
    assert bench.stage.engine.num_computed == 200  # and nothing is read twice


@patient
def test_what_was_put_off_is_saved_at_the_end(bench: Bench) -> None:
    bench.ask(ids(1, 200))
    bench.worker.stop()
    assert bench.stage.store.match(as_tokens(ids(1, 200))).length == 200


@soon
def test_a_pause_is_used(bench: Bench) -> None:
    bench.ask(ids(1, 200))
    for _ in range(200 // 16 + 1):  # whole blocks, and a tail
        assert bench.exported.acquire(timeout=WAIT_SECONDS)


@at_once
def test_where_nobody_pauses_it_is_put_off_only_so_long(bench: Bench) -> None:
    """Each idle moment is used then, although a pause was not waited for."""
    bench.ask(ids(1, 200))
    for _ in range(200 // 16 + 1):
        assert bench.exported.acquire(timeout=WAIT_SECONDS)


@at_once
def test_who_comes_while_a_piece_is_saved_waits_for_one_block(bench: Bench) -> None:
    came: list[threading.Event] = []

    def come() -> None:
        if not came:
            bench.order.append("came")
            came.append(bench.submit(ids(2, 30), "second"))

    bench.on_export = come
    bench.ask(ids(1, 200))
    assert bench.exported.acquire(timeout=WAIT_SECONDS)
    bench.worker.call(lambda scheduler: None)
    assert came[0].wait(WAIT_SECONDS)
    assert bench.order[:4] == ["answer", "export", "came", "second"]


def test_a_hurried_piece_is_one_block_and_all_is_saved_at_last(stage: Stage) -> None:
    stage.ask(ids(9, 100))  # 104 tokens: six blocks of 16, a tail at 100 and one at 104
    kept = []
    while stage.scheduler.use_idle_time(hurried=lambda: True):
        kept.append(stage.store.stats().blocks)
    assert kept == [1, 2, 3, 4, 5, 6, 8]


def test_nobody_is_waited_for_where_nobody_was_answered() -> None:
    assert Lull().seconds_left(1e9) == 0.0


def test_the_pause_begins_anew_with_each_token_and_ends() -> None:
    lull = Lull(1.0, LONG)
    lull.answered(10.0)
    assert lull.seconds_left(10.25) == 0.75
    lull.answered(10.5)
    assert lull.seconds_left(10.5) == 1.0
    assert lull.seconds_left(11.5) == 0.0


def test_it_is_put_off_from_the_first_idle_moment_until_nothing_is_left() -> None:
    lull = Lull(1.0, 2.0)
    for now in (10.0, 10.5, 11.0, 11.5):
        lull.answered(now)
        assert lull.seconds_left(now) == min(1.0, 12.0 - now)
    lull.answered(12.0)
    assert lull.seconds_left(12.0) == 0.0
    lull.used_up()
    assert lull.seconds_left(12.0) == 1.0
