"""What is counted of a service: an observer that keeps Prometheus' counters and histograms.

It counts what happens to requests, on the worker's thread, in about a microsecond each time. What is a state, such as
cells in use or bytes in a tier, is not counted but read when somebody asks (`levels.py`). Nobody who asks waits for the
worker or makes it wait for more than an addition. Every service has a registry of its own, so several may live in one
process.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping

import prometheus_client as prometheus
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from rekindle.errors import RekindleError
from rekindle.kv.store import Fetched
from rekindle.reuse.plan import Compute, Fork, Place, Plan
from rekindle.serve.counting import Rate, Times
from rekindle.serve.metric_list import BY_NAME, PREFIX
from rekindle.serve.observe import Observer
from rekindle.serve.request import FinishReason
from rekindle.serve.run import Run
from rekindle.serve.slide import Slid

SOURCES = ("resident", "memory", "disk", "network", "blended", "computed")
SESSION_STATES = ("hot", "hibernating")
CHUNK_OUTCOMES = ("exact", "placed", "computed")
OUTCOMES = ("stop", "length", "cancelled", "failed", "refused")


def outcomes_of(plan: Plan) -> Iterator[str]:
    """Of each chunk of a blended prompt that is not empty."""
    for chunk in plan.chunks:
        length = chunk.stop - chunk.start
        if length:
            yield "exact" if chunk.exact == length else "placed" if chunk.placed else "computed"


def sources_of(plan: Plan, fetched: Fetched) -> dict[str, int]:
    """Prompt tokens by where their KV comes from. Their sum is the prompt's length.

    A slower tier's blocks go on where the faster one's end, so of what is placed the end came from the slowest.
    """
    counts: Tally[str] = Tally()
    for step in plan.steps:
        length = step.stop - step.start
        match step:
            case Fork():
                counts["resident"] += length - step.blended
                counts["blended"] += step.blended
            case Compute():
                counts["computed"] += length
            case Place(chunk=int()):
                counts["blended"] += length
            case Place():
                for tier, brought in reversed(fetched.tokens.items()):
                    counts[tier] += min(brought, length)
                    length -= min(brought, length)
                counts["memory"] += length
    return {source: count for source, count in counts.items() if count}


class Registry(prometheus.CollectorRegistry):
    """Without the moments at which each series was created, which the library would add to all of them."""

    def collect(self) -> Iterator[Family]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class Metrics(Observer):
    """Counts what happens. The methods that count are the worker's; the rest may be called from any thread."""

    def __init__(self) -> None:
        self.registry = Registry()
        prometheus.ProcessCollector(registry=self.registry)
        self.started = time.time()
        self._ttft = self._histogram("time_to_first_token_seconds")
        itl, generated = BY_NAME["inter_token_latency_seconds"], BY_NAME["generated_tokens"]
        self._itl = Times(PREFIX + itl.name, itl.help, itl.edges)
        self._generated = Rate(PREFIX + generated.name, generated.help, time.perf_counter)
        for collector in (self._itl, self._generated):
            self.registry.register(collector)
        self._queue = self._histogram("request_queue_seconds")
        self._restore = self._histogram("request_restore_seconds")
        self._prefill = self._histogram("request_prefill_seconds")
        self._duration = self._histogram("request_duration_seconds")
        self._http = self._counter("http_requests")
        self._requests = self._counter("requests")
        self._outcomes = {outcome: self._requests.labels(outcome) for outcome in OUTCOMES}
        prompt_tokens = self._counter("prompt_tokens")
        self._sources = {source: prompt_tokens.labels(source) for source in SOURCES}
        chunks = self._counter("chunks")
        self._chunks = {outcome: chunks.labels(outcome) for outcome in CHUNK_OUTCOMES}
        self._swaps = self._counter("swaps")
        self._evictions = self._counter("resident_evictions")
        self._sessions = self._gauge("sessions")
        self.watch_sessions(lambda: dict.fromkeys(SESSION_STATES, 0))
        self._moves = self._counter("session_window_moves")
        self._dropped = self._counter("session_dropped_tokens")
        slid = self._counter("session_slid_tokens")
        self._slid = {how: slid.labels(how) for how in ("turned", "placed")}
        self._runs: dict[Run, int] = {}  # tokens of its answer that have been counted
        self._queued: set[Run] = set()
        self._swapped: set[Run] = set()
        self._gauge("requests_running").set_function(lambda: self.num_running)
        self._gauge("requests_queued").set_function(lambda: self.num_queued)
        self._gauge("requests_swapped").set_function(lambda: self.num_swapped)

    def _histogram(self, name: str) -> prometheus.Histogram:
        metric = BY_NAME[name]
        return prometheus.Histogram(PREFIX + name, metric.help, registry=self.registry, buckets=metric.edges)

    def _counter(self, name: str) -> prometheus.Counter:
        metric = BY_NAME[name]
        return prometheus.Counter(PREFIX + name, metric.help, metric.labels, registry=self.registry)

    def _gauge(self, name: str) -> prometheus.Gauge:
        metric = BY_NAME[name]
        return prometheus.Gauge(PREFIX + name, metric.help, metric.labels, registry=self.registry)

    # What happens to requests.

    def queued(self, run: Run) -> None:
        self._runs[run] = 0
        self._queued.add(run)

    def begun(self, run: Run) -> None:
        self._queued.discard(run)
        clock = run.clock
        self._queue.observe(max(0.0, clock.admitted - clock.submitted - _fetching(run)))

    def admitted(self, run: Run, plan: Plan) -> None:
        clock, fetched, fetching = run.clock, run.fetched, _fetching(run)
        if fetching or any(isinstance(step, Place) for step in plan.steps):
            self._restore.observe(clock.restored - clock.planned + fetching)
        for source, count in sources_of(plan, fetched).items():
            self._sources[source].inc(count)
        for outcome in outcomes_of(plan):
            self._chunks[outcome].inc()

    def first_token(self, run: Run) -> None:
        clock = run.clock
        self._ttft.observe(clock.first_token - clock.arrived)
        if run.plan is not None and run.plan.computed:
            self._prefill.observe(clock.first_token - clock.restored)
        self._count_generated(run)

    def token(self, run: Run, seconds_since_last: float) -> None:
        if self._count_generated(run):
            self._itl.observe(seconds_since_last)

    def _count_generated(self, run: Run) -> int:
        """How many are new: none, if what was sampled ends the turn."""
        total = len(run.generated)
        new = total - self._runs.get(run, 0)
        if new:
            self._runs[run] = total
            self._generated.add(new, run.clock.last_token)
        return new

    def swapped(self, run: Run) -> None:
        self._swapped.add(run)
        self._swaps.inc()

    def resumed(self, run: Run) -> None:
        self._swapped.discard(run)

    def finished(self, run: Run, reason: FinishReason) -> None:
        self._ended(run)
        self._outcomes[reason].inc()
        if reason != "cancelled":
            self._duration.observe(time.perf_counter() - run.clock.arrived)

    def failed(self, run: Run, error: RekindleError) -> None:
        self._ended(run)
        self._outcomes["failed"].inc()

    def _ended(self, run: Run) -> None:
        self._runs.pop(run, None)
        self._queued.discard(run)
        self._swapped.discard(run)

    def evicted(self, tokens: int) -> None:
        self._evictions.inc()

    def slid(self, slid: Slid) -> None:
        self._slid["turned"].inc(slid.turned)
        self._slid["placed"].inc(slid.placed)

    # What only others know.

    def refused(self) -> None:
        """A request was refused before it was queued."""
        self._outcomes["refused"].inc()

    def answered(self, method: str, route: str, status: int) -> None:
        """An HTTP request got its answer. `route` must be one of few: not a path that somebody made up."""
        self._http.labels(method, route, str(status)).inc()

    def window_moved(self, dropped_tokens: int) -> None:
        """The oldest turns of a live session went, as its window was full."""
        self._moves.inc()
        self._dropped.inc(dropped_tokens)

    def watch_sessions(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Ask this, whenever somebody asks, how many live sessions there are in each state of `SESSION_STATES`."""
        for state in SESSION_STATES:
            self._sessions.labels(state).set_function(lambda state=state: count()[state])  # type: ignore[misc]

    # For people.

    @property
    def num_running(self) -> int:
        return max(0, len(self._runs) - len(self._queued) - len(self._swapped))

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_swapped(self) -> int:
        return len(self._swapped)

    @property
    def num_requests(self) -> int:
        """That have come so far, refused ones and those under way included."""
        return len(self._runs) + int(sum(_value(outcome) for outcome in self._outcomes.values()))

    @property
    def num_generated(self) -> int:
        return self._generated.total

    @property
    def prompt_tokens(self) -> dict[str, int]:
        """Of admitted requests, by source."""
        return {source: int(_value(counter)) for source, counter in self._sources.items()}

    @property
    def slid_tokens(self) -> dict[str, int]:
        """Of live sessions, by how they came to their new places."""
        return {how: int(_value(counter)) for how, counter in self._slid.items()}

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, over the last ten seconds."""
        return self._generated.per_second()

    @property
    def mean_ttft_seconds(self) -> float:
        return _mean(self._ttft)

    @property
    def mean_duration_seconds(self) -> float:
        """Of complete answers, queueing included."""
        return _mean(self._duration)


def _fetching(run: Run) -> float:
    """Seconds."""
    return max(0.0, run.clock.fetch_ended - run.clock.fetch_started)


def _samples(metric: Collector) -> dict[str, float]:
    return {sample.name: sample.value for family in metric.collect() for sample in family.samples}


def _value(counter: prometheus.Counter) -> float:
    return next(value for name, value in _samples(counter).items() if name.endswith("_total"))


def _mean(histogram: prometheus.Histogram) -> float:
    values = {name.rpartition("_")[2]: value for name, value in _samples(histogram).items()}
    return values["sum"] / values["count"] if values["count"] else 0.0
