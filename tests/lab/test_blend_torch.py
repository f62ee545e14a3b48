"""Choices that look into KV: what they recompute is what they say, and all of it gives full prefill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.lab.blend_run import ChunkKV, read_fully
from rekindle.lab.blend_tasks import BlendTask, ember_tasks
from rekindle.lab.blend_torch import read_asked, read_deviating
from rekindle.model import ember


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


def test_deviation_at_a_late_layer_mends_what_at_an_early_one_it_does_not_see(
    engine: TorchEngine, task: BlendTask
) -> None:
    prompt, kv, asked = task.prompt, ChunkKV(engine, task.before[:1]), task.asked[0].tokens
    full = read_fully(engine, prompt).seq
    expected = engine.forward([Work(engine.fork(full, len(prompt)), asked)]).popitem()[1].copy()
    errors = {}
    for layer, part, ratio in ((1, "K", 0.0), (2, "K", 0.15), (2, "V", 0.15), (1, "K", 1.0)):
        reading = read_deviating(engine, prompt, kv, full, layer=layer, part=part, ratio=ratio)
        assert math.isnan(reading.seconds) and (engine.tokens(reading.seq) == prompt.tokens).all()
        marks = len(prompt) - sum(map(len, task.chunks))
        chosen = marks + round(ratio * sum(map(len, task.chunks)))
        assert reading.computed == round(layer / 4 * len(prompt) + (1 - layer / 4) * chosen)
        logits = engine.forward([Work(reading.seq, asked)])[reading.seq]
        errors[layer, part, ratio] = float(np.abs(logits - expected).max())
        engine.close(reading.seq)
    assert errors[1, "K", 1.0] < 1e-3
    assert max(errors[2, "K", 0.15], errors[2, "V", 0.15]) < errors[1, "K", 0.0] / 2


def test_the_question_s_attention_is_what_a_softmax_gives(engine: TorchEngine, task: BlendTask) -> None:
    prompt, kv, asked = task.prompt, ChunkKV(engine, task.before[:1]), task.asked[0].tokens
    for chunk in task.chunks:
        kv.warm(chunk)
    full = read_fully(engine, prompt).seq
    everything = read_asked(engine, prompt, kv, asked, ratio=1.0)
    one, other = (engine.forward([Work(seq, asked)])[seq].copy() for seq in (full, everything.seq))
    assert np.abs(one - other).max() < 1e-3, "all of it recomputed is full prefill"
    few = read_asked(engine, prompt, kv, asked, ratio=0.1)
    marks = len(prompt) - sum(map(len, task.chunks))
    assert few.computed == round(0.1 * sum(map(len, task.chunks))) + 2 * marks + len(asked)
