"""Blocks that were fetched from a slower tier for a request that has not used them yet.

They may not go, or fetching them was in vain: a policy that judges what has just come may well send it away again. They are
let go when the request uses the chain, and after a while if it never does. No more than `max_bytes` are held, of each chain
the head first.

They also count differently: a request that waits for blocks and then finds them in memory has used those once, not twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.kv.block import Block
from rekindle.kv.keys import Key

_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Lease:
    keys: tuple[Key, ...]  # from the head on
    num_known: int  # of these, how many were in memory before
    num_bytes: int
    ends: float


class Awaited:
    """Not thread-safe; the store guards it. `key in awaited`: it may not go."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0  # what leases share counts for each
        self._leases: dict[Key, _Lease] = {}  # by last key, which ends first first
        self._counts: dict[Key, int] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._counts

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, blocks: Sequence[Block], num_known: int, now: float) -> None:
        """Hold a chain, given head first, of which the first `num_known` blocks have not just come."""
        self.expire(now)
        keys: list[Key] = []
        num_bytes = 0
        for block in blocks:
            if self.num_bytes + num_bytes + block.num_bytes > self.max_bytes:
                break
            keys.append(block.key)
            num_bytes += block.num_bytes
        if len(keys) > num_known:
            self._remove(keys[-1])
            self._leases[keys[-1]] = _Lease(tuple(keys), num_known, num_bytes, now + _PATIENCE_SECONDS)
            self.num_bytes += num_bytes
            for key in keys:
                self._counts[key] = self._counts.get(key, 0) + 1

    def used(self, chain: Sequence[Key]) -> int:
        """A request uses these: end what was held for it. Returns how many of them it did not have to wait for."""
        known = len(chain)
        if self._leases:
            for last in self._leases.keys() & set(chain):
                known = min(known, self._leases[last].num_known)
                self._remove(last)
        return known

    def expire(self, now: float) -> None:
        while self._leases and next(iter(self._leases.values())).ends <= now:
            self._remove(next(iter(self._leases)))

    def clear(self) -> None:
        for last in list(self._leases):
            self._remove(last)

    def _remove(self, last: Key) -> None:
        lease = self._leases.pop(last, None)
        if lease is not None:
            self.num_bytes -= lease.num_bytes
            for key in lease.keys:
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        counts: dict[Key, int] = {}
        for lease in self._leases.values():
            for key in lease.keys:
                counts[key] = counts.get(key, 0) + 1
        assert counts == self._counts
        assert self.num_bytes == sum(lease.num_bytes for lease in self._leases.values())
