"""Looking into layers: what a probe computes and leaves, what is mended with it, and where attention goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.conftest import TORCH_KINDS, TOY_SPEC, Bench, open_torch

from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.engine.toy import ToyEngine
from rekindle.errors import BadRange, ContextFull, EngineError, ForeignPayload
from rekindle.tokens import as_tokens

FLOAT_KINDS = [kind for kind in TORCH_KINDS if kind.endswith("float32")]


@pytest.fixture(scope="module", params=FLOAT_KINDS)
def engine(request: pytest.FixtureRequest) -> Iterator[TorchEngine]:
    engine = open_torch(request.param)
    yield engine
    engine.check_integrity()
    assert engine.num_free_cells == engine.num_cells
    engine.shutdown()


def random(engine: TorchEngine | ToyEngine, seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, engine.spec.vocab_size, count).astype(np.int32)


def test_engines_that_cannot_look_say_so_and_change_nothing(bench: Bench) -> None:
    if bench.engine.spec.can_look:
        return
    seq = bench.read(bench.random(1, 30))
    payload = bench.engine.export(seq, 0, 30)
    with pytest.raises(EngineError, match="does not look into the layers"):
        bench.engine.probe(seq, as_tokens([11]), 1)
    with pytest.raises(EngineError, match="does not look into the layers"):
        bench.engine.refreshed(seq, payload, 0, 1, "V")
    with pytest.raises(EngineError, match="does not look into the layers"):
        bench.engine.attention(seq, as_tokens([11]))
    assert bench.engine.length(seq) == 30
    assert bench.engine.num_token_layers == bench.engine.num_computed * bench.engine.spec.num_layers
    bench.engine.close(seq)


def test_a_probe_computes_the_layers_before_and_no_more(engine: TorchEngine) -> None:
    """In slices, after a beginning; later layers are the payload's own, and what it stood in goes on as if nothing was."""
    begin, chunk = random(engine, 2, 20), random(engine, 3, 40)
    seq, exact, own = engine.open(), engine.open(), engine.open()
    engine.forward([Work(seq, begin)])
    engine.forward([Work(exact, np.concatenate([begin, chunk]))])
    engine.forward([Work(own, np.concatenate([begin[:1], chunk]))])
    alone, in_place = engine.export(own, 0, 41), engine.export(exact, 20, 60)
    for layer in sorted({1, engine.spec.num_layers - 1}):
        computed, probed = engine.num_computed, engine.num_token_layers
        for start, stop in ((0, 7), (7, 40)):
            engine.probe(seq, chunk[start:stop], layer)
        assert engine.num_computed == computed
        assert engine.num_token_layers - probed == layer * 40
        for kv in ("K", "V"):
            mended, scores = engine.refreshed(seq, alone, 20, layer, kv, start=1)  # type: ignore[arg-type]
            assert (mended.tokens == chunk).all() and mended.position == 20 and scores.shape == (40,)
            fresh, stored = engine.look(in_place), engine.look(alone, 19)
            for index, found in enumerate(engine.look(mended)):
                for part in ("key", "value"):
                    expected = getattr(fresh[index], part) if index < layer else getattr(stored[index], part)[:, -40:]
                    assert torch.allclose(getattr(found, part), expected, atol=1e-4)
            part = "key" if kv == "K" else "value"
            apart = getattr(fresh[layer], part) - getattr(stored[layer], part)[:, -40:]
            assert np.allclose(scores, apart.square().sum(dim=(0, 2)).sqrt().numpy(), atol=1e-3)
            _, none = engine.refreshed(seq, in_place, 20, layer, kv)  # type: ignore[arg-type]
            assert none.max() < 1e-3 < scores.max()
        engine.truncate(seq, 20)
        assert np.abs(engine.forward([Work(seq, chunk)])[seq] - logits_after(engine, begin, chunk)).max() < 5e-3
        engine.truncate(seq, 20)
    for each in (seq, exact, own):
        engine.close(each)


def logits_after(engine: TorchEngine, *parts: np.ndarray) -> np.ndarray:
    seq = engine.open()
    logits = engine.forward([Work(seq, np.concatenate(parts))])[seq].copy()
    engine.close(seq)
    return logits


def test_attention_is_what_transformers_own_gives(engine: TorchEngine) -> None:
    """In two calls after a beginning, with windows and soft caps."""
    tokens = random(engine, 4, 90)
    ids = torch.from_numpy(tokens).long()[None]
    model = engine._model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode(), engine._borrowed.pinned():
        layers = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    expected = sum(layer[0, :, 50:].sum(dim=(0, 1)) for layer in layers).numpy()
    seq = engine.open()
    engine.forward([Work(seq, tokens[:50], logits=False)])
    counted = engine.num_token_layers
    one = engine.attention(seq, tokens[50:70])
    other = engine.attention(seq, tokens[70:])
    assert engine.num_token_layers - counted == 40 * engine.spec.num_layers
    assert (len(one), len(other)) == (70, 90)
    other[:70] += one
    assert np.allclose(other, expected, atol=1e-2)
    assert other.sum() == pytest.approx(40 * sum(layer.shape[1] for layer in layers), rel=1e-3)
    assert np.abs(engine.forward([Work(seq, tokens[:9])])[seq] - logits_after(engine, tokens, tokens[:9])).max() < 5e-3
    engine.close(seq)


@pytest.mark.parametrize("kind", ["torch-ember-float32", "toy"])
def test_what_is_refused_changes_nothing(kind: str) -> None:
    engine = ToyEngine(replace(TOY_SPEC, can_look=True, num_layers=4), 511) if kind == "toy" else open_torch(kind)
    seq = engine.open()
    engine.forward([Work(seq, as_tokens(range(10, 30)))])
    payload = engine.export(seq, 0, 20)
    for layer in (-1, 0, engine.spec.num_layers):
        with pytest.raises(BadRange, match="can be probed at a layer from 1 to 3"):
            engine.probe(seq, as_tokens([11]), layer)
        with pytest.raises(BadRange, match="can be probed at a layer from 1 to 3"):
            engine.refreshed(seq, payload, 0, layer, "V")
    with pytest.raises(BadRange, match="no tokens"):
        engine.probe(seq, as_tokens([]), 1)
    with pytest.raises(ContextFull):
        engine.probe(seq, as_tokens([11] * 600), 1)
    with pytest.raises(ContextFull):
        engine.attention(seq, as_tokens([11] * 600))
    with pytest.raises(BadRange, match="has other tokens at 1"):
        engine.refreshed(seq, payload, 1, 1, "V", stop=3)
    with pytest.raises(BadRange, match="not a part"):
        engine.refreshed(seq, payload, 0, 1, "V", stop=21)
    with pytest.raises(ForeignPayload):
        engine.refreshed(seq, replace(payload, fingerprint=bytes(16)), 0, 1, "V")
    assert engine.length(seq) == 20
    engine.close(seq)
    engine.check_integrity()
    engine.shutdown()
