"""What happens to requests, told to whoever wants to count, trace or log it.

An `Observer` overrides what it is interested in; everything else does nothing. All methods are called on the scheduler's
thread, between or inside steps, so they must be quick and must not block. They may read a run (its clock, plan, counts),
and must change nothing.

A run is told of in this order, and exactly one of the last two comes, once:

    queued -> admitted -> (first_token -> token ...) -> finished | failed
                  ^ swapped -> resumed ^

A request that is refused before it is queued (the queue is full, the prompt is too long) is the caller's to count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rekindle.errors import RekindleError
from rekindle.reuse.plan import Plan
from rekindle.serve.request import FinishReason

if TYPE_CHECKING:
    from rekindle.serve.run import Run
    from rekindle.serve.scheduler import Step
    from rekindle.serve.slide import Slid

_log = logging.getLogger(__name__)


class Observer:
    """Base class: hears everything, does nothing."""

    def queued(self, run: Run) -> None:
        """A request came in; `run.clock` has its arrival."""

    def begun(self, run: Run) -> None:
        """It left the queue and has a sequence; `run.clock` has the moments."""

    def admitted(self, run: Run, plan: Plan) -> None:
        """Its plan is made, at once or when it was seen what to compute, and what is reused is in the engine; `run.clock`
        has the moments, `run.fetch` the fetch.
        """

    def first_token(self, run: Run) -> None:
        """Its first token was sampled, at `run.clock.first_token`."""

    def token(self, run: Run, seconds_since_last: float) -> None:
        """A token after the first was sampled."""

    def swapped(self, run: Run) -> None:
        """Its KV was taken out of the engine to make room; it waits."""

    def resumed(self, run: Run) -> None:
        """Its KV is back in the engine."""

    def finished(self, run: Run, reason: FinishReason) -> None:
        """Its answer is complete, or it was cancelled, perhaps before it was admitted."""

    def failed(self, run: Run, error: RekindleError) -> None:
        """It could not be finished; its sink has got the error."""

    def evicted(self, tokens: int) -> None:
        """An idle sequence of so many tokens left the engine."""

    def slid(self, slid: Slid) -> None:
        """The oldest turns of a live session were cut out, and what followed has come to its new place."""

    def stepped(self, step: Step) -> None:
        """A step has ended, an idle one included."""


class Observers(Observer):
    """Tells several. One that raises is logged and told nothing more: watching must not disturb."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._all = list(observers)

    def queued(self, run: Run) -> None:
        self._tell(lambda observer: observer.queued(run))

    def begun(self, run: Run) -> None:
        self._tell(lambda observer: observer.begun(run))

    def admitted(self, run: Run, plan: Plan) -> None:
        self._tell(lambda observer: observer.admitted(run, plan))

    def first_token(self, run: Run) -> None:
        self._tell(lambda observer: observer.first_token(run))

    def token(self, run: Run, seconds_since_last: float) -> None:
        self._tell(lambda observer: observer.token(run, seconds_since_last))

    def swapped(self, run: Run) -> None:
        self._tell(lambda observer: observer.swapped(run))

    def resumed(self, run: Run) -> None:
        self._tell(lambda observer: observer.resumed(run))

    def finished(self, run: Run, reason: FinishReason) -> None:
        self._tell(lambda observer: observer.finished(run, reason))

    def failed(self, run: Run, error: RekindleError) -> None:
        self._tell(lambda observer: observer.failed(run, error))

    def evicted(self, tokens: int) -> None:
        self._tell(lambda observer: observer.evicted(tokens))

    def slid(self, slid: Slid) -> None:
        self._tell(lambda observer: observer.slid(slid))

    def stepped(self, step: Step) -> None:
        self._tell(lambda observer: observer.stepped(step))

    def _tell(self, news: Callable[[Observer], None]) -> None:
        for observer in list(self._all):
            try:
                news(observer)
            except Exception:
                _log.exception("an observer failed; %r hears nothing more", observer)
                self._all.remove(observer)
