"""What a session's listeners are told, in the order in which it happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rekindle.errors import RekindleError
from rekindle.serve.request import Done

REMEMBERED_NEWS = 2048  # for listeners that come back


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
    """An answer is over: "stop", "length", "interrupted" or "cancelled". Each has one such end, or a failure."""

    turn: int
    reason: str
    text: str  # the answer as it is kept, or as it was when the conversation went back and lost it
    done: Done | None  # tokens, times and plan; None if it was broken off


@dataclass(frozen=True)
class Spent:
    """What an interrupted answer has cost; it comes when the worker has let go of it."""

    turn: int
    done: Done


@dataclass(frozen=True)
class System:
    """Something else has happened to the session."""

    kind: str  # reset, rewound, amended, swapped, replaced, forgotten, hibernated, truncated, warning
    message: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An answer could not be finished; the user's message stays, and may be answered again."""

    turn: int
    error: RekindleError


News = UserInput | Token | End | Spent | System | Failure
Listener = Callable[[int, News], None]  # with the news' number, from 1; must not block


class Audience:
    """Who listens to a session, and its latest news for those who come back. Belongs to the sessions' thread."""

    def __init__(self) -> None:
        self.num_told = 0
        self._listeners: list[Listener] = []
        self._latest: deque[tuple[int, News]] = deque(maxlen=REMEMBERED_NEWS)

    def __len__(self) -> int:
        return len(self._listeners)

    def add(self, listener: Listener, *, after: int | None = None) -> None:
        """Tell it what happens from now on, or after the news of this number, as far as they are remembered."""
        if after is not None:
            for number, news in self._latest:
                if number > after:
                    listener(number, news)
        self._listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        """Tell it nothing more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def clear(self) -> None:
        """Tell nobody anything more."""
        self._listeners.clear()

    def tell(self, news: News) -> None:
        """This has happened."""
        self.num_told += 1
        self._latest.append((self.num_told, news))
        for listener in list(self._listeners):
            listener(self.num_told, news)
