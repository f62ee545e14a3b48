"""`rekindle lab live`: the arms do the same work, and what is counted is what was computed."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from rekindle.errors import InvalidRequest
from rekindle.lab.live_drift import measure_drift
from rekindle.lab.live_run import PARTS, print_report, run_live
from rekindle.lab.live_ttft import make_plan


def printed(report: Any) -> dict[str, Any]:
    """The line of JSON at the end of what people get."""
    text = io.StringIO()
    print_report(report, Console(file=text, width=144))
    found: dict[str, Any] = json.loads(text.getvalue().strip().splitlines()[-1])
    return found


def test_messages_that_were_shown_before_need_no_model_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKINDLE_SESSION_PAUSE_SECONDS", "0")  # a busy machine may rest longer than a draft
    plan = make_plan(
        "builtin", threads=1, samples=3, conversation_tokens=200, characters=24, gap_seconds=0.5, answer_tokens=4
    )
    report = printed(run_live(plan, ["ttft"]))["ttft"]
    arms = {arm["arm"]: arm for arm in report["arms"]}
    assert list(arms) == ["increments", "revised", "commit", "chat"]
    assert all(arm["messages"] == 3 and arm["ttft_p50_ms"] > 0 for arm in arms.values())
    assert (arms["increments"]["prefill_calls"], arms["increments"]["computed_tokens"]) == (0, 0)
    assert 150 < report["conversation_tokens"] < 400
    assert 5 < arms["chat"]["computed_tokens"] < 60  # the message, not the conversation


def test_a_talk_computes_what_is_new_and_knows_its_head() -> None:
    plan = make_plan("builtin", threads=1)
    first, second = printed(run_live(plan, ["talk"], turns=60, window=1024))["talks"]
    for talk in (first, second):
        assert talk["moves"] > 0 and talk["computed_tokens"] == talk["new_tokens"]
        assert talk["judged"] == 60 and talk["num_right"] >= 0.95 * 60 and talk["num_right_alone"] == 60
    assert second["placed_tokens"] > 0  # a window that moves by little slides often


def test_drift_is_measured_on_the_same_tokens() -> None:
    drifts = measure_drift("builtin", "f16", 0.95, most_rotations=2, threads=1, moves=(1, 3))
    by = {(drift.moves, drift.arm): drift for drift in drifts}
    assert [by[3, arm].most_rotations for arm in ("turned", "turned, placed after 2", "placed")] == [3, 1, 1]
    for moves in (1, 3):
        assert by[moves, "placed"].from_placed.divergence == 0
        assert by[moves, "turned"].from_placed.divergence < by[moves, "turned"].from_prefill.divergence
        assert by[moves, "limit: read in pieces"].from_prefill.divergence < by[moves, "turned"].from_prefill.divergence


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ttft, talk, drift"):
        run_live(make_plan("builtin"), ["speed"])


def test_an_unknown_kv_type_is_refused_before_anything_is_measured() -> None:
    measured: list[str] = []
    with pytest.raises(InvalidRequest, match="kv_type"):
        run_live(make_plan("builtin"), PARTS, kv_types=["f16", "f17"], progress=lambda what, *_: measured.append(what))
    assert not measured
