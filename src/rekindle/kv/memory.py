"""The memory tier: blocks within a byte budget; a policy names those that go.

A block never stays without its predecessors: chains die from the tail. What is pinned stays, and what was just fetched for
a request that has not begun yet. Everything else may go, even what has just come, if that promises least: so the policy
decides what is admitted, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from rekindle.kv.awaited import Awaited
from rekindle.kv.block import Block
from rekindle.kv.keys import Key
from rekindle.kv.pins import Pins
from rekindle.kv.policies import DEFAULT
from rekindle.kv.shares import Share, Shares

MAX_TAILS = 256  # of one parent that are looked into

Cost = Callable[[Block], float]  # of computing a block, in any unit that stays the same


def _cost_by_tokens(block: Block) -> float:
    return len(block.tokens) or 1


class MemoryTier:
    """A byte budget of blocks. Not thread-safe; the store guards it."""

    def __init__(
        self,
        max_bytes: int,
        *,
        policy: str = DEFAULT,
        quota: float = 1.0,
        pins: Pins | None = None,
        cost: Cost = _cost_by_tokens,
    ) -> None:
        """`quota` is the part of it that one salt may have. Raises InvalidRequest for an unknown policy."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.evictions = 0
        self._blocks: dict[Key, Block] = {}
        self.get: Callable[[Key], Block | None] = self._blocks.get  # without counting a use; called for every block
        self._tails: dict[Key, dict[Key, None]] = {}  # parent -> its tails, oldest first
        self._pins = Pins(0) if pins is None else pins
        self._awaited = Awaited((max_bytes - self._pins.max_bytes) // 2)
        self._staying = _Staying(self._pins, self._awaited)
        self._shares = Shares(max_bytes, policy=policy, quota=quota)
        self._cost = cost
        self._largest = 0  # bytes of a block that was put

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def policy(self) -> str:
        """Its name."""
        return self._shares.policy

    @property
    def state(self) -> str:
        """ "ok", or what is wrong, in words."""
        if self._largest <= self.max_bytes:
            return "ok"
        return f"too small: it has {self.max_bytes:,} bytes, and a block takes up to {self._largest:,}"

    def tails(self, parent: Key) -> list[Block]:
        """The newest tails that follow a block (or a root)."""
        newest = islice(reversed(self._tails.get(parent, {})), MAX_TAILS)
        return [self._blocks[key] for key in newest]

    def put(self, root: Key, chain: Sequence[Block], *, now: float = 0.0, num_known: int | None = None) -> None:
        """Add the blocks of one chain, head first, tails last, and make room; some of these may go again at once.

        Where another block has the same key, the chain ends: what follows would be found after the wrong tokens. With
        `num_known`, they were fetched for a request, all but so many, and stay until it uses them.
        """
        share = self._shares.of(root)
        chain = self._added(share, chain)
        self._tell(share, chain)
        self._shares.changed(share)
        if num_known is not None:
            self._awaited.add(chain, num_known, now)
        self._make_room(share, now)

    def hit(self, root: Key, chain: Sequence[Key]) -> None:
        """A request uses these, given head first; some may have gone since they were looked up."""
        known = self._awaited.used(chain)
        found = next((index for index, key in enumerate(chain) if key not in self._blocks), len(chain))
        if found and known:
            self._shares.of(root).policy.hit(chain[: min(found, known)])

    def clear(self) -> None:
        """Forget all blocks, and what was learned of them."""
        for share in list(self._shares):
            while (key := share.policy.evict()) is not None:
                self._change(share, key, None)
        self._shares.clear()
        self._awaited.clear()

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        sizes = {key: block.num_bytes for key, block in self._blocks.items()}
        assert self.num_bytes == sum(sizes.values())
        assert all(key == block.key for key, block in self._blocks.items())
        tails = {key for keys in self._tails.values() for key in keys}
        assert tails == {key for key, block in self._blocks.items() if block.logits is not None}
        assert all(self._tails.values()), "an empty set of tails"
        assert all(block.position == 0 or block.parent in self._blocks for block in self._blocks.values()), "a hole"
        by_root: dict[Key, int] = {}
        for block in self._blocks.values():
            root = self._root(block)
            by_root[root] = by_root.get(root, 0) + block.num_bytes
        self._shares.check_integrity(by_root)
        assert sum(len(share.policy) for share in self._shares) == len(self._blocks)
        self._pins.check_integrity(sizes)
        self._awaited.check_integrity()
        assert self.num_bytes <= self.max_bytes

    def _root(self, block: Block) -> Key:
        while block.position:
            block = self._blocks[block.parent]
        return block.parent

    def _added(self, share: Share, chain: Sequence[Block]) -> list[Block]:
        """What of a chain is stored now."""
        added = []
        for block in chain:
            old = self._blocks.get(block.key)
            if old is not block:
                if old is not None and not old.holds(block.parent, block.position, block.tokens):
                    break
                self._change(share, block.key, block)
            added.append(block)
        return added

    def _tell(self, share: Share, chain: Sequence[Block]) -> None:
        """Tell the policy of a chain, once for each of its tails."""
        keys = [block.key for block in chain if block.logits is None]
        sizes = [block.num_bytes for block in chain if block.logits is None]
        costs = [self._cost(block) for block in chain if block.logits is None]
        untold = bool(keys)
        for tail in chain[len(keys) :]:
            depth = keys.index(tail.parent) + 1 if tail.position else 0
            untold = untold and depth < len(keys)
            share.policy.insert(
                [*keys[:depth], tail.key], [*sizes[:depth], tail.num_bytes], [*costs[:depth], self._cost(tail)]
            )
        if untold:
            share.policy.insert(keys, sizes, costs)

    def _make_room(self, share: Share, now: float) -> None:
        while self._shares.is_over(share) and self._evict(share):
            pass
        while self.num_bytes > self.max_bytes:
            self._awaited.expire(now)
            if not any(self._evict(payer) for payer in self._shares.largest_first()):
                return

    def _evict(self, share: Share) -> bool:
        """False if all of it stays."""
        victim = share.policy.evict(self._staying)
        if victim is None:
            return False
        self._change(share, victim, None)
        self.evictions += 1
        if not len(share.policy):
            self._shares.changed(share)
        return True

    def _change(self, share: Share, key: Key, block: Block | None) -> None:
        """The one place where bytes come and go."""
        old = self._blocks.pop(key, None)
        if old is not None:
            share.num_bytes -= old.num_bytes
            self.num_bytes -= old.num_bytes
            self._pins.went(key)
            if old.logits is not None:
                self._tails[old.parent].pop(key, None)
                if not self._tails[old.parent]:
                    del self._tails[old.parent]
        if block is not None:
            self._blocks[key] = block
            share.num_bytes += block.num_bytes
            self.num_bytes += block.num_bytes
            self._pins.came(key, block.num_bytes)
            self._largest = max(self._largest, block.num_bytes)
            if block.logits is not None:
                self._tails.setdefault(block.parent, {})[key] = None


class _Staying:
    """What may not go."""

    __slots__ = ("_awaited", "_pins")

    def __init__(self, pins: Pins, awaited: Awaited) -> None:
        self._pins = pins
        self._awaited = awaited

    def __contains__(self, key: object) -> bool:
        return key in self._pins or key in self._awaited
