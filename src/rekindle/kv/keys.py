"""Names of stored KV.

A prefix key says "these tokens after exactly those": each block's key covers the parent's, so equal keys mean equal
beginnings. Everything goes into the digest with its length, so no two inputs run together.

Of a long prompt most of the work is hashing, one block after the other, so `chain_keys` makes each key only when it is
asked for: a look-up that ends early pays for what it has looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from rekindle.tokens import Tokens

KEY_BYTES = 16
TOKEN_BYTES = 4
_LENGTH_BYTES = 8  # of a part's length
Key = bytes


def digest(*parts: bytes) -> Key:
    """blake2b over parts, each preceded by its length."""
    return _hash(b"".join(_framed(part) for part in parts))


def root_key(fingerprint: bytes, salt: bytes) -> Key:
    """The parent of every first block of one model and one tenant."""
    return digest(b"root", fingerprint, salt)


def block_key(parent: Key, tokens: Tokens) -> Key:
    """These tokens after exactly those of `parent`."""
    return digest(b"block", parent, token_bytes(tokens))


def tail_key(parent: Key, tokens: Tokens) -> Key:
    """A prompt that ends with these tokens, fewer than a block and perhaps none, after those of `parent`."""
    return digest(b"tail", parent, token_bytes(tokens))


def token_bytes(tokens: Tokens) -> bytes:
    """The same on every machine, whatever integer type the ids have come in."""
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def chain_keys(root: Key, tokens: bytes, block_tokens: int) -> Iterator[Key]:
    """`block_key` of each whole block, from the first on, given `token_bytes` of the prompt."""
    width = block_tokens * TOKEN_BYTES
    opening = _framed(b"block") + KEY_BYTES.to_bytes(_LENGTH_BYTES, "little")
    length = width.to_bytes(_LENGTH_BYTES, "little")
    key = root
    for stop in range(width, len(tokens) + 1, width):
        key = _hash(opening + key + length + tokens[stop - width : stop])
        yield key


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(_LENGTH_BYTES, "little") + part


def _hash(data: bytes) -> Key:
    return blake2b(data, digest_size=KEY_BYTES).digest()
