"""WS /v1/responses: responses over one connection, as OpenAI's WebSocket mode has it.

    in    response.create    the fields of POST /v1/responses; `stream` is of no meaning here, and with `"generate": false`
                             the prompt is only read, for the next turn to begin faster
          response.cancel    the response of this `response_id` ends where it is; without one, that of its stream
    out   the response's events, and `error`

Messages are answered one after another; with a `stream_id` those of different streams side by side, and each event names
its stream. What is not stored can be gone on from on the same connection, as long as that is open. A message that makes no
sense is answered with an error, and nothing else happens. Hanging up cancels what is under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, ValidationError
from starlette.websockets import WebSocket

from rekindle.api.answers import Answers, Runner
from rekindle.api.connection import Connection, accept, parse, type_of
from rekindle.api.door import message_of
from rekindle.api.refusals import invalid_message, refusal_of
from rekindle.api.requests import exchange_of
from rekindle.api.responses import events_of, turn_of
from rekindle.api.responses_events import ResponseWriter, WireEvent
from rekindle.api.responses_kept import KeptResponses
from rekindle.api.responses_wire import ResponseRequest
from rekindle.api.sockets import IDLE_SECONDS, PROTOCOL
from rekindle.api.wire import Str, Wire
from rekindle.errors import InvalidRequest, Overloaded, RekindleError

MAX_WAITING = 64  # messages of one connection
LOCAL_RESPONSES = 64  # of one connection that are not stored
OUTBOX = 4096  # events that wait for a client; one more and it is hung up on


class CreateMessage(ResponseRequest):
    """`response.create`."""

    type: Literal["response.create"]
    generate: bool | None = Field(None, description="false: read the prompt, and answer nothing")
    stream_id: Annotated[Str, Field(max_length=64)] | None = None


class CancelMessage(Wire):
    """`response.cancel`."""

    type: Literal["response.cancel"]
    response_id: Str | None = None
    stream_id: Annotated[Str, Field(max_length=64)] | None = None


_TYPES: dict[str, type[CreateMessage | CancelMessage]] = {
    "response.create": CreateMessage,
    "response.cancel": CancelMessage,
}


def decode(value: dict[str, Any]) -> CreateMessage | CancelMessage:
    """A message. Raises InvalidRequest that says what was expected."""
    try:
        return _TYPES[type_of(value, _TYPES)].model_validate(value)
    except ValidationError as error:
        raise invalid_message(error) from None


def responses_socket_router(runner: Runner, kept: KeptResponses) -> APIRouter:
    """This endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.websocket("/v1/responses")
    async def responses(socket: WebSocket) -> None:
        await accept(socket, PROTOCOL)
        await _Responses(socket, runner, kept).run()

    return router


class _Responses:
    """One connection's responses: a worker for each stream that has something to do."""

    def __init__(self, socket: WebSocket, runner: Runner, kept: KeptResponses) -> None:
        self._socket, self._runner, self._kept = socket, runner, kept
        self._local = KeptResponses(LOCAL_RESPONSES, float("inf"))
        self._connection = Connection(
            socket, runner.load, outbox=OUTBOX, idle_seconds=IDLE_SECONDS, is_busy=self._is_busy
        )
        self._waiting: dict[str | None, deque[CreateMessage]] = {}  # by stream; of those that are worked on
        self._running: dict[str | None, tuple[ResponseWriter, Answers]] = {}  # by stream
        self._workers: set[asyncio.Task[None]] = set()

    async def _is_busy(self) -> bool:
        return bool(self._waiting)

    async def run(self) -> None:
        """Until either side hangs up."""
        try:
            await self._connection.run(self._obey, begin=lambda: asyncio.sleep(0))
        finally:
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)
            await self._connection.hang_up()

    async def _obey(self, text: str | None) -> None:
        stream = None
        try:
            value = parse(text)
            stream = _stream_of(value)
            self._take(decode(value))
        except RekindleError as error:
            self._post([_refused(error)], stream)

    def _take(self, message: CreateMessage | CancelMessage) -> None:
        """Raises Overloaded, Stopping or InvalidRequest."""
        if isinstance(message, CancelMessage):
            self._cancel(message)
            return
        self._runner.load.check_open()
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} messages of this connection wait already; try again later")
        waiting = self._waiting.get(message.stream_id)
        if waiting is not None:
            waiting.append(message)
            return
        self._waiting[message.stream_id] = deque([message])
        worker = asyncio.ensure_future(self._work(message.stream_id))
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    def _cancel(self, message: CancelMessage) -> None:
        """The worker ends it, and its stream is told. Raises InvalidRequest if it is over, or never was."""
        for stream, (writer, answers) in self._running.items():
            if writer.id == message.response_id or (message.response_id is None and stream == message.stream_id):
                writer.is_cancelled = True
                answers.cancel()
                return
        raise InvalidRequest("there is no such response under way on this connection", param="response_id")

    async def _work(self, stream: str | None) -> None:
        """Answer what waits in one stream."""
        waiting = self._waiting[stream]
        try:
            while waiting:
                await self._answer(waiting.popleft())
        finally:
            del self._waiting[stream]

    async def _answer(self, message: CreateMessage) -> None:
        request = message_of(self._socket)
        keep = self._kept if message.is_kept else self._local
        try:
            generate = message.generate is not False
            turn = await turn_of(self._runner, request, message, self._local, self._kept, generate=generate)
            with await self._runner.submit(request, [turn.generation]) as answers:
                self._running[message.stream_id] = (turn.writer, answers)
                async for events in events_of(turn, answers, keep, at_once=True):
                    self._post(events, message.stream_id)
        except Exception as error:  # whatever is wrong with one message, its stream hears of it and goes on
            self._post([_refused(error)], message.stream_id)
        finally:
            self._running.pop(message.stream_id, None)
            exchange_of(request).over()

    def _post(self, events: list[WireEvent], stream: str | None) -> None:
        for event in events:
            self._connection.post(event if stream is None else event | {"stream_id": stream})


def _refused(error: Exception) -> WireEvent:
    status, body = refusal_of(error)
    return {"type": "error", "status": status, "sequence_number": 0, **body}  # a response of its own, for some clients


def _stream_of(value: dict[str, Any]) -> str | None:
    """The stream that a message names, if it can be told."""
    stream = value.get("stream_id")
    return stream[:64] if isinstance(stream, str) else None
