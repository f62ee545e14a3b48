"""A block as a file: what goes in comes out, every tool can read it, and no changed byte goes unnoticed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load
from tests.kv.samples import FINGERPRINT, facts, make_chain, make_tail

from rekindle.errors import CorruptBlock
from rekindle.kv.block import Block
from rekindle.kv.format import decode, encode, encode_parts, peek
from rekindle.tokens import as_tokens

BLOCK, TAIL = make_chain(1, 1, tail=3)
EMPTY_TAIL = make_tail(BLOCK.key, as_tokens([]), 4)
BLOCKS = pytest.mark.parametrize("block", [BLOCK, TAIL, EMPTY_TAIL], ids=["block", "tail", "empty tail"])


@BLOCKS
def test_what_goes_in_comes_out(block: Block) -> None:
    assert facts(decode(encode(block, FINGERPRINT), FINGERPRINT)) == facts(block)


@BLOCKS
def test_it_is_a_file_that_other_tools_read(block: Block) -> None:
    tensors = load(encode(block, FINGERPRINT))
    assert tensors["payload"].tobytes() == bytes(block.payload)
    assert tensors["tokens"].tolist() == block.tokens.tolist()
    assert ("logits" in tensors) == (block.logits is not None)


def test_nothing_is_copied() -> None:
    """Neither on the way out nor on the way in: the payload is most of the memory."""
    payload = encode_parts(BLOCK, FINGERPRINT)[-1]
    assert np.shares_memory(np.frombuffer(payload, dtype=np.uint8), np.frombuffer(BLOCK.payload, dtype=np.uint8))
    data = np.frombuffer(encode(TAIL, FINGERPRINT), dtype=np.uint8)
    block = decode(data.data, FINGERPRINT)
    assert block.logits is not None
    assert all(np.shares_memory(data, part) for part in (block.payload, block.tokens, block.logits))


def test_tensors_are_aligned() -> None:
    data = encode(TAIL, FINGERPRINT)
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 64 == 0
    assert json.loads(data[8:start])["tokens"]["data_offsets"][0] == 0


@BLOCKS
def test_every_changed_bit_is_noticed(block: Block) -> None:
    data = bytearray(encode(block, FINGERPRINT))
    for index in range(len(data)):
        for bit in range(8):
            data[index] ^= 1 << bit
            with pytest.raises(CorruptBlock):
                decode(bytes(data), FINGERPRINT)
            data[index] ^= 1 << bit


@BLOCKS
def test_every_cut_is_noticed(block: Block) -> None:
    data = encode(block, FINGERPRINT)
    for length in range(len(data)):
        with pytest.raises(CorruptBlock):
            decode(data[:length], FINGERPRINT)
    with pytest.raises(CorruptBlock):
        decode(data + b"\0", FINGERPRINT)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptBlock):
        decode(data, FINGERPRINT)


def test_a_torn_file_of_zeros_is_refused() -> None:
    """What a file system may leave of a file after a power failure."""
    data = encode(BLOCK, FINGERPRINT)
    for kept in range(0, len(data), 64):
        with pytest.raises(CorruptBlock):
            decode(data[:kept] + bytes(len(data) - kept), FINGERPRINT)


def test_another_model_and_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(BLOCK, b"g" * 16)
    with pytest.raises(CorruptBlock, match="a block of model 66666666"):
        decode(data, FINGERPRINT)
    assert facts(decode(data, None)) == facts(BLOCK)
    monkeypatch.setattr("rekindle.kv.format.VERSION", "2")
    newer = encode(BLOCK, FINGERPRINT)
    monkeypatch.undo()
    with pytest.raises(CorruptBlock, match="version 1 expected, got version 2"):
        decode(newer, FINGERPRINT)


def test_what_a_block_is_is_found_at_the_beginning() -> None:
    data = encode(TAIL, FINGERPRINT)
    start = 8 + int.from_bytes(data[:8], "little")
    front = peek(data[: start + 4 * len(TAIL.tokens)])
    assert front is not None and front.tokens.tolist() == TAIL.tokens.tolist()
    assert (front.key, front.parent, front.position) == (TAIL.key, TAIL.parent, TAIL.position)
    assert (front.tail, front.fingerprint) == (True, FINGERPRINT)
    for length in range(start + 4 * len(TAIL.tokens)):
        assert peek(data[:length]) is None
    assert peek(bytes(100)) is None
