"""How many tokens are computed at once between placed parts, where an engine computes some numbers faster than others.

On a CPU, llama.cpp's attention has a kernel that works on tiles of 64 rows; a batch of fewer goes through another, which
takes twice as long per row, or ten times. So a batch of 40 may take longer than one of 64, and one of 78 nearly as long as
one of 128. Where that is so (it is measured while serving), runs of computed tokens are fitted:

    shorter than a tile, but as slow     grows into what follows: more is mended in no more time
    longer                               becomes a whole number of tiles: the next larger, and what one run has too
                                         much of the next ones do without, so that in all it is hardly more than chosen

The run that ends the prompt grows into what stands before it. Only chosen beginnings of chunks are cut; where tokens were
chosen one by one, those at the end may be the ones that matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from rekindle.engine.protocol import Range
from rekindle.reuse.blend_select import FIRST, Choice
from rekindle.tokens import SHORT_REST

GROWN = "with them computing takes no longer"


def fit_rows(
    span: Range, placed: dict[int, list[Range]], choices: Sequence[Choice], slow_from: int
) -> tuple[dict[int, list[Range]], list[Choice]]:
    """Placed ranges of each chunk, and choices, of a prompt that is read from span[0] to span[1], fitted.

    Computing `slow_from` tokens or more takes longer than computing SHORT_REST, unless there are as many.
    """
    if slow_from >= SHORT_REST:
        return placed, list(choices)
    fitting = _Fitting(span[0], list(choices), slow_from)
    fitted = {index: [fit for each in placed[index] for fit in fitting.next(each)] for index in sorted(placed)}
    fitting.end(span[1], fitted)
    return fitted, sorted(fitting.choices, key=lambda choice: choice.start)


class _Fitting:
    """Goes from left to right."""

    def __init__(self, position: int, choices: list[Choice], slow_from: int) -> None:
        self.choices = choices
        self._position = position  # to which everything is computed or placed
        self._slow_from = slow_from
        self._ahead = 0  # tokens that longer runs so far have beyond what was chosen

    def next(self, place: Range) -> list[Range]:
        """What is placed of a range: nothing, it, or a little more or less at its beginning."""
        start, stop = place
        count = start - self._position
        if self._slow_from <= count < SHORT_REST:
            start = self._grow(start, min(stop, self._position + SHORT_REST))
        elif count > SHORT_REST:
            tiles = max(1, -(-(count - self._ahead) // SHORT_REST))
            end = self._position + tiles * SHORT_REST
            start = self._grow(start, min(stop, end)) if end > start else self._cut(start, end)
        if start == stop:
            return []
        if count > SHORT_REST:
            self._ahead += start - self._position - count
        self._position = stop
        return [(start, stop)]

    def end(self, total: int, fitted: dict[int, list[Range]]) -> None:
        """The last run takes of what was placed before it."""
        ranges = next((fitted[index] for index in sorted(fitted, reverse=True) if fitted[index]), None)
        if ranges and self._slow_from <= total - self._position < SHORT_REST and ranges[-1][1] == self._position:
            start, stop = ranges.pop()
            end = max(start, total - SHORT_REST)
            if start < end:
                ranges.append((start, end))
            self._grow(end, stop)

    def _grow(self, start: int, end: int) -> int:
        if start < end:
            self.choices.append(Choice(start, end, GROWN))
        return end

    def _cut(self, start: int, end: int) -> int:
        """Give back chosen tokens before `start`, down to `end` if a chunk's beginning reaches so far."""
        for index, choice in enumerate(self.choices):
            if choice.stop == start and choice.reason == FIRST:
                cut = max(end, choice.start + 1)
                self.choices[index] = Choice(choice.start, cut, FIRST)
                return cut
        return start
