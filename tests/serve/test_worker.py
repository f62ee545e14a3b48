"""A worker that fails, whatever fails: whoever waits is told, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.serve.conftest import Stage, ids

from rekindle.errors import EngineError
from rekindle.reuse.prompt import Prompt
from rekindle.serve.observe import Observer
from rekindle.serve.request import Event, Failed, Generation
from rekindle.serve.run import Clock, Run
from rekindle.serve.worker import Worker
from rekindle.tokens import as_tokens

WAIT_SECONDS = 60.0


class Broken(Observer):
    """Raises whenever it is told of a failure."""

    def failed(self, run: Run, error: object) -> None:
        raise ZeroDivisionError


class Bench:
    """A worker on the toy engine that can be held, so that much waits for it."""

    def __init__(self) -> None:
        self.stage = Stage(observer=Broken())
        self.worker = Worker(self.stage.scheduler, max_queue=8)
        self._held, self._go = threading.Event(), threading.Event()

    def hold(self) -> None:
        def wait(scheduler: object) -> None:
            self._held.set()
            self._go.wait()

        self.worker.post(wait)
        assert self._held.wait(WAIT_SECONDS)

    def go(self) -> None:
        self._go.set()

    def submit(self, seed: int) -> tuple[list[Event], threading.Event]:
        """What is told of a request, and what is set at its end."""
        told: list[Event] = []
        ended = threading.Event()

        def hear(event: Event) -> None:
            told.append(event)
            if isinstance(event, Failed):
                ended.set()

        now = time.perf_counter()
        generation = Generation(prompt=Prompt(as_tokens(ids(seed, 40))), max_tokens=1)
        self.worker.submit(Run(generation, hear, None, Clock(now, now)))
        return told, ended

    def check_all_told(self, requests: list[tuple[list[Event], threading.Event]]) -> None:
        for told, ended in requests:
            assert ended.wait(WAIT_SECONDS)
            assert len(told) == 1 and isinstance(told[0], Failed) and isinstance(told[0].error, EngineError)
        self.worker.stop()
        assert isinstance(self.worker.failure, ZeroDivisionError)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.go()
    bench.worker.stop()


def fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def test_one_who_tells_of_failures_and_fails_itself_holds_up_nobody(bench: Bench) -> None:
    bench.hold()
    bench.stage.engine.forward = fail  # type: ignore[assignment]
    requests = [bench.submit(seed) for seed in range(3)]
    bench.go()
    bench.check_all_told(requests)


@pytest.mark.parametrize("what", ["expect", "let_go"])
def test_commands_that_fail_after_the_failure_hold_up_nobody_behind_them(
    bench: Bench, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks one request's arrival may break all; so may what others want done on the broken engine."""
    bench.hold()
    scheduler, called = bench.stage.scheduler, threading.Event()
    action: Callable[[object], object] = lambda _: called.set()  # noqa: E731
    if what == "expect":
        monkeypatch.setattr(scheduler._admission, "expect", fail)
    else:
        bench.worker.post(fail)
    requests = [bench.submit(seed) for seed in range(3)]
    bench.worker.post(fail)
    caller = threading.Thread(target=bench.worker.call, args=(action,))
    caller.start()
    while bench.worker._inbox.qsize() < 5 + (what == "let_go"):
        pass
    bench.go()
    bench.check_all_told(requests)
    caller.join(WAIT_SECONDS)
    assert called.is_set() and not caller.is_alive()
