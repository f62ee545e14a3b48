"""Joining saved states: what comes out is the state that llama.cpp saves of all cells at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine.test_llama import TOKENS, opened, read

from rekindle.engine.pieces import Joiner, unpack
from rekindle.engine.protocol import Payload
from rekindle.engine.saved_join import MAX_JOINED_BYTES, MAX_STATE_BYTES, join
from rekindle.model import ember
from rekindle.tokens import as_tokens


@pytest.mark.parametrize("shape", ["ember", "tiny-llama", "tiny-qwen3", "tiny-gemma3"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_joined_state_is_the_state_of_the_whole(shape: str, kv_type: str, tiny_models: dict[str, Path]) -> None:
    with opened(tiny_models.get(shape, ember.weights_path()), kv_type) as engine:
        seq = read(engine)
        whole = engine.export(seq, 0, 24)
        blocks = [engine.export(seq, start, start + 8) for start in range(0, 24, 8)]
        (joined,) = Joiner(engine.spec.fingerprint).joined(blocks)
        assert bytes(joined.data) == bytes(whole.data)
        assert joined.position == 0 and (joined.tokens == TOKENS[:24]).all()


def test_what_does_not_follow_or_differs_stays_alone() -> None:
    with opened(ember.weights_path()) as engine:
        seq = read(engine)
        blocks = [engine.export(seq, start, start + 8) for start in (0, 16, 24)]
        tail = engine.export(seq, 32, 37)
        joiner = Joiner(engine.spec.fingerprint)
        lengths = [len(payload) for payload in joiner.joined([*blocks, tail])]
        assert lengths == [8, 16, 5]
        assert [len(payload) for payload in Joiner(b"another").joined(blocks)] == [8, 8, 8]


def test_states_of_other_kinds_or_torn_are_not_joined(tiny_models: dict[str, Path]) -> None:
    room = np.empty(MAX_JOINED_BYTES, np.uint8)
    with opened(ember.weights_path()) as engine:
        seq = read(engine)
        one, other = (unpack(engine.export(seq, start, start + 8))[0][2] for start in (0, 8))
        size = join([one, other], room)
        assert size is not None and size > len(one)
        assert join([one, other[:-1]], room) is None
        assert join([one[:-9], other[:-9]], room) is None
        assert join([one, other], room[: 2 * len(one) - 1]) is None
        strange = bytearray(other)
        offset = 8 + 8 + 8 * 12 + 8  # the first tensor's type
        strange[offset] ^= 1
        assert join([one, memoryview(strange)], room) is None


def test_large_states_stay_alone() -> None:
    size = MAX_STATE_BYTES + 1
    tokens = as_tokens(range(8))
    large = [Payload(tokens, 8 * index, memoryview(bytes(size)), b"") for index in range(3)]
    assert list(Joiner(b"").joined(large)) == large
