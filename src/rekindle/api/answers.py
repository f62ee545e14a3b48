"""Running generations for a request: from the worker's events to whole answers or one merged stream.

A `Runner` submits all generations of a request at once (several for n > 1 or several prompts) and gives their
`Answers`. The worker's sinks only hand events over to the event loop. Whoever has answers closes them when done with
them, which cancels what still runs: so a client that goes away, an error in one choice and a normal end are all the
same to the worker. A server that is stopped tells the runner, and who still waits gets an error instead of silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect, Request

from rekindle.errors import Stopping
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sink, TokenInfo
from rekindle.serve.service import Service, Ticket

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    done: Done
    tokens: tuple[TokenInfo, ...]  # of all its pieces


class Runner:
    """Runs generations on a service, and knows the answers that are not closed. Belongs to one event loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._open: set[Answers] = set()

    async def submit(self, generations: Sequence[Generation]) -> Answers:
        """Raises what `Service.submit` raises; then none of them runs."""
        answers = Answers(len(generations), self._open.discard)
        self._open.add(answers)

        def submit() -> None:
            for index, generation in enumerate(generations):
                if answers.closed:  # the client has gone while a schema was compiled
                    return
                answers.tickets[index] = self.service.submit(generation, answers.sink(index))
            if answers.closed:
                answers.close()

        try:
            if any(generation.json_schema is not None for generation in generations):
                await asyncio.to_thread(submit)  # a schema is compiled first, which streams should not wait for
            else:
                submit()
        except BaseException:
            answers.close()
            raise
        return answers

    def stop(self) -> None:
        """End all that run: their clients get a Stopping."""
        for answers in self._open:
            for ticket in list(answers.tickets.values()):
                ticket.cancel()


class Answers:
    """The events of several generations, in the order in which they happen, each with its generation's index.

    A context manager; leaving it closes it.
    """

    def __init__(self, num: int, closed: Callable[[Answers], None]) -> None:
        self.tickets: dict[int, Ticket] = {}  # of those that have not ended
        self.closed = False
        self._num = num
        self._closed = closed
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._first: tuple[int, Event] | None = None

    def sink(self, index: int) -> Sink:
        """For the worker: hands the events of one generation over to the event loop."""

        def hand_over(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for this any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return hand_over

    def close(self) -> None:
        """Cancel what still runs."""
        self.closed = True
        for ticket in list(self.tickets.values()):
            ticket.cancel()
        self.tickets.clear()
        self._closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def begin(self) -> None:
        """Wait for the first event, so that a failure before it can still be answered with a status."""
        self._first = await self._events.get()
        _check(self._first[1])

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        """Until all have ended. Raises the error of the first that fails."""
        while self.tickets:
            index, event = self._first or await self._events.get()
            self._first = None
            if not isinstance(event, Piece):
                self.tickets.pop(index, None)
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
    if isinstance(event, Done) and event.reason == "cancelled":  # not by us: after `close` nobody listens
        raise Stopping("the server is being stopped")
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
