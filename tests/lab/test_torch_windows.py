"""What windows give up is counted from real cells and payloads."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from rekindle.engine.torch.engine import TorchEngine
from rekindle.lab.torch_models import tiny_model
from rekindle.lab.torch_windows import count_windows, print_report


@pytest.mark.parametrize(("name", "windowed"), [("gemma3", 2), ("mistral", 3), ("qwen3", 0)])
def test_a_released_sequence_holds_what_it_needs(name: str, windowed: int) -> None:
    engine = TorchEngine(tiny_model(name, torch.bfloat16), num_cells=400)
    report = count_windows(engine, "tiny", [20, 400])
    assert (report.layers, report.windowed) == (3, windowed)
    short, long = report.sequences
    assert short.whole == short.released == short.needed == short.payloads == 20 * report.bytes_per_token
    assert long.whole == 400 * report.bytes_per_token
    assert long.payloads == long.needed
    assert long.needed <= long.released < long.needed + engine.bytes_per_cell
    assert (long.needed < long.whole) == (windowed > 0)
    assert engine.num_free_cells == 400
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    assert json.loads(out.getvalue().splitlines()[-1])["sequences"][1]["tokens"] == 400
