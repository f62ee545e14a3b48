"""A block as bytes: one safetensors file, with everything in it that tells whether it may be used.

    | 8: header's length | header: JSON, padded | tokens | logits (of tails) | payload |
                           ^ begins with the checksum of all bytes but its own

The tokens, the logits and the payload are tensors; the payload, which only the engine can read, is one of bytes. Metadata:
the format's version, the key, the parent, the position, the model's fingerprint and the checksum. Safetensors is read by
every tool of the field, and reading it can't run code. The checksum stands at a fixed place at the front, so one pass over
the bytes as they lie tells whether any of them is not what was written, and the tensors are then views of them, not copies.
"""

from __future__ import annotations

import json
import re
from binascii import unhexlify
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash

from rekindle.errors import CorruptBlock
from rekindle.kv.block import Block
from rekindle.tokens import Tokens

VERSION = "1"
SUFFIX = ".safetensors"

_ALIGNMENT = 64  # of the first tensor, which is the tokens; the logits follow aligned to 4
_LENGTH_BYTES = 8
_OPENING = b'{"__metadata__":{"checksum":"'
_CHECKSUM = slice(_LENGTH_BYTES + len(_OPENING), _LENGTH_BYTES + len(_OPENING) + 32)  # in hex
_TYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_TENSORS = {"tokens": "I32", "logits": "F32", "payload": "U8"}
_LAYOUT = tuple((name.encode(), kind.encode()) for name, kind in _TENSORS.items())

Buffer = bytes | memoryview

_HEX, _NUMBER = rb"((?:[0-9a-f]{2})*)", rb"([0-9]{1,18})"
_TENSOR = rb'"%s":\{"dtype":"%s","shape":\[' + _NUMBER + rb'\],"data_offsets":\[([0-9,]+)\]\}'
_IDENTITY = re.compile(  # just as `_header` writes it: what it has not written has no checksum of ours anyway
    rb'\{"__metadata__":\{"checksum":"[0-9a-f]{32}","version":"([0-9a-z.]*)",'
    + b'"key":"%s","parent":"%s","position":"%s"' % (_HEX, _HEX, _NUMBER)
)
_REST = re.compile(b',"fingerprint":"%s"' % _HEX + rb"\},%s,(?:%s,)?%s\} *" % tuple(_TENSOR % each for each in _LAYOUT))


class _Header(NamedTuple):  # which is made a good deal faster than a frozen dataclass
    """What a header says, with the places of the tensors in the file."""

    version: str
    key: bytes
    parent: bytes
    position: int
    fingerprint: bytes
    tokens: slice
    logits: slice | None
    payload: slice


@dataclass(frozen=True, eq=False, slots=True)
class Front:
    """What the beginning of a file says of its block, unchecked."""

    key: bytes
    parent: bytes
    position: int  # of the first token
    tokens: Tokens
    tail: bool
    fingerprint: bytes

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.position + len(self.tokens)


def encode(block: Block, fingerprint: bytes) -> bytes:
    """The file of a block."""
    return b"".join(encode_parts(block, fingerprint))


def encode_parts(block: Block, fingerprint: bytes) -> list[Buffer]:
    """The file of a block as buffers to be written one after another; the payload is not copied."""
    tensors = {"tokens": np.ascontiguousarray(block.tokens, dtype="<i4").data.cast("B")}
    if block.logits is not None:
        tensors["logits"] = np.ascontiguousarray(block.logits, dtype="<f4").data.cast("B")
    tensors["payload"] = np.frombuffer(block.payload, dtype=np.uint8).data
    opening, rest = _header(block, fingerprint, {name: len(data) for name, data in tensors.items()})
    state = xxhash.xxh3_128(opening)
    state.update(rest)
    for data in tensors.values():
        state.update(data)
    return [opening + state.hexdigest().encode() + rest, *tensors.values()]


def decode(data: Buffer, fingerprint: bytes | None) -> Block:
    """The block in a file, as views of `data`. Raises CorruptBlock unless it is whole and of this version and model.

    Without a fingerprint the block of any model will do.
    """
    view = memoryview(data)
    _check_whole(view)
    header = _read_header(view)
    if header is None:
        raise CorruptBlock("a block expected, got a file whose header is none of a block")
    if header.version != VERSION:
        raise CorruptBlock(f"a block of version {VERSION} expected, got version {header.version}")
    if fingerprint is not None and header.fingerprint != fingerprint:
        raise CorruptBlock(f"a block of model {fingerprint.hex()} expected, got one of {header.fingerprint.hex()}")
    if header.payload.stop != len(view):
        raise CorruptBlock(f"a file of {header.payload.stop} bytes expected, got {len(view)} bytes")
    return Block(
        header.key,
        header.parent,
        np.frombuffer(view[header.tokens], dtype=_TYPES["I32"]),
        header.position,
        view[header.payload],
        None if header.logits is None else np.frombuffer(view[header.logits], dtype=_TYPES["F32"]),
    )


def _header(block: Block, fingerprint: bytes, sizes: dict[str, int]) -> tuple[bytes, bytes]:
    """What comes before the checksum, and what between it and the first tensor."""
    facts = {
        "version": VERSION,
        "key": block.key.hex(),
        "parent": block.parent.hex(),
        "position": str(block.position),
        "fingerprint": fingerprint.hex(),
    }
    entries: dict[str, Any] = {}
    start = 0
    for name, size in sizes.items():
        kind = _TENSORS[name]
        shape = [size // _TYPES[kind].itemsize]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    rest = f'",{_compact(facts)[1:]},{_compact(entries)[1:]}'.encode()
    length = len(_OPENING) + 32 + len(rest)
    padding = -(_LENGTH_BYTES + length) % _ALIGNMENT
    return (length + padding).to_bytes(_LENGTH_BYTES, "little") + _OPENING, rest + b" " * padding


def _compact(facts: dict[str, Any]) -> str:
    return json.dumps(facts, separators=(",", ":"))


def _check_whole(view: memoryview) -> None:
    """Raises CorruptBlock if any byte is not what was written. Against rot and tearing, not against forgers."""
    if view[_LENGTH_BYTES : _CHECKSUM.start] != _OPENING:
        raise CorruptBlock("a block expected, got a file that doesn't begin like one")
    state = xxhash.xxh3_128(view[: _CHECKSUM.start])
    state.update(view[_CHECKSUM.stop :])
    expected = bytes(view[_CHECKSUM])
    if state.hexdigest().encode() != expected:
        raise CorruptBlock(f"bytes with the checksum {expected!r} expected, got {state.hexdigest()}")


def _read_header(view: memoryview) -> _Header | None:
    """None if a file that begins so is no block's, or if its header goes on behind these bytes."""
    start = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    header = bytes(view[_LENGTH_BYTES:start])
    match = _IDENTITY.match(header)
    rest = None if match is None else _read_rest(header[match.end() :])
    if match is None or rest is None:
        return None
    version, key, parent, position = match.groups()
    fingerprint, num_tokens, num_logits, num_bytes = rest
    tokens = slice(start, start + 4 * num_tokens)
    logits = None if num_logits is None else slice(tokens.stop, tokens.stop + 4 * num_logits)
    after = (logits or tokens).stop
    payload = slice(after, after + num_bytes)
    return _Header(
        version.decode(), unhexlify(key), unhexlify(parent), int(position), fingerprint, tokens, logits, payload
    )


@lru_cache(maxsize=256)
def _read_rest(rest: bytes) -> tuple[bytes, int, int | None, int] | None:
    """Fingerprint and numbers of tokens, logits and bytes, from a header behind its position; None if it makes no sense.

    There it is the same for all blocks of a model that have as many tokens, so it is read once.
    """
    match = _REST.fullmatch(rest)
    if match is None:
        return None
    fingerprint, tokens, tokens_at, logits, logits_at, payload, payload_at = match.groups()
    num_tokens, num_logits, num_bytes = int(tokens), None if logits is None else int(logits), int(payload)
    ends = [4 * num_tokens, 4 * (num_tokens + (num_logits or 0)), 4 * (num_tokens + (num_logits or 0)) + num_bytes]
    expected = [b"%d,%d" % place for place in zip([0, *ends], ends, strict=False)]
    if [tokens_at, logits_at or expected[1], payload_at] != expected:
        return None
    return unhexlify(fingerprint), num_tokens, num_logits, num_bytes


def fingerprint_of(beginning: bytes) -> bytes | None:
    """Of the model whose block begins so; None if these bytes don't reach to the end of the header or make no sense."""
    header = _read_header(memoryview(beginning))
    return None if header is None or header.version != VERSION else header.fingerprint


def peek(beginning: bytes) -> Front | None:
    """What the first bytes of a file say; None if they don't reach to the end of the tokens or make no sense."""
    view = memoryview(beginning)
    header = _read_header(view)
    if header is None or header.version != VERSION or len(view) < header.tokens.stop:
        return None
    tokens = np.frombuffer(view[header.tokens], dtype=_TYPES["I32"]).copy()
    return Front(header.key, header.parent, header.position, tokens, header.logits is not None, header.fingerprint)
