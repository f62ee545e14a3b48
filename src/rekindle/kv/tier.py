"""What the store asks of a place where blocks are kept.

A tier is a small class with its sizes (and its clock, if it has one) injected. It may lose a block at any time; it must
never give a wrong one. One contract test class runs over every tier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rekindle.kv.block import Block
from rekindle.kv.keys import Key


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block is looked for. A tail is filed under its parent, so that all tails of a parent can be found."""

    key: Key
    parent: Key
    tail: bool = False


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """Totals of one tier since it was opened."""

    name: str  # "memory", "disk", "network"
    blocks: int  # kept now; for a shared tier as far as it is known
    bytes: int
    max_bytes: int | None  # None: no limit of ours
    hits: int = 0  # blocks found
    misses: int = 0
    evictions: int = 0
    faults: int = 0  # operations that failed
    corrupt: int = 0  # blocks set aside because they were not what was written
    state: str = "ok"  # "ok", or what is wrong at present, in words


class Tier(Protocol):
    """Thread-safe. Faults of the medium are raised as TierUnavailable, at once; corrupt blocks are counted misses."""

    name: str

    def get(self, places: Sequence[Place]) -> Iterator[Block | None]:
        """The blocks, in this order, each as soon as it has come; None for one that is missing. Counts as a use."""

    def contains(self, places: Sequence[Place]) -> list[bool]:
        """Which are there, without reading them or counting a use."""

    def tails(self, parent: Key) -> list[Block]:
        """All tails filed under a parent."""

    def put(self, chain: Sequence[Block]) -> None:
        """Keep the blocks of one chain, given head first. What is there already is not written again."""

    def remove(self, places: Sequence[Place]) -> None:
        """Forget these, if they are there."""

    def clear(self) -> None:
        """Forget everything."""

    def stats(self) -> TierStats: ...

    def check_integrity(self) -> None:
        """Recount from scratch. Raises AssertionError."""

    def close(self) -> None:
        """Free what is held; nothing may be called afterwards."""
