"""Who may have another answer just now: a limit that live answers share with all others of the same owner."""

from __future__ import annotations

from typing import Protocol


class Gate(Protocol):
    """Counts answers under way, by the salt of whoever has them. Called on the sessions' thread."""

    def enter(self, salt: bytes) -> None:
        """One more begins. Raises Overloaded if that is too many; then it is not counted."""

    def leave(self, salt: bytes, seconds: float | None) -> None:
        """One has ended, after so many seconds if it came to its end."""


class Open:
    """The gate where there is no limit."""

    def enter(self, salt: bytes) -> None:
        pass

    def leave(self, salt: bytes, seconds: float | None) -> None:
        pass
