"""Running generations for a request: from the worker's events to whole answers or one merged stream.

A `Runner` submits all generations of a request at once (several for n > 1 or several prompts) and gives their
`Answers`. The worker's sinks only hand events over to the event loop. Whoever has answers closes them when done with
them, which cancels what still runs: so a client that goes away, an error in one choice and a normal end are all the
same to the worker. When the time of a request is over, or the server's, its answers fail: who waits for them hears so at
once, whatever the worker is doing, and the worker ends them with its next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect, HTTPConnection, Request

from rekindle.api.door import arrived
from rekindle.api.keys import caller_of
from rekindle.api.load import Load
from rekindle.api.requests import exchange_of
from rekindle.errors import Overloaded, RekindleError, Stopping, TimedOut
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sink, TokenInfo
from rekindle.serve.service import Service, Ticket

T = TypeVar("T")
_STOPPING = "the server is being stopped"


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    done: Done
    tokens: tuple[TokenInfo, ...]  # of all its pieces


class Runner:
    """Runs generations on a service, and knows the answers that are not closed. Belongs to one event loop."""

    def __init__(self, service: Service, load: Load) -> None:
        self.service = service
        self.load = load
        self._open: set[Answers] = set()
        self._stopping = False

    async def submit(self, request: HTTPConnection, generations: Sequence[Generation]) -> Answers:
        """Raises what `Service.submit` raises, and Overloaded if the caller has too many; then none of them runs."""
        if self._stopping:  # since the request was let in
            raise Stopping(_STOPPING)
        answers = self._opened(request, len(generations))
        exchange = exchange_of(request)
        exchange.model = self.service.model_name

        def submit() -> None:
            for index, generation in enumerate(generations):
                if answers.closed:  # the client has gone while a schema was compiled
                    return
                answers.tickets[index] = self.service.submit(generation, answers.sink(index))
                exchange.submitted.append(len(generation.prompt))
            if answers.closed:
                answers.cancel()

        try:
            if any(generation.json_schema is not None for generation in generations):
                await asyncio.to_thread(submit)  # a schema is compiled first, which streams should not wait for
            else:
                submit()
        except BaseException as error:
            answers.close()
            if isinstance(error, Overloaded):
                error.retry_seconds = self.load.until_room()
            raise
        return answers

    def stop(self) -> None:
        """End all that run, and those that are submitted from now on: their clients get a Stopping."""
        self._stopping = True
        for answers in self._open:
            answers.fail(Stopping(_STOPPING))

    def _opened(self, request: HTTPConnection, num: int) -> Answers:
        """Answers without tickets, counted and under their time limit."""
        caller, began = caller_of(request), time.perf_counter()
        self.load.take(caller, num)

        def closed(answers: Answers) -> None:
            self._open.discard(answers)
            self.load.give_back(caller, num, time.perf_counter() - began if answers.complete else None)

        answers = Answers(num, closed, exchange_of(request).ended)
        self._open.add(answers)
        if (limit := self.service.settings.request_timeout) is not None:
            error = TimedOut(f"the request took longer than the {limit:g} seconds that this server allows")
            answers.fail_after(arrived(request) + limit - began, error)
        return answers


class Answers:
    """The events of several generations, in the order in which they happen, each with its generation's index.

    A context manager; leaving it closes it.
    """

    def __init__(
        self, num: int, closed: Callable[[Answers], None], ended: Callable[[Done | Failed], None] = lambda end: None
    ) -> None:
        """`closed` is called once; `ended` with each generation's end, also when nobody iterates any more."""
        self.tickets: dict[int, Ticket] = {}  # of those that have not ended
        self.closed = False
        self._num = num
        self._num_left = num
        self._closed = closed
        self._ended = ended
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._first: tuple[int, Event] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def sink(self, index: int) -> Sink:
        """For the worker: hands the events of one generation over to the event loop."""

        def hand_over(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for this any more
                self._loop.call_soon_threadsafe(self._take, index, event)

        return hand_over

    def _take(self, index: int, event: Event) -> None:
        self._events.put_nowait((index, event))
        if not isinstance(event, Piece):
            self._ended(event)

    @property
    def complete(self) -> bool:
        """Whether all have come to their end."""
        return not self._num_left

    def fail(self, error: RekindleError) -> None:
        """End them with an error, behind what has come so far."""
        self.cancel()
        self._events.put_nowait((0, Failed(error)))

    def fail_after(self, seconds: float, error: RekindleError) -> None:
        """`fail` then, unless they are closed before."""
        self._timer = self._loop.call_later(max(0.0, seconds), self.fail, error)

    def cancel(self) -> None:
        """Let the worker end what still runs. May be called from any thread."""
        for ticket in list(self.tickets.values()):
            ticket.cancel()

    def close(self) -> None:
        """Cancel what still runs."""
        self.cancel()
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
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
            checked = _check(event)
            self._num_left -= isinstance(checked, Done)
            yield index, checked

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
        raise Stopping(_STOPPING)
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
