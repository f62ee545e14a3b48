"""What a row of a batch costs: measured, to know which short batches take longer than a longer one.

On a CPU, llama.cpp's attention has a kernel for 64 rows and more that takes half as long per row, or a tenth. How many
rows below that are worth filling up depends on the model and on how much stands before them, so it is not written down
anywhere but learned from the steps that read prompts alone.
"""

from __future__ import annotations

import statistics
from collections import deque

from rekindle.tokens import SHORT_REST

FEWEST = 8  # rows; fewer say more of what a call costs than of what a row does
_REMEMBERED = 9  # measurements of which the middle one counts
_SURE = 1.1  # times that a short batch has to take, beyond what a full one does


class Rows:
    """Owned by the scheduler. Reads no clock itself."""

    def __init__(self) -> None:
        self._short, self._full, self._long = (deque[float](maxlen=_REMEMBERED) for _ in range(3))

    def add(self, count: int, seconds: float) -> None:
        """A step that read so many prompt tokens and did nothing else."""
        if count >= FEWEST:
            kind = self._short if count < SHORT_REST else self._full if count < 2 * SHORT_REST else self._long
            kind.append(seconds / count)

    @property
    def slow_from(self) -> int:
        """The fewest rows that take longer than SHORT_REST rows; SHORT_REST if there are none, or it is not known."""
        full = self._full or self._long
        if not self._short or not full:
            return SHORT_REST
        share = statistics.median(full) / statistics.median(self._short)
        return max(FEWEST, min(SHORT_REST, int(_SURE * SHORT_REST * share) + 1))
