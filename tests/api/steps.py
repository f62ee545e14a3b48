"""Taking an engine's steps one at a time, and hearing what becomes of each generation meanwhile.

The engine, the worker and the server are the real ones: each forward only waits for leave before it computes.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rekindle.engine.protocol import Logits, Work
from rekindle.serve.request import Done, Event, Failed, Generation, Sink
from rekindle.serve.service import Service, Ticket

DEADLINE_SECONDS = 120.0


class Followed:
    """A generation: whether somebody asked to cancel it, and how it ended."""

    def __init__(self) -> None:
        self.cancelled = False
        self.num_pieces = 0
        self.end: Done | Failed | None = None
        self.ticket: Ticket | None = None


class Steps:
    """A service whose forwards wait for leave, and whose generations are followed in the order of submission."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.engine = service._engine
        self.generations: list[Followed] = []
        self._forward, self._submit = self.engine.forward, service.submit
        self._changed = threading.Condition()
        self._begun = 0  # forwards
        self._allowed = 0
        self._free = False
        self.engine.forward = self._step  # type: ignore[method-assign]
        service.submit = self._follow  # type: ignore[method-assign]

    @property
    def begun(self) -> int:
        """Forwards that have begun; one that has not ended waits for leave."""
        return self._begun

    def let(self, count: int = 1) -> None:
        """Allow so many more forwards."""
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def let_all(self) -> None:
        with self._changed:
            self._free = True
            self._changed.notify_all()

    def hold(self) -> None:
        """Allow none any more."""
        with self._changed:
            self._free, self._allowed = False, self._begun

    def wait(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(happened, DEADLINE_SECONDS), vars(self)

    def wait_until_begun(self, count: int) -> None:
        self.wait(lambda: self._begun >= count)

    def check_nothing_is_left(self) -> None:
        """No request, and every cell either free or a resident's."""
        self.wait(lambda: all(each.end is not None for each in self.generations))
        self.service.check_integrity()
        left: list[object] = []
        self.service._worker.call(lambda scheduler: left.extend([*scheduler.running, *scheduler.waiting]))
        assert not left
        self.service.evict_residents()
        assert self.engine.num_free_cells == self.engine.num_cells

    def _step(self, work: Sequence[Work]) -> Logits:
        with self._changed:
            self._begun += 1
            mine = self._begun
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._free or mine <= self._allowed, DEADLINE_SECONDS)
        return self._forward(work)

    def _follow(self, generation: Generation, sink: Sink) -> Ticket:
        followed = Followed()

        def both(event: Event) -> None:
            sink(event)
            with self._changed:
                followed.num_pieces += 1
                if isinstance(event, Done | Failed):
                    followed.end = event
                self._changed.notify_all()

        with self._changed:  # its first forward begins when it is listed
            followed.ticket = self._submit(generation, both)
            self.generations.append(followed)
            self._changed.notify_all()
        return _Ticket(followed, self._changed)


class _Ticket:
    def __init__(self, followed: Followed, changed: threading.Condition) -> None:
        self._followed = followed
        self._changed = changed

    def cancel(self) -> None:
        assert self._followed.ticket is not None
        self._followed.ticket.cancel()
        with self._changed:
            self._followed.cancelled = True
            self._changed.notify_all()


@contextmanager
def steps_of(service: Service) -> Iterator[Steps]:
    """Its steps wait for leave until the end; then it goes on as before."""
    forward, submit = service._engine.forward, service.submit
    steps = Steps(service)
    try:
        yield steps
    finally:
        steps.let_all()
        service._engine.forward, service.submit = forward, submit  # type: ignore[method-assign]


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def post(url: str, path: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """A request on a socket of its own, sent and not waited for."""
    connection = socket.create_connection(address_of(url), timeout=DEADLINE_SECONDS)
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
    return connection


def read_until(connection: socket.socket, *ends: bytes) -> bytes:
    """What comes up to and with the first of these, or to the end."""
    received = b""
    while not any(end in received for end in ends):
        data = connection.recv(65536)
        if not data:
            break
        received += data
    return received
