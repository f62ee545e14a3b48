"""Whether other programs want the cores that the engine computes on, and what follows for threads that wait.

llama.cpp's threads wait for each other hundreds of times a token. On a machine of our own they had best wait busily; where
others hold a core for milliseconds that is the worst they can do (`rekindle/openmp.py` has the figures). The system counts
for each thread how long it could have run and had no core. Of a process whose threads have the machine to themselves these
times add up to less than a fifth of the time that it computes, its own event loop and a client on the same machine
included; one other busy program makes it half and more. Standing still because the container's quota is used up counts as
well (a busy process with a quota of 0.3 cores ran 0.90 of 3 seconds and waited 2.09; the group's own count of throttled
time said 0.30). So

    crowded   from the start, and as soon as in `WINDOW_SECONDS` of steps threads lacked a core for `CROWDED` of it
    calm      after one such window at the start, and then after `CALM_SECONDS` of steps, in none of which they did so for
              more than `CALM` of it; after twice that if it was too soon, and so on up to `LONGEST_CALM_SECONDS`

and while it is crowded a thread of ours holds a team of libgomp's threads that do nothing, which makes libgomp's others
sleep instead of spin. What threads waited for in a pause of `PAUSE_SECONDS`, while others had their turn, is left out: it
would count against the little that they computed. (Two servers on one machine that were asked in turn made .3 to .5 of
that, and each time our next tokens took half as long again.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from rekindle import openmp
from rekindle.serve.observe import Observer
from rekindle.serve.scheduler import Step

WINDOW_SECONDS = 0.25
PAUSE_SECONDS = 0.1
CALM_SECONDS = 1.0
LONGEST_CALM_SECONDS = 16.0
CROWDED = 0.4
CALM = 0.25
_TASKS = Path("/proc/self/task")
Waited = Callable[[], dict[str, float]]


def waited_seconds() -> dict[str, float]:
    """For each thread of this process the seconds for which it could have run and had no core (proc_pid_schedstat)."""
    waited = {}
    for task in _TASKS.iterdir():
        try:
            waited[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return waited


class Crowding(Observer):
    """Watches the steps; belongs to the worker's thread, but for `close`."""

    def __init__(
        self,
        hold: Callable[[], Callable[[], None]],
        waited: Waited = waited_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hold` makes threads sleep where they would spin, until what it returns is called."""
        self._hold = hold
        self._waited = waited
        self._clock = clock
        self._ended = clock()  # the last step
        self._release: Callable[[], None] | None = hold()
        self._before = waited()
        self._seconds = self._lacked = 0.0  # of steps, and without a core, in this window
        self._calm_seconds = 0.0  # of steps, in the calm windows up to now
        self._needed = WINDOW_SECONDS  # of such, until it is calm

    @property
    def crowded(self) -> bool:
        return self._release is not None

    def stepped(self, step: Step) -> None:
        now = self._clock()
        paused, self._ended = now - step.seconds - self._ended >= PAUSE_SECONDS, now
        if paused:
            self._before = self._waited()
        elif step.idle:
            self._count()
        else:
            self._seconds += step.seconds
            if self._seconds >= WINDOW_SECONDS:
                self._count()
                self._learn(self._lacked / self._seconds, self._seconds)
                self._seconds = self._lacked = 0.0

    def _count(self) -> None:
        """What threads lacked since this was last done."""
        waited, before = self._waited(), self._before
        self._lacked += sum(max(0.0, waited[task] - before[task]) for task in waited.keys() & before.keys())
        self._before = waited

    def close(self) -> None:
        """Hold nothing any more. For other threads when no step may follow."""
        if self._release is not None:
            self._release()
        self._release = None

    def _learn(self, share: float, seconds: float) -> None:
        self._calm_seconds = self._calm_seconds + seconds if share <= CALM else 0.0
        if self._release is None and share >= CROWDED:
            self._release = self._hold()
            self._needed = min(max(2 * self._needed, CALM_SECONDS), LONGEST_CALM_SECONDS)
        elif self._calm_seconds >= self._needed:
            self.close()
        if self._calm_seconds >= 2 * LONGEST_CALM_SECONDS:
            self._needed = WINDOW_SECONDS


def hold_team(num_threads: int) -> Callable[[], None]:
    """A thread with a team of so many, itself included, which sleeps until the result is called."""
    begun, over = threading.Event(), threading.Event()

    def keep() -> None:
        try:
            openmp.add_team(num_threads)
        finally:
            begun.set()
        over.wait()

    thread = threading.Thread(target=keep, name="rekindle-crowding", daemon=True)
    thread.start()
    begun.wait()

    def release() -> None:
        over.set()
        thread.join()

    return release


def watch_crowding(threads: int, cores: int) -> Crowding | None:
    """For an engine with so many threads of llama.cpp's; None where they never wait for each other, or can't be watched.

    `cores` are those that libgomp counts: all that they may run on, whatever the quota.
    """
    if threads < 2 or not openmp.can_adapt():
        return None
    enough = max(2, cores - threads + 2)  # that with the engine's they are more than the cores
    return Crowding(lambda: hold_team(enough))
