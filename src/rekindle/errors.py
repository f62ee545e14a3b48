"""The tree of exceptions.

Every refusal a user can meet is a `RekindleError`. A message says what was expected, what came, and what to do. `status`
is the HTTP status that the refusal has at the edge, `code` its stable name there; nothing below `api/` uses either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


class RekindleError(Exception):
    """Root of all errors that Rekindle raises on purpose."""

    status = 500
    code = "internal_error"


class InvalidRequest(RekindleError):
    """The caller asked for something that has no meaning here. `param` names the offending field, if there is one."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt can never fit in the context."""

    code = "context_length_exceeded"


class ModelError(RekindleError):
    """A model cannot be found, read or served."""

    code = "model_error"


class Overloaded(RekindleError):
    """Too much work is waiting already; the same request may succeed later."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, *, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds  # about when; None: not known


class TimedOut(RekindleError):
    """The request took longer than this server allows, its wait included; it has been given up."""

    status = 504
    code = "request_timeout"


class Stopping(RekindleError):
    """The server is being stopped; nothing new is taken and what runs is given up."""

    status = 503
    code = "stopping"


class StoreError(RekindleError):
    """The store, or one of its tiers, failed."""

    code = "store_error"


class CorruptBlock(StoreError):
    """A stored block is not what was written."""

    code = "corrupt_block"


class TierUnavailable(StoreError):
    """A tier cannot be reached at present."""

    status = 503
    code = "tier_unavailable"


class SessionError(RekindleError):
    """A live session cannot do what was asked in its present state."""

    status = 400
    code = "session_error"


class EngineError(RekindleError):
    """The engine refused a verb; every sequence is as it was before."""

    code = "engine_error"


class ContextFull(EngineError):
    """There are not enough free cells, or no free sequence, for what was asked."""

    status = 503
    code = "context_full"


class BadRange(EngineError):
    """A token range or position does not exist in the sequence."""


class UnknownSequence(EngineError):
    """The sequence is not open."""


class ForeignPayload(EngineError):
    """A payload was not made by this engine with this model and these settings, or is torn."""


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, whole: bool = False, param: str = ""
) -> None:
    """Raises InvalidRequest unless the value is a number from `low` to `high`; True and False are none, nor is NaN."""
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        least, most = ("" if math.isinf(limit) else f"{limit:,}" for limit in (low, high))
        limits = f" between {least} and {most}" if least and most else f" of at least {least}" if least else ""
        is_endless = is_number and abs(value) > 1 << 64  # Python refuses to write those of thousands of digits
        got = "a number beyond all limits" if is_endless else str(value) if is_number else repr(value)[:40]
        raise InvalidRequest(f"{name} must be {what}{limits}, got {got}", param=param or name)


def counted(number: int, what: str) -> str:
    """ "1 token", "1,234 tokens"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: "; did you mean 'x'?" or "; known: a, b, c"."""
    names = sorted(known)
    return similar(name, names) or f"; known: {', '.join(names)}"


def similar(name: str, known: Iterable[str]) -> str:
    """The same where the known ones are listed anyway: "; did you mean 'x'?" or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
