"""The torch experiment: all arms do the work they say, and the report's arithmetic is right. No speed is asserted."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from rekindle.engine.torch.engine import TorchEngine
from rekindle.errors import InvalidRequest
from rekindle.lab import machine
from rekindle.lab.torch_models import tiny_model
from rekindle.lab.torch_speed import Workload, engine_arm, measure_torch_speed, print_report, transformers_arm

WORK = Workload(prompt_tokens=40, decode_tokens=5, streams=3, rounds=2, threads=1)


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 8 << 20)


def test_each_arm_computes_the_prompt_once_and_then_one_token_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("qwen3", torch.bfloat16)
    engine = TorchEngine(model, num_cells=256)
    shapes: list[tuple[int, ...]] = []
    embedding = model.get_input_embeddings()
    plain = embedding.forward
    monkeypatch.setattr(embedding, "forward", lambda ids: shapes.append(tuple(ids.shape)) or plain(ids))
    for streams in (1, 3):
        seconds = engine_arm(engine, WORK, streams)
        assert seconds.prefill > 0 < seconds.decode
        assert shapes == [(1, 40)] * streams + [(1, streams)] * 5
        shapes.clear()
    transformers_arm(model, WORK)
    assert shapes == [(1, 40)] + [(1, 1)] * 5


def test_the_report() -> None:
    report = measure_torch_speed(tiny_model("llama", torch.bfloat16), "tiny", WORK)
    assert len(report.engine_rounds) == len(report.stream_rounds) == len(report.transformers_rounds) == 2
    assert report.kv_bytes == 3 * 2 * 2 * 32 * 2 * 42
    head = 512 * 64
    assert report.weight_bytes == 2 * (report.layer_weights + head)
    assert report.decode_limit == report.bandwidth / (report.weight_bytes + report.kv_bytes)
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    line = json.loads(out.getvalue().splitlines()[-1])
    assert line["experiment"] == "torch"
    assert line["workload"]["streams"] == 3
    assert line["streams_ratio"] == pytest.approx(report.streams_ratio, abs=1e-3)


def test_empty_work_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be 1 or more"):
        Workload(threads=1, decode_tokens=0)
