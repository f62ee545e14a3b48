"""Two servers that are asked in turn: in which order, what is made of the pairs, what a waiting server uses, how one dies.

The peer is this project's own server on the toy engine, started by a program that takes llama-server's arguments.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from rekindle.api.server import running
from rekindle.lab import machine
from rekindle.lab.load import run as arms
from rekindle.lab.load import turns
from rekindle.lab.load.client import Answer, ServerError, Target
from rekindle.lab.load.drive import Load
from rekindle.lab.load.figures import Figure, Run, ratios
from rekindle.lab.load.run import LoadReport, Wish, make_setup, run_load
from rekindle.lab.load.servers import Server, Setup
from rekindle.lab.load.show import print_report, remarks
from rekindle.lab.load.turns import Arm, at_rest, take_turns
from rekindle.lab.load.workloads import Sizes
from rekindle.serve.service import Service
from rekindle.settings import Settings

SMALL = Sizes(clients=2, requests=2, system_tokens=40, message_tokens=10, answer_tokens=6)
STAND_IN = """#!{python}
import os, sys
open({pid!r}, "w").write(str(os.getpid()))
os.environ["REKINDLE_STORE"] = "none"
command = [{python!r}, "-m", "rekindle", "serve", "--engine", "toy", "--host", "127.0.0.1", "--port", "0"]
os.execv(command[0], command)
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Service.open(Settings(engine="toy", context=4_096, store="none")) as service, running(service) as url:
        yield url


@pytest.fixture(autouse=True)
def little_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 1 << 20)


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "QUIET_SECONDS", 0.0)


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A program that is started as llama-server is."""
    program = tmp_path / "llama-server"
    program.write_text(STAND_IN.format(python=sys.executable, pid=str(tmp_path / "pid")))
    program.chmod(0o755)
    return program


def setup_for(workload: str) -> Setup:
    return make_setup(workload, SMALL, model="builtin", threads=1)


def printed(report: LoadReport) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=180))
    return out.getvalue()


def arm(name: str, server: Server | None = None) -> Arm:
    return Arm(name=name, server=server or Server(name=name, url=""), load=Load(Target("http://localhost"), print))


def asked(names: str, num_turns: int, first: int) -> str:
    """Who is asked, in order; each turn by its number."""
    order: list[str] = []
    those = [arm(name) for name in names]

    def turn(number: int) -> turns.Turn:
        async def ask(load: Load) -> list[Figure]:
            (name,) = (each.name for each in those if each.load is load)
            order.append(f"{name}{number}")
            return [Figure(name="number", value=number)]

        return ask

    asyncio.run(take_turns(those, [turn(number) for number in range(num_turns)], first))
    assert all([each.value for each in one.figures] == list(range(num_turns)) for one in those)
    return " ".join(order)


@pytest.mark.usefixtures("no_rest")
def test_who_is_first_changes_with_each_turn_and_each_round() -> None:
    assert asked("AB", 4, first=0) == "A0 B0 B1 A1 A2 B2 B3 A3"
    assert asked("AB", 3, first=1) == "B0 A0 A1 B1 B2 A2"
    assert asked("A", 3, first=1) == "A0 A1 A2"


@dataclass(frozen=True, kw_only=True)
class Busy(Server):
    """Has used so many seconds more at each look, and nothing more in the end."""

    more: list[float]
    looks: list[float] = field(default_factory=list)

    def cpu_seconds(self) -> float | None:
        self.looks.append(sum(self.looks[-1:]) + (self.more.pop(0) if self.more else 0.0))
        return self.looks[-1]


def test_the_next_is_asked_when_the_last_is_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(turns, "_LONGEST_SECONDS", 1e6)
    asyncio.run(at_rest(server := Busy(name="a", url="", more=[1e6, 1e6, 0, 1e6])))
    assert len(server.looks) == 6  # two for each while, of which the third was quiet
    asyncio.run(at_rest(Server(name="", url="")))  # nobody knows
    monkeypatch.setattr(turns, "_LONGEST_SECONDS", 0.0)
    asyncio.run(at_rest(server := Busy(name="a", url="", more=[1e6, 1e6, 1e6, 1e6])))
    assert len(server.looks) == 2  # it never rests, and is not waited for for ever


def test_processor_time_is_the_processs_own() -> None:
    before = time.process_time()
    used = Server(name="", url="", pid=os.getpid()).cpu_seconds()
    if sys.platform == "linux":
        assert used is not None and before <= used <= time.process_time()
    with psutil.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert Server(name="", url="", pid=process.pid).cpu_seconds() is None


@pytest.mark.usefixtures("no_rest")
def test_what_a_server_uses_while_the_other_is_asked_is_kept_apart() -> None:
    """B's clock goes on by 1 at each look: whatever is measured of it in one turn is 1, however many looks there are."""

    @dataclass(frozen=True, kw_only=True)
    class Counting(Server):
        looks: list[int] = field(default_factory=list)

        def cpu_seconds(self) -> float | None:
            return float(self.looks[0])

    first, second = arm("A", Counting(name="A", url="", looks=[0])), arm("B", Counting(name="B", url="", looks=[0]))

    async def turn(load: Load) -> list[Figure]:
        own, other = (first, second) if load is first.load else (second, first)
        own.server.looks[0] += 10  # type: ignore[attr-defined]
        other.server.looks[0] += 1  # type: ignore[attr-defined]
        return []

    asyncio.run(take_turns([first, second], [turn, turn]))
    for each in (first, second):
        assert (each.cpu_seconds, each.idle_cpu_seconds) == ([10, 10], [1, 1])
        assert each.idle_seconds > 0


def test_a_turn_that_waits_for_the_other_takes_no_time() -> None:
    load = Load(Target("http://localhost"), print)
    load.began, load.ended = 10.0, 12.0
    load.pause()
    assert load.seconds == 2.0
    load.began, load.ended = 100.0, 103.0
    assert load.seconds == 5.0


def fake_run(server: str, number: int, speeds: list[float], **more: float) -> Run:
    """A turn for each speed; one answer, as long on every server."""
    answer = Answer(due=0, ended=1, arrivals=(1.0,), asked_tokens=1, prompt_tokens=9, completion_tokens=1)
    figures = tuple(Figure(name="speed", value=speed) for speed in speeds)
    return Run(server=server, round=number, seconds=1, answers=(answer,), skipped=0, figures=figures, **more)  # type: ignore[arg-type]


def test_ratios_are_of_turns_where_figures_are() -> None:
    ours, theirs = [[10, 30, 60], [8, 25]], [[10, 20, 20], [10, 100]]
    runs = [fake_run(name, i, each[i]) for i in range(2) for name, each in (("a", ours), ("b", theirs))]  # type: ignore[arg-type]
    found = ratios(runs)
    assert found["speed"].values == (1.0, 1.5, 3.0, 0.8, 0.25)
    assert found["speed"].median == 1.0
    assert found["speed"].quartiles == pytest.approx((0.8, 1.5))
    assert found["prompt_tokens"].values == (1.0, 1.0)  # of rounds
    assert (runs[0].as_dict()["speed"], runs[2].as_dict()["speed"]) == (30, 16.5)  # medians of a round's turns
    nothing = [fake_run("a", 0, [1.0, float("nan"), 1.0]), fake_run("b", 0, [0.0, 1.0, float("nan")])]
    assert "speed" not in ratios(nothing)


def test_a_server_that_does_not_rest_is_told(url: str) -> None:
    report = run_load(Wish(workload="cold", sizes=SMALL, url=url), None)
    assert report.runs[0].as_dict()["idle_cpu_percent"] is None  # it had no neighbour
    runs = (fake_run("a", 0, [1], idle_share=0.002), fake_run("b", 0, [1], idle_share=0.5))
    said = remarks(LoadReport(**(vars(report) | {"runs": runs})))
    assert "b used up to 50.0% of a core while the other server was asked." in said
    assert not any(line.startswith("a used") for line in said)


def test_a_server_alone_is_asked_the_same_turns(url: str) -> None:
    progress: list[tuple[int, int]] = []
    wish = Wish(workload="cold", sizes=SMALL, url=url, rounds=2, seed=71)
    report = run_load(wish, None, lambda _, done, total: progress.append((done, total)))
    for run in report.runs:
        assert (len(run.answers), run.errors, run.cpu_seconds) == (8, {}, None)
        names = ["prefill", "prefill", "prefill", "decode", "decode", "decode", "2_streams"]
        assert [each.name for each in run.figures] == [f"{name}_tokens_per_second" for name in names]
        assert not run.knew_all  # each round has texts of its own
    assert progress == [(done, 8) for _ in range(2) for done in range(9)]
    assert ratios(report.runs) == {}


@pytest.mark.slow
def test_both_are_up_and_asked_in_turn(url: str, peer: Path) -> None:
    asked: list[str] = []
    wish = Wish(workload="cold", sizes=SMALL, url=url, peer=str(peer), rounds=2)
    report = run_load(wish, setup_for("cold"), lambda who, done, _: asked.append(who.split()[0]) if done else None)
    a, b = "rekindle,", "llama-server,"
    one = [a, b, b, a, a, b, b, a, a, b, b, a, a, a, b, b]  # three prompts, three streams, and two streams together
    other = [b, a, a, b, b, a, a, b, b, a, a, b, b, b, a, a]
    assert asked == one + other
    assert [(run.server, run.round) for run in report.runs] == [
        (name, number) for number in range(2) for name in ("rekindle", "llama-server")
    ]
    for run in report.runs:
        assert (len(run.whole), run.completion_tokens) == (8, 3 + 5 * 6)
        assert (run.cpu_seconds is not None) == (run.server == "llama-server" and sys.platform == "linux")
    text = printed(report)
    record = json.loads(text.splitlines()[-1])
    assert "both servers up and asked in turn" in text
    assert record["spread"]["prefill_tokens_per_second"]["pairs"] == 6
    assert record["spread"]["tokens_per_second"]["pairs"] == 2
    low, high = record["spread"]["decode_tokens_per_second"]["quartiles"]
    assert low <= record["ratios"]["decode_tokens_per_second"] <= high
    assert {"server", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p99_ms", "errors"} <= record["runs"][0].keys()
    assert record["ratios"]["prompt_tokens"] == 1.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes")
@pytest.mark.parametrize("who", ["rekindle", "llama-server"])
def test_one_that_dies_in_the_middle_is_told_and_the_other_ends_too(peer: Path, who: str) -> None:
    children: dict[str, int] = {}

    def kill(_: str, done: int, total: int) -> None:
        if not children and done >= total // 2:
            children.update(servers_of(peer.with_name("pid")))
            os.kill(children[who], signal.SIGKILL)
            os.waitid(os.P_PID, children[who], os.WEXITED | os.WNOWAIT)

    with pytest.raises(ServerError, match=r"ended while it was measured \(exit code -9\)"):
        run_load(Wish(workload="cold", sizes=SMALL, peer=str(peer)), setup_for("cold"), kill)
    assert len(children) == 2 and not any(map(psutil.pid_exists, children.values()))


def servers_of(pid_file: Path) -> dict[str, int]:
    """Both servers, by name."""
    peer = int(pid_file.read_text())
    (own,) = (pid for pid in servers_up("--max-running") if pid != peer)  # an option that the stand-in hasn't
    return {"rekindle": own, "llama-server": peer}


def servers_up(option: str = "serve") -> list[int]:
    """Children of this process that were started with it."""
    found = []
    for each in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # ended, and nobody has asked how
            if option in each.cmdline():
                found.append(each.pid)
    return found


def test_two_models_that_memory_does_not_hold_are_refused_before_any_is_started(
    monkeypatch: pytest.MonkeyPatch, peer: Path
) -> None:
    setup = setup_for("cold")
    monkeypatch.setattr(arms, "free_bytes", lambda: 2 * setup.model.stat().st_size - 1)
    with pytest.raises(
        ServerError, match=r"expected at least 0\.\d GB of free memory, got 0\.\d GB; take a smaller model"
    ):
        run_load(Wish(workload="cold", sizes=SMALL, peer=str(peer)), setup)
    assert not peer.with_name("pid").exists()


@pytest.mark.slow
def test_sessions_have_one_server_up_at_a_time(monkeypatch: pytest.MonkeyPatch, peer: Path) -> None:
    """So there need be memory for one only."""
    monkeypatch.setattr(arms, "free_bytes", lambda: 0)
    before, up = set(servers_up()), list[int]()

    def count(_: str, done: int, total: int) -> None:
        if done == total:
            up.append(len(set(servers_up()) - before))

    report = run_load(Wish(workload="rag", sizes=SMALL, peer=str(peer)), setup_for("rag"), count)
    assert up == [1, 1]
    assert "one server up at a time" in printed(report)
    assert [run.idle_share for run in report.runs] == [None, None]
