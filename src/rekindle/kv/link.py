"""Connections to one server, shared by threads, behind a circuit breaker.

What goes wrong with a server is told as TierUnavailable, in words and without the password.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from rekindle.errors import TierUnavailable
from rekindle.kv.breaker import Breaker
from rekindle.kv.resp import Command, Connection, Refused, Reply, Server

_MAX_IDLE = 4


class Unreachable(TierUnavailable):
    """No answer, or no way in."""


class Link:
    """Thread-safe. Every method raises TierUnavailable at once while the breaker is open."""

    def __init__(self, server: Server, timeout_seconds: float, clock: Callable[[], float]) -> None:
        self.breaker = Breaker(clock, fault=Unreachable)
        self.server = server
        self._timeout = timeout_seconds
        self._idle: deque[Connection] = deque()
        self._lock = threading.Lock()

    def ask(self, commands: Sequence[Command], *, may_refuse: bool = False) -> list[Reply]:
        """The replies to commands that are sent together. A refusal is a fault, or with `may_refuse` among the replies."""
        if not commands:
            return []
        with self.breaker.attempt(), self._lent() as take, self._told():
            connection = take()
            connection.send(commands)
            replies = [connection.receive() for _ in commands]
            return replies if may_refuse else [_unrefused(reply) for reply in replies]

    def stream(self, commands: Iterable[Command], window: Callable[[], int]) -> Iterator[Reply]:
        """Each reply as soon as it has come, with up to `window` commands on their way meanwhile."""
        todo = iter(commands)
        waiting = 0
        with self._lent() as take:
            while True:
                batch = list(islice(todo, max(0, window() - waiting)))
                waiting += len(batch)
                if not waiting:
                    return
                with self.breaker.attempt(), self._told():
                    connection = take()
                    if batch:
                        connection.send(batch)
                    reply = _unrefused(connection.receive())
                waiting -= 1
                try:
                    yield reply
                except GeneratorExit:  # mostly at the first miss, and what was asked for behind it misses too
                    if take().skip(waiting):
                        return
                    raise

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _lent(self) -> Iterator[Callable[[], Connection]]:
        """A function that gives this borrower's connection; it is opened at its first call."""
        lent: list[Connection] = []

        def take() -> Connection:
            if not lent:
                lent.append(self._take())
            return lent[0]

        try:
            yield take
        except BaseException:  # replies may be on their way still
            for connection in lent:
                connection.close()
            raise
        for connection in lent:
            self._give_back(connection)

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return Connection(self.server, self._timeout)
            if connection.is_idle():
                return connection
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise Unreachable(f"the store's server {self.server} gave no answer within {self._timeout:g} s") from None
        except (OSError, UnicodeError) as error:  # the latter for a name that can't be one of a host
            reason = getattr(error, "strerror", None) or str(error)
            raise Unreachable(f"the store's server {self.server} can't be reached: {reason}") from None
        except Refused as error:
            raise Unreachable(f"the store's server {self.server} refuses: {error}") from None


def _unrefused(reply: Reply) -> Reply:
    if isinstance(reply, Refused):
        raise reply
    return reply
