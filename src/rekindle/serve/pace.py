"""How much of a prompt is read in one step: as much as those who are being answered hardly notice.

A step that only decodes takes about as long whatever it does, because the weights have to be read. What prompt tokens add
to it is no straight line: the second row of a batch may cost more than the first, and an engine may have a fast kernel for
many rows only. (On two cores llama.cpp computes 1, 2, 8, 16 and 64 rows of gemma3-270m q8_0 in 13, 31, 43, 52 and 145 ms;
of ember after 1,000 tokens 63 rows in 82 ms and 64 in 12 ms.) So what is measured, as it happens, is

    alone    seconds of a step that only decodes, by the number of answers in it
    added    seconds that prompt tokens add to such a step, by the rows of the whole batch

and of a ladder of batch sizes the one is taken that reads fastest among those that make a step at most `slowdown` times as
long. What a size adds grows with what was read before, so measurements are forgotten after a while. A size that is not
known is expected to add what the last one did, half of it whatever the size and half of it in proportion, or what reading
as much alone takes; and where only the former is known a chunk at most grows fivefold from one step to the next. Where no
size is bearable it is three tokens, two or one, the most that make a step at most `TOLERATED` times as long, but one in any
case, so that a prompt gets on; and never more than the limit that was set. As long as a prompt is read there are no steps
that only decode, so now and then one is left without a chunk, to measure again.

Small chunks cost more in all, and many prompts are short. Two exceptions read them at once:

- Where more prompts are being read than answers are being given, more wait for the prompts than are stalled by them: the
  added time is then allowed that many times over, and what takes a step or two at the limit is read at the limit, to its
  end. So requests that come together begin to answer together.
- What comes beside answers and can be read in one step of at most `BURST_SECONDS` is read in one step, if the last such
  step was `BURST_STEPS` steps ago. So of a stream's gaps less than one in a hundred is of that kind.

When nobody is being answered there is nobody to stall, and the chunk is as large as the engine's batch, unless that takes
so long that whoever comes or goes meanwhile would have to wait for it, or would leave a short rest. As long as nothing was
measured it is the least, by which a slow model reads about as many tokens a second.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque

from rekindle.kv.speed import Speed
from rekindle.tokens import SHORT_REST, first_part

MIN_CHUNK = 3
TOLERATED = 2.75  # times as long as a step without a chunk: below the three times that a long prompt may cost a stream
GRAIN = 4  # batches are multiples of this: fewer shapes, for which an engine may prepare
PROBE_STEPS = 64  # steps with a chunk between two without
LONE_TOKENS = (512, 2048)  # least and greatest chunk when nobody is being answered; the first is the least
LONE_SECONDS = 0.25  # that such a step should take at most, where the least chunk allows
BURST_SECONDS = 0.25
BURST_STEPS = 128
_ROWS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_GROWTH = 5  # times the prompt tokens of the step before
_BESIDE = 1.25  # what reading beside answers takes, of what reading as much alone takes
_MANY_ROWS = SHORT_REST  # so many are computed about as fast per row as any larger number
_SOON_STEPS = 2  # at the limit: what takes no more is read at once if more wait for it than are stalled
_REMEMBERED = 9  # measurements of which the middle one counts: a step that was disturbed says nothing
_FRESH_STEPS = 16  # for which a measurement is as good as a new one
_FORGOTTEN_STEPS = (
    128  # after which a size that was not taken is as good as unknown; in between it adds no less than then
)


class _Recent:
    """The middle of the latest measurements."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_REMEMBERED)
        self.step = 0  # of the latest

    def add(self, value: float, step: int = 0) -> None:
        if step - self.step > _FORGOTTEN_STEPS:
            self._values.clear()
        self._values.append(value)
        self.step = step

    @property
    def middle(self) -> float:
        return statistics.median(self._values)


class Pace:
    """Chooses chunks and learns from the steps they made. Reads no clock itself."""

    def __init__(self, *, limit: int, slowdown: float) -> None:
        """At most `limit` tokens beside answers. A `slowdown` of infinity means: always as many."""
        self._limit = limit
        self._slowdown = slowdown
        self._alone: defaultdict[int, _Recent] = defaultdict(_Recent)  # answers in a step -> its seconds
        self._added: defaultdict[int, _Recent] = defaultdict(_Recent)  # rows of a batch -> seconds that prompts added
        self._rows = 0  # of the last step that was to be bearable
        self._steps = 0
        self._since_probe = 0
        self._since_burst = BURST_STEPS
        self._to_end = 0  # unread tokens of what is read at the limit to its end
        self._probing = False  # the step under way reads nothing, only to measure that
        self._fresh = True  # the last step had nothing to read
        self.prefill = Speed()  # of steps that decode nothing

    def chunk(
        self, num_decoding: int, num_reading: int = 1, num_unread: float = math.inf, *, hurried: bool = False
    ) -> int:
        """Prompt tokens for the next step beside so many answers; 0 to measure it without any.

        They are taken from `num_reading` prompts, of which `num_unread` tokens in all are still to be read.

        A hurried step keeps to the limit although there is nobody to stall.
        """
        is_soon_read = self._is_soon_read(num_decoding, num_reading, num_unread)
        if num_decoding == 0:
            most = self._limit if hurried else max(self._limit, self._lone())
            return most if math.isinf(num_unread) else first_part(int(num_unread), most)
        if math.isinf(self._slowdown) or is_soon_read:
            return self._limit
        alone = self._decode_alone(num_decoding)
        if alone is not None and self._may_burst(num_unread):
            self._since_burst = 0
            return self._limit
        if alone is None or self._since_probe >= PROBE_STEPS:
            self._since_probe = 0
            self._probing = True
            return 0
        self._since_probe += 1
        return self._bearable(num_decoding, alone, (self._slowdown - 1) * alone * max(1.0, num_reading / num_decoding))

    def learn(self, num_decoding: int, num_prefill: int, seconds: float) -> None:
        """What a step took: `seconds` of the engine's forward."""
        rows = num_decoding + num_prefill
        self._since_burst += 1
        self._steps += 1
        if num_decoding == 0:
            if num_prefill >= _MANY_ROWS or self.prefill.seconds_per_token is None:  # few cost far more each
                self.prefill.add(num_prefill, seconds)
        elif num_prefill == 0:
            self._alone[num_decoding].add(seconds)
        elif (alone := self._decode_alone(num_decoding)) is not None:
            self._added[rows].add(max(0.0, seconds - alone), self._steps)
        self._fresh = num_prefill == 0 and not self._probing
        self._probing = False

    def _lone(self) -> int:
        least, greatest = LONE_TOKENS
        speed = self.prefill.seconds_per_token
        return least if not speed else min(greatest, max(least, int(LONE_SECONDS / speed)))

    def _is_soon_read(self, num_decoding: int, num_reading: int, num_unread: float) -> bool:
        """Whether more wait for it than are stalled, and not for long; what was begun so is ended so."""
        begins = num_reading > num_decoding and num_unread <= _SOON_STEPS * self._limit
        soon = begins or num_unread < self._to_end
        self._to_end = int(num_unread) if soon else 0
        return soon

    def _may_burst(self, num_unread: float) -> bool:
        speed = self.prefill.seconds_per_token
        is_short = speed is not None and num_unread <= min(self._limit, BURST_SECONDS / (_BESIDE * speed))
        return is_short and self._fresh and self._since_burst >= BURST_STEPS

    def _decode_alone(self, num_decoding: int) -> float | None:
        """Seconds of a step that decodes so many, or the most below that which were measured; they take no longer."""
        known = max((count for count in self._alone if count <= num_decoding), default=None)
        return None if known is None else self._alone[known].middle

    def _bearable(self, num_decoding: int, alone: float, allowed: float) -> int:
        """Prompt tokens that are read fastest, of those that add as many seconds as are allowed."""
        most = num_decoding + self._limit
        least = min(most, -(-(num_decoding + MIN_CHUNK) // GRAIN) * GRAIN)
        sizes = [least, *(rows for rows in _ROWS if least < rows < most), most]
        few = [rows for rows in range(num_decoding + 1, num_decoding + MIN_CHUNK) if rows < least]
        last = max((rows for rows in few + sizes if rows <= self._rows), default=least)
        bearable = {
            rows: (rows - num_decoding) / max(alone + added, 1e-9)
            for rows in sizes
            if (added := self._expected(rows, last, num_decoding)) <= allowed
        }
        self._rows = max(bearable, key=lambda rows: bearable[rows], default=0) or self._tolerable(
            [*few, least], last, num_decoding, (TOLERATED - 1) * alone
        )
        return self._rows - num_decoding

    def _tolerable(self, sizes: list[int], last: int, num_decoding: int, tolerated: float) -> int:
        """The most rows of these that add no more, of which the first are taken in any case; at first the last."""
        if not any(rows in self._added for rows in sizes):
            return sizes[-1]
        return max((rows for rows in sizes if self._expected(rows, last, num_decoding) <= tolerated), default=sizes[0])

    def _expected(self, rows: int, last: int, num_decoding: int) -> float:
        """Seconds that a batch of so many rows adds, where one of `last` rows came last; infinite if nothing is known."""
        own, other = self._added.get(rows), self._added.get(last)
        age = math.inf if own is None else self._steps - own.step
        if own is not None and (rows == last or age <= _FRESH_STEPS):
            return own.middle
        guesses = [math.inf]
        growth = (rows - num_decoding) / (last - num_decoding)
        if other is not None and growth <= _GROWTH:
            guesses.append(other.middle * (1 + growth) / 2)
        if self.prefill.seconds_per_token is not None and rows >= _MANY_ROWS:
            guesses.append(_BESIDE * self.prefill.seconds_per_token * rows)
        return max(min(guesses), own.middle) if own is not None and age <= _FORGOTTEN_STEPS else min(guesses)
