"""Greedy dual: uses plus the age at which a block came, least first (Cherkasova's GDSF; here cost over size is 1).

Computing KV costs nearly as much as there are tokens, and so does keeping it; what is left of GDSF's value, uses times
cost over size, is the number of uses. "Age" is the value of the last victim: what is used no more is overtaken in the end.
Uses of evicted blocks are remembered, which helps a lot.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Sequence
from typing import ClassVar

from rekindle.kv.policies.successors import Successors
from rekindle.kv.policy import K, Policy

_REMEMBERED = 1 << 20  # keys whose number of uses is kept


class GDSF(Policy[K]):
    """Of equal blocks, the deepest goes first."""

    name: ClassVar[str] = "gdsf"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._age = 0
        self._uses: dict[K, int] = {}  # also of blocks that are gone
        self._value: dict[K, tuple[int, int, int]] = {}  # of stored blocks: value, minus depth, serial of the last use
        self._heap: list[tuple[tuple[int, int, int], K]] = []  # of tails; others and outdated ones are skipped
        self._tree: Successors[K] = Successors()
        self._serial = 0

    def __len__(self) -> int:
        return len(self._value)

    def hit(self, chain: Sequence[K]) -> None:
        for depth, key in enumerate(chain):
            self._use(key, depth)
        self._offer(chain[-1:])

    def insert(self, chain: Sequence[K], sizes: Sequence[int], costs: Sequence[float]) -> None:
        for depth, key in enumerate(chain):
            if key not in self._value:
                self._use(key, depth)
        self._tree.add(chain)
        self._offer(chain[-1:])

    def remove(self, chain: Sequence[K]) -> None:
        self._remove(chain[-1])

    def evict(self, pinned: Container[K] = ()) -> K | None:
        spared: list[K] = []
        victim: K | None = None
        while self._heap:
            value, key = heapq.heappop(self._heap)
            if self._value.get(key) != value or not self._tree.is_tail(key):
                continue
            if key in pinned:
                spared.append(key)
                continue
            self._age = max(self._age, value[0])
            victim = key
            self._remove(key)
            break
        for key in spared:  # pinned blocks count as used when their turn comes
            self._use(key, -self._value[key][1])
            self._offer([key])
        return victim

    def check_integrity(self) -> None:
        self._tree.check_integrity(self._value.keys())
        offered = {key for value, key in self._heap if self._value.get(key) == value}
        assert all(key in offered for key in self._value if self._tree.is_tail(key)), "a tail that is not in the heap"

    def _use(self, key: K, depth: int) -> None:
        uses = self._uses.pop(key, 0) + 1  # popped, so that the dictionary is in the order of the last use
        self._uses[key] = uses
        if len(self._uses) > _REMEMBERED:
            del self._uses[next(iter(self._uses))]
        self._serial += 1
        self._value[key] = (self._age + uses, -depth, self._serial)

    def _offer(self, keys: Sequence[K]) -> None:
        for key in keys:
            if self._tree.is_tail(key):
                heapq.heappush(self._heap, (self._value[key], key))
        if len(self._heap) > 4 * len(self._value) + 64:  # mostly outdated
            self._heap = [(value, key) for key, value in self._value.items() if self._tree.is_tail(key)]
            heapq.heapify(self._heap)

    def _remove(self, key: K) -> None:
        del self._value[key]
        parent = self._tree.remove(key)
        if parent is not None:
            self._offer([parent])
