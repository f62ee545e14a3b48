"""The memory tier: blocks within a byte budget; a policy names those that go.

A block never stays without its predecessors: chains die from the tail. What is pinned stays, and what was just fetched for
a request that has not begun yet. Everything else may go, even what has just come, if that promises least: so the policy
decides what is admitted, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice

from rekindle.kv.awaited import Awaited
from rekindle.kv.block import Block
from rekindle.kv.common import CommonMemory
from rekindle.kv.keys import Key
from rekindle.kv.pins import Pins
from rekindle.kv.policies import DEFAULT
from rekindle.kv.shares import Share, Shares
from rekindle.kv.tree import Tree

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
        block_tokens: int,
        policy: str = DEFAULT,
        quota: float = 1.0,
        pins: Pins | None = None,
        cost: Cost = _cost_by_tokens,
    ) -> None:
        """`quota` is the part of it that one salt may have. Raises InvalidRequest for an unknown policy."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.evictions = 0
        self._block_tokens = block_tokens
        self._tree = Tree(block_tokens)  # whole blocks
        self._tails: dict[Key, Block] = {}
        self._tails_of: dict[Key, dict[Key, None]] = {}  # parent -> its tails, oldest first
        self._pins = Pins(0) if pins is None else pins
        self._awaited = Awaited((max_bytes - self._pins.max_bytes) // 2)
        self._staying = _Staying(self._pins, self._awaited)
        self._shares = Shares(max_bytes, policy=policy, quota=quota)
        self._cost = cost
        self._common = CommonMemory()
        self._largest = 0  # bytes of a block that was put

    def __len__(self) -> int:
        return len(self._tree) + len(self._tails)

    def __contains__(self, key: object) -> bool:
        return key in self._tree or key in self._tails

    def get(self, key: Key) -> Block | None:
        """A block or tail; no use of it."""
        return self._tails.get(key) or self._tree.get(key)

    def longest(self, root: Key, written: bytes) -> tuple[list[Key], list[Block]]:
        """Keys and blocks of the longest beginning of a prompt, given as `token_bytes`; no use of them."""
        return self._tree.longest(root, written)

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

    @property
    def held_bytes(self) -> int:
        """With what blocks that were read together keep from being freed."""
        return self.num_bytes + self._common.num_bytes

    def tails(self, parent: Key) -> list[Block]:
        """The newest tails that follow a block (or a root)."""
        newest = islice(reversed(self._tails_of.get(parent, {})), MAX_TAILS)
        return [self._tails[key] for key in newest]

    def put(
        self,
        root: Key,
        known: Sequence[Block],
        new: Sequence[Block],
        *,
        now: float = 0.0,
        fetched: bool = False,
    ) -> None:
        """Add what is new of one chain, head first, tails last, and make room; some of it may go again at once.

        `known` are the stored blocks that it begins with. A block of which the key is known elsewhere ends the chain: what
        follows would be found after the wrong tokens. What was fetched for a request stays until that uses it.
        """
        share = self._shares.of(root)
        whole, tails = self._fitting(new)
        sizes = [block.num_bytes for block in (*whole, *tails)]
        if sizes:
            self._add(share, root, known[-1].key if known else root, whole, tails, sizes)
            self._tell(share, [block.key for block in known], whole, tails, sizes)
        self._shares.changed(share)
        if fetched:
            self._awaited.add([*known, *whole, *tails], len(known), now)
        self._make_room(share, now)

    def hit(self, root: Key, chain: Sequence[Key]) -> None:
        """A request uses these, given head first; some may have gone since they were looked up."""
        known = self._awaited.used(chain)
        found = len(chain)
        if found and chain[-1] not in self:  # chains die from the tail
            found = bisect_left(chain, True, key=lambda key: key not in self)
        if found and known:
            self._shares.of(root).policy.hit(chain[: min(found, known)])

    def clear(self) -> None:
        """Forget all blocks, and what was learned of them."""
        for share in list(self._shares):
            while (key := share.policy.evict()) is not None:
                self._remove(share, key)
        self._shares.clear()
        self._awaited.clear()

    def remove(self, root: Key, chain: Sequence[Key]) -> None:
        """Lose the last block of a chain, given head first, and all that follows it, even what is to stay."""
        share, path = self._shares.of(root), list(chain)
        while len(path) >= len(chain) and path[-1] in self:
            following = self._after(path[-1])
            if following is not None:
                path.append(following)
            else:
                share.policy.remove(path)
                self._remove(share, path.pop())
        self._shares.changed(share)

    def _after(self, key: Key) -> Key | None:
        """A tail or block that follows this one, if there is any."""
        tail = next(iter(self._tails_of.get(key, ())), None)
        return self._tree.after(key) if tail is None and key in self._tree else tail

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        self._tree.check_integrity()
        blocks = [*self._tree, *self._tails.values()]
        sizes = {block.key: block.num_bytes for block in blocks}
        assert len(sizes) == len(blocks) == len(self)
        assert self.num_bytes == sum(sizes.values())
        assert all(key == tail.key and tail.logits is not None for key, tail in self._tails.items())
        assert all(block.logits is None for block in self._tree)
        assert {key for keys in self._tails_of.values() for key in keys} == self._tails.keys()
        assert all(self._tails_of.values()), "an empty set of tails"
        by_root: dict[Key, int] = {}
        for block in blocks:
            root = self._root(block)
            by_root[root] = by_root.get(root, 0) + block.num_bytes
        self._shares.check_integrity(by_root)
        assert sum(len(share.policy) for share in self._shares) == len(blocks)
        self._pins.check_integrity(sizes)
        self._awaited.check_integrity()
        self._common.check_integrity(blocks)
        assert self.held_bytes <= self.max_bytes

    def _root(self, block: Block) -> Key:
        while block.position:
            before = self._tree.get(block.parent)
            assert before is not None, "a hole"
            block = before
        return block.parent

    def _fitting(self, new: Sequence[Block]) -> tuple[list[Block], list[Block]]:
        """Of a chain's new blocks and tails those that can be added."""
        whole: list[Block] = []
        tails: list[Block] = []
        keys: set[Key] = set()
        for block in new:
            if block.key in self._tree or block.key in keys:
                break
            tail = self._tails.get(block.key)
            if tail is None:
                (whole if block.logits is None else tails).append(block)
                keys.add(block.key)
            elif not tail.holds(block.parent, block.position, block.tokens):
                break
        return whole, tails

    def _tell(
        self, share: Share, known: list[Key], whole: Sequence[Block], tails: Sequence[Block], sizes: Sequence[int]
    ) -> None:
        """Tell the policy of a chain, once for each of its tails. Of what it knows sizes and costs don't matter."""
        keys = known + [block.key for block in whole]
        all_sizes = [0] * len(known) + list(sizes[: len(whole)])
        costs = [0.0] * len(known) + [self._cost(block) for block in whole]
        untold = bool(whole)
        for tail, size in zip(tails, sizes[len(whole) :], strict=True):
            depth = tail.position // self._block_tokens
            untold = untold and depth < len(keys)
            share.policy.insert(
                [*keys[:depth], tail.key], [*all_sizes[:depth], size], [*costs[:depth], self._cost(tail)]
            )
        if untold:
            share.policy.insert(keys, all_sizes, costs)

    def _make_room(self, share: Share, now: float) -> None:
        while self._shares.is_over(share) and self._evict(share):
            pass
        while self.held_bytes > self.max_bytes:
            self._awaited.expire(now)
            if not any(self._evict(payer) for payer in self._shares.largest_first()):
                return

    def _evict(self, share: Share) -> bool:
        """False if all of it stays."""
        victim = share.policy.evict(self._staying)
        if victim is None:
            return False
        self._remove(share, victim)
        self.evictions += 1
        if not len(share.policy):
            self._shares.changed(share)
        return True

    def _add(
        self,
        share: Share,
        root: Key,
        parent: Key,
        whole: Sequence[Block],
        tails: Sequence[Block],
        sizes: Sequence[int],
    ) -> None:
        if whole:
            self._tree.add(root, parent, whole)
        for tail in tails:
            self._tails[tail.key] = tail
            self._tails_of.setdefault(tail.parent, {})[tail.key] = None
        for block, size in zip((*whole, *tails), sizes, strict=True):
            self._count(share, size)
            self._common.came(block)
            self._pins.came(block.key, size)
        self._largest = max(self._largest, *sizes)

    def _remove(self, share: Share, key: Key) -> None:
        block = self._tails.pop(key, None)
        if block is None:
            block = self._tree.remove(key)
        else:
            siblings = self._tails_of[block.parent]
            del siblings[key]
            if not siblings:
                del self._tails_of[block.parent]
        self._count(share, -block.num_bytes)
        self._common.went(block)
        self._pins.went(key)

    def _count(self, share: Share, num_bytes: int) -> None:
        """The one place where bytes come and go."""
        share.num_bytes += num_bytes
        self.num_bytes += num_bytes


class _Staying:
    """What may not go."""

    __slots__ = ("_awaited", "_pins")

    def __init__(self, pins: Pins, awaited: Awaited) -> None:
        self._pins = pins
        self._awaited = awaited

    def __contains__(self, key: object) -> bool:
        return key in self._pins or key in self._awaited
