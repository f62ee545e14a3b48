"""Spans of time as people write them: "30s", "10m", "1.5h", "2d", or a number of seconds."""

from __future__ import annotations

import math
import re
from numbers import Real

from rekindle.errors import InvalidRequest

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
EXPECTED = "a time such as 30s, 10m, 2h, 1d, or a number of seconds, more than 0"
_FEW = 3
_WRITTEN = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*([smhdw]?)")


def seconds_of(value: str | float, *, param: str = "ttl") -> float:
    """The seconds of a span; more than 0. Raises InvalidRequest."""
    try:
        seconds = _read(value) if isinstance(value, str) else _number(value)
    except OverflowError:  # a whole number of hundreds of digits
        seconds = math.inf
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        raise InvalidRequest(f"{param}: expected {EXPECTED}; got {str(value)[:40]!r}", param=param)
    return seconds


def _number(value: object) -> float | None:
    """True is no number of seconds."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _read(text: str) -> float | None:
    match = _WRITTEN.fullmatch(text.strip().lower())
    return None if match is None else float(match[1]) * UNITS[match[2] or "s"]


def in_words(seconds: float) -> str:
    """A span in its largest unit, rounded down, and the next smaller one while that says much: 5400 is "1 h 30 min"."""
    parts: list[tuple[int, str]] = []
    rest = int(seconds)
    for unit, name in (("d", "d"), ("h", "h"), ("m", "min"), ("s", "s")):
        number, rest = divmod(rest, UNITS[unit])
        if number or parts or unit == "s":
            parts.append((number, name))
    shown = parts[: 2 if parts[0][0] < _FEW else 1]
    return " ".join(f"{number} {name}" for number, name in shown if number or len(shown) == 1) or "0 s"
