"""Chains of blocks to keep in tiers, each with a payload that follows from its key, so that a wrong one is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from rekindle.kv.block import Block
from rekindle.kv.keys import Key, block_key, root_key, tail_key
from rekindle.kv.tier import Place
from rekindle.tokens import Tokens

FINGERPRINT = b"f" * 16
SIZE = 4  # tokens per block


class Clock:
    """Stands still until it is moved."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def chain(root: Key, tokens: Tokens, block_tokens: int) -> Iterator[tuple[Key, Key, Tokens]]:
    """(parent, key, tokens) of each whole block, from the first on, by the definition of a key."""
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        part = tokens[start : start + block_tokens]
        key = block_key(parent, part)
        yield parent, key, part
        parent = key


def payload_of(key: Key, length: int) -> bytes:
    return hashlib.shake_128(key).digest(length)


def make_chain(
    seed: int, count: int, *, payload_bytes: int = 100, salt: bytes = b"", tail: int | None = None
) -> list[Block]:
    """`count` whole blocks, and with `tail` a tail of so many tokens."""
    parent = root_key(FINGERPRINT, salt)
    tokens = np.random.default_rng(seed).integers(0, 1 << 30, (count + 1) * SIZE).astype(np.int32)
    blocks = []
    for index in range(count):
        part = tokens[index * SIZE : (index + 1) * SIZE]
        key = block_key(parent, part)
        blocks.append(Block(key, parent, part, index * SIZE, memoryview(payload_of(key, payload_bytes))))
        parent = key
    if tail is not None:
        blocks.append(make_tail(parent, tokens[count * SIZE : count * SIZE + tail], count * SIZE, payload_bytes))
    return blocks


def make_tail(parent: Key, tokens: Tokens, position: int, payload_bytes: int = 100) -> Block:
    key = tail_key(parent, tokens)
    payload = payload_of(key, payload_bytes if len(tokens) else 0)
    logits = np.frombuffer(payload_of(key, 40), dtype=np.uint8).astype(np.float32)
    return Block(key, parent, tokens, position, memoryview(payload), logits)


def facts(block: Block | None) -> object:
    """A block as something that can be compared; None for none."""
    if block is None:
        return None
    logits = None if block.logits is None else block.logits.tobytes()
    return (block.key, block.parent, block.position, block.tokens.tobytes(), bytes(block.payload), logits)


def all_facts(blocks: Iterator[Block | None] | Sequence[Block | None]) -> list[object]:
    return [facts(block) for block in blocks]


def other_kind(block: Block) -> Place:
    """Where this key would be, were it not a tail, or the other way round."""
    return Place(key=block.key, parent=block.parent, tail=block.logits is None)
