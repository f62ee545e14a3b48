"""Counting what comes with every token, in a fraction of a microsecond.

The Python client's histograms take a lock and walk through their buckets: too much for a thing that a small model does
thousands of times a second. Here one thread adds, without a lock, and any other may read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.utils import floatToGoString

RATE_SECONDS = 10.0  # that the present speed is taken over
_MARK_SECONDS = 0.5  # between two notes of what had been counted by then


class Times:
    """A histogram of seconds; a collector for Prometheus' registry."""

    def __init__(self, name: str, documentation: str, edges: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._edges = tuple(edges)  # upper bounds of the buckets, but for the last, which has none
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._edges, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Family]:
        bounds = [floatToGoString(edge) for edge in (*self._edges, float("inf"))]  # type: ignore[no-untyped-call]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class Rate:
    """How many of something came, in all and per second lately; a collector for Prometheus' registry."""

    def __init__(self, name: str, documentation: str, clock: Callable[[], float]) -> None:
        self.total = 0
        self._name = name
        self._documentation = documentation
        self._clock = clock
        self._started = self._marked = clock()
        # Moments and the totals before them. Replaced as a whole, never changed, for somebody may be reading.
        self._marks: tuple[tuple[float, int], ...] = ((self._started, 0),)

    def add(self, count: int, now: float) -> None:
        """`now` is the clock's."""
        if now - self._marked >= _MARK_SECONDS:
            self._marks = (*self._marks[-int(RATE_SECONDS / _MARK_SECONDS) :], (now, self.total))
            self._marked = now
        self.total += count

    def per_second(self) -> float:
        """Over the last `RATE_SECONDS`, or since the start where that is shorter; up to `_MARK_SECONDS` are missed."""
        now = self._clock()
        seconds = min(RATE_SECONDS, now - self._started)
        before = next((total for when, total in self._marks if when >= now - seconds), self.total)
        return (self.total - before) / seconds if seconds > 0 else 0.0

    def collect(self) -> Iterator[Family]:
        yield CounterMetricFamily(self._name, self._documentation, value=self.total)
