"""`rekindle lab load` as a process: what it prints, how it ends, and that nothing it started outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Run


def test_the_last_line_is_json_and_a_plot_is_written(run: Run, tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    sizes = ["--clients", "2", "--turns", "2", "--system-tokens", "50", "--answer-tokens", "4"]
    done = run("lab", "load", *sizes, "--threads", "1", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert "…" not in done.stdout  # no figure and no heading is cut, however narrow the terminal
    assert (record["workload"], record["ratios"]) == ("chat", {})
    (only,) = record["runs"]
    assert (only["server"], only["requests"], only["errors"]) == ("rekindle", 4, 0)
    assert plot.stat().st_size > 1_000


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["127.0.0.1:1"], 1, "is it running?"),
        (["x", "-w", "chaat"], 2, "did you mean 'chat'?"),
        (["x", "--peer", "lama-server"], 2, "did you mean 'llama-server'?"),
        (["x", "--peer-option", "a", "--peer", "llama-server"], 2, "expected name=value"),
        (["x", "-w", "trace"], 2, "--trace FILE"),
        (["-w", "repeat", "--clients", "2"], 2, "the workload repeat has no clients; its sizes are answer_tokens"),
        (["x", "-w", "chat", "--trace", "f"], 2, "the workload chat has no trace"),
        (["x", "-w", "rag", "--answers", "scripted"], 2, "the workload rag has no transcripts"),
        (["x", "--threads", "1"], 2, "--threads is for servers that are started here"),
        (["x", "--model", "builtin"], 2, "--model is for servers that are started here"),
        (["--api-key", "k"], 2, "--api-key is for a server at a URL"),
        (["x", "--peer-option", "a=1"], 2, "--peer-option is for a peer"),
    ],
)
def test_what_has_no_meaning_is_one_line(run_here: Run, arguments: list[str], code: int, reason: str) -> None:
    done = run_here("lab", "load", *arguments)
    assert done.returncode == code
    assert reason in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_who_ends_it_ends_its_server_too(environment: dict[str, str], number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "rekindle",
        "lab",
        "load",
        "--turns",
        "100",
        "--answer-tokens",
        "200",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        (child,) = wait_for_children(process.pid)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    wait_for_end(child)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not has_ended(pid):
        assert time.monotonic() < deadline, "the server outlives who started it"
        os.sched_yield()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it is gone, maybe since the file was opened
        return True


def wait_for_children(pid: int) -> list[int]:
    """Its children, as soon as it has some."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return [int(child) for child in children]
        os.sched_yield()
    raise AssertionError("it started no server")
