"""Least recently used first, tails before heads.

A use of a chain touches its blocks from the tail to the head, so a block is never older than what follows it, and the
oldest block is always one that nothing depends on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import ClassVar

from rekindle.kv.policies.successors import Successors
from rekindle.kv.policy import K, Policy


class LRU(Policy[K]):
    """The yardstick that every other policy is measured by."""

    name: ClassVar[str] = "lru"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[K, None] = OrderedDict()  # oldest first
        self._tree: Successors[K] = Successors()

    def __len__(self) -> int:
        return len(self._order)

    def hit(self, chain: Sequence[K]) -> None:
        for key in reversed(chain):
            self._order.move_to_end(key)

    def insert(self, chain: Sequence[K], sizes: Sequence[int], costs: Sequence[float]) -> None:
        order = self._order
        for key in reversed(chain):
            order[key] = None
            order.move_to_end(key)
        self._tree.add(chain)

    def remove(self, chain: Sequence[K]) -> None:
        self._remove(chain[-1])

    def evict(self, pinned: Container[K] = ()) -> K | None:
        for _ in range(len(self._order)):
            key = next(iter(self._order))
            if key not in pinned and self._tree.is_tail(key):
                self._remove(key)
                return key
            self._order.move_to_end(key)  # pinned, or before a pinned block: counts as used when its turn comes
        return None

    def check_integrity(self) -> None:
        self._tree.check_integrity(self._order.keys())

    def _remove(self, key: K) -> None:
        del self._order[key]
        self._tree.remove(key)
