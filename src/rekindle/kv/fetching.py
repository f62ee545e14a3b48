"""Reading slower tiers: what one has of a prompt's beginning, from where memory's blocks end.

    memory has    | block 0 | block 1 |
    a tier has                        | block 2 | block 3 | tail |
                  | the prompt                                         |

Blocks are read in order up to the first that is missing, then the longest tail that the prompt goes on with. Each is
compared with the prompt's tokens, so a collision of keys can't serve other KV. What a tier has given before it failed is
good.

How long a token takes is measured as tiers are read, so that one from which it takes longer than computing can be left
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rekindle.errors import TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.keys import Key, tail_key
from rekindle.kv.outages import Outages
from rekindle.kv.speed import Speed
from rekindle.kv.tier import Place, Tier
from rekindle.tokens import Tokens


class Fetching:
    """Reads tiers for the store, which decides what becomes of the blocks. Thread-safe; may wait for a slow tier."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        block_tokens: int,
        is_in_memory: Callable[[Key], bool],
        clock: Callable[[], float],
    ) -> None:
        self.speeds = {tier.name: Speed() for tier in tiers}
        self._tiers = tiers
        self._block_tokens = block_tokens
        self._is_in_memory = is_in_memory
        self._clock = clock
        self._outages = Outages("read from")

    def read(self, tier: Tier, tokens: Tokens, places: Sequence[Place], known: int, root: Key) -> list[Block]:
        """The blocks and tail of a tier that go on where the first `known` of a prompt's `places` end.

        How long that took counts unless it failed; a fault is told in the log and is a miss.
        """
        blocks: list[Block] = []
        size, started = self._block_tokens, self._clock()
        try:
            for block in tier.get(places[known:]) if places[known:] else ():
                start = (known + len(blocks)) * size
                parent = places[known + len(blocks)].parent
                if block is None or not block.holds(parent, start, tokens[start : start + size]):
                    break
                blocks.append(block)
            end = known + len(blocks)
            tail = self._read_tail(tier, places[end - 1].key if end else root, tokens[end * size :])
            if tail is not None and tail.position == end * size:
                blocks.append(tail)
        except TierUnavailable as error:
            self._outages.failed(tier.name, error)  # what came before is good
        else:
            self.speeds[tier.name].add(sum(len(block.tokens) for block in blocks), self._clock() - started)
            if places[known:]:  # or else it was asked for nothing
                self._outages.worked(tier.name)
        return blocks

    def _read_tail(self, tier: Tier, parent: Key, rest: Tokens) -> Block | None:
        """The longest tail after `parent` that the rest of the prompt begins with, if it is longer than what is here."""
        longest = min(len(rest), self._block_tokens - 1)
        parts: dict[Place, Tokens] = {}
        for length in range(longest, 0 if len(rest) else -1, -1):
            key = tail_key(parent, rest[:length])
            if self._is_in_memory(key):
                break
            parts[Place(key=key, parent=parent, tail=True)] = rest[:length]
        there = tier.contains(list(parts)) if parts else []
        place = next((place for place, found in zip(parts, there, strict=True) if found), None)
        if place is None:
            return None
        tail = next(iter(tier.get([place])))
        return tail if tail is not None and np.array_equal(tail.tokens, parts[place]) else None

    def has_more(self, tier: Tier, places: Sequence[Place]) -> bool:
        """Whether a tier that is left alone has the first of these, as far as it can be asked."""
        try:
            return bool(places) and tier.contains(places[:1])[0]
        except TierUnavailable:
            return False

    def probe(self) -> None:
        """Ask every tier once; what is wrong with one is told in the log, and by its state."""
        for tier in self._tiers:
            try:
                tier.probe(writing=False)
            except TierUnavailable as error:
                self._outages.failed(tier.name, error)
