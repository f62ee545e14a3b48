"""Whose blocks are in memory, and who pays when room is needed.

Without quotas all blocks are under one policy, whoever owns them. With quotas every salt has a share of its own: its bytes,
and its own policy over its own blocks. Then two rules hold. A share over its quota gives up blocks of its own. When the
whole is full, the largest share pays, so that all who want more end up with equally much, and nobody who has less than
that loses a block to somebody who has more (max-min fairness). Finding the largest takes O(log shares).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from rekindle.kv.keys import Key
from rekindle.kv.policies import check_policy, make_policy
from rekindle.kv.policies.lru import LRU
from rekindle.kv.policy import Policy

_EVERYBODY: Key = b""
_MAX_LEARNING = 256  # shares whose policy is the chosen one; that takes 0.1 MB each, so any more are under LRU


class Share:
    """The blocks of one salt, or of all."""

    __slots__ = ("changed", "num_bytes", "owner", "policy")

    def __init__(self, owner: Key, policy: Policy[Key]) -> None:
        self.owner = owner
        self.policy = policy
        self.num_bytes = 0
        self.changed = 0  # serial of the last time that it grew


class Shares:
    """All owners' shares of one memory tier, which counts the bytes."""

    def __init__(self, max_bytes: int, *, policy: str, quota: float) -> None:
        """`quota` is the part of the memory that one salt may have; with 1 there are no quotas. Raises InvalidRequest."""
        check_policy(policy)
        self.policy = policy
        self.max_share_bytes = int(max_bytes * quota)
        self._separate = quota < 1
        self._shares: dict[Key, Share] = {}  # only the one for everybody may be without blocks
        self._num_learning = 0  # of them, how many are under the chosen policy
        self._serial = 0
        self._heap: list[
            tuple[int, int, Key]
        ] = []  # see `_entry`; each share has one of no fewer bytes than it has now

    def of(self, root: Key) -> Share:
        """The share that this root's blocks belong to."""
        owner = root if self._separate else _EVERYBODY
        share = self._shares.get(owner)
        if share is None:
            name = self.policy if self._num_learning < _MAX_LEARNING else LRU.name
            self._num_learning += name == self.policy
            share = self._shares[owner] = Share(owner, make_policy(name, max(1, self.max_share_bytes)))
        return share

    def is_over(self, share: Share) -> bool:
        return self._separate and share.num_bytes > self.max_share_bytes

    def changed(self, share: Share) -> None:
        """To be told when a share has grown or has lost its last block."""
        if not self._separate:
            return
        if not len(share.policy):
            del self._shares[share.owner]
            self._num_learning -= share.policy.name == self.policy
            return
        self._serial += 1
        share.changed = self._serial
        heapq.heappush(self._heap, _entry(share))
        if len(self._heap) > 4 * len(self._shares) + 64:  # mostly outdated
            self._heap = [_entry(each) for each in self._shares.values()]
            heapq.heapify(self._heap)

    def largest_first(self) -> Iterator[Share]:
        """All shares; to be left as soon as one has given something up, and asked for again."""
        if not self._separate:
            yield from self._shares.values()
            return
        seen: list[tuple[int, int, Key]] = []
        try:
            while self._heap:
                entry = self._heap[0]
                share = self._shares.get(entry[-1])
                if share is None or -entry[0] < share.num_bytes or entry in seen[-1:]:
                    heapq.heappop(self._heap)  # of a share that is gone, or has a truer entry
                elif entry != _entry(share):
                    heapq.heapreplace(self._heap, _entry(share))
                else:
                    seen.append(heapq.heappop(self._heap))
                    yield share
        finally:
            for entry in seen:
                heapq.heappush(self._heap, entry)

    def clear(self) -> None:
        self._shares.clear()
        self._heap.clear()
        self._num_learning = 0

    def check_integrity(self, sizes: dict[Key, int]) -> None:
        """Recount, given the bytes of each root's blocks. Raises AssertionError."""
        bytes_of: dict[Key, int] = {}
        for root, size in sizes.items():
            owner = root if self._separate else _EVERYBODY
            bytes_of[owner] = bytes_of.get(owner, 0) + size
        learning = sum(share.policy.name == self.policy for share in self._shares.values())
        assert self._num_learning == learning
        assert {owner: share.num_bytes for owner, share in self._shares.items() if share.num_bytes} == bytes_of
        for owner, share in self._shares.items():
            share.policy.check_integrity()
            assert owner == _EVERYBODY or len(share.policy), "a share without blocks"
            assert not self._separate or any(o == owner and -size >= share.num_bytes for size, _, o in self._heap)

    def __iter__(self) -> Iterator[Share]:
        return iter(self._shares.values())


def _entry(share: Share) -> tuple[int, int, Key]:
    """Of equally large shares the one that has not grown for longest comes first."""
    return (-share.num_bytes, share.changed, share.owner)
