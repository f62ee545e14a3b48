"""Which stored block follows which: bookkeeping for policies that rank single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Generic

from rekindle.kv.policy import K


class Successors(Generic[K]):
    """The tree of stored blocks."""

    def __init__(self) -> None:
        self._parent: dict[K, K | None] = {}
        self._next: dict[K, set[K]] = {}  # no empty sets

    def add(self, chain: Sequence[K]) -> None:
        """Add what is missing of a chain."""
        parents = self._parent
        missing = len(chain)
        while missing and chain[missing - 1] not in parents:
            missing -= 1
        for index in range(missing, len(chain)):
            key = chain[index]
            parent = chain[index - 1] if index else None
            parents[key] = parent
            if parent is not None:
                self._next.setdefault(parent, set()).add(key)

    def remove(self, key: K) -> K | None:
        """Remove a tail; returns what it followed."""
        assert key not in self._next
        parent = self._parent.pop(key)
        if parent is not None:
            siblings = self._next[parent]
            siblings.remove(key)
            if not siblings:
                del self._next[parent]
        return parent

    def is_tail(self, key: K) -> bool:
        """Whether nothing follows it."""
        return key not in self._next

    def check_integrity(self, stored: AbstractSet[K]) -> None:
        """These and no others are in the tree, and each one's predecessor too. Raises AssertionError."""
        assert self._parent.keys() == stored
        recounted: dict[K, set[K]] = {}
        for key, parent in self._parent.items():
            if parent is not None:
                assert parent in self._parent, "a block without its predecessor"
                recounted.setdefault(parent, set()).add(key)
        assert recounted == self._next
