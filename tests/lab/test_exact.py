"""The exactness experiment: reuse differs by rounding only, on the built-in model."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rekindle.errors import InvalidRequest
from rekindle.lab.exact import print_report, run_exact


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_reuse_differs_by_rounding_only(kv_type: str) -> None:
    report = run_exact("builtin", prompts=4, answer_tokens=8, kv_type=kv_type, threads=1)
    assert set(report.same_text.values()) == {4}
    assert max(report.forked, report.placed) <= 3 * max(report.rounding, 0.01)
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    assert json.loads(out.getvalue().splitlines()[-1])["prompts"] == 4


def test_reuse_differs_by_rounding_only_on_torch_too() -> None:
    report = run_exact("builtin", prompts=4, answer_tokens=8, engine="torch", threads=1)
    assert (report.engine, report.kv_type) == ("torch", "float32")
    assert set(report.same_text.values()) == {4}
    assert max(report.forked, report.placed) < 0.001


def test_no_prompts_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        run_exact("builtin", prompts=0)
