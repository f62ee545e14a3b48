"""`WS /v1/realtime`: live sessions in the format of OpenAI's realtime API, text only.

    realtime_wire.py       what clients say
    realtime_do.py         what they want done
    realtime_talk.py       a session's conversation, and what is told of it
    realtime_items.py      OpenAI's items, and a session's head and turns
    realtime_response.py   an answer on its way
    realtime_aside.py      an answer beside the conversation
    realtime_settings.py   OpenAI's session object
    realtime_beta.py       other names for the same, as they were once

Query: `model`, which must be the one that is served; `session=NAME`, without which a session of its own is opened;
`resume=HANDLE` brings one back; `last_event=ID` tells what has happened after this event. A session that somebody has
named stays as other live sessions do; one of its own waits for its client to come back for an hour, or not at all if
nothing was said in it.

An event that makes no sense is answered with an `error` event with its id, and nothing else happens.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.websockets import WebSocket

from rekindle.api import realtime_wire as wire
from rekindle.api.connection import Connection, accept
from rekindle.api.keys import caller_of
from rekindle.api.load import Load
from rekindle.api.openai import check_model
from rekindle.api.realtime_beta import in_beta, is_wanted
from rekindle.api.realtime_do import Commands, error_event
from rekindle.api.realtime_talk import REMEMBERED_EVENTS, Event, Sink
from rekindle.api.refusals import refuse
from rekindle.api.sockets import LiveSessions, session_name
from rekindle.errors import RekindleError, SessionError, Stopping
from rekindle.serve.service import Service
from rekindle.serve.sessions.sessions import Sessions

PROTOCOL = "realtime"
OUTBOX = 4 * REMEMBERED_EVENTS  # events that wait for a client; one more and it is hung up on
IDLE_SECONDS = 3600.0  # without an event in either direction, after which a socket is closed
ABANDONED_SECONDS = 3600.0  # without a client, after which a session without a name is given up


@dataclass(frozen=True)
class _Wish:
    """Which session a client wants."""

    salt: bytes
    name: str | None = None
    handle: str | None = None


class Realtime:
    """The realtime side of all sessions. Belongs to the sessions' thread."""

    def __init__(self, service: Service, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._known: dict[str, Commands] = {}  # by the session's key

    def open(self, sessions: Sessions, wish: _Wish) -> Commands:
        """What can be done to the session that is wanted. Raises RekindleError."""
        self._clean(sessions)
        if wish.handle is not None:
            session, is_new, is_private = sessions.resume(wish.handle, salt=wish.salt, name=wish.name), False, False
        else:
            name = wish.name or f"sess_{secrets.token_hex(8)}"
            is_new = all(session.name != name for session in sessions.all(salt=wish.salt))
            session, is_private = sessions.open(name, salt=wish.salt), wish.name is None
        commands = self._known.get(session.key)
        if commands is None:
            commands = self._known[session.key] = Commands(self._service, sessions, session, is_private=is_private)
            commands.is_new = is_new
        return commands

    def enter(self, commands: Commands, last_event_id: str | None, sink: Sink) -> None:
        """Let a client take part, and tell it first what there is."""
        conversation = commands.conversation
        conversation.wake()
        sink(conversation.stamped({"type": "session.created", "session": commands.settings}))
        if not commands.is_new:
            missed = None if last_event_id is None else conversation.missed(last_event_id)
            told = conversation.shown() if missed is None else {}  # what was missed leads there by itself
            sink(conversation.stamped({"type": "rekindle.session.resumed", "is_complete": missed is not None} | told))
            for event in missed or ():
                sink(event)
        commands.is_new = False
        conversation.attach(sink)

    def leave(self, sessions: Sessions, commands: Commands, sink: Sink) -> None:
        """It has gone."""
        conversation = commands.conversation
        conversation.detach(sink)
        if commands.is_private and not conversation.is_heard and not conversation.items:
            self._end(sessions, commands)

    def _clean(self, sessions: Sessions) -> None:
        """Let go what belongs to sessions that are no more, and sessions that nobody comes back to."""
        salts = {commands.conversation.session.salt for commands in self._known.values()}
        alive = {session for salt in salts for session in sessions.all(salt=salt)}
        for key, commands in list(self._known.items()):
            conversation = commands.conversation
            is_left = not conversation.is_heard and self._clock() - conversation.left_at > ABANDONED_SECONDS
            if conversation.session not in alive:
                commands.close()
                del self._known[key]
            elif commands.is_private and is_left and self._clock() > conversation.session.pinned_until:
                self._end(sessions, commands)

    def _end(self, sessions: Sessions, commands: Commands) -> None:
        commands.close()
        self._known.pop(commands.conversation.session.key, None)
        sessions.end(commands.conversation.session)


def realtime_router(service: Service, live: LiveSessions, load: Load) -> APIRouter:
    """The endpoint."""
    router = APIRouter(prefix="/v1", tags=["live"])
    realtime = Realtime(service)

    @router.websocket("/realtime")
    async def v1_realtime(socket: WebSocket) -> None:
        await _Client(socket, service, live, load, realtime).run()

    return router


class _Client:
    """One connection, until it is let in."""

    def __init__(self, socket: WebSocket, service: Service, live: LiveSessions, load: Load, realtime: Realtime) -> None:
        self._socket, self._service, self._live, self._load, self._realtime = socket, service, live, load, realtime

    async def run(self) -> None:
        """From the handshake to the end."""
        query = self._socket.query_params
        try:
            check_model(self._service, query.get("model"))
            wish = _Wish(caller_of(self._socket).salt(), session_name(query.get("session")), query.get("resume"))
            commands = await self._live.call(lambda sessions: self._realtime.open(sessions, wish))
        except RekindleError as error:
            await self._socket.send_denial_response(refuse(error))
            return
        protocols: list[str] = self._socket.scope.get("subprotocols", [])
        await accept(self._socket, PROTOCOL)
        talk = _Talk(
            Connection(
                self._socket,
                self._load,
                outbox=OUTBOX,
                idle_seconds=IDLE_SECONDS,
                back="; come back with session or resume, and last_event",
                is_busy=lambda: talk.is_busy(),
            ),
            self._live,
            self._realtime,
            commands,
            is_beta=is_wanted(self._socket.headers, protocols),
        )
        await talk.run(query.get("last_event"))


class _Talk:
    """One client, once it is let in."""

    def __init__(
        self, connection: Connection, live: LiveSessions, realtime: Realtime, commands: Commands, *, is_beta: bool
    ) -> None:
        self._connection, self._live, self._realtime, self._commands = connection, live, realtime, commands
        self._is_beta = is_beta

    async def run(self, last_event_id: str | None) -> None:
        """To the end."""

        async def begin() -> None:
            await self._live.call(lambda sessions: self._realtime.enter(self._commands, last_event_id, self._sink))

        try:
            await self._connection.run(self._obey, begin)
        finally:
            await self._leave()
            await self._connection.hang_up()

    async def is_busy(self) -> bool:
        """Whether there is something that a client waits for."""
        return await self._live.holds(lambda: self._commands.is_needed)

    def _sink(self, event: Event) -> None:
        """On the sessions' thread."""
        shown = in_beta(event) if self._is_beta else event
        if shown is not None:
            self._connection.post_soon(shown)

    async def _leave(self) -> None:
        with suppress(Stopping):
            await self._live.call(lambda sessions: self._realtime.leave(sessions, self._commands, self._sink))

    async def _obey(self, text: str | None) -> None:
        event_id = None
        try:
            value = self._connection.check(text)
            event_id = wire.id_of(value)
            event = wire.decode(value)
            if isinstance(event, wire.SessionResume):
                await self._resume(event)
            else:
                await self._live.call(lambda sessions: self._do(sessions, event))
        except Exception as error:  # whatever is wrong with one event, the session goes on
            told = error_event(error, event_id)
            await self._live.call(lambda sessions: self._sink(self._commands.conversation.stamped(told)))

    def _do(self, sessions: Sessions, event: wire.Incoming) -> None:
        session = self._commands.conversation.session
        if sessions.get(session.name, salt=session.salt) is not session:
            raise SessionError("the session has ended and there is another of its name; connect again")
        self._commands.obey(event, self._sink)

    async def _resume(self, event: wire.SessionResume) -> None:
        """Go on in another session."""
        wish = _Wish(self._commands.conversation.session.salt, event.session, event.handle)

        def switch(sessions: Sessions) -> None:
            before = self._commands
            self._commands = self._realtime.open(sessions, wish)
            if self._commands is not before:
                self._realtime.leave(sessions, before, self._sink)
                self._realtime.enter(self._commands, event.last_event_id, self._sink)

        await self._live.call(switch)
