"""Who goes first when not everybody can: the order in which waiting requests are started and running ones make room.

A policy gives each request a rank; the lowest goes first, and among equals the one that arrived first. The same rank says
who is swapped out when cells run out: the highest. Nothing else is up to a policy, so a bad one can be unfair, but it can
lose or recompute nothing.

Time is counted in admissions, not in seconds: `passed` is how often a request that arrived later was started while this
one waited. A policy that prefers some requests must let `passed` win in the end, or the others starve; the ones here
state after how many admissions it does:

    fifo           a request is passed only while it waits for something of its own: KV that is fetched, or a beginning
                   that another request is reading
    priority       a request gains one priority for every `AGE_AFTER` admissions that pass it, and after `MAX_PASSED` it
                   goes before all others
    cache-aware    the longest reuse first; after `MAX_PASSED` a request goes before all others

Whoever is before all others holds the queue until there is room. A policy of your own is a subclass of `Policy`, given to
`rekindle.load(policy=...)` or `Service.open(settings, policy=...)`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from rekindle.errors import InvalidRequest

AGE_AFTER = 8  # admissions that pass a request until it counts as more urgent by one
MAX_PASSED = 64  # admissions that may pass a request at all

Rank = tuple[float, ...]


class Request(Protocol):
    """What a policy may know of a request. Read only."""

    @property
    def priority(self) -> int:
        """As the client asked: lower goes earlier, 0 unless given."""

    @property
    def passed(self) -> int:
        """Requests that arrived later and were started while this one waited."""

    @property
    def reusable(self) -> int:
        """Prompt tokens known not to need computing: in the engine, or in the store's memory. An estimate; 0 once it runs.

        Kept only for policies with `looks_at_reuse`.
        """

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def is_running(self) -> bool:
        """Whether it has been started: it runs, or was swapped out."""


class Policy:
    """First in, first out; the base of the others."""

    name: ClassVar[str] = "fifo"
    looks_at_reuse: ClassVar[bool] = False
    may_preempt: ClassVar[bool] = False  # whether `preempts` is to be asked

    def rank(self, request: Request) -> Rank:
        """The lowest goes first. Always of the same length. Called often, on the worker's thread: be quick."""
        return ()

    def preempts(self, waiting: Request, running: Request) -> bool:
        """Whether a waiting request that finds no room may swap out a running one."""
        return False


class Priority(Policy):
    """The most urgent first, by the request's `priority`, with ageing. Preempts what is less urgent."""

    name = "priority"
    may_preempt = True

    def __init__(self, age_after: int = AGE_AFTER, max_passed: int = MAX_PASSED) -> None:
        self._age_after = age_after
        self._max_passed = max_passed

    def rank(self, request: Request) -> Rank:
        if request.passed >= self._max_passed:
            return (0, 0)
        return (1, request.priority - request.passed // self._age_after)

    def preempts(self, waiting: Request, running: Request) -> bool:
        """By the priorities asked for; what a running request has gained by waiting protects it."""
        return waiting.priority < running.priority and self.rank(waiting) < self.rank(running)


class CacheAware(Policy):
    """The longest reuse first, so that KV is used while it is there (after SGLang's longest prefix match).

    SGLang: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024, section 3.
    """

    name = "cache-aware"
    looks_at_reuse = True

    def __init__(self, max_passed: int = MAX_PASSED) -> None:
        self._max_passed = max_passed

    def rank(self, request: Request) -> Rank:
        if request.passed >= self._max_passed:
            return (0, 0)
        return (1, -request.reusable)


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Policy, Priority, CacheAware)}


def policy_named(name: str) -> Policy:
    """Raises InvalidRequest for a name that none has."""
    if name not in POLICIES:
        raise InvalidRequest(f"unknown policy {name!r}; known: {', '.join(POLICIES)}", param="policy")
    return POLICIES[name]()
