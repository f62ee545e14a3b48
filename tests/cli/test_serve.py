"""`rekindle serve` as users run it: a process that says where it listens, answers, and ends on a signal."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .conftest import Run

CHAT = {"messages": [{"role": "user", "content": "Hello."}], "temperature": 0, "max_tokens": 8}


@contextmanager
def served(environment: dict[str, str], *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and the line it printed when it was ready."""
    command = [sys.executable, "-m", "rekindle", "serve", "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


def url_in(line: str) -> str:
    found = re.search(r"http://\S+", line)
    assert found is not None, line
    return found.group()


def test_it_says_where_it_listens_and_what_it_runs(environment: dict[str, str]) -> None:
    with served(environment) as (_, line):
        assert re.fullmatch(
            r"Rekindle is listening on http://127\.0\.0\.1:\d+ "
            r"\(model ember, engine llama\.cpp, \d+ cells, 1 thread, f16 KV, "
            r"[\d.]+[KMG]iB of memory for stored KV \(a quarter of what was free\)\)\n",
            line,
        )
        with httpx.Client(base_url=url_in(line), timeout=60) as client:
            assert client.get("/health").json()["status"] == "ok"
            first, second = (client.post("/v1/chat/completions", json=CHAT).json() for _ in range(2))
    assert first["choices"] == second["choices"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(environment: dict[str, str], number: signal.Signals) -> None:
    with served(environment) as (process, line):
        assert httpx.get(f"{url_in(line)}/health").status_code == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err


def test_a_signal_in_the_middle_of_an_answer_ends_it_cleanly(environment: dict[str, str]) -> None:
    endless = CHAT | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
    with served(environment) as (process, line), httpx.Client(base_url=url_in(line), timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=endless) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert any("[DONE]" in each or "error" in each for each in lines)
        assert process.wait(60) == 0


def test_garbage_is_looked_for_in_what_was_made_since_the_start(environment: dict[str, str]) -> None:
    code = (
        "import gc, sys, rekindle.api.server as server; from rekindle.cli import main\n"
        "def serve(service, host, port, ready):\n"
        "    ready('http://127.0.0.1:1'); print(gc.isenabled(), gc.get_freeze_count() > 10_000 > len(gc.get_objects()))\n"
        "server.serve = serve; main()"
    )
    command = [sys.executable, "-c", code, "serve", "--engine", "toy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "True True"


def test_options_reach_the_server(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rekindle.toml"
    file.write_text('kv_type = "q8_0"\nthreads = 2\ncontext = 512\n')
    options = ("--config", str(file), "--context", "1024", "--engine", "toy")
    plain = {name: value for name, value in environment.items() if not name.startswith("REKINDLE_")}
    with served(plain, *options) as (_, line):
        assert "engine toy, 1024 cells, 2 threads, q8_0 KV" in line


def test_a_port_in_use_is_told(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "cannot listen on 127.0.0.1:" in result.stderr.splitlines()[-1]


def test_a_chat_with_a_server_reuses_the_conversation(environment: dict[str, str], run: Run) -> None:
    with served(environment) as (_, line):
        talk = ("chat", "--url", url_in(line), "--max-tokens", "8", "--system", "Answer from the records. " * 10)
        result = run(*talk, stdin="Hello.\nThank you.\n/stats\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2
    costs = re.findall(r"prompt: (\d+) tokens reused, (\d+) computed", result.stderr)
    (_, first_computed), (second_reused, _) = [tuple(int(count) for count in cost) for cost in costs]
    assert second_reused > first_computed
    assert re.search(r"hits +1\b", result.stderr)


@pytest.mark.parametrize("mode", ["--chat", "--raw"])
def test_a_prompt_is_answered_by_a_server_as_by_a_model_here(environment: dict[str, str], run: Run, mode: str) -> None:
    asked = ("generate", "Vodris paints in orange. What colour does Vodris paint in?", mode, "--max-tokens", "6")
    here = run(*asked).stdout
    with served(environment) as (_, line):
        assert (
            httpx.head(f"{url_in(line)}/health").status_code == httpx.head(f"{url_in(line)}/ready").status_code == 200
        )
        there = run(*asked, "--url", url_in(line), "--stats")
    assert there.stdout == here != ""
    assert "tokens reused" in there.stderr
