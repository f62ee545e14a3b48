"""The store: KV by prefix key, of every prompt that was read, within a budget.

A prompt is kept as a chain of whole blocks and a tail with the logits after its last token:

    | block 0 | block 1 | … | block n-1 | tail + logits |
      64        64            64          0 to 63 tokens

`match` finds the longest stored beginning of a prompt. Whole blocks must be equal; the tail of another prompt serves with
the tokens it shares. After a key match the tokens themselves are compared, so a collision can't serve other KV.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rekindle.kv.block import Block
from rekindle.kv.keys import Key, chain, root_key, tail_key
from rekindle.kv.memory import MemoryTier
from rekindle.tokens import Tokens, common_length


@dataclass(frozen=True, eq=False)
class Match:
    """The longest stored beginning of a prompt."""

    blocks: tuple[Block, ...]  # in order; the last may be a tail of which only some tokens are shared
    length: int  # tokens of the prompt that these blocks cover
    logits: npt.NDArray[np.float32] | None  # after the prompt's last token, if the whole prompt is stored


@dataclass(frozen=True)
class StoreStats:
    blocks: int
    bytes: int
    max_bytes: int
    evictions: int


class Store:
    """Thread-safe."""

    def __init__(self, fingerprint: bytes, *, max_bytes: int, block_tokens: int = 64) -> None:
        self.block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._memory = MemoryTier(max_bytes)
        self._lock = threading.Lock()

    def match(self, tokens: Tokens, salt: bytes = b"") -> Match:
        """What is stored of this prompt's beginning; counts as a use of it."""
        with self._lock:
            blocks: list[Block] = []
            root = root_key(self._fingerprint, salt)
            for parent, key, part in chain(root, tokens, self.block_tokens):
                block = self._memory.get(key)
                if block is None or not block.holds(parent, len(blocks) * self.block_tokens, part):
                    break
                blocks.append(block)
            length = len(blocks) * self.block_tokens
            parent = blocks[-1].key if blocks else root
            tail, shared = self._best_tail(parent, length, tokens[length:])
            if tail is not None and shared:
                blocks.append(tail)
            self._memory.touch(
                [block.key for block in blocks] + ([tail.key] if tail is not None and not shared else [])
            )
            whole = tail is not None and shared == len(tail.tokens) == len(tokens) - length
            return Match(tuple(blocks), length + shared, tail.logits if tail is not None and whole else None)

    def _best_tail(self, parent: Key, start: int, rest: Tokens) -> tuple[Block | None, int]:
        """The tail after `parent` that shares most with `rest`; among equals the one that is just that."""
        exact = self._memory.get(tail_key(parent, rest)) if len(rest) < self.block_tokens else None
        if exact is not None and exact.holds(parent, start, rest):
            return exact, len(rest)
        best, best_shared = None, 0
        for tail in self._memory.tails(parent):
            shared = common_length(tail.tokens, rest) if tail.position == start else 0
            if shared > best_shared:
                best, best_shared = tail, shared
        return best, best_shared

    def missing(self, tokens: Tokens, salt: bytes = b"") -> list[int]:
        """Starts of the whole blocks of this sequence that are not stored."""
        with self._lock:
            links = chain(root_key(self._fingerprint, salt), tokens, self.block_tokens)
            return [i * self.block_tokens for i, (_, key, _) in enumerate(links) if self._memory.get(key) is None]

    def put(
        self,
        tokens: Tokens,
        payloads: dict[int, memoryview],
        *,
        salt: bytes = b"",
        tails: Sequence[tuple[int, memoryview, npt.NDArray[np.float32]]] = (),
    ) -> None:
        """Store whole blocks, given as start -> payload, and tails, given as (length, payload, logits), of a sequence.

        A tail of `length` holds the tokens from the last block boundary at or before `length`. A block without all its
        predecessors is worth nothing, so the first one that is neither given nor stored ends the chain: what follows is
        left out.
        """
        root = root_key(self._fingerprint, salt)
        with self._lock:
            keys = [root]  # of the chain so far
            blocks = []
            for index, (parent, key, part) in enumerate(chain(root, tokens, self.block_tokens)):
                start = index * self.block_tokens
                known = self._memory.get(key)
                if start in payloads:
                    blocks.append(Block(key, parent, part.copy(), start, payloads[start]))
                elif known is not None and known.holds(parent, start, part):
                    blocks.append(known)
                else:
                    break
                keys.append(key)
            for length, payload, logits in tails:
                if length // self.block_tokens < len(keys):
                    parent = keys[length // self.block_tokens]
                    start = length - length % self.block_tokens
                    part = tokens[start:length].copy()
                    blocks.append(Block(tail_key(parent, part), parent, part, start, payload, logits))
            self._memory.put(blocks)

    def clear(self) -> None:
        with self._lock:
            self._memory.clear()

    def stats(self) -> StoreStats:
        with self._lock:
            memory = self._memory
            return StoreStats(len(memory), memory.num_bytes, memory.max_bytes, memory.evictions)

    def check_integrity(self) -> None:
        with self._lock:
            self._memory.check_integrity()
