"""The door: the first thing a request meets. It notes when the request came and how large it may be.

The size is watched while the body is read, so that neither a false nor a missing Content-Length lets more in.
"""

from __future__ import annotations

import time
from typing import cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rekindle.api.refusals import respond

_ARRIVED = "rekindle.arrived"


def arrived(request: Request) -> float:
    """`time.perf_counter()` when the request's head was there and its body was not yet read."""
    return cast(float, request.scope[_ARRIVED])


class Door:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_ARRIVED] = time.perf_counter()
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
