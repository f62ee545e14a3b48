"""The one thread: it owns the scheduler and the engine, and steps as long as there is work.

Everything reaches it as a command in its inbox, so no lock guards the engine. When nothing is to be computed, and nobody
has gone on at once (`lull.py`), it saves residents to the store and studies chunks that were met, one at a time, and then
waits for the next command.

An error that is not one request's ends the thread: the engine's state is unknown then. That is an alarm, never a hang:
whoever waits is told, whoever comes later is refused, and `failure` says why.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from rekindle.errors import EngineError, Overloaded, Stopping, counted
from rekindle.serve.lull import Lull
from rekindle.serve.request import request_id
from rekindle.serve.run import Run
from rekindle.serve.scheduler import Scheduler

_log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """The worker's state after its latest step, or what was called since."""

    running: int = 0
    waiting: int = 0
    residents: int = 0
    resident_tokens: int = 0
    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Worker:
    """Runs a scheduler in a thread. All methods may be called from any thread."""

    def __init__(self, scheduler: Scheduler, *, max_queue: int, lull: Lull | None = None) -> None:
        self._scheduler = scheduler
        self._lull = lull or Lull()
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._snapshot = Snapshot()
        self._posted = 0  # submissions that the thread has not taken yet
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="rekindle-worker", daemon=True)
        self._busy_since: float | None = None  # time.monotonic(); None: waits for a command
        self.failure: BaseException | None = None
        self._thread.start()

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def busy_seconds(self) -> float:
        """How long the step that is being taken has taken so far; 0.0 if there is nothing to do."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, run: Run) -> None:
        """Queue a request. Raises Overloaded, Stopping, or EngineError when the worker has failed."""
        with self._lock:
            self._check_room()
            self._posted += 1
            self._inbox.put(lambda: self._take(run))

    def check_room(self) -> None:
        """Whether one more request may come just now. Raises what `submit` raises."""
        with self._lock:
            self._check_room()

    def _check_room(self) -> None:
        self._check_alive()
        waiting = len(self._scheduler.waiting) + self._posted
        if waiting >= self._max_queue:
            raise Overloaded(
                f"{counted(waiting, 'request')} waiting already, the limit is {self._max_queue}; try again later"
            )

    def call(self, action: Callable[[Scheduler], object]) -> None:
        """Do something on the worker's thread, between two steps, and wait for it. Raises what it raises."""
        done = threading.Event()
        errors: list[Exception] = []

        def command() -> None:
            try:
                action(self._scheduler)
            except Exception as error:
                errors.append(error)
            finally:
                self._publish()
                done.set()

        with self._lock:
            self._check_alive()
            self._inbox.put(command)
        done.wait()
        if errors:
            raise errors[0]

    def post(self, action: Callable[[Scheduler], object]) -> None:
        """Do something on the worker's thread, between two steps, without waiting for it; nothing if it has ended."""
        self._inbox.put(lambda: self._do(action))

    def _do(self, action: Callable[[Scheduler], object]) -> None:
        action(self._scheduler)

    def wake(self) -> None:
        """Take another step: something that a waiting request needs has come."""
        self._inbox.put(_nothing)

    def stop(self) -> None:
        """End the thread; what is running ends as cancelled."""
        with self._lock:
            self._inbox.put(self._stop)
        self._thread.join()

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._busy_since = time.monotonic()
                self._obey()
                if not self._stopping:
                    step = self._scheduler.step()
                    self._publish()
                    if step.idle and not self._use_pause():
                        self._inbox_wait()
        except BaseException as error:  # of whatever kind: a thread that is gone answers nobody
            under_way = (*self._scheduler.waiting, *self._scheduler.running)
            ids = " ".join(name for run in under_way if (name := run.context.get(request_id, "")))
            _log.exception("the worker failed", extra={"fields": {"request_ids": ids}})
            self.failure = error
            self._scheduler.abandon(self._failed())
        finally:
            self._close()
            self._busy_since = None

    def _failed(self) -> EngineError:
        """For those who wait; the failure itself may hold what is not for them."""
        return EngineError(f"the worker failed ({type(self.failure).__name__}); see the server's log")

    def _use_pause(self) -> bool:
        """Whether somebody came, or something was done that nobody waits for; if not, all that is left is to wait."""
        left = self._lull.seconds_left(time.monotonic())
        if left and self._inbox_wait(left):
            return True
        is_used = self._scheduler.use_idle_time(hurried=lambda: not self._inbox.empty())
        if not is_used:
            self._lull.used_up()
        return is_used

    def _inbox_wait(self, timeout_seconds: float | None = None) -> bool:
        """Obey the next command, unless there is work already; False if none came."""
        if self._scheduler.running:
            return False
        self._busy_since = None
        try:
            command = self._inbox.get(timeout=timeout_seconds)
        except queue.Empty:
            return False
        finally:
            self._busy_since = time.monotonic()
        command()
        return True

    def _obey(self) -> None:
        while not self._inbox.empty():  # nobody else takes from it
            self._inbox.get_nowait()()

    def _take(self, run: Run) -> None:
        self._scheduler.submit(run)
        with self._lock:
            self._posted -= 1

    def _stop(self) -> None:
        self._stopping = True
        for run in (*self._scheduler.waiting, *self._scheduler.running):
            run.cancel()
        self._scheduler.step()

    def _close(self) -> None:
        """Answer whatever was posted too late."""
        with self._lock:
            self._stopping = True
        while not self._inbox.empty():
            self._obey_late(self._inbox.get_nowait())
        self._scheduler.abandon(Stopping("the server is being stopped") if self.failure is None else self._failed())
        try:
            while self.failure is None and self._scheduler.residents.save_one():
                pass
        except Exception:
            _log.exception("the residents could not be saved")
        self._publish()

    def _obey_late(self, command: Callable[[], None]) -> None:
        """A request that comes now waits at least, and is told; what else fails on a broken engine holds up nobody."""
        try:
            command()
        except Exception:
            _log.exception("a command that came too late has failed")

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self._failed()
        if self._stopping:
            raise Stopping("the server is being stopped")

    def _publish(self) -> None:
        scheduler, counts = self._scheduler, self._scheduler.counts
        if counts.generated_tokens > self._snapshot.generated_tokens:
            self._lull.answered(time.monotonic())
        self._snapshot = Snapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            residents=len(scheduler.residents),
            resident_tokens=scheduler.residents.num_tokens,
            requests=counts.requests,
            hits=counts.hits,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generated_tokens=counts.generated_tokens,
        )


def _nothing() -> None:
    pass
