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
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
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

Buffer = bytes | memoryview


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
    try:
        length = int.from_bytes(view[:_LENGTH_BYTES], "little")
        header = json.loads(bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + length]))
        facts = header.pop("__metadata__")
        if facts["version"] != VERSION:
            raise CorruptBlock(f"a block of version {VERSION} expected, got version {facts['version']}")
        if fingerprint is not None and facts["fingerprint"] != fingerprint.hex():
            raise CorruptBlock(f"a block of model {fingerprint.hex()} expected, got one of {facts['fingerprint']}")
        tensors = {name: _tensor(view[_LENGTH_BYTES + length :], name, header) for name in header}
        return Block(
            bytes.fromhex(facts["key"]),
            bytes.fromhex(facts["parent"]),
            tensors["tokens"],
            int(facts["position"]),
            tensors["payload"].data,
            tensors.get("logits"),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptBlock(
            f"a block expected, got a file without its parts ({type(error).__name__}: {error})"
        ) from None


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


def _tensor(data: memoryview, name: str, header: dict[str, Any]) -> npt.NDArray[Any]:
    entry = header[name]
    start, stop = entry["data_offsets"]
    if entry["dtype"] != _TENSORS[name] or not 0 <= start <= stop <= len(data):
        raise CorruptBlock(f"a tensor {name} of {_TENSORS[name]} in {len(data)} bytes expected, got {entry}")
    tensor: npt.NDArray[Any] = np.frombuffer(data[start:stop], dtype=_TYPES[entry["dtype"]])
    if [len(tensor)] != entry["shape"]:
        raise CorruptBlock(f"a tensor {name} of {len(tensor)} numbers expected, got the shape {entry['shape']}")
    return tensor


def peek(beginning: bytes) -> Front | None:
    """What the first bytes of a file say; None if they don't reach to the end of the tokens or make no sense."""
    view = memoryview(beginning)
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + length]))
        facts = header["__metadata__"]
        if facts["version"] != VERSION:
            return None
        return Front(
            bytes.fromhex(facts["key"]),
            bytes.fromhex(facts["parent"]),
            int(facts["position"]),
            _tensor(view[_LENGTH_BYTES + length :], "tokens", header).copy(),
            "logits" in header,
            bytes.fromhex(facts["fingerprint"]),
        )
    except (CorruptBlock, KeyError, ValueError, TypeError, AttributeError):
        return None


def peek_tokens(beginning: bytes) -> Tokens | None:
    """The tokens of a block whose first bytes these are, unchecked; None if they don't reach so far or make no sense."""
    view = memoryview(beginning)
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + length]))
        return _tensor(view[_LENGTH_BYTES + length :], "tokens", header)
    except (CorruptBlock, KeyError, ValueError, TypeError, AttributeError):
        return None
