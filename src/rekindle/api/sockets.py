"""The simple sockets: live sessions for a microcontroller or a ten-line script.

    WS /ws/input     what is said to a session
    WS /ws/output    what happens in it, to any number of listeners
    WS /ws           both
    GET /status      the sessions of the caller

Each takes `?session=NAME` (a default session without), `?resume=HANDLE` to bring a session back, and those that listen
`?last_event=N` to be told what has happened after that event. A message that makes no sense is answered with an error,
and nothing else happens. Whoever does not read what it listens to is hung up on, with a reason; whoever comes back with the
number of its last event has lost nothing. A session that nobody listens to may make way for others: whoever speaks to it
then brings it back from its file, or is hung up on if there is none.

Browsers say which page a socket is for: it must be this server's, or one of `cors_origin`. They can't send headers, so an
API key may come as a subprotocol, `rekindle.key.KEY`, beside the protocol `rekindle`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.websockets import WebSocket

from rekindle.api.connection import GOING_AWAY, Connection, accept
from rekindle.api.keys import caller_of
from rekindle.api.live_wire import Incoming, decode, encode
from rekindle.api.load import Load
from rekindle.api.refusals import Json, refusal_of, refuse
from rekindle.errors import InvalidRequest, RekindleError, Stopping
from rekindle.serve.service import Service
from rekindle.serve.sessions.news import REMEMBERED_NEWS, News
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import SessionGone, Sessions

T = TypeVar("T")
DEFAULT_SESSION = "default"
PROTOCOL = "rekindle"
MAX_NAME = 64
OUTBOX = 2 * REMEMBERED_NEWS  # messages that wait for a listener; one more and it is hung up on
IDLE_SECONDS = 3600.0  # without a word, after which an input is closed


class LiveSessions:
    """The sessions of an app, made when they are first needed. Belongs to the event loop."""

    def __init__(self, service: Service, load: Load) -> None:
        self._service, self._load = service, load
        self._sessions: Sessions | None = None

    @property
    def sessions(self) -> Sessions:
        if self._sessions is None:
            self._sessions = Sessions(self._service, gate=self._load)
        return self._sessions

    async def call(self, action: Callable[[Sessions], T]) -> T:
        """Do something with the sessions, on their thread."""
        sessions = self.sessions
        return await asyncio.wrap_future(sessions.call(lambda: action(sessions)))

    async def holds(self, condition: Callable[[], bool]) -> bool:
        """Whether this is so, on their thread, where all that was told before has been posted; not after their end."""
        try:
            return await self.call(lambda _: condition())
        except Stopping:
            return False

    def close(self) -> None:
        """Write them to their files."""
        if self._sessions is not None:
            self._sessions.close()


def sockets_router(service: Service, live: LiveSessions, load: Load) -> APIRouter:
    """These endpoints."""
    router = APIRouter(tags=["live"])

    @router.websocket("/ws/input")
    async def ws_input(socket: WebSocket) -> None:
        await _Socket(socket, service, live, load, hears=False).run()

    @router.websocket("/ws/output")
    async def ws_output(socket: WebSocket) -> None:
        await _Socket(socket, service, live, load, speaks=False).run()

    @router.websocket("/ws")
    async def ws_both(socket: WebSocket) -> None:
        await _Socket(socket, service, live, load).run()

    @router.get("/status")
    async def status(request: Request) -> Json:
        """The caller's live sessions: their state, their windows, and what they have computed and reused."""
        salt = caller_of(request).salt()
        listed = await live.call(lambda sessions: [session.status for session in sessions.all(salt=salt)])
        return Json({"model": service.model_name, "sessions": listed})

    return router


def _number(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 15:
        raise InvalidRequest(f"{name}: expected a number from 0 on, got {text[:40]!r}", param=name)
    return int(text)


class _Socket:
    """One connection."""

    def __init__(
        self,
        socket: WebSocket,
        service: Service,
        live: LiveSessions,
        load: Load,
        *,
        hears: bool = True,
        speaks: bool = True,
    ) -> None:
        self._socket, self._service, self._live, self._load = socket, service, live, load
        self._hears, self._speaks = hears, speaks

    async def run(self) -> None:
        """From the handshake to the end."""
        try:
            last = _number(self._socket.query_params.get("last_event"), "last_event")
            session = await self._open()
        except RekindleError as error:
            await self._socket.send_denial_response(refuse(error))
            return
        await accept(self._socket, PROTOCOL)
        await self._converse(session, last)

    async def _open(self) -> Session:
        """The session that is asked for; a new one, if need be. Raises RekindleError."""
        query, salt = self._socket.query_params, caller_of(self._socket).salt()
        name, handle = session_name(query.get("session")), query.get("resume")
        if handle is not None:
            return await self._live.call(lambda sessions: sessions.resume(handle, salt=salt, name=name))
        return await self._live.call(lambda sessions: sessions.open(name or DEFAULT_SESSION, salt=salt))

    async def _converse(self, session: Session, last: int | None) -> None:
        async def is_answering() -> bool:
            return await self._live.holds(lambda: session.state == "answering")

        connection = Connection(
            self._socket,
            self._load,
            outbox=OUTBOX,
            idle_seconds=None if self._hears else IDLE_SECONDS,
            back="; come back with last_event" if self._hears else "",
            is_busy=is_answering if self._hears else None,
        )

        def listener(number: int, news: News) -> None:
            connection.post_soon(encode(number, news))

        async def obey(text: str | None) -> None:
            try:
                await self._obey(session, connection, text)
            except SessionGone:
                connection.end(GOING_AWAY, "the session has ended; connect again")
            except RekindleError as error:
                connection.post({"type": "error"} | refusal_of(error)[1])

        async def begin() -> None:
            if self._hears:
                await self._live.call(lambda sessions: session.listen(listener, after=last))

        connection.post(await self._live.call(lambda sessions: _welcome(sessions, session)))
        try:
            await connection.run(obey, begin)
        finally:
            if self._hears:
                with suppress(Stopping):
                    await self._live.call(lambda sessions: session.leave(listener))
            await connection.hang_up()

    async def _obey(self, session: Session, connection: Connection, text: str | None) -> None:
        if not self._speaks:
            raise InvalidRequest("this socket only listens; speak on /ws/input or /ws")
        incoming: Incoming = decode(connection.check(text))
        await self._live.call(lambda sessions: incoming.apply(sessions.again(session)))


def session_name(name: str | None) -> str | None:
    """A session's name as it was asked for. Raises InvalidRequest."""
    if name is not None and not 0 < len(name) <= MAX_NAME:
        raise InvalidRequest(f"session: expected a name of 1 to {MAX_NAME} characters", param="session")
    return name


def _welcome(sessions: Sessions, session: Session) -> dict[str, Any]:
    return {
        "type": "system",
        "kind": "connected",
        "data": f"session {session.name}",
        "detail": session.status | {"handle": sessions.handle(session)},
    }
