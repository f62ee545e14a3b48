"""The memory tier: blocks within a byte budget, least recently used first out, tails before heads.

A use of a chain touches its blocks from the tail to the head, so a block is never younger than its predecessor, and the
oldest block is always one that nothing depends on: chains die from the tail.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from rekindle.kv.block import Block
from rekindle.kv.keys import Key
from rekindle.kv.pins import Pins

MAX_TAILS = 256  # of one parent that are looked into


class MemoryTier:
    """A byte budget of blocks. Not thread-safe; the store guards it."""

    def __init__(self, max_bytes: int, pins: Pins | None = None) -> None:
        self.max_bytes = max_bytes
        self.pins = Pins(0) if pins is None else pins
        self.num_bytes = 0
        self.evictions = 0
        self._blocks: OrderedDict[Key, Block] = OrderedDict()  # oldest first
        self._tails: dict[Key, dict[Key, None]] = {}  # parent -> its tails, oldest first
        self._pins: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: Key) -> Block | None:
        """Without touching it."""
        return self._blocks.get(key)

    def tails(self, parent: Key) -> list[Block]:
        """The newest tails that follow a block (or a root)."""
        newest = islice(reversed(self._tails.get(parent, {})), MAX_TAILS)
        return [self._blocks[key] for key in newest]

    def put(self, chain: Iterable[Block]) -> None:
        """Add the blocks of one chain, head first, and make room. What can't fit beside the pinned is left out.

        Where another block has the same key, the chain ends: what follows would be found after the wrong tokens.
        """
        keys = []
        for block in chain:
            old = self._blocks.get(block.key)
            if old is not None and not old.holds(block.parent, block.position, block.tokens):
                break
            self._change(block.key, block)
            keys.append(block.key)
        self.touch(keys)
        self._make_room()

    def touch(self, chain: Iterable[Key]) -> None:
        """Mark the blocks of one chain, given head first, as just used."""
        for key in reversed(list(chain)):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def clear(self) -> None:
        for key in list(self._blocks):
            self._change(key, None)

    @contextmanager
    def pinned(self, keys: Iterable[Key]) -> Iterator[None]:
        """Keep these keys and what they follow while the context lasts."""
        keys = list(keys)
        for key in keys:
            self._pins[key] = self._pins.get(key, 0) + 1
        try:
            yield
        finally:
            for key in keys:
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
            self._make_room()

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        assert self.num_bytes == sum(block.num_bytes for block in self._blocks.values())
        assert all(key == block.key for key, block in self._blocks.items())
        tails = {key for keys in self._tails.values() for key in keys}
        assert tails == {key for key, block in self._blocks.items() if block.logits is not None}
        assert all(self._tails.values()), "an empty set of tails"
        assert all(block.position == 0 or block.parent in self._blocks for block in self._blocks.values()), "a hole"
        assert self.num_bytes <= self.max_bytes or self._pins
        self.pins.check_integrity({key: block.num_bytes for key, block in self._blocks.items()})

    def _make_room(self) -> None:
        if self.num_bytes <= self.max_bytes:
            return
        kept = self._pinned_chains()
        while self.num_bytes > self.max_bytes:
            victim = next((key for key in self._blocks if key not in kept and key not in self.pins), None)
            if victim is None:
                return
            self._change(victim, None)
            self.evictions += 1

    def _pinned_chains(self) -> set[Key]:
        """Pinned keys and the blocks that they follow."""
        kept: set[Key] = set()
        for key in self._pins:
            while key not in kept and (block := self._blocks.get(key)) is not None:
                kept.add(key)
                key = block.parent
        return kept

    def _change(self, key: Key, block: Block | None) -> None:
        """The one place where bytes come and go."""
        old = self._blocks.pop(key, None)
        if old is not None:
            self.num_bytes -= old.num_bytes
            self.pins.went(key)
            if old.logits is not None:
                self._tails[old.parent].pop(key, None)
                if not self._tails[old.parent]:
                    del self._tails[old.parent]
        if block is not None:
            self._blocks[key] = block
            self.num_bytes += block.num_bytes
            self.pins.came(key, block.num_bytes)
            if block.logits is not None:
                self._tails.setdefault(block.parent, {})[key] = None
