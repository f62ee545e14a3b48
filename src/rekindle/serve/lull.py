"""The pause after an answer: whoever goes on at once does not wait for what is done in idle time.

Saving residents and studying chunks takes the worker's thread some milliseconds a piece, more where memory is dear, and
meanwhile it can start nobody. A client that asks again as soon as it has its answer would meet such a piece every time: a
prompt of 1,000 tokens of gemma3-270m is saved in five, and five requests that followed it found the worker busy for 2 to
20 ms, although nothing of them had to be computed. So idle time begins when nobody was answered for `PAUSE_SECONDS`.

Where nobody ever pauses so long, what is to be done is put off for `PUT_OFF_SECONDS` at most, and then gets every idle
moment until it is done: what is not saved is lost when the process is killed.

This reads no clock: times are the caller's, in seconds.
"""

from __future__ import annotations

import math

PAUSE_SECONDS = 0.05
PUT_OFF_SECONDS = 10.0


class Lull:
    """Says when idle time may be used."""

    def __init__(self, pause_seconds: float = PAUSE_SECONDS, put_off_seconds: float = PUT_OFF_SECONDS) -> None:
        self._pause = pause_seconds
        self._put_off = put_off_seconds
        self._answered = -math.inf  # when a token of an answer was sampled last
        self._idle_since = math.inf  # when the idle time that is not used yet could first have been

    def answered(self, now: float) -> None:
        """Some request has got a token."""
        self._answered = now

    def seconds_left(self, now: float) -> float:
        """How long to wait for somebody before idle time is used, if it could be used now; 0.0: not at all."""
        self._idle_since = min(self._idle_since, now)
        return max(0.0, min(self._answered + self._pause, self._idle_since + self._put_off) - now)

    def used_up(self) -> None:
        """Nothing is left to be done."""
        self._idle_since = math.inf
