"""The load test as a whole: loops, counts, reports, and servers started for it. No speed is asserted."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from rich.console import Console

from rekindle.api.server import running
from rekindle.engine.protocol import Logits, Work
from rekindle.engine.toy import ToyEngine
from rekindle.errors import InvalidRequest
from rekindle.lab import machine
from rekindle.lab.load.client import Answer, ServerError
from rekindle.lab.load.figures import Figure, Run, ratios
from rekindle.lab.load.plot import label_times, plot_report
from rekindle.lab.load.run import LoadReport, Wish, make_setup, run_load, workload_named
from rekindle.lab.load.servers import kernels_of, peer_starter
from rekindle.lab.load.show import print_report, remarks
from rekindle.lab.load.workloads import Sizes
from rekindle.serve.service import Service
from rekindle.settings import Settings

SMALL = Sizes(
    clients=3,
    requests=5,
    turns=2,
    system_tokens=60,
    message_tokens=10,
    answer_tokens=6,
    documents=4,
    document_tokens=20,
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Service.open(Settings(engine="toy", context=4_096, store="none")) as service, running(service) as url:
        yield url


def run(url: str, workload: str, sizes: Sizes = SMALL, **more: Any) -> LoadReport:
    return run_load(Wish(workload=workload, sizes=sizes, url=url, **more), None)


def printed(report: LoadReport) -> tuple[str, dict[str, Any]]:
    out = io.StringIO()
    print_report(report, Console(file=out, width=180))
    *_, last = out.getvalue().splitlines()
    return out.getvalue(), json.loads(last)


@pytest.mark.parametrize(("workload", "requests"), [("chat", 6), ("agent", 6), ("rag", 5)])
def test_every_request_is_answered_and_counted(url: str, workload: str, requests: int) -> None:
    progress: list[tuple[str, int, int]] = []
    wish = Wish(workload=workload, sizes=SMALL, url=url)
    report = run_load(wish, None, lambda *step: progress.append(step))
    (only,) = report.runs
    record = only.as_dict()
    assert (record["server"], record["requests"], record["errors"]) == ("rekindle", requests, 0)
    assert record["completion_tokens"] == 6 * requests
    assert record["computed_tokens"] == record["prompt_tokens"] - record["cached_tokens"]
    assert 0 < record["ttft_p50_ms"] <= record["ttft_p95_ms"] <= record["ttft_p99_ms"]
    assert progress[0][1:] == (0, requests) and progress[-1][1:] == (requests, requests)
    assert remarks(report) == []


def test_what_clients_share_is_computed_once(url: str) -> None:
    report = run(url, "chat", seed=11)
    computed, prompts = report.runs[0].computed_tokens, report.runs[0].prompt_tokens
    assert computed is not None and prompts is not None
    assert computed < prompts - 5 * 50  # 6 requests, one system prompt of 60 tokens


def test_an_open_loop_starts_sessions_when_they_are_due(url: str) -> None:
    first, second = (run(url, "rag", rate=200.0, seed=5).runs[0] for _ in range(2))
    starts = [sorted(answer.due - run.answers[0].due for answer in run.answers) for run in (first, second)]
    offsets = [[due - dues[0] for due in dues] for dues in starts]
    assert offsets[0] == pytest.approx(offsets[1])  # the same seed, the same times
    assert len(set(offsets[0])) == 5
    assert sum(first.errors.values()) == 0


def test_scripted_answers_make_every_servers_transcript_the_same(url: str) -> None:
    tokens = [run(url, "chat", answers="scripted").runs[0].prompt_tokens for _ in range(2)]
    assert tokens[0] == tokens[1]


def test_cold_measures_reading_and_decoding(url: str) -> None:
    record = run(url, "cold", SMALL.with_(system_tokens=200)).runs[0].as_dict()
    assert record["prefill_tokens_per_second"] > 0
    assert record["decode_tokens_per_second"] > 0
    assert record["3_streams_tokens_per_second"] > 0


def test_a_burst_computes_its_beginning_once(url: str) -> None:
    only = run(url, "burst", SMALL.with_(clients=8, system_tokens=400), seed=21).runs[0]
    seconds, computed = only.figures
    assert seconds.name == "total_seconds" and seconds.value > 0
    assert computed.expected is not None
    assert computed.value == pytest.approx(computed.expected, rel=0.2)


def test_a_repeat_computes_nothing(url: str) -> None:
    figures = {figure.name: figure for figure in run(url, "repeat", seed=31).runs[0].figures}
    assert figures["repeat_computed_tokens"].value == 0
    assert figures["repeat_ttft_ms"].expected is not None


@pytest.fixture
def real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """That take as long as a real engine's: or all is over while the client of a busy machine is held up."""
    forward = ToyEngine.forward

    def slow(engine: ToyEngine, work: Sequence[Work]) -> Logits:
        time.sleep(0.003 + 0.001 * sum(len(each.tokens) for each in work))
        return forward(engine, work)

    monkeypatch.setattr(ToyEngine, "forward", slow)


@pytest.mark.usefixtures("real_steps")
def test_stall_compares_a_stream_with_itself(url: str) -> None:
    report = run(url, "stall", SMALL.with_(system_tokens=600, answer_tokens=3_000))
    figures = {figure.name: figure for figure in report.runs[0].figures}
    assert figures["beside_itl_p99_ms"].expected == pytest.approx(3 * figures["alone_itl_p99_ms"].value)
    assert figures["tokens_while_reading"].value >= 1
    assert figures["share_covered"].value == 1.0
    assert "times its ITL p99 alone" in printed(report)[0]


@pytest.mark.usefixtures("real_steps")
def test_a_stream_that_ends_before_the_prompt_is_read_says_so() -> None:
    """Few tokens are left of it when the prompt comes, most of which is read when it is over."""
    settings = Settings(engine="toy", context=4_096, store="none", prefill_budget=16)
    with Service.open(settings) as service, running(service) as url:
        report = run(url, "stall", SMALL.with_(system_tokens=3_000, answer_tokens=560))
    figures = {figure.name: figure for figure in report.runs[0].figures}
    assert figures["share_covered"].value < 1
    assert "with more --answer-tokens" in printed(report)[0]


def test_a_stream_too_short_to_be_stalled_is_an_error(url: str) -> None:
    with pytest.raises(ServerError, match=r"a stream ended after .* too short"):
        run(url, "stall", SMALL)


def test_a_measurement_that_a_failed_request_would_spoil_is_an_error(url: str) -> None:
    with pytest.raises(ServerError, match="a request failed that the measurement needs: HTTP 400"):
        run(url, "repeat", SMALL.with_(system_tokens=9_000))


def test_errors_are_counted_and_end_their_session(url: str) -> None:
    report = run(url, "chat", SMALL.with_(system_tokens=9_000))
    (only,) = report.runs
    assert (sum(only.errors.values()), only.skipped, only.whole) == (3, 3, [])
    assert only.as_dict()["ttft_p50_ms"] is None
    text, record = printed(report)
    assert record["runs"][0]["errors"] == 3
    assert "rekindle: 3 × HTTP 400" in text and "3 requests were not sent" in text


def answer(due: float, arrivals: tuple[float, ...], prompt: int, cached: int, asked: int = 3) -> Answer:
    return Answer(
        due=due,
        ended=arrivals[-1],
        arrivals=arrivals,
        asked_tokens=asked,
        prompt_tokens=prompt,
        completion_tokens=len(arrivals),
        cached_tokens=cached,
    )


def fake_run(server: str, number: int, answers: tuple[Answer, ...], **more: Any) -> Run:
    return Run(server=server, round=number, seconds=2.0, answers=answers, skipped=0, **more)


def test_figures_and_ratios_are_what_they_say() -> None:
    ours = (answer(0.0, (0.1, 0.2, 0.4), 100, 80),)
    theirs = (answer(0.0, (0.2, 0.4, 0.8), 100, 60),)
    figure = {"figures": (Figure(name="total_seconds", value=2.0),)}
    runs = [
        fake_run("a", 0, ours, **figure),
        fake_run("b", 0, theirs, figures=(Figure(name="total_seconds", value=8.0),)),
        fake_run("a", 1, ours, **figure),
        fake_run("b", 1, ours, figures=(Figure(name="total_seconds", value=4.0),)),
    ]
    record = runs[0].as_dict()
    assert record["ttft_p50_ms"] == pytest.approx(100)
    assert record["itl_p50_ms"] == pytest.approx(150)
    assert record["tokens_per_second"] == 1.5
    found = {name: ratio.median for name, ratio in ratios(runs).items()}
    assert found["total_seconds"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["ttft_p50_ms"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["computed_tokens"] == pytest.approx((0.5 + 1.0) / 2)
    assert "errors" not in found
    assert ratios(runs[:1]) == {}


def test_arms_that_did_different_work_are_told(url: str) -> None:
    report = run(url, "rag")
    runs = (
        fake_run("a", 0, (answer(0.0, (0.1, 0.2), 100, 0),)),
        fake_run("b", 0, (answer(0.0, (0.1, 0.2, 0.3), 150, 0),)),
    )
    said = remarks(LoadReport(**(vars(report) | {"runs": runs})))
    assert "a: 1 answers were shorter than asked." in said
    assert "The servers did not do the same work: prompt tokens differ by a factor of 0.667." in said
    assert "The servers did not do the same work: completion tokens differ by a factor of 0.667." in said


def test_a_server_that_knew_the_texts_is_told() -> None:
    with Service.open(Settings(engine="toy", context=4_096, store="none")) as service, running(service) as url:
        first, again, other = run(url, "chat"), run(url, "chat"), run(url, "chat", seed=1)
    said = "rekindle had more than half of every prompt cached: ask it what is new, with another seed."
    assert [said in remarks(report) for report in (first, again, other)] == [False, True, False]


def test_a_narrow_table_cuts_no_server_s_name(url: str) -> None:
    name = "llama-server (peer)"
    report = LoadReport(**(vars(run(url, "rag")) | {"runs": (fake_run(name, 0, (answer(0.0, (0.1,), 9_999, 0),)),)}))
    out = io.StringIO()
    print_report(report, Console(file=out, width=144))
    assert f"{name} " in out.getvalue()


@pytest.mark.parametrize(("low", "high"), [(140, 4_000), (0.02, 300), (3, 9), (0.5, 90_000)])
def test_the_numbers_of_a_plots_axis_stand_apart(low: float, high: float) -> None:
    drawing = Drawing(figsize=(4, 4))
    axes = drawing.subplots()
    axes.set(xscale="log", xlim=(low, high))
    label_times(axes)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    shown = [(tick.get_loc(), tick.label1) for tick in (*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks())]
    labels = [label for at, label in sorted(shown, key=lambda each: each[0]) if label.get_text() and low <= at <= high]
    spans = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    assert len(labels) >= 1 and "$" not in labels[0].get_text()
    assert all(before.x1 < after.x0 for before, after in pairwise(spans))


def test_the_plot_is_a_png(url: str, tmp_path: Path) -> None:
    report = run(url, "rag")
    plot_report(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidRequest, match="can't be written"):
        plot_report(report, tmp_path / "no" / "p.png")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rate": 0.0}, "more than 0 sessions"),
        ({"rate": 1.0, "workload": "burst"}, "times of its own"),
        ({"answers": "mine"}, "own or scripted"),
        ({"rounds": 0}, "more than 0"),
        ({"answers": "scripted", "workload": "rag"}, "the workload rag has no transcripts"),
    ],
)
def test_wishes_without_meaning_are_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        Wish(**({"workload": "chat", "sizes": SMALL} | more))


def test_kernels_are_read_from_llama_cpps_description() -> None:
    assert kernels_of("CPU : AVX = 1 | AVX512 = 0 | REPACK = 1 | ") == {"AVX", "REPACK"}


def started(peer: str | None, **more: Any) -> LoadReport:
    sizes = workload_named("chat").defaults.with_(clients=2, turns=2, system_tokens=100, answer_tokens=4)
    setup = make_setup("chat", sizes, model="builtin", threads=1, **more)
    return run_load(Wish(workload="chat", sizes=sizes, peer=peer, rounds=2 if peer else 1), setup)


@pytest.mark.slow
def test_rekindle_is_started_on_the_real_engine() -> None:
    report = started(None)
    (only,) = report.runs
    assert (only.server, len(only.whole), only.completion_tokens) == ("rekindle", 4, 16)
    assert only.cached_tokens and only.cached_tokens > 150  # the system prompt for one client, all of it for turn two


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama-server")
def test_llama_server_and_rekindle_run_in_turn_on_the_same_work() -> None:
    report = started("llama-server")
    assert [run.server for run in report.runs] == ["rekindle", "llama-server"] * 2
    assert [run.round for run in report.runs] == [0, 0, 1, 1]
    assert all(run.completion_tokens == 16 and not run.errors for run in report.runs)
    ours, theirs, *_ = report.runs
    assert ours.prompt_tokens == pytest.approx(theirs.prompt_tokens, rel=0.05)
    assert theirs.cached_tokens is not None and theirs.cached_tokens > 0
    _, record = printed(report)
    assert set(record["ratios"]) >= {"ttft_p50_ms", "ttft_p95_ms", "tokens_per_second", "computed_tokens"}
    assert record["servers"]["llama-server"]["kernels"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama-server")
def test_two_servers_of_a_kind_keep_apart() -> None:
    sizes = workload_named("rag").defaults.with_(requests=1, document_tokens=10, answer_tokens=2)
    setup = make_setup("rag", sizes, model="builtin", threads=1)
    with peer_starter("llama-server", setup)() as server:
        report = run_load(Wish(workload="rag", sizes=sizes, url=server.url, peer="llama-server"), setup)
    assert [run.server for run in report.runs] == ["llama-server", "llama-server (peer)"]
    assert ratios(report.runs)["prompt_tokens"].median == 1


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama-server")
def test_a_wrong_option_of_the_peer_is_told() -> None:
    with pytest.raises(ServerError, match="no field 'n_slots'"):
        started("llama-server", options={"n_slots": 4})


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'llama-server'"):
        started("lama-server")
    with pytest.raises(InvalidRequest, match="a path of a llama-server"):
        started("/nowhere/llama-server")


def test_a_program_that_does_not_listen_is_told_with_what_it_said(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('error: unknown model')\n")
    program.chmod(0o755)
    with pytest.raises(ServerError, match=r"ended before it listened \(exit code 1\): error: unknown model"):
        run_peer_alone(program)


@pytest.mark.slow
def test_decoding_stands_beside_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 8 << 20)
    sizes = SMALL.with_(system_tokens=50)
    report = run_load(Wish(workload="cold", sizes=sizes), make_setup("cold", sizes, model="builtin", threads=1))
    figures = {figure.name: figure for figure in report.runs[0].figures}
    assert figures["decode_tokens_per_second"].expected and figures["prefill_tokens_per_second"].expected is None
    assert figures["prefill_tokens_per_cpu_second"].value > 0
    assert report.runs[0].cpu_seconds


@pytest.mark.slow
def test_a_server_that_dies_while_it_is_measured_is_told() -> None:
    from rekindle.lab.load.servers import rekindle_server

    setup = make_setup("chat", SMALL, model="builtin", threads=1)
    with (
        pytest.raises(ServerError, match=r"ended while it was measured \(exit code -9\)"),
        rekindle_server(setup) as one,
    ):
        assert one.pid is not None and one.cpu_seconds()
        os.kill(one.pid, signal.SIGKILL)
        os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)


def run_peer_alone(program: Path) -> None:
    from rekindle.lab.load.servers import binary_server

    setup = make_setup("chat", SMALL, model="builtin", threads=1)
    with binary_server(setup, program):
        raise AssertionError("it must not start")
