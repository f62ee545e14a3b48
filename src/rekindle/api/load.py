"""What is under way at the HTTP edge: how many answers for whom, how long they take, and whether more are let in.

From the mean of the latest durations follows what a refused client is told in `Retry-After`: with S seconds an answer,
R answers at a time and a queue of W, those who wait now have begun after about S × W / R seconds. It is an estimate:
nobody keeps a place for the client that comes back then.

Belongs to the event loop's thread, but for `drain` and for answers, which live sessions count on a thread of theirs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from rekindle.api.keys import Caller, owner_of
from rekindle.errors import InvalidRequest, Overloaded, Stopping
from rekindle.settings import Settings

LONGEST_RETRY = 60  # seconds; clients give up, or don't listen, when they are told to wait for longer
_LATEST = 64  # durations that count


class Load:
    """The load of one app."""

    def __init__(self, settings: Settings) -> None:
        self.draining = False
        self.num_requests = 0  # under way, from their first byte to the last of their answer; those at open routes not
        self._max_running = settings.max_running
        self._max_queue = settings.max_queue
        self._max_per_key = settings.max_per_key
        self._drain_seconds = settings.drain_seconds
        self._ends_at = 0.0  # time.monotonic() when a drain is over at the latest
        self._lock = threading.Lock()
        self._answers: Counter[bytes] = Counter()  # under way, by owner
        self._seconds: deque[float] = deque(maxlen=_LATEST)

    # Requests.

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request is under way."""
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def drain(self) -> None:
        """Let nothing new in. May be called from any thread and from a signal handler, also twice."""
        if not self.draining:
            self._ends_at = time.monotonic() + self._drain_seconds
            self.draining = True

    def check_open(self) -> None:
        """Raises Stopping while the server drains."""
        if self.draining:
            raise Stopping("the server is being stopped and takes nothing new; try again later")

    @property
    def drained(self) -> bool:
        """Whether nothing is under way any more, or the time for it is over."""
        return self.draining and (not self.num_requests or time.monotonic() >= self._ends_at)

    # Answers.

    def take(self, caller: Caller, num_answers: int) -> None:
        """Count a caller's answers. Raises Overloaded when they are more than it may have, and counts nothing."""
        self._take(caller.salt(), num_answers)

    def give_back(self, caller: Caller, num_answers: int, seconds: float | None) -> None:
        """They have ended, after so many seconds if they came to their end."""
        self._give_back(caller.salt(), num_answers, seconds)

    def enter(self, salt: bytes) -> None:
        """Count an answer of a live session with this salt. Raises Overloaded, as `take` does."""
        self._take(owner_of(salt), 1)

    def leave(self, salt: bytes, seconds: float | None) -> None:
        """It has ended."""
        self._give_back(owner_of(salt), 1, seconds)

    def _take(self, owner: bytes, num_answers: int) -> None:
        with self._lock:
            have, most = self._answers.get(owner, 0), self._max_per_key
            if most is not None and have + num_answers > most:
                message = f"this API key has {have} answers under way, the limit is {most}; try again later"
                raise Overloaded(message, retry_seconds=self._mean / max(1, have))
            self._answers[owner] += num_answers

    def _give_back(self, owner: bytes, num_answers: int, seconds: float | None) -> None:
        with self._lock:
            self._answers[owner] -= num_answers
            if not self._answers[owner]:
                del self._answers[owner]
            if seconds is not None:
                self._seconds.append(seconds)

    def check_num_answers(self, num_answers: int) -> None:
        """More answers than may ever be under way are refused as a whole, not again and again. Raises InvalidRequest."""
        most = min(self._max_queue, self._max_per_key or self._max_queue)
        if num_answers > most:
            raise InvalidRequest(f"at most {most} choices fit into one request, got {num_answers}", param="n")

    # Estimates.

    def until_room(self) -> float:
        """Seconds until all that wait in a full queue have begun, about."""
        return self._mean * self._max_queue / self._max_running

    def until_end(self) -> float:
        """Seconds until a drain is over at the latest; then whoever comes next may answer."""
        return max(0.0, self._ends_at - time.monotonic())

    @property
    def _mean(self) -> float:
        seconds = list(self._seconds)
        return sum(seconds) / len(seconds) if seconds else 0.0


def retry_after(seconds: float | None) -> dict[str, str]:
    """The header `Retry-After`: whole seconds, from 1 to a minute."""
    return {"Retry-After": str(min(LONGEST_RETRY, max(1, math.ceil(seconds or 0.0))))}
