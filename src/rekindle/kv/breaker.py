"""A circuit breaker: after faults in a row, ask no more for a while, then let one try.

    closed --faults in a row--> open --back-off--> half open: one try --it succeeds--> closed
                                  ^                                  |
                                  +---- twice the back-off, bounded -+  it fails

A store that is down must cost a request nothing: while the breaker is open, callers are refused at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rekindle.errors import TierUnavailable


class Breaker:
    """Thread-safe. `state` is "ok", or the last fault in words until a try has succeeded again."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        fault: type[TierUnavailable] = TierUnavailable,
        max_faults: int = 3,
        first_backoff_seconds: float = 1.0,
        max_backoff_seconds: float = 60.0,
    ) -> None:
        self.state = "ok"
        self.faults = 0  # in all
        self._clock = clock
        self._fault = fault
        self._max_faults = max_faults
        self._first_backoff = first_backoff_seconds
        self._max_backoff = max_backoff_seconds
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._backoff = first_backoff_seconds
        self._next_try: float | None = None  # when the next try is due; None while closed

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One use of the medium: the `fault` it raises is one, its end without an exception is a success.

        Raises TierUnavailable at once while open. Any other exception says nothing about the medium.
        """
        trying = self._admit()
        try:
            yield
        except self._fault as error:
            self._failed(str(error), trying)
            raise
        except BaseException:
            if trying:
                self.try_now()
            raise
        self._succeeded()

    def _admit(self) -> bool:
        """Whether this is the one try of a half-open breaker. Raises TierUnavailable."""
        with self._lock:
            if self._next_try is None:
                return False
            wait = self._next_try - self._clock()
            if wait > 0:
                raise TierUnavailable(f"{self.state}; not asked again for {wait:.1f} s")
            self._next_try = self._clock() + self._backoff  # others wait for the outcome of this try
            return True

    def _failed(self, reason: str, trying: bool) -> None:
        with self._lock:
            self.state = reason
            self.faults += 1
            self._in_a_row += 1
            if trying:  # one of many that were under way when the breaker opened is no try
                self._backoff = min(2 * self._backoff, self._max_backoff)
            if self._in_a_row >= self._max_faults:
                self._next_try = self._clock() + self._backoff

    def _succeeded(self) -> None:
        with self._lock:
            self.state = "ok"
            self._in_a_row = 0
            self._backoff = self._first_backoff
            self._next_try = None

    def try_now(self) -> None:
        """Let the next use be the one try, however long the back-off: somebody has asked for just this."""
        with self._lock:
            if self._next_try is not None:
                self._next_try = self._clock()
