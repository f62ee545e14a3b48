"""The GPU experiment, rehearsed on the CPU: every arm runs and the report adds up. And on a GPU where there is one."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.errors import InvalidRequest
from rekindle.lab.torch_gpu import GpuWork, bytes_seen, measure_gpu, noise_blocks, print_report, run_gpu
from rekindle.lab.torch_models import tiny_model
from rekindle.tokens import as_tokens

WORK = GpuWork(prompt_tokens=100, decode_tokens=3, batches=(1, 3), restore_tokens=200)
NEEDS_CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_arm_runs(name: str, device: str) -> None:
    report = measure_gpu(tiny_model(name, torch.bfloat16).to(device), "tiny", WORK)
    assert [each.batch for each in report.decoded] == [1, 3]
    for each in report.decoded:
        assert each.failure is None and each.step is not None
        assert min(each.engine, each.step, each.limit) > 0
        assert (each.recorded is None) == (each.busy is None) == (device == "cpu")
        read = report.weight_bytes + each.batch * report.kv_bytes
        assert each.limit == pytest.approx(each.batch * report.bandwidth / read)
    assert set(report.restore_rates) == ({"ordinary"} if device == "cpu" else {"ordinary", "page-locked"})
    assert report.restore_bytes == 200 * 3 * 2 * 2 * 32 * 2
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    assert json.loads(out.getvalue().splitlines()[-1])["experiment"] == "gpu"


def test_what_a_token_sees_ends_at_the_window() -> None:
    engine = TorchEngine(tiny_model("gemma3", torch.bfloat16), num_cells=200)
    a_layer = 2 * 2 * 32 * 2
    assert bytes_seen(engine, 20) == 3 * 20 * a_layer
    assert bytes_seen(engine, 100) == (100 + 2 * 31) * a_layer


def test_blocks_of_noise_can_be_gone_on_with() -> None:
    engine = TorchEngine(tiny_model("qwen3", torch.bfloat16), num_cells=200)
    seq = engine.open()
    engine.place_all(seq, noise_blocks(engine, 150))
    assert engine.length(seq) == 150
    logits = engine.forward([Work(seq, as_tokens([42]))])[seq]
    assert logits.std() > 0.5


def test_what_cannot_be_measured_is_refused() -> None:
    for options, reason in (
        ({"device": "tpu"}, "device must be one of"),
        ({"device": "cpu", "dtype": "int8"}, "dtype must"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            run_gpu("tiny-llama", **options)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidRequest, match="--device cpu rehearses"):
            run_gpu("tiny-llama", device="cuda")
    with pytest.raises(InvalidRequest, match="must be 1 or more"):
        GpuWork(batches=(0,))
