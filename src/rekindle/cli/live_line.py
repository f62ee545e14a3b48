"""A line to a live session: one connection to a simple socket, made anew when it breaks.

The pauses between attempts are 1, 2, 4, 8, 10, 10 … seconds. Who comes back names the last event that it was told, and the
session's handle, so nothing is lost: neither what was said meanwhile nor, after a restart of the server, the conversation.
What the server refuses (a wrong key, a name that is none) is not tried again, nor a host that there is not. A server that
is not there yet is waited for: the two often start together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlencode

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rekindle.cli.client import ServerError, first_key, refusal, server_url
from rekindle.cli.refusals import complain
from rekindle.errors import InvalidRequest
from rekindle.settings import Settings

LONGEST_PAUSE = 10.0
MAX_MESSAGE_BYTES = 1 << 24
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}

Message = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """A session on a server."""

    url: str  # ws:// or wss://, with the path that the server is under, if there is one
    session: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, host: str, port: int, url: str | None, session: str, key: str | None) -> Self:
        """From options; a URL goes before host and port. Raises InvalidRequest."""
        key = key or first_key(Settings.load())
        if url is None:
            return cls(f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}", session, key)
        parts = server_url(url, _SCHEMES)
        return cls(parts._replace(scheme=_SCHEMES[parts.scheme]).geturl(), session, key)


class Line:
    """One way to a session. Connects when it is first used. A context manager that hangs up."""

    def __init__(
        self, address: Address, path: str, max_retries: int, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._address, self._path, self._max_retries, self._pause = address, path, max_retries, pause
        self._stack = ExitStack()
        self._socket: ClientConnection | None = None
        self._handle: str | None = None
        self._last_event: int | None = None
        self._unsure: Message | None = None  # sent, but nothing has come since that says it arrived
        self._answered: Message | None = None  # the latest news of an answer under way
        self._lost_end: Message | None = None  # of an answer that ended with its server; for the next to receive
        self.welcome: Message = {}  # what the server said when it last let us in
        self.tell: Callable[[str], None] = complain  # of what the connection goes through

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket = None
        self._stack.close()

    def open(self) -> Message:
        """Connect now, if that is not done; what the server said. Raises ServerError or InvalidRequest."""
        self._connected()
        return self.welcome

    def send(self, message: Message) -> None:
        """Raises ServerError when the server can't be reached any more, or refuses."""
        while True:
            try:
                self._connected().send(json.dumps(message))
            except ConnectionClosed as closed:
                self._lost(closed)
            else:
                self._unsure = message if message["type"] == "message" else None
                return

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, of whatever kind; None if none comes in so many seconds. Raises ServerError.

        An answer that has ended with its server has an end, too, though nobody is left to tell of it.
        """
        while True:
            try:
                socket = self._connected()
                if (end := self._lost_end) is not None:
                    self._lost_end = None
                    return end
                message = json.loads(socket.recv(timeout=timeout))
            except TimeoutError:
                return None
            except ConnectionClosed as closed:
                self._lost(closed)
                self._say_again(self._connected())
                continue
            assert isinstance(message, dict)
            self._last_event = message.get("event", self._last_event)
            self._unsure = None
            if message["type"] in ("user_input", "token", "end") or "turn" in message:
                self._answered = message if message["type"] in ("user_input", "token") else None
            return message

    def _lost(self, closed: ConnectionClosed) -> None:
        reason = closed.rcvd.reason if closed.rcvd is not None else ""
        if reason:
            self.tell(f"{self._address.url} hung up: {reason}")
        self.close()

    def _say_again(self, socket: ClientConnection) -> None:
        """A message that may have been lost with its connection, if nothing has happened to the session since."""
        status, unsure = self.welcome.get("detail", {}), self._unsure
        is_as_before = status.get("last_event") == self._last_event and status.get("state") == "idle"
        if unsure is not None and is_as_before:
            socket.send(json.dumps(unsure))

    def _connected(self) -> ClientConnection:
        attempt = 0
        while self._socket is None:
            headers = {} if self._address.key is None else {"Authorization": f"Bearer {self._address.key}"}
            try:
                way = connect(self._url, additional_headers=headers, proxy=None, max_size=MAX_MESSAGE_BYTES)
                socket = self._stack.enter_context(way)
                self._greet(socket.recv(timeout=LONGEST_PAUSE))
                self._socket = socket
            except InvalidStatus as error:
                response = error.response
                refused = refusal(
                    self._address.url, response.status_code, bytes(response.body or b""), response.reason_phrase
                )
                if self._handle is not None and isinstance(refused, InvalidRequest):
                    self._handle = None  # the server knows nothing of it any more: then under its name
                    continue
                if response.status_code < 500 and response.status_code != 429:
                    raise refused from None
                self._wait(attempt, str(refused))
            except (OSError, InvalidHandshake, TimeoutError, ConnectionClosed) as error:
                self._stack.close()
                reason = f"cannot talk to {self._address.url}: {error or type(error).__name__}"
                if not self.welcome and not isinstance(error, ConnectionRefusedError):
                    raise ServerError(reason) from None
                self._wait(attempt, reason)
            attempt += 1
        return self._socket

    @property
    def _url(self) -> str:
        query: dict[str, str | int] = {"session": self._address.session}
        if self._last_event is not None:
            query["last_event"] = self._last_event
        if self._handle is not None:
            query["resume"] = self._handle
        return f"{self._address.url}{self._path}?{urlencode(query)}"

    def _greet(self, said: str | bytes) -> None:
        """Raises ServerError if this is no welcome to a session."""
        try:
            welcome = json.loads(said)
            detail = welcome["detail"]
            self._handle = detail["handle"]
        except (ValueError, KeyError, TypeError):
            reason = "said something unexpected; is it a Rekindle server?"
            raise ServerError(f"{self._address.url} {reason}") from None
        self.welcome = welcome
        if self._last_event is None:
            self._last_event = detail.get("last_event")
        elif detail.get("last_event", 0) < self._last_event:  # a new one counts from 1 again
            self._last_event, answered, self._answered = detail.get("last_event"), self._answered, None
            if answered is not None and detail.get("state") != "answering":
                self._lost_end = {"type": "end", "turn": answered["turn"], "reason": "cancelled", "data": ""}

    def _wait(self, attempt: int, reason: str) -> None:
        """Before the next attempt. Raises ServerError after the last."""
        if attempt >= self._max_retries:
            raise ServerError(reason)
        seconds = min(2.0**attempt, LONGEST_PAUSE)
        self.tell(f"{reason}; the next attempt is in {seconds:g} s")
        self._pause(seconds)
