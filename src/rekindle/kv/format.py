"""A block as bytes: one safetensors file, with everything in it that tells whether it may be used.

The payload is a byte tensor, the tokens and (of tails) the logits are tensors of their own. Metadata: the format's version,
the key, the parent, the position, the model's fingerprint and a checksum over tensors and metadata. Safetensors is read by
every tool of the field, and reading it can't run code.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rekindle.errors import CorruptBlock
from rekindle.kv.block import Block

VERSION = "1"
SUFFIX = ".safetensors"
Tensors = dict[str, npt.NDArray[Any]]


def encode(block: Block, fingerprint: bytes) -> bytes:
    """The file of a block."""
    tensors: Tensors = {"payload": np.frombuffer(block.payload, dtype=np.uint8), "tokens": block.tokens}
    if block.logits is not None:
        tensors["logits"] = block.logits
    facts = {
        "version": VERSION,
        "key": block.key.hex(),
        "parent": block.parent.hex(),
        "position": str(block.position),
        "fingerprint": fingerprint.hex(),
    }
    return bytes(save(tensors, metadata=facts | {"checksum": _checksum(facts, tensors)}))


def decode(data: bytes, fingerprint: bytes) -> Block:
    """The block in a file. Raises CorruptBlock unless it is whole and of this version and model."""
    try:
        tensors = load(data)
        facts = _metadata(data)
        checksum = facts.pop("checksum")
        if checksum != _checksum(facts, tensors):
            raise CorruptBlock(f"checksum {_checksum(facts, tensors)} expected, got {checksum}")
        if (facts["version"], facts["fingerprint"]) != (VERSION, fingerprint.hex()):
            raise CorruptBlock(f"version {VERSION} of {fingerprint.hex()} expected, got {facts}")
        return Block(
            bytes.fromhex(facts["key"]),
            bytes.fromhex(facts["parent"]),
            tensors["tokens"].astype(np.int32, copy=False),
            int(facts["position"]),
            tensors["payload"].data,
            tensors.get("logits"),
        )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptBlock(f"not a block: {error}") from None


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return {str(name): str(value) for name, value in metadata.items()}


def _checksum(facts: dict[str, str], tensors: Tensors) -> str:
    """Against torn and rotten files, not against forgers: fast before strong."""
    state = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        state.update(np.ascontiguousarray(tensors[name]).data)
    return state.hexdigest()
