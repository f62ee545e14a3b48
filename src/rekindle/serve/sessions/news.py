"""What a session's listeners are told, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rekindle.errors import RekindleError
from rekindle.serve.request import Done


@dataclass(frozen=True)
class UserInput:
    """A user's message is complete."""

    turn: int
    text: str


@dataclass(frozen=True)
class Token:
    """Some more of an answer."""

    turn: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class End:
    """An answer is over: "stop", "length", "interrupted" or "cancelled"."""

    turn: int
    reason: str
    text: str  # the answer as it is kept
    done: Done | None  # tokens, times and plan; None if it was interrupted


@dataclass(frozen=True)
class Spent:
    """What an interrupted answer has cost; it comes when the worker has let go of it."""

    turn: int
    done: Done


@dataclass(frozen=True)
class System:
    """Something else has happened to the session."""

    kind: str  # reset, rewound, amended, swapped, forgotten, hibernated, truncated, warning
    message: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An answer could not be finished; the user's message stays, and may be answered again."""

    turn: int
    error: RekindleError


News = UserInput | Token | End | Spent | System | Failure
