"""One socket's traffic, whatever its messages mean.

What goes out waits in an outbox of limited length. Nobody is waited for: a reader that does not read, a speaker that has
gone silent and everybody when the server stops is hung up on, with a reason that says what to do.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from rekindle.api.load import Load
from rekindle.api.refusals import InvalidInput
from rekindle.errors import Stopping, nearest

MAX_MESSAGE_CHARACTERS = 1 << 18
SEND_SECONDS = 30.0  # for one message to go out
GOODBYE_SECONDS = 30.0  # for whoever does not read to hear why it is over, once it reads again
WATCH_SECONDS = 0.25
TOO_SLOW, GOING_AWAY, IDLE, BROKEN = 1008, 1001, 1000, 1011
_SHOWN = 60  # characters of a type
_STOPPING = "the server is being stopped; come back later"
_log = logging.getLogger(__name__)

Message = dict[str, Any]


async def accept(socket: WebSocket, protocol: str) -> None:
    """Let a socket in, under this subprotocol if it is offered, as by browsers that give a key beside it."""
    offered = socket.scope.get("subprotocols", [])
    await socket.accept(subprotocol=protocol if protocol in offered else None)


def parse(text: str | None) -> Message:
    """A message from its text, None if it is binary. Raises InvalidRequest."""
    if text is None:
        raise InvalidInput("expected a text message, got a binary one", code="invalid_json")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput("expected a message in JSON, got something else", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidInput("expected a JSON object with a type, got another value", param="type", code="invalid_type")
    return value


def type_of(message: Message, known: Collection[str]) -> str:
    """A message's type. Raises InvalidRequest if it is none of these."""
    given = message.get("type")
    if isinstance(given, str) and given in known:
        return given
    got = (
        f"type {given[:_SHOWN]!r}{nearest(given, known)}" if isinstance(given, str) else f"no type{nearest('', known)}"
    )
    code = "missing_field" if given is None else "invalid_value"
    raise InvalidInput(f"expected a message of a known type, got {got}", param="type", code=code)


class Connection:
    """A socket that was accepted. Belongs to the event loop, but for `post_soon`."""

    def __init__(
        self,
        socket: WebSocket,
        load: Load,
        *,
        outbox: int,
        idle_seconds: float | None = None,
        back: str = "",
        is_busy: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """`outbox` messages may wait; None of `idle_seconds` lets it be silent for ever; `back` says how to come back.

        When the server drains, it is hung up on once it is no longer busy and what there was to tell has gone out.
        """
        self._socket, self._load, self._idle_seconds, self._back = socket, load, idle_seconds, back
        self._is_busy = is_busy
        self._num_unsent = 0  # messages on their way
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Message] = asyncio.Queue(outbox)
        self._over = asyncio.Event()
        self._why = (GOING_AWAY, "")
        self._active_at = self._loop.time()

    def post(self, message: Message) -> None:
        """Send this, in its turn."""
        try:
            self._outbox.put_nowait(message)
            self._num_unsent += 1
        except asyncio.QueueFull:
            self.end(TOO_SLOW, f"{self._outbox.maxsize} messages were not read{self._back}")

    def post_soon(self, message: Message) -> None:
        """`post` from another thread."""
        try:
            self._loop.call_soon_threadsafe(self.post, message)
        except RuntimeError:
            _log.debug("the event loop is closed: nobody listens any more")

    def end(self, code: int, reason: str) -> None:
        """Hang up; the first reason counts, and none is given if the other side has gone."""
        if not self._over.is_set():
            self._why = (code, reason)
            self._over.set()

    async def run(self, obey: Callable[[str | None], Awaitable[None]], begin: Callable[[], Awaitable[None]]) -> None:
        """Read and write until it is over. `obey` gets each message's text, None if it is binary, one at a time.

        `begin` is awaited once what it posts can go out.
        """
        tasks = [asyncio.ensure_future(work) for work in (self._read(obey), self._write(), self._watch())]
        try:
            await begin()
            await self._over.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def hang_up(self) -> None:
        """Say goodbye, if there is somebody to say it to."""
        code, reason = self._why
        if self._socket.application_state is WebSocketState.CONNECTED and reason:
            try:
                async with asyncio.timeout(GOODBYE_SECONDS):
                    await self._socket.close(code, reason)
            except (RuntimeError, TimeoutError, WebSocketDisconnect):
                _log.debug("the other side of a socket is gone")

    def check(self, text: str | None) -> Message:
        """A message of limited length, unless the server drains. Raises InvalidRequest, Stopping."""
        if text is not None and len(text) > MAX_MESSAGE_CHARACTERS:
            told = f"expected at most {MAX_MESSAGE_CHARACTERS} characters, got {len(text)}"
            raise InvalidInput(told, code="body_too_large")
        self._load.check_open()
        return parse(text)

    async def _read(self, obey: Callable[[str | None], Awaitable[None]]) -> None:
        try:
            while (message := await self._socket.receive())["type"] != "websocket.disconnect":
                self._active_at = self._loop.time()
                await obey(message.get("text"))
            self.end(GOING_AWAY, "")
        except Stopping:
            self.end(GOING_AWAY, _STOPPING)
        except Exception:  # nobody would listen to the other side any more, and it would wait for ever
            _log.exception("a message on a socket could not be dealt with")
            self.end(BROKEN, f"the server failed, and its log says why{self._back}")

    async def _write(self) -> None:
        try:
            while True:
                text = json.dumps(await self._outbox.get(), ensure_ascii=False).encode("utf-8", "replace").decode()
                async with asyncio.timeout(SEND_SECONDS):
                    await self._socket.send_text(text)
                self._num_unsent -= 1
                self._active_at = self._loop.time()
        except TimeoutError:
            self.end(TOO_SLOW, f"nothing was read for {SEND_SECONDS:g} seconds{self._back}")
        except (RuntimeError, WebSocketDisconnect):
            self.end(GOING_AWAY, "")

    async def _watch(self) -> None:
        """Nobody is held up by a socket: not the end of the server, and not its memory."""
        while not self._load.draining or await self._has_more_to_tell():
            await asyncio.sleep(WATCH_SECONDS)
            if self._idle_seconds is not None and self._loop.time() - self._active_at > self._idle_seconds:
                self.end(IDLE, f"nothing was said for {self._idle_seconds:g} seconds{self._back}")
        self.end(GOING_AWAY, _STOPPING)

    async def _has_more_to_tell(self) -> bool:
        is_busy = self._is_busy is not None and await self._is_busy()
        return is_busy or self._num_unsent > 0  # in this order: what ends it has been posted by then
