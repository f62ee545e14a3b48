"""How long a token takes, by one way of getting its KV: measured as it happens."""

from __future__ import annotations

_WEIGHT = 0.25  # of the newest measurement
_RETRY = 16  # a way that was slower is tried again after so many times of not being taken


class Speed:
    """A moving average of seconds per token. Approximate under concurrency, which is harmless."""

    def __init__(self) -> None:
        self.seconds_per_token: float | None = None  # None: not measured yet
        self._passed_over = 0

    def add(self, num_tokens: int, seconds: float) -> None:
        """One measurement, of so many tokens at once."""
        if num_tokens > 0:
            new, old = seconds / num_tokens, self.seconds_per_token
            self.seconds_per_token = new if old is None else old + _WEIGHT * (new - old)

    def slower_than(self, other: Speed, name: str) -> str | None:
        """Why this way should not be taken instead of `other` (computing), or None."""
        mine, theirs = self.seconds_per_token, other.seconds_per_token
        if mine is None or theirs is None or mine <= theirs:
            return None
        self._passed_over += 1
        if self._passed_over % _RETRY == 0:
            return None
        return f"in the {name} tier, but fetching takes {1e6 * mine:.0f} us a token and computing {1e6 * theirs:.0f} us"
