"""How long a token takes, by one way of getting its KV: measured as it happens."""

from __future__ import annotations

EQUAL_COST_POSITION = (
    16_384  # where attention costs a token as much as the weights do, in models of 1 to 8 billion weights
)

_WEIGHT = 0.25  # of the newest measurement
_FEWEST_TOKENS = 128  # of a call that is measured for what a position costs
_HALF_LIFE_TOKENS = 100_000
_PRIOR_VARIANCE = 200.0**2  # of positions: what was seen outweighs what is usual when they were spread by more
_MAX_SLOPE = 1 / 256
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


class PrefillCost:
    """What computing tokens takes, in units of the first one's: 1 + slope × position for each.

    Every token costs the weights once, and attention over all that is before it. The slope is that of the straight line
    through what was measured: seconds per token against position. It begins at what is usual and is drawn towards that
    until calls at different positions were seen. Approximate under concurrency, which is harmless.
    """

    def __init__(self) -> None:
        self.slope = 1 / EQUAL_COST_POSITION
        self._tokens = 0.0  # how many the averages below are over; older ones count less
        self._position = self._seconds = 0.0  # averages over tokens; seconds of one
        self._variance = self._covariance = 0.0  # of position, and of both

    def of(self, start: int, num_tokens: int) -> float:
        """Of so many tokens from a position on."""
        return num_tokens * (1 + self.slope * (start + (num_tokens - 1) / 2))

    def add(self, start: int, num_tokens: int, seconds: float) -> None:
        """One call that computed these tokens and no others. Short calls tell little: what a call costs hides the rest."""
        if num_tokens < _FEWEST_TOKENS or seconds <= 0:
            return
        self._tokens = self._tokens * 0.5 ** (num_tokens / _HALF_LIFE_TOKENS) + num_tokens
        share = num_tokens / self._tokens
        position, each = start + (num_tokens - 1) / 2 - self._position, seconds / num_tokens - self._seconds
        self._position += share * position
        self._seconds += share * each
        self._variance = (1 - share) * (self._variance + share * position**2)
        self._covariance = (1 - share) * (self._covariance + share * position * each)
        self._fit()

    def _fit(self) -> None:
        usual = 1 / EQUAL_COST_POSITION
        usual_rise = self._seconds * usual / (1 + usual * self._position)  # seconds per position
        rise = (self._covariance + _PRIOR_VARIANCE * usual_rise) / (self._variance + _PRIOR_VARIANCE)
        first = self._seconds - rise * self._position
        self.slope = min(max(rise / first, 0.0), _MAX_SLOPE) if first > 0 else _MAX_SLOPE
