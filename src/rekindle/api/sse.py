"""Server-sent events: one JSON value per event, as a codec.

JSON escapes all control characters, so no newline in a token can break an event. The three other characters that
Unicode counts as line ends are escaped too: many clients split lines by Unicode's rules instead of the format's.
`Decoder` is the way back, for clients and tests; it follows the event stream format of the HTML standard, but for lines
that end in a bare carriage return, and knows only `data` fields.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"  # the end of a stream that was not broken off

_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}


def encode(value: object) -> bytes:
    """One event with `value` as JSON."""
    text = _to_json(value)
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class Decoder:
    """From bytes, cut anywhere, to the data of whole events."""

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a line
        self._lines: list[str] = []  # the data lines of the event that is being read

    def decode(self, data: bytes) -> list[str]:
        """The data of the events that end in `data`."""
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        events = []
        for line in lines:
            if line:
                self._take(line)
            elif self._lines:
                events.append("\n".join(self._lines))
                self._lines = []
        return events

    def flush(self) -> bool:
        """Forget an event that was broken off; True if there was one."""
        torn = bool(self._rest or self._lines)
        self._rest, self._lines = b"", []
        return torn

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._lines.append(value.removeprefix(b" ").decode("utf-8"))


class EventStream(StreamingResponse):
    """A streaming response that calls `close` as soon as it is over, however that comes: its end, an error, a client
    that goes away, before the first event or in the middle of a send.

    Starlette notices a client that goes away and cancels the sending task, but a generator that waits at its `yield`,
    or has not begun, would learn of it when it is garbage collected, or never.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        # no-transform and the X header: no proxy may collect events to compress them or to forward them in bulk
        super().__init__(source, headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"})
        self._source = source
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._source):
                await super().__call__(scope, receive, send)
        finally:
            self._close()
