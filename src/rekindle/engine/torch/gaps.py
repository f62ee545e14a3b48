"""Free cells of the pool, handed out so that a sequence's cells lie side by side.

Attention over neighbouring cells reads the pool in place, as one view; cells strewn about must be copied together first, at
each token and in each layer. So a sequence grows into the cell right behind its last one, and a new sequence begins in the
middle of the largest gap, which leaves room both for itself and for whoever ends where that gap begins.

    |aaaa|bbbbbb|........................|cc|     a gap of 24; its middle is where a new sequence begins
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rekindle.engine.sequences import FreeCells


class Gaps(FreeCells):
    """See the module's docstring. One byte per cell, 1 if free; searched only where a sequence can't simply grow."""

    def __init__(self, num_cells: int) -> None:
        self._free = bytearray(b"\x01" * num_cells)
        self._count = num_cells

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._map()).tolist())

    def take(self, count: int, after: int | None) -> list[int]:
        cells: list[int] = []
        if after is not None:
            cells += self._take_run(after + 1, count)
        while len(cells) < count:
            start, length = self._largest_gap()
            wanted = min(count - len(cells), length)
            offset = (length - wanted) // 2 if start else 0
            cells += self._take_run(start + offset, wanted)
        return cells

    def give(self, cells: Sequence[int]) -> None:
        for cell in cells:
            self._free[cell] = 1
        self._count += len(cells)

    def _take_run(self, start: int, count: int) -> list[int]:
        """Up to `count` free cells from `start` on, as far as they are neighbours."""
        if not count or start >= len(self._free) or not self._free[start]:
            return []
        end = min(start + count, len(self._free))
        taken = self._free.find(b"\x00", start, end)
        stop = end if taken < 0 else taken
        self._free[start:stop] = bytes(stop - start)
        self._count -= stop - start
        return list(range(start, stop))

    def _largest_gap(self) -> tuple[int, int]:
        """First cell and length."""
        edges = np.flatnonzero(np.diff(self._map(), prepend=np.int8(0), append=np.int8(0)))
        starts, stops = edges[::2], edges[1::2]
        best = int(np.argmax(stops - starts))
        return int(starts[best]), int(stops[best] - starts[best])

    def _map(self) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
        return np.frombuffer(self._free, dtype=np.int8)


def runs(cells: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[tuple[int, int]]:
    """Cells, in the order given, as maximal [start, stop) of neighbours."""
    if not len(cells):
        return []
    apart = cells[1:] - cells[:-1] != 1
    if not apart.any():  # as almost always, and asked for each sequence and group in each step
        return [(int(cells[0]), int(cells[-1]) + 1)]
    breaks = np.flatnonzero(apart) + 1
    starts = cells[np.concatenate(([0], breaks))]
    stops = cells[np.concatenate((breaks - 1, [-1]))] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
