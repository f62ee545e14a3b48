"""Which tokens of placed chunks to compute anew: a pure choice, made before anything is placed.

What comes in are *spans*, the parts of chunks that could be placed, with what is remembered of each; what goes out are
ranges of the prompt. Budget is counted in tokens: a share of all that could be placed.

    none        nothing: shows the harm, and what each mark between chunks mends by itself
    first       the first tokens of each chunk (LegoLink of EPIC, https://arxiv.org/abs/2410.15332)
    remembered  the tokens whose KV once differed most between in place and on its own; a chunk of which nothing is
                remembered gets its first tokens
    deviation   the tokens whose K or V at a layer, now, differs most from that on its own (CacheBlend,
                https://arxiv.org/abs/2405.16444)
    query       the tokens to which the question attends most (as ProphetKV)

The last two have to look: before anything is chosen the prompt goes through some layers, or the question through all. What
was seen takes the place of what is remembered.

Every range is a model call of its own, so a few more tokens in one range are better than one more range. `dearest` weighs
that: it looks for ranges of the largest sum of gains, where each token costs a price, each range as much as RANGE_TOKENS
tokens, and the price is what makes the whole fit into the budget. A range at the beginning of a chunk is free of that
cost, because what stands before the chunk is computed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import Range

Select = Literal["none", "first", "remembered", "deviation", "query", "auto"]
Floats = npt.NDArray[np.float32]
LOOKING: tuple[Select, ...] = ("deviation", "query")
FIRST = "they lack what stands before their chunk most"
REMEMBERED = "their KV differed most between in place and on its own"
RANGE_TOKENS = 4  # what a range more costs, in tokens
_STEPS = 24  # of the search for a price


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens of a chunk that could be placed."""

    start: int  # in the prompt
    stop: int
    is_begin: bool = True  # whether the token before it is computed anyway
    scores: Floats | None = None  # [stop - start] how far each token's KV once differed

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Choice:
    """Tokens to compute anew, and why those."""

    start: int
    stop: int
    reason: str


def choose(spans: Sequence[Span], select: Select, ratio: float, reason: str = REMEMBERED) -> list[Choice]:
    """Ranges to compute, ascending, each within one span, and `reason` for those that scores have chosen.

    Raises AssertionError for a ratio outside [0, 1].
    """
    assert 0 <= ratio <= 1, ratio
    if select == "none" or ratio == 0:
        return []
    if ratio == 1:
        return [Choice(span.start, span.stop, "all of it is to be computed") for span in spans if len(span)]
    known = [span for span in spans if span.scores is not None and select != "first"]
    unknown = [span for span in spans if span not in known]
    chosen = [*_first(unknown, ratio), *_scored(known, ratio, reason)]
    return sorted(chosen, key=lambda choice: choice.start)


def _first(spans: Sequence[Span], ratio: float) -> list[Choice]:
    counts = [min(len(span), round(ratio * len(span))) for span in spans]
    return [Choice(span.start, span.start + count, FIRST) for span, count in zip(spans, counts, strict=True) if count]


def _scored(spans: Sequence[Span], ratio: float, reason: str) -> list[Choice]:
    """The budget of all these chunks goes where it is needed."""
    if not spans:
        return []
    gains = np.concatenate([span.scores for span in spans if span.scores is not None])
    begins = np.cumsum([0, *(len(span) for span in spans)])
    free = {int(begin) for begin, span in zip(begins, spans, strict=False) if span.is_begin}
    chosen = []
    for start, stop in dearest(gains, round(ratio * len(gains)), free):
        for begin, span in zip(begins, spans, strict=False):
            first, end = max(start, int(begin)), min(stop, int(begin) + len(span))
            if first < end:
                offset = span.start - int(begin)
                chosen.append(Choice(first + offset, end + offset, reason))
    return chosen


def dearest(gains: Floats, count: int, free: set[int] | frozenset[int] = frozenset()) -> list[Range]:
    """Few ranges of at most `count` tokens in all whose gains add up to much; see the module's docstring.

    `free`: where a range may begin at no cost.
    """
    if count >= len(gains):
        return [(0, len(gains))] if len(gains) else []
    values = [float(gain) for gain in gains]
    low, high = 0.0, max(values, default=0.0)
    best: list[Range] = []
    for _ in range(_STEPS):
        price = (low + high) / 2
        ranges = _profitable(values, price, free)
        if sum(stop - start for start, stop in ranges) <= count:
            best, high = ranges, price
        else:
            low = price
    return _grown(values, best, count)


def _profitable(gains: Sequence[float], price: float, free: set[int] | frozenset[int]) -> list[Range]:
    """The ranges of the largest sum of gains at this price, by dynamic programming over (inside, outside)."""
    inside, outside = float("-inf"), 0.0
    entered, left = [], []  # at each token: whether the best way to be inside begins here, and to be outside ends here
    for index, gain in enumerate(gains):
        fresh = outside - (0.0 if index in free else RANGE_TOKENS * price)
        entered.append(fresh > inside)
        inside = max(inside, fresh) + gain - price
        left.append(inside > outside)
        outside = max(outside, inside)
    ranges, index = [], len(gains) - 1
    while index >= 0:
        if not left[index]:
            index -= 1
            continue
        stop = index + 1
        while not entered[index]:
            index -= 1
        ranges.append((index, stop))
        index -= 1
    return ranges[::-1]


def _grown(gains: Sequence[float], ranges: Sequence[Range], count: int) -> list[Range]:
    """What is left of the budget goes to the best neighbours of the ranges there are."""
    chosen = np.zeros(len(gains), dtype=bool)
    for start, stop in ranges:
        chosen[start:stop] = True
    left = count - int(chosen.sum())
    while left > 0:
        beside = np.flatnonzero(~chosen & (np.append(chosen[1:], False) | np.append(False, chosen[:-1]))).tolist()
        chosen[max(beside or range(len(gains)), key=lambda index: gains[index])] = True
        left -= 1
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
