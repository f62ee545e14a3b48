"""How much of a prompt is read in one step: as much as those who are being answered hardly notice.

A step that only decodes takes about as long whatever it does, because the weights have to be read; each prompt token that
rides along adds a little, from some number on a lot. Both are measured as they happen:

    decode     seconds of a step that only decodes, by the number of answers in it
    token      seconds that one prompt token adds to such a step

and the chunk is chosen so that the step takes at most `slowdown` times as long as without it:

    decode + chunk * token = slowdown * decode

Where more prompts are being read than answers are being given, more wait for the prompts than are stalled by them: the
added time is then allowed that many times over; and what takes a step or two at the limit is read at the limit, because
small chunks cost more in all. So requests that come together begin to answer together.

A chunk is never less than `MIN_CHUNK`, so that a prompt gets on, and never more than the limit that was set; it at most
doubles from one step to the next. As long as a prompt is read there are no steps that only decode, so now and then one
is left without a chunk, to measure again.

When nobody is being answered there is nobody to stall, and the chunk is as large as the engine's batch, unless that takes
so long that whoever comes or goes meanwhile would have to wait for it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from rekindle.kv.speed import Speed

MIN_CHUNK = 4
GRAIN = 4  # chunks are multiples of this: fewer shapes, for which an engine may prepare
_SOON_STEPS = 2  # at the limit: what takes no more is read at once if more wait for it than are stalled
PROBE_STEPS = 64  # steps with a chunk between two without
LONE_TOKENS = (512, 2048)  # least and greatest chunk when nobody is being answered
LONE_SECONDS = 0.25  # that such a step should take at most, where the least chunk allows
_REMEMBERED = 9  # measurements of which the middle one counts: one step that was disturbed says nothing


class _Recent:
    """The middle of the latest measurements."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def middle(self) -> float | None:
        """None before the first."""
        return statistics.median(self._values) if self._values else None


class Pace:
    """Chooses chunks and learns from the steps they made. Reads no clock itself."""

    def __init__(self, *, limit: int, slowdown: float) -> None:
        """At most `limit` tokens beside answers. A `slowdown` of infinity means: always as many."""
        self._limit = limit
        self._slowdown = slowdown
        self._decode: dict[int, _Recent] = {}  # answers in a step -> its seconds
        self._token = _Recent()
        self._chunk = 0  # the last
        self._since_probe = 0
        self.prefill = Speed()  # of steps that decode nothing

    def chunk(
        self, num_decoding: int, num_reading: int = 1, num_unread: float = math.inf, *, hurried: bool = False
    ) -> int:
        """Prompt tokens for the next step beside so many answers; 0 to measure it without any.

        They are taken from `num_reading` prompts, of which `num_unread` tokens in all are still to be read.

        A hurried step keeps to the limit although there is nobody to stall.
        """
        if num_decoding == 0:
            return self._limit if hurried else max(self._limit, self._lone())
        if math.isinf(self._slowdown) or (num_reading > num_decoding and num_unread <= _SOON_STEPS * self._limit):
            return self._limit
        decode = self._decode_alone(num_decoding)
        if decode is None or self._since_probe >= PROBE_STEPS:
            self._since_probe = 0
            return 0
        self._since_probe += 1
        return min(self._limit, self._bearable(decode * max(1.0, num_reading / num_decoding)))

    def learn(self, num_decoding: int, num_prefill: int, seconds: float) -> None:
        """What a step took: `seconds` of the engine's forward."""
        if num_decoding == 0:
            self.prefill.add(num_prefill, seconds)
            return
        decode = self._decode_alone(num_decoding)
        if num_prefill == 0:
            self._decode.setdefault(num_decoding, _Recent()).add(seconds)
        elif decode is not None:
            self._chunk = num_prefill
            self._token.add(max(0.0, seconds - decode) / num_prefill)

    def _lone(self) -> int:
        least, greatest = LONE_TOKENS
        speed = self.prefill.seconds_per_token
        return greatest if not speed else min(greatest, max(least, int(LONE_SECONDS / speed)))

    def _decode_alone(self, num_decoding: int) -> float | None:
        """Seconds of a step that decodes so many, or the most below that which were measured; they take no longer."""
        known = max((count for count in self._decode if count <= num_decoding), default=None)
        return None if known is None else self._decode[known].middle

    def _bearable(self, decode: float) -> int:
        """Prompt tokens that take as long as `slowdown` allows to add to a step of `decode` seconds."""
        token = self._token.middle
        if token is None:
            return MIN_CHUNK
        wanted = (self._slowdown - 1) * decode / token if token > 0 else math.inf
        grown = min(wanted, 2 * max(self._chunk, MIN_CHUNK))
        return max(MIN_CHUNK, int(grown) // GRAIN * GRAIN)
