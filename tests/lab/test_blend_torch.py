"""Choices that look first, on a bare engine: their work is what they say, and much of it comes near full prefill."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.lab.blend_run import ChunkKV, Reading, read_blended, read_fully, read_singly
from rekindle.lab.blend_tasks import BlendTask, ember_tasks
from rekindle.lab.torch_models import tiny_model
from rekindle.model import ember
from rekindle.reuse.blend import Blend
from rekindle.reuse.prompt import Prompt, join
from rekindle.tokens import Tokens

LAYERS = 4


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    model = AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=torch.float32)
    engine = TorchEngine(model, num_cells=8192, max_sequences=16)
    yield engine
    engine.check_integrity()
    engine.shutdown()


@pytest.fixture(scope="module")
def task() -> BlendTask:
    return min(islice(ember_tasks(1), 4), key=lambda task: len(task.prompt))


def warmed(engine: TorchEngine, prompt: Prompt) -> ChunkKV:
    kv = ChunkKV(engine, prompt.tokens[:1])
    for chunk in prompt.chunks:
        kv.warm(prompt.tokens[chunk.start : chunk.stop])
    return kv


def logits_after(engine: TorchEngine, reading: Reading, question: Tokens) -> np.ndarray:
    logits = engine.forward([Work(reading.seq, question)])[reading.seq].copy()
    engine.close(reading.seq)
    return logits


def test_deviation_mends_and_its_work_is_what_the_report_says(engine: TorchEngine, task: BlendTask) -> None:
    prompt, kv, asked = task.prompt, warmed(engine, task.prompt), task.asked[0].tokens
    expected = logits_after(engine, read_fully(engine, prompt), asked)
    none = np.abs(logits_after(engine, read_blended(engine, prompt, kv, Blend("none", 0.0)), asked) - expected).max()
    for layer, judge, ratio, share in ((1, "V", 0.15, 0.5), (2, "K", 0.15, 0.5), (3, "V", 0.99, 0.05)):
        before = engine.num_token_layers
        reading = read_blended(engine, prompt, kv, Blend("deviation", ratio, layer, judge))  # type: ignore[arg-type]
        plan = reading.plan
        assert (engine.tokens(reading.seq) == prompt.tokens).all()
        assert plan.looked is not None and plan.looked.token_layers == layer * prompt.chunks[-1].stop
        assert engine.num_token_layers - before == plan.looked.token_layers + plan.computed * LAYERS
        assert reading.computed == round(plan.budget * len(prompt)) and reading.seconds > 0
        assert np.abs(logits_after(engine, reading, asked) - expected).max() < share * none


def test_single_tokens_are_chosen_by_their_scores(engine: TorchEngine, task: BlendTask) -> None:
    prompt, kv, asked = task.prompt, warmed(engine, task.prompt), task.asked[0].tokens
    expected = logits_after(engine, read_fully(engine, prompt), asked)
    none = np.abs(logits_after(engine, read_blended(engine, prompt, kv, Blend("none", 0.0)), asked) - expected).max()
    marks = len(prompt) - sum(map(len, task.chunks))
    for layer, ratio in ((2, 0.15), (1, 1 - 1e-9)):
        before = engine.num_token_layers
        reading = read_singly(engine, prompt, kv, Blend("deviation", ratio, layer, "K"))
        assert (engine.tokens(reading.seq) == prompt.tokens).all()
        chosen = round(ratio * (len(prompt) - marks))
        work = layer * prompt.chunks[-1].stop + (2 * marks + chosen) * LAYERS  # what is in no chunk is computed twice
        assert engine.num_token_layers - before == work
        difference = np.abs(logits_after(engine, reading, asked) - expected).max()
        assert difference < (1e-3 if ratio > 0.9 else 0.5 * none)


def test_the_question_is_looked_at_and_not_read(engine: TorchEngine, task: BlendTask) -> None:
    prompt, kv, asked = task.prompt, warmed(engine, task.prompt), task.asked[0].tokens
    reading = read_blended(engine, prompt, kv, Blend("query", 0.1), question=asked)
    marks = len(prompt) - sum(map(len, task.chunks))
    assert reading.plan.looked is not None and reading.plan.looked.tokens == marks + len(asked)
    assert (engine.tokens(reading.seq) == prompt.tokens).all()
    engine.close(reading.seq)


@pytest.mark.parametrize("shape", ["gemma3", "mistral"])
def test_layers_with_a_window_can_be_looked_into(shape: str) -> None:
    """Several windows long: what a layer does not see is not looked at, and what is computed anew sees its window."""
    engine = TorchEngine(tiny_model(shape, torch.float32), num_cells=1024, max_sequences=8)
    assert 0 < engine.spec.window < 100
    random = np.random.default_rng(3)
    parts = [(random.integers(10, 500, count).astype(np.int32), count > 50) for count in (1, 3, 120, 2, 150, 4, 90, 6)]
    prompt, question = join(parts), random.integers(10, 500, 9).astype(np.int32)
    kv = warmed(engine, prompt)
    full = logits_after(engine, read_fully(engine, prompt), question)
    none = logits_after(engine, read_blended(engine, prompt, kv, Blend("none", 0.0)), question)
    for select in ("deviation", "query"):
        blend = Blend(select, 0.98)  # type: ignore[arg-type]
        nearly = logits_after(engine, read_blended(engine, prompt, kv, blend, question=question), question)
        assert np.abs(nearly - full).max() < 0.5 * np.abs(none - full).max()
    engine.check_integrity()
    engine.shutdown()
