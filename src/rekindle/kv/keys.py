"""Names of KV that are the same in every process and after every restart.

A prefix key says "these tokens after exactly those": each block's key covers the parent's, so equal keys mean equal
beginnings. Everything goes into the digest with its length, so no two inputs run together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from rekindle.tokens import Tokens

KEY_BYTES = 16
Key = bytes


def digest(*parts: bytes) -> Key:
    """blake2b over parts, each preceded by its length."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def root_key(fingerprint: bytes, salt: bytes) -> Key:
    """The parent of every first block of one model and one tenant."""
    return digest(b"root", fingerprint, salt)


def block_key(parent: Key, tokens: Tokens) -> Key:
    """These tokens after exactly those of `parent`."""
    return digest(b"block", parent, _bytes(tokens))


def tail_key(parent: Key, tokens: Tokens) -> Key:
    """A prompt that ends with these tokens, fewer than a block and perhaps none, after those of `parent`."""
    return digest(b"tail", parent, _bytes(tokens))


def _bytes(tokens: Tokens) -> bytes:
    """The same on every machine, whatever integer type the ids have come in."""
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def chain(root: Key, tokens: Tokens, block_tokens: int) -> Iterator[tuple[Key, Key, Tokens]]:
    """(parent, key, tokens) of each whole block, from the first on."""
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        part = tokens[start : start + block_tokens]
        key = block_key(parent, part)
        yield parent, key, part
        parent = key
