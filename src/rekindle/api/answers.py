"""Running generations for a request: from the worker's events to whole answers or one merged stream.

`Answers` submits all generations of a request at once (several for n > 1 or several prompts). The worker's sinks only
hand events over to the event loop. Leaving the context cancels what still runs: so a client that goes away, an error in
one choice and a normal end are all the same to the worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from rekindle.errors import RekindleError
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, TokenInfo
from rekindle.serve.service import Service, Ticket

T = TypeVar("T")


class StoppingError(RekindleError):
    """The server is being stopped and gave this generation up."""

    status = 503
    code = "stopping"


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    done: Done
    tokens: tuple[TokenInfo, ...]  # of all its pieces


class Answers:
    """The events of several generations, in the order in which they happen, each with its generation's index."""

    def __init__(self, num: int) -> None:
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._num = num
        self._running: dict[int, Ticket] = {}
        self._first: tuple[int, Event] | None = None

    @classmethod
    def submit(cls, service: Service, generations: Sequence[Generation]) -> Answers:
        """Raises what `Service.submit` raises; then none of them runs."""
        answers = cls(len(generations))
        loop = asyncio.get_running_loop()
        try:
            for index, generation in enumerate(generations):
                answers._running[index] = service.submit(generation, answers._sink(loop, index))
        except BaseException:
            answers.cancel()
            raise
        return answers

    def _sink(self, loop: asyncio.AbstractEventLoop, index: int) -> Any:
        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for this any more
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return sink

    def cancel(self) -> None:
        """Stop what still runs."""
        for ticket in self._running.values():
            ticket.cancel()
        self._running.clear()

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Whatever happens inside, nothing runs on after it."""
        try:
            yield
        finally:
            self.cancel()

    async def begin(self) -> None:
        """Wait for the first event, so that a failure before it can still be answered with a status."""
        self._first = await self._events.get()
        _check(self._first[1])

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        """Until all have ended. Raises the error of the first that fails."""
        while self._running:
            index, event = self._first or await self._events.get()
            self._first = None
            if not isinstance(event, Piece):
                self._running.pop(index, None)
            yield index, _check(event)

    async def whole(self) -> list[Answer]:
        """All answers, in the order of their generations."""
        tokens: list[list[TokenInfo]] = [[] for _ in range(self._num)]
        ends: dict[int, Done] = {}
        async for index, event in self:
            if isinstance(event, Piece):
                tokens[index].extend(event.tokens)
            else:
                ends[index] = event
        return [Answer(ends[index], tuple(tokens[index])) for index in range(self._num)]


def _check(event: Event) -> Piece | Done:
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Done) and event.reason == "cancelled":  # by the service: after our own cancel nobody listens
        raise StoppingError("the server is being stopped")
    return event


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it and raise ClientDisconnect when the client goes away. The body must have been read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
