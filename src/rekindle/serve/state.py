"""What the parts of the scheduler share: the engine, who waits and who runs, and who wants to hear of it."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from rekindle.engine.protocol import Engine
from rekindle.kv.store import Store
from rekindle.reuse.plan import Plan
from rekindle.serve.observe import Observer
from rekindle.serve.policies import MAX_PASSED, Policy, Rank
from rekindle.serve.residents import Residents
from rekindle.serve.run import Run

_NOBODY = Observer()


@dataclass
class Counts:
    """Totals since the start."""

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    swaps: int = 0

    def add(self, plan: Plan) -> None:
        """A request that looks for reuse was started."""
        self.requests += 1
        self.hits += plan.reused > 1  # a beginning-of-text token, which all prompts share, saves nothing
        self.prompt_tokens += plan.total
        self.cached_tokens += plan.reused


@dataclass(eq=False)
class State:
    """The requests of one engine. A request is in one of the two lists from its arrival to its end."""

    engine: Engine
    store: Store
    residents: Residents
    policy: Policy
    observer: Observer
    max_running: int
    min_tokens: int  # fewer are neither looked for nor kept
    waiting: list[Run] = field(default_factory=list)  # in the order of arrival
    running: list[Run] = field(default_factory=list)  # in the order of their start
    counts: Counts = field(default_factory=Counts)
    departures: int = 0  # how often a running request has left; only then can there be room that was not there before
    _arrivals: int = 0

    def arrive(self, run: Run) -> None:
        self._arrivals += 1
        run.number = self._arrivals
        self.waiting.append(run)

    def enter(self, run: Run) -> None:
        """A waiting request runs: those that arrived before it have been passed."""
        self.waiting.remove(run)
        self.running.append(run)
        for earlier in self.waiting:
            if earlier.number > run.number:
                break
            earlier.passed += 1

    def planned(self, run: Run) -> None:
        """A started request has its plan."""
        assert run.plan is not None
        if run.generation.reuses and run.generation.answers:
            self.counts.add(run.plan)
        self.watching(run).admitted(run, run.plan)

    def put_back(self, run: Run) -> None:
        """A running request waits again, at its old place."""
        self.remove(run)
        insort(self.waiting, run, key=lambda each: each.number)

    def remove(self, run: Run) -> None:
        """Take a request out of its list, if it is in one."""
        if run in self.running:
            self.running.remove(run)
            self.departures += 1
        elif run in self.waiting:
            self.waiting.remove(run)

    def rank(self, run: Run) -> Rank:
        """The policy's, made different for any two requests.

        Live sessions come first, with those that were passed too often; who only warms a prompt comes last.
        """
        generation = run.generation
        is_urgent = generation.hold is not None or run.passed >= MAX_PASSED
        group = 2 if generation.warm else 0 if is_urgent else 1
        return (group, *self.policy.rank(run), run.number)

    def least_tokens(self, run: Run) -> int:
        """Fewer are not worth looking for or keeping; of what was asked to be warmed any number is."""
        return 1 if run.generation.warm else max(1, self.min_tokens)

    def watching(self, run: Run) -> Observer:
        """Who is told of a run: of one without an answer nobody, as it is no request that anybody waits for."""
        return self.observer if run.generation.answers else _NOBODY

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert all(run.seq is not None for run in self.running)
        assert all(run.seq is None for run in self.waiting)
        assert not set(self.running) & set(self.waiting)
        assert self.waiting == sorted(self.waiting, key=lambda run: run.number)
        owned = [run.seq for run in self.running] + list(self.residents.seqs)
        assert len(set(owned)) == len(owned), "a sequence with two owners"


def shares(one: Run, other: Run) -> bool:
    """Whether two requests may use each other's KV."""
    return one.generation.reuses and other.generation.reuses and one.salt == other.salt


def twins(one: Run, other: Run) -> bool:
    """Whether both answer one request that blends, and the other, by placing chunks, reads what both are to have read.

    Nobody else sees a blended sequence, but a request of several answers need not read its prompt for each of them.
    """
    mine, its = one.generation, other.generation
    is_blended = other.looking is not None or (other.plan is not None and other.plan.blended > 0)
    return is_blended and mine.prompt is its.prompt and mine.blend == its.blend and shares(one, other)
