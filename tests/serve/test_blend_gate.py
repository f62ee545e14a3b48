"""A server that is given a report blends only as was measured to be good enough, on this model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import InvalidRequest
from rekindle.lab.blend import run_blend
from rekindle.model.chunks import Chunk
from rekindle.reuse.blend import Blend
from rekindle.serve.blend_gate import BlendGate, BlendingRefused
from rekindle.serve.marked import wished_blend
from rekindle.serve.request import Done, Generation
from rekindle.serve.service import Service
from rekindle.settings import Settings

FINGERPRINT = bytes(range(16))
SHARES = [
    ("first", 0.05, 0.93),
    ("first", 0.1, 0.98),
    ("first", 0.2, 0.99),
    ("remembered", 0.05, 1.0),
    ("none", 0.0, 0.5),
]


def line(fingerprint: bytes = FINGERPRINT, shares: Any = SHARES, **others: Any) -> str:
    arms = [{"select": s, "ratio": r, "exact_match_of_full": share} for s, r, share in shares]
    report = {"experiment": "blend", "model": "a-model", "fingerprint": fingerprint.hex(), "arms": arms}
    return json.dumps(report | others)


def gate(tmp_path: Path, text: str, least: float = 0.97) -> BlendGate:
    file = tmp_path / "report.txt"
    file.write_text(text)
    return BlendGate.load(file, FINGERPRINT, least)


def test_what_was_measured_to_be_good_enough_passes(tmp_path: Path) -> None:
    known = gate(tmp_path, f"a table\n{line()}\n")
    for blend in (Blend("first", 0.1), Blend("first", 0.15), Blend("first", 0.9), Blend("remembered", 0.05)):
        known.check(blend)
    known.check(Blend("query", 1.0))  # all is computed
    assert known.passing == "first from 10%, remembered from 5%"


def test_deviation_is_as_good_as_where_it_was_judged(tmp_path: Path) -> None:
    shares = [("deviation V2", 0.15, 1.0), ("deviation K1", 0.2, 0.9)]
    known = gate(tmp_path, line(shares=shares))
    known.check(Blend("deviation", 0.15), 8)  # a quarter of the way
    known.check(Blend("deviation", 0.15, layer=2), 32)
    for blend, num_layers in ((Blend("deviation", 0.2), 4), (Blend("deviation", 0.2, judge="K", layer=1), 8)):
        with pytest.raises(BlendingRefused, match=r"Good enough: deviation V2 from 15%"):
            known.check(blend, num_layers)


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        (Blend("first", 0.05), "first at 5% kept 0.930 of"),
        (Blend("first", 0.09), "first at 9% kept 0.930 of"),
        (Blend("first", 0.01), "first at 1% was not measured"),
        (Blend("none", 0.0), "none at 0% kept 0.500 of"),
        (Blend("none", 1.0), "none at 100% kept 0.500 of"),  # which computes nothing anew, whatever the ratio
        (Blend("query", 0.5), "query at 50% was not measured"),
    ],
)
def test_anything_else_is_refused_with_what_would_pass(tmp_path: Path, blend: Blend, message: str) -> None:
    with pytest.raises(BlendingRefused, match=message) as refused:
        gate(tmp_path, line()).check(blend)
    assert "first from 10%, remembered from 5%" in str(refused.value) and refused.value.param == "rekindle.blend"


@pytest.mark.parametrize("text", ["", "no report\n", line(bytes(16)), "{" * 10_000, '{"experiment": "blend"}', "[1]"])
def test_without_a_report_on_this_model_nothing_passes(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = gate(tmp_path, text)
    with pytest.raises(BlendingRefused, match="was not measured for this model"):
        known.check(Blend("remembered", 0.9))
    assert "blending is refused" in caplog.text and FINGERPRINT.hex() in caplog.text


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_told_in_the_log_alone(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "secret-place"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BlendingRefused) as refused:
        BlendGate.load(file, FINGERPRINT, 0.97).check(Blend())
    assert "secret-place" in caplog.text and "secret-place" not in str(refused.value)


def test_the_last_report_counts_and_torn_arms_do_not(tmp_path: Path) -> None:
    torn = json.loads(line())
    torn["arms"] = [{"select": "first"}, None, {"select": "first", "ratio": "x", "exact_match_of_full": 1}]
    gate(tmp_path, f"{json.dumps(torn)}\n{line()}").check(Blend("first", 0.1))
    with pytest.raises(BlendingRefused, match="Good enough: nothing that was measured"):
        gate(tmp_path, f"{line()}\n{json.dumps(torn)}").check(Blend("first", 0.1))


def test_a_measured_report_opens_the_gate_of_the_same_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "report.json"
    caplog.set_level(logging.INFO)
    file.write_text(run_blend(engine="llama", documents=1, ratios=(0.15,)).as_json())
    settings = Settings(store="none", context=1024, threads=1, blend_gate=str(file), blend="marked")
    with Service.open(settings) as service:
        marked = service.text_prompt(["Read this:", Chunk(" Vodris paints in orange."), " What?"])
        assert service.blend_of({"select": "remembered"}, marked) == Blend("remembered", 0.15)
        assert service.blend_of(False, marked) is None and service.blend_of(None, marked) == Blend("auto", 0.15)
        with pytest.raises(BlendingRefused, match="none at 15% kept 0"):
            service.blend_of({"select": "none"}, marked)
        assert service.blend_of(True, service.text_prompt("No chunk.")) is None, "nothing is marked"
    assert "blending keeps at least 0.97" in caplog.text
    with Service.open(settings.model_copy(update={"kv_type": "q8_0"})) as service:
        assert service.blend_of(None, marked) is None, "not asked for: read exactly"
        with pytest.raises(BlendingRefused, match="not measured for this model with these settings"):
            service.blend_of(True, marked)


def test_a_model_that_cannot_be_blended_is_read_exactly_unless_blending_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")  # then llama.cpp cannot move what is quantised
    settings = Settings(store="none", context=512, threads=1, kv_type="q8_0", blend="marked")
    with Service.open(settings) as service:
        assert "can't be moved to other positions; marked chunks are read exactly" in caplog.text
        marked = service.text_prompt(["Read this:", Chunk(" Vodris paints in orange."), " What?"])
        usual = Generation(prompt=marked, max_tokens=1, blend=service.blend_of(None, marked))
        assert isinstance(list(service.events(usual))[-1], Done)
        with pytest.raises(InvalidRequest, match="can't be moved to other positions; leave blend out"):
            list(service.events(Generation(prompt=marked, max_tokens=1, blend=service.blend_of(True, marked))))


@pytest.mark.parametrize("select", ["deviation", "query"])
def test_a_server_does_not_start_with_a_selection_that_its_engine_has_not(select: str) -> None:
    settings = Settings.load(None, engine="toy", blend_select=select)
    with pytest.raises(
        InvalidRequest, match=f"one of none, first, remembered, auto, got '{select}', which looks"
    ) as no:
        Service.open(settings)
    assert no.value.param == "blend_select"


@pytest.mark.parametrize("select", ["deviation", "auto"])
def test_a_server_does_not_start_with_a_layer_that_its_model_has_not(select: str) -> None:
    pytest.importorskip("torch")
    settings = Settings.load(None, engine="torch", blend_select=select, blend_layer=4, store="none", threads=1)
    with pytest.raises(InvalidRequest, match=r"at a layer from 1 to 3 of ember's 4 layers, .*; got 4") as no:
        Service.open(settings)
    assert no.value.param == "blend_layer"


@pytest.mark.parametrize(
    ("blend", "shares", "is_told"),
    [
        (Blend("first", 0.1), SHARES, False),
        (Blend("first", 0.05), SHARES, True),
        (Blend("auto", 0.15), SHARES, True),
        (Blend("first", 0.05), [("first", 0.05, 0.5)], False),  # nothing is good enough, which was told
    ],
)
def test_settings_by_which_nothing_is_blended_are_told_at_the_start(
    tmp_path: Path, blend: Blend, shares: Any, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gate(tmp_path, line(shares=shares)).tell_of(blend, 8)
    told = [record for record in caplog.records if "by these settings nothing is blended" in record.message]
    assert bool(told) == is_told and all("Good enough: first from 10%" in record.message for record in told)


def test_wishes() -> None:
    default = Blend("first", 0.3)
    assert wished_blend(None, default) is None and wished_blend(False, default) is None
    assert wished_blend(True, default) is default and wished_blend({}, default) == default
    assert wished_blend({"ratio": 0.5}, default) == Blend("first", 0.5)
    assert wished_blend(Blend("none", 0), default) == Blend("none", 0)
    deviation = Blend("deviation", 0.3, layer=5, judge="K")
    assert wished_blend({"select": "deviation", "layer": 5, "judge": "K"}, default) == deviation
    assert wished_blend({"select": "deviation"}, Blend(layer=3)) == Blend("deviation", layer=3)
    for field in ({"layer": 2}, {"judge": "K"}):
        with pytest.raises(InvalidRequest, match=f"blend.{next(iter(field))} says how deviation is judged; .* 'first'"):
            wished_blend(field, default)
    with pytest.raises(InvalidRequest, match="one of none, first, got 'frist'; did you mean 'first'"):
        wished_blend({"select": "frist"}, default, ("none", "first"))
    with pytest.raises(InvalidRequest, match="unknown field 'selekt'; did you mean 'select'"):
        wished_blend({"selekt": "first"}, default)
    for wrong in ("first", 0.15, [1]):
        with pytest.raises(InvalidRequest, match="blend: expected True, False, or"):
            wished_blend(wrong, default)  # type: ignore[arg-type]
    for bad in ({"select": "best"}, {"select": ["first"]}, {"ratio": 1.5}, {"ratio": float("nan")}, {"ratio": "15 %"}):
        with pytest.raises(InvalidRequest, match="must be"):
            wished_blend(bad, default)
