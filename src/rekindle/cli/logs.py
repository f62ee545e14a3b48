"""Where log lines go and how they look: set up by the command that serves, and by nobody else.

    text    2026-11-21T13:20:01.123Z INFO rekindle.access: answered request_id=4f… method=POST route=/generate …
    json    {"time": "2026-11-21T13:20:01.123Z", "level": "info", "logger": "rekindle.access", "message": "answered", …}

A record's `fields`, a dictionary, follow its message; so does the id of the request that was worked on when it was made.
Both formats have one line per record, whatever is in it, but for tracebacks in text.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, Literal, TextIO

from rekindle.serve.request import request_id

Format = Literal["text", "json"]
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")


def set_up(format: Format, level: str, stream: TextIO | None = None) -> None:
    """Send everything to `stream`, or else to stderr. Other libraries' lines come from WARNING on, or INFO when debugging.

    May be called again; what it set up before is replaced.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    handler.addFilter(_is_news)
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    logging.getLogger("rekindle").setLevel(level.upper())


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, to be told from others'."""


class TextLines(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        message = " ".join(record.getMessage().splitlines())
        fields = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        line = f"{_moment(record)} {record.levelname} {record.name}: {message}{fields}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class JsonLines(logging.Formatter):
    """For machines."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def _is_news(record: logging.LogRecord) -> bool:
    """uvicorn takes a socket that was refused with an answer for one that got none; the access line has told its status."""
    return record.name != "uvicorn.error" or record.msg != "ASGI callable returned without completing handshake."


def _moment(record: logging.LogRecord) -> str:
    """In UTC, to the millisecond."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    known = request_id.get()
    return ({"request_id": known} if known else {}) | getattr(record, "fields", {})


def _plain(value: object) -> str:
    """As it is, or in quotes if it could be taken for something else."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
