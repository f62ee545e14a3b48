"""The comparison of the engines: the same answers from both, on the built-in model."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rekindle.errors import InvalidRequest
from rekindle.lab.engines import print_report, run_engines


def test_both_engines_give_the_same_answers() -> None:
    report = run_engines(prompts=6, answer_tokens=8, threads=1)
    assert (report.same_ids, report.same_text, report.control_text) == (6, 6, 6)
    assert report.next_text < 6  # else equal answers would mean nothing
    assert 0 < report.difference < 0.02 * report.spread
    assert report.torch_control < 0.001
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    assert json.loads(out.getvalue().splitlines()[-1])["same_text"] == 6


def test_a_coarser_type_shows_in_the_logits() -> None:
    report = run_engines(prompts=3, answer_tokens=2, dtype="bfloat16", threads=1)
    assert report.kv_types == ("f16", "bfloat16")
    assert report.difference > 0.03


def test_no_prompts_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        run_engines(prompts=0)
