"""The door: the first thing a request meets. It notes when the request came and who sent it, and says how large it may be.

Web pages of origins that nobody named are sent away, unless they only read, which browsers keep them from. Where API
keys are set, only the open routes let anybody in: what tells whether the server lives, and the root. While the
server drains, whatever would begin new work is told to come back.

The size is watched while the body is read, so that neither a false nor a missing Content-Length lets more in.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import cast

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rekindle.api.keys import ANYBODY, Keys, note
from rekindle.api.load import Load, retry_after
from rekindle.api.origins import check_host, check_origin
from rekindle.api.refusals import refuse, respond
from rekindle.api.requests import note_message
from rekindle.errors import RekindleError, Stopping

OPEN_ROUTES = frozenset({"/", "/health", "/ready"})
_ARRIVED = "rekindle.arrived"
_READING = frozenset({"GET", "HEAD", "OPTIONS"})  # these begin no work


def arrived(request: HTTPConnection) -> float:
    """`time.perf_counter()` when the request's head was there and its body was not yet read."""
    return cast(float, request.scope[_ARRIVED])


def message_of(socket: HTTPConnection) -> HTTPConnection:
    """A message that has just come on a socket, as a request of its own, by whoever opened the socket."""
    scope = dict(socket.scope) | {_ARRIVED: time.perf_counter()}
    note_message(scope)
    return HTTPConnection(scope)


class Door:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        load: Load,
        max_body_bytes: int,
        origins: Collection[str] = (),
        hosts: Collection[str] = ("*",),
    ) -> None:
        """`origins` of web pages that may call, `hosts` by which the server may be called; "*" for all."""
        self._app = app
        self._keys = keys
        self._load = load
        self._max_body_bytes = max_body_bytes
        self._origins = origins
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        scope[_ARRIVED] = time.perf_counter()
        if scope.get("http_version") == "1.1" and not any(name == b"host" for name, _ in scope["headers"]):
            await respond(400, "a request of HTTP/1.1 must have a Host header", code="no_host")(scope, receive, send)
            return
        if scope["path"] in OPEN_ROUTES:
            note(scope, ANYBODY)
            await self._enter(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            check_host(headers, self._hosts)
            is_reading = scope.get("method") in _READING  # a socket has no method
            if not is_reading:
                check_origin(headers, self._origins)
            note(scope, self._keys.check(headers))
            if not is_reading:
                self._load.check_open()
        except Stopping as error:
            advice = retry_after(self._load.until_end()) | {"Connection": "close"}
            await refuse(error, advice)(scope, receive, send)
        except RekindleError as error:
            await refuse(error)(scope, receive, send)
        else:
            with self._load.request():
                await self._enter(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on, with an eye on the size of the body."""
        if _declared_bytes(scope) > self._max_body_bytes:
            await respond(413, self._message, code="body_too_large")(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"the body is larger than the {self._max_body_bytes} bytes that this server reads"


def _declared_bytes(scope: Scope) -> int:
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    return int(declared) if declared.isdigit() else 0
