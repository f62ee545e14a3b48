"""Which block goes when room is needed: what a tier tells a policy, and what it asks. The policies are in `policies`.

A policy sees the chains that are used and stored, and names victims. It never sees payloads, holds no thread and reads no
clock: its time is the volume that was asked for. A tier uses it like this:

    policy.hit(keys[:found])                 # a request used the stored beginning of a chain; once per request
    policy.insert(keys, sizes, costs)        # all of this chain is stored now
    while too_large:
        key = policy.evict(pinned)           # the block that can best be spared; it may be one that has just come:
        …                                    # this is how a policy refuses to admit
    policy.remove(keys)                      # the last one is gone for another reason

Chains die from the tail: a victim is never the predecessor of a stored block. All operations cost O(1) or O(log n),
amortised, per block or better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Sequence
from typing import ClassVar, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Policy(ABC, Generic[K]):
    """Chooses victims among the blocks of one tier. Not thread-safe; the tier guards it.

    A chain is a sequence of keys, head first, each of which stands for all before it: a key never has two predecessors.
    """

    name: ClassVar[str]

    def __init__(self, capacity: int) -> None:
        """For a tier that holds about this much, in the unit of `sizes`. The tier keeps the budget, not the policy."""
        assert capacity > 0
        self.capacity = capacity

    @abstractmethod
    def __len__(self) -> int:
        """Blocks that are stored, as far as the policy knows."""

    @abstractmethod
    def hit(self, chain: Sequence[K]) -> None:
        """A request used these blocks, all of them stored."""

    @abstractmethod
    def insert(self, chain: Sequence[K], sizes: Sequence[int], costs: Sequence[float]) -> None:
        """All blocks of this chain are stored now; for those that were already, this is no use, and the rest doesn't count.

        `costs` is what computing each block takes, in any unit that stays the same (seconds, say).
        """

    @abstractmethod
    def remove(self, chain: Sequence[K]) -> None:
        """The last block of this chain, which nothing stored follows, is gone, though it is no victim."""

    @abstractmethod
    def evict(self, pinned: Container[K] = ()) -> K | None:
        """The next victim, which counts as gone from here on; None if there is none but pinned ones and their heads."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Recount from scratch. Raises AssertionError."""
