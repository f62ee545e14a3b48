"""Keys turned in saved states: what llama.cpp makes of them, to the last rounding, and no call of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.engine.test_llama import opened

from rekindle.engine import turning
from rekindle.engine.llama import LlamaEngine
from rekindle.engine.protocol import Payload, Work
from rekindle.errors import ForeignPayload
from rekindle.model import ember
from rekindle.tokens import Tokens, as_tokens

SHAPES = ["ember", "tiny-llama", "tiny-qwen3", "tiny-gemma3"]
AT = [100, 0, 200]  # where the pieces below go


def pieces(engine: LlamaEngine) -> list[Payload]:
    """Three, of a prompt of 60 tokens."""
    seq = engine.open()
    engine.forward([Work(seq, random(engine, 60), logits=False)])
    found = [engine.export(seq, start, start + 20) for start in (0, 20, 40)]
    engine.close(seq)
    return found


def random(engine: LlamaEngine, count: int) -> Tokens:
    return as_tokens(np.random.default_rng(1).integers(10, engine.spec.vocab_size, count))


def logits_after(engine: LlamaEngine, payload: Payload) -> np.ndarray:
    """Behind a piece that was moved to 200."""
    seq = engine.open()
    engine.forward([Work(seq, random(engine, 200), logits=False)])
    engine.place(seq, payload, 200)
    assert not engine._shift_pending
    logits = engine.forward([Work(seq, as_tokens([11, 12]))])[seq].copy()
    engine.close(seq)
    return logits


@pytest.mark.parametrize("shape", SHAPES)
def test_what_llama_cpp_has_shown_once_is_done_without_it(shape: str, tiny_models: dict[str, Path]) -> None:
    with opened(tiny_models.get(shape, ember.weights_path())) as engine:
        payloads = pieces(engine)
        shown = engine.move(payloads, AT)
        calls = engine.num_calls
        turned = engine.move(payloads, AT)
        assert engine.num_calls == calls and not engine._shift_pending
        for one, other in zip(shown, turned, strict=True):
            assert one.position == other.position and (one.tokens == other.tokens).all()
            assert len(one.data) == len(other.data)
            for mine, yours in zip(engine._turner._keys(one), engine._turner._keys(other), strict=True):
                assert (np.abs(mine - yours) <= np.spacing(np.maximum(np.abs(mine), np.float16(1)))).all()
        assert not engine.turns_all_cells
        expected = logits_after(engine, shown[2])
        in_passing = logits_after(engine, payloads[2])  # turned as it is placed
        assert np.abs(in_passing - expected).max() < 0.02 * expected.std()
        assert np.abs(logits_after(engine, turned[2]) - expected).max() < 0.02 * expected.std()
        for mine, yours in zip(engine._turner._keys(payloads[2]), engine._turner._keys(turned[2]), strict=True):
            assert np.abs(mine - yours).max() > 0.05  # or all this would say nothing


def test_what_was_shown_nearby_is_not_believed_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "TRUSTED", 2)
    with opened(ember.weights_path()) as engine:
        payloads = pieces(engine)
        for at, asks in (([0, 20, 50], True), ([0, 20, 120], True), ([0, 20, 120], False), ([0, 20, 300], True)):
            calls = engine.num_calls
            engine.move(payloads, at)
            assert (engine.num_calls > calls) is asks, at


def test_what_no_candidate_explains_is_left_to_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "_STANDARD_BASE", 500.0)
    with opened(ember.weights_path()) as engine:
        engine._turner._candidates = [each for each in engine._turner._candidates if not each.is_interleaved]
        payloads = pieces(engine)
        for _ in range(3):
            calls = engine.num_calls
            engine.move(payloads, AT)
            assert engine.num_calls == calls + 1


def test_quantised_keys_are_left_to_llama_cpp(tiny_models: dict[str, Path]) -> None:
    with opened(tiny_models["tiny-llama"], "q8_0") as engine:
        payloads = pieces(engine)
        for _ in range(2):
            calls = engine.num_calls
            engine.move(payloads, AT)
            assert engine.num_calls == calls + 1
        assert engine.turns_all_cells


def test_parts_are_turned_and_what_would_come_to_stand_before_the_beginning_is_left_to_llama_cpp() -> None:
    """Of a block whose first tokens are not placed."""
    with opened(ember.weights_path()) as engine:
        block, tokens = pieces(engine)[1], random(engine, 60)
        shifted: dict[int, np.ndarray] = {}
        for learned in (False, True):
            if learned:
                engine.move(pieces(engine), AT)
            for before in (3, 30):
                seq = engine.open()
                engine.forward([Work(seq, tokens[:before], logits=False)])
                engine.place(seq, block, before, start=12, stop=18)
                assert engine._shift_pending is (not learned or before < 12)
                logits = engine.forward([Work(seq, as_tokens([11]))])[seq].copy()
                assert (engine.tokens(seq)[before:-1] == block.tokens[12:18]).all()
                engine.close(seq)
                assert np.abs(logits - shifted.setdefault(before, logits)).max() < 0.02 * logits.std()
        engine.check_integrity()


def test_torn_payloads_are_refused() -> None:
    with opened(ember.weights_path()) as engine:
        payloads = pieces(engine)
        engine.move(payloads, AT)
        whole = bytes(payloads[0].data)
        for data in (whole[:-7], whole + b"more", whole[:30], b"", whole[:12] + bytes(len(whole) - 12)):
            with pytest.raises(ForeignPayload):
                engine.move([replace(payloads[0], data=memoryview(data))], [150])
        engine.check_integrity()
