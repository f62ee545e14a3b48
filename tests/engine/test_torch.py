"""What is particular to the torch engine: agreement with transformers, models it refuses, RoPE of all kinds, payloads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rekindle.engine.protocol import Payload, Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.engine.torch.groups import make_groups
from rekindle.engine.torch.payload import LayerShape, PayloadLayout
from rekindle.errors import ContextFull, EngineError, ForeignPayload, ModelError
from rekindle.lab.torch_logits import compare
from rekindle.lab.torch_models import COMMON, TINY, WITHOUT_HEAD_DIM, random_model, tiny_model
from rekindle.tokens import Tokens, as_tokens

FOUR_LAYERS = {**WITHOUT_HEAD_DIM, "num_hidden_layers": 4}


def latent_attention() -> Any:
    return transformers.DeepseekV3Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, intermediate_size=64,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip


def noise(seed: int, count: int) -> Tokens:
    return np.random.default_rng(seed).integers(10, 512, count).astype(np.int32)


def read(engine: TorchEngine, tokens: Tokens) -> int:
    seq = engine.open()
    engine.forward([Work(seq, tokens)])
    return seq


def probe(engine: TorchEngine, seq: int) -> np.ndarray[Any, Any]:
    """Logits after one more token, which is taken back."""
    logits = engine.forward([Work(seq, as_tokens([42]))])[seq].copy()
    engine.truncate(seq, engine.length(seq) - 1)
    return logits


def own_logits(model: Any, tokens: Tokens) -> np.ndarray[Any, Any]:
    """The model's own logits after the last token, with its own attention."""
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens).long()[None], use_cache=False).logits[0, -1].float().numpy()


def rope(**parameters: object) -> Any:
    return transformers.LlamaConfig(
        **{**COMMON, "max_position_embeddings": 300}, rope_parameters={"rope_theta": 1e4, **parameters}
    )


# Agreement with transformers.


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers_within_rounding(name: str) -> None:
    found = compare(name)
    assert found.spread > 2  # else small differences would mean nothing
    assert max(found.forward, found.placed, found.recomputed) < 1e-4
    assert found.same_tokens


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama"])
def test_bfloat16_loses_no_more_than_transformers_does(name: str) -> None:
    """Beside the same weights in float32; prompts long enough for plain products, in pieces."""
    model = tiny_model(name, torch.bfloat16)
    exact = tiny_model(name, torch.bfloat16).float()
    engine = TorchEngine(model, num_cells=512)
    ours, theirs = [], []
    for seed in range(8):
        tokens, seq = noise(seed, 300), engine.open()
        engine.forward([Work(seq, tokens[:150])])
        logits = engine.forward([Work(seq, tokens[150:])])[seq]
        expected = own_logits(exact, tokens)
        ours.append(np.linalg.norm(logits - expected))
        theirs.append(np.linalg.norm(own_logits(model, tokens) - expected))
        engine.close(seq)
    assert np.mean(ours) < 1.3 * np.mean(theirs)


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_model("phi3")
    tokens = noise(1, 60)
    before, names = own_logits(model, tokens), vars(model.config).copy()
    engine = TorchEngine(model, num_cells=400)
    read(engine, noise(2, 300))
    with pytest.raises(EngineError):
        engine.forward([Work(engine.open(), as_tokens([512]))])
    assert (own_logits(model, tokens) == before).all()
    assert vars(model.config) == names


def test_a_model_call_that_fails_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    engine = TorchEngine(model, num_cells=200)
    tokens = noise(3, 60)
    seq, other = read(engine, tokens), engine.open()
    fork = engine.fork(seq, 40)
    before, free = bytes(engine.export(seq, 0, 60).data), engine.num_free_cells

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.layers[2].mlp, "forward", fail)  # K and V of two layers are written by then
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.forward([Work(seq, noise(4, 20)), Work(other, noise(5, 20))])
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.recompute(seq, [(10, 20), (45, 50)])
    monkeypatch.undo()
    assert engine.num_free_cells == free - 10  # what the fork shared has become the sequence's own
    assert (engine.length(seq), engine.length(other)) == (60, 0)
    assert bytes(engine.export(seq, 0, 60).data) == before
    assert np.abs(probe(engine, fork) - probe(engine, read(engine, tokens[:40]))).max() < 1e-4
    engine.check_integrity()


def test_cells_strewn_over_the_pool_give_the_same() -> None:
    """More runs of cells than are attended to one by one."""
    engine = TorchEngine(tiny_model("gemma3"), num_cells=300, max_sequences=64)
    fillers = [read(engine, noise(100 + i, 5)) for i in range(60)]
    for filler in fillers[::2]:
        engine.close(filler)
    tokens = noise(6, 140)
    seq = engine.open()
    for start in range(0, 140, 7):
        engine.forward([Work(seq, tokens[start : start + 7])])
    assert all(len(np.flatnonzero(np.diff(keys.cells) != 1)) > 20 for keys in engine._table.keys(seq))
    strewn = probe(engine, seq)
    for filler in fillers[1::2]:
        engine.close(filler)
    assert np.abs(strewn - probe(engine, read(engine, tokens))).max() < 1e-4


def test_growing_sequences_keep_their_cells_together() -> None:
    engine = TorchEngine(tiny_model("qwen2"), num_cells=512)
    seqs = [read(engine, noise(seed, 20)) for seed in range(4)]
    for _ in range(30):
        engine.forward([Work(seq, as_tokens([42])) for seq in seqs])
    for seq in seqs:
        assert all((np.diff(keys.cells) == 1).all() for keys in engine._table.keys(seq))


@pytest.mark.parametrize("name", ["gemma2", "latent attention"])
def test_single_tokens_of_many_sequences_are_answered_together(name: str) -> None:
    """The plain way, which pads keys: of lengths far apart and close by, beside a prompt that is being read."""
    model = tiny_model("gemma2") if name == "gemma2" else random_model(latent_attention(), torch.float32)
    engine = TorchEngine(model, num_cells=1000)
    texts = [noise(30 + length, length) for length in (5, 6, 60, 63, 64, 200)]
    seqs = [read(engine, text) for text in texts]
    reading, prompt = engine.open(), noise(31, 50)
    work = [Work(seq, as_tokens([42])) for seq in seqs]
    logits = engine.forward([*work[:3], Work(reading, prompt), *work[3:]])
    for seq, text in zip(seqs, texts, strict=True):
        assert np.abs(logits[seq] - own_logits(model, np.concatenate([text, as_tokens([42])]))).max() < 1e-4
    assert np.abs(logits[reading] - own_logits(model, prompt)).max() < 1e-4


# What it refuses, and what it serves without moving keys.

REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("mamba", lambda: transformers.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2), "recurrent state"),
    (
        "lfm2",
        lambda: transformers.Lfm2Config(**WITHOUT_HEAD_DIM, layer_types=["conv", "full_attention", "conv"]),
        "recurrent state",
    ),
    (
        "qwen3-next",
        lambda: transformers.Qwen3NextConfig(**{**COMMON, "num_hidden_layers": 4}, num_experts=4),
        "recurrent state",
    ),
    (
        "llama4",
        lambda: transformers.Llama4TextConfig(**COMMON, intermediate_size_mlp=64, num_local_experts=2),
        "chunked_attention",
    ),
    ("gpt-oss", lambda: transformers.GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2), "s_aux"),
    (
        "bloom",
        lambda: transformers.BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4),
        "attention interface",
    ),
]


@pytest.mark.parametrize(("config", "reason"), [pytest.param(c, r, id=name) for name, c, r in REFUSED])
def test_models_it_cannot_serve_are_refused_with_the_reason(config: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        TorchEngine(random_model(config(), torch.float32), num_cells=64)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"call model.eval\(\) first"):
        TorchEngine(tiny_model("llama").train(), num_cells=64)


def test_a_model_that_carries_something_past_its_attention_is_refused() -> None:
    model = tiny_model("llama")
    norm = model.model.layers[1].post_attention_layernorm
    plain = norm.forward
    norm.forward = lambda states: plain(states + torch.roll(states, 1, dims=1))  # a token sees its neighbour's state
    with pytest.raises(ModelError, match="logits differ from the model's own"):
        TorchEngine(model, num_cells=256)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            lambda: transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=200), id="gpt2"
        ),
        pytest.param(
            lambda: transformers.OPTConfig(
                vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
                word_embed_proj_dim=64, max_position_embeddings=200,
            ),
            id="opt",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_learned_positions_give_prefix_reuse_only(config: Callable[[], Any]) -> None:
    model = random_model(config(), torch.float32)
    engine = TorchEngine(model, num_cells=300)
    assert not engine.spec.can_shift
    tokens = noise(7, 60)
    seq = read(engine, tokens)
    payload = engine.export(seq, 0, 40)
    again = engine.fork(seq, 20)
    engine.truncate(again, 0)
    engine.place(again, payload, 0)
    logits = engine.forward([Work(again, tokens[40:])])[again]
    assert np.abs(logits - own_logits(model, tokens)).max() < 1e-4
    with pytest.raises(EngineError, match="cannot be moved"):
        engine.place(again, payload, 60)
    with pytest.raises(EngineError, match="V depends on the position"):
        engine.drop(again, 10, 20)
    with pytest.raises(EngineError, match="cannot be moved"):
        engine.look(payload, 5)
    engine.drop(again, 50, 60)
    with pytest.raises(ContextFull, match="at most 200 tokens"):
        engine.forward([Work(again, noise(8, 151))])


# RoPE of all kinds: keys that were turned are those that are computed there.

TURNING: list[tuple[str, Callable[[], Any]]] = [
    ("linear", lambda: rope(rope_type="linear", factor=4.0)),
    ("yarn with its attention factor", lambda: rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=75)),
    ("dynamic within its range", lambda: rope(rope_type="dynamic", factor=4.0)),
    ("neighbouring pairs", lambda: transformers.CohereConfig(**WITHOUT_HEAD_DIM)),
    ("neighbouring pairs, half of the head", lambda: transformers.GlmConfig(**COMMON)),
    ("layers without positions", lambda: transformers.Cohere2Config(**FOUR_LAYERS, sliding_window=32)),
    ("soft caps", lambda: transformers.Gemma2Config(**COMMON, sliding_window=32, query_pre_attn_scalar=32)),
    ("latent attention, whose rotated part is the head's end", latent_attention),
]


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in TURNING])
def test_turned_keys_are_those_computed_there(config: Callable[[], Any]) -> None:
    model = random_model(config(), torch.float32)
    engine = TorchEngine(model, num_cells=300)
    assert engine.spec.can_shift
    tokens, before = noise(9, 40), noise(10, 130)
    placed = engine.open()
    assert np.abs(engine.forward([Work(placed, before)])[placed] - own_logits(model, before)).max() < 1e-4
    hidden = engine.fork(placed, 130)
    engine.place(placed, engine.export(read(engine, tokens), 0, 40), 130)
    engine.compute_blind(hidden, tokens)
    turned, computed = (engine.look(engine.export(seq, 130, 170)) for seq in (placed, hidden))
    for one, other in zip(turned, computed, strict=True):
        assert (one.key - other.key).abs().max() < 1e-4
        assert (one.value - other.value).abs().max() < 1e-4
    assert np.abs(probe(engine, placed) - probe(engine, hidden)).max() < 1e-4


def test_dynamic_rope_ends_where_its_frequencies_would_change() -> None:
    engine = TorchEngine(random_model(rope(rope_type="dynamic", factor=4.0), torch.float32), num_cells=512)
    seq = read(engine, noise(11, 300))
    with pytest.raises(ContextFull, match="at most 300 tokens"):
        engine.forward([Work(seq, as_tokens([42]))])
    assert engine.length(seq) == 300


def test_longrope_takes_one_set_of_factors_for_all_lengths() -> None:
    """The short ones if no sequence can be longer than their range, which is 128 tokens here; else the long ones."""
    model = tiny_model("phi3")
    short, long = noise(12, 100), noise(13, 200)
    brief, wide = TorchEngine(model, num_cells=400, max_length=128), TorchEngine(model, num_cells=400)
    assert brief.spec.fingerprint != wide.spec.fingerprint
    assert np.abs(brief.forward([Work(brief.open(), short)]).popitem()[1] - own_logits(model, short)).max() < 1e-4
    one, other = wide.open(), wide.open()
    logits = wide.forward([Work(one, long), Work(other, short)])
    assert np.abs(logits[one] - own_logits(model, long)).max() < 1e-4
    assert np.abs(logits[other] - own_logits(model, short)).max() > 1e-2  # its frequencies are the long ones
    with pytest.raises(ContextFull, match="at most 128 tokens"):
        brief.forward([Work(brief.open(), long)])


# Sliding windows: what has left them is given up, and nothing else.


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_of_many_windows_in_few_cells(name: str, dtype: torch.dtype) -> None:
    """More tokens than cells, released on the way: logits are those of transformers, which reads it in one piece."""
    model, tokens = tiny_model(name, dtype), noise(17, 1000)
    cells = 180 if name == "mistral" else 600
    engine = TorchEngine(model, num_cells=cells, max_length=1100)
    seq, at = engine.open(), 0
    for count in (1, 99, 50, 1, 120, 9, *(60,) * 12):
        logits = engine.forward([Work(seq, tokens[at : at + count])])[seq].copy()
        at += count
        engine.release(seq, max(engine.reach(seq), at - 10))
        engine.check_integrity()
    assert at == 1000 and engine.num_held([seq]) < cells < at
    expected = own_logits(tiny_model(name, dtype).float(), tokens)
    tolerance = 1e-4 if dtype is torch.float32 else 2 * np.abs(own_logits(model, tokens) - expected).max()
    assert np.abs(logits - expected).max() < tolerance
    with pytest.raises(ContextFull, match="at most 1100 tokens"):
        engine.forward([Work(seq, noise(18, 101))])


def test_cells_that_one_kind_of_layers_gives_up_serve_the_other() -> None:
    """Counted: a token has cells in three groups, one of the layer that sees all and two of those that see 32 tokens."""
    engine = TorchEngine(tiny_model("gemma3"), num_cells=400)
    assert (engine.groups.count, engine.groups.num_windowed, engine.groups.window) == (3, 2, 32)
    one = read(engine, noise(19, 340))
    with pytest.raises(ContextFull, match="200 cells are needed, 60 of 400 are free"):
        engine.forward([Work(engine.open(), noise(20, 200))])
    engine.release(one, 340)
    assert engine.num_free_cells == (400 * 3 - 340 - 2 * 31) // 3 == 266
    other = read(engine, noise(20, 200))
    engine.release(other, 200)
    third = read(engine, noise(21, 170))
    for seq, tokens in ((one, noise(19, 340)), (other, noise(20, 200)), (third, noise(21, 170))):
        expected = own_logits(engine._model, np.concatenate([tokens, as_tokens([42])]))
        assert np.abs(probe(engine, seq) - expected).max() < 1e-4


SHAPE, WIDE = LayerShape(1, 256, 256), LayerShape(1, 512, 512)
GROUPED: list[tuple[str, list[LayerShape], list[int], tuple[int, int, int, int]]] = [
    ("no window", [SHAPE] * 5, [0] * 5, (1, 5, 0, 0)),
    ("a window everywhere", [SHAPE] * 5, [48] * 5, (1, 5, 1, 48)),
    ("gemma3-270m", [SHAPE] * 18, ([512] * 5 + [0]) * 3, (6, 3, 5, 512)),
    ("gemma2-2b", [SHAPE] * 26, [4096, 0] * 13, (2, 13, 1, 4096)),
    ("gemma3-4b, whose layers don't come out even", [SHAPE] * 34, (([1024] * 5 + [0]) * 6)[:34], (7, 5, 6, 1024)),
    ("shapes that differ", [SHAPE, WIDE], [64, 0], (1, 2, 0, 0)),
]


@pytest.mark.parametrize(("shapes", "windows", "expected"), [pytest.param(*g[1:], id=g[0]) for g in GROUPED])
def test_layers_are_grouped(shapes: list[LayerShape], windows: list[int], expected: tuple[int, int, int, int]) -> None:
    groups = make_groups(shapes, windows)
    assert (groups.count, groups.size, groups.num_windowed, groups.window) == expected
    assert len(set(zip(groups.of, groups.place, strict=True))) == len(shapes)
    if groups.window:
        assert all(groups.is_windowed(group) == (window > 0) for group, window in zip(groups.of, windows, strict=True))


# Payloads.


def test_a_payload_serves_another_process(tmp_path: Path) -> None:
    """One process stores, another, which has computed nothing, goes on from there."""
    tokens = noise(14, 90)
    engine = TorchEngine(tiny_model("gemma3"), num_cells=256)
    seq = read(engine, tokens)
    script = f"""
import sys, numpy as np
from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.lab.torch_models import tiny_model
engine = TorchEngine(tiny_model("gemma3"), num_cells=256)
seq, tokens = engine.open(), np.array({tokens.tolist()}, dtype=np.int32)
engine.forward([Work(seq, tokens)])
payload = engine.export(seq, 0, 80)
sys.stdout.buffer.write(payload.fingerprint + bytes(payload.data))
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    payload = Payload(tokens[:80], 0, memoryview(made)[16:], made[:16])
    again = engine.open()
    computed = engine.num_computed
    engine.place(again, payload, 0)
    engine.forward([Work(again, tokens[80:])])
    assert engine.num_computed == computed + 10
    assert np.abs(probe(engine, again) - probe(engine, seq)).max() < 1e-4


OTHERS: list[tuple[str, Callable[[], TorchEngine]]] = [
    ("type", lambda: TorchEngine(tiny_model("llama", torch.bfloat16), num_cells=128)),
    ("weights", lambda: TorchEngine(tiny_model("llama", seed=1), num_cells=128)),
    ("architecture", lambda: TorchEngine(tiny_model("mistral"), num_cells=128)),
    ("RoPE", lambda: TorchEngine(random_model(rope(rope_type="linear", factor=2.0), torch.float32), num_cells=128)),
]


@pytest.mark.parametrize("other", [pytest.param(make, id=name) for name, make in OTHERS])
def test_payloads_of_others_are_refused(other: Callable[[], TorchEngine]) -> None:
    engine, stranger = TorchEngine(tiny_model("llama"), num_cells=128), other()
    payload = stranger.export(read(stranger, noise(15, 20)), 0, 20)
    with pytest.raises(ForeignPayload, match="another model, KV type or build"):
        engine.place(engine.open(), payload, 0)
    with pytest.raises(ForeignPayload, match="another model, KV type or build"):
        engine.look(payload)


def test_the_same_weights_have_the_same_fingerprint_whoever_holds_them() -> None:
    one, other = (TorchEngine(tiny_model("llama"), num_cells=cells) for cells in (128, 256))
    assert one.spec.fingerprint == other.spec.fingerprint
    told = TorchEngine(tiny_model("llama"), num_cells=128, weights=b"digest of the file")
    assert told.spec.fingerprint != one.spec.fingerprint
    coarse = TorchEngine(tiny_model("llama", torch.bfloat16), num_cells=128, weights=b"digest of the file")
    assert coarse.spec.fingerprint != told.spec.fingerprint  # the same file, read into another type


def test_looking_into_a_payload() -> None:
    """Layer by layer, [heads, tokens, width], K as transformers' own cache has it at the position asked for."""
    model = tiny_model("gemma3")
    engine = TorchEngine(model, num_cells=256)
    tokens = noise(16, 50)
    payload = engine.export(read(engine, tokens), 0, 50)
    with torch.inference_mode():
        ids, positions = torch.from_numpy(tokens).long()[None], torch.arange(50)[None]
        here, there = (
            model(input_ids=ids, position_ids=positions + start, use_cache=True).past_key_values for start in (0, 70)
        )
    for position, cache in ((None, here), (0, here), (70, there)):
        layers = engine.look(payload, position)
        assert len(layers) == 3
        for layer, own in zip(layers, cache.layers, strict=True):
            kept = own.keys.shape[2]  # transformers drops what has left the window
            assert layer.key.shape == (2, 50, 32)
            assert (layer.key[:, -kept:] - own.keys[0]).abs().max() < 1e-4
            assert (layer.value[:, -kept:] - own.values[0]).abs().max() < 1e-4
    pairs = [(layer.key.transpose(0, 1), layer.value.transpose(0, 1)) for layer in engine.look(payload)]
    assert bytes(engine.layout.join(pairs)) == bytes(payload.data)


def test_the_layout_is_as_described() -> None:
    layout = PayloadLayout((LayerShape(2, 3, 5), LayerShape(1, 4, 4)), torch.float16)
    assert layout.bytes_per_token == 2 * (2 * 3 + 2 * 5 + 4 + 4)
    values = torch.arange(24 * 7, dtype=torch.float16)
    (key, value), (next_key, _) = layout.split(values.view(torch.uint8), 7)
    assert (key.shape, value.shape, next_key.shape) == ((7, 2, 3), (7, 2, 5), (7, 1, 4))
    assert key[1, 1].tolist() == [9, 10, 11]
    assert value[0, 0, 0] == 7 * 6
    assert next_key[0, 0, 0] == 7 * 16


# Without torch.


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None
import rekindle
from rekindle.errors import ModelError
try:
    import rekindle.engine.torch
except ModelError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"{missing} is not installed" in said
    assert "pip install 'rekindle[torch]'" in said
