"""How a server process ends: by a signal at any time, with answers under way, twice asked, and when its worker fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from .test_serve import served, url_in

SIGNALS = [signal.SIGINT, signal.SIGTERM]
CHAT = "/v1/chat/completions"
ENDLESS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello. " * 20}],
    "max_tokens": 1900,
    "ignore_eos": True,
    "stream": True,
}
SHORT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}

# A server whose engine computes one step for each line on its input, so that a request takes as long as a test needs.
STEPPED = """
import sys, threading
from rekindle.engine.toy import ToyEngine
leave = threading.Semaphore(0)
def read():
    for line in sys.stdin:
        leave.release(int(line))
threading.Thread(target=read, daemon=True).start()
plain = ToyEngine.forward
def forward(self, work):
    print("step", flush=True)
    leave.acquire()
    {fault}
    return plain(self, work)
ToyEngine.forward = forward
from rekindle.cli import main
sys.argv = ["rekindle", "serve", "--engine", "toy", "--port", "0", *sys.argv[1:]]
main()
"""


class Stepped:
    """Such a server: `let` allows steps, `wait_for_step` waits until one has begun."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None and process.stdin is not None
        self._out, self._in = process.stdout, process.stdin
        self.url = url_in(self._out.readline())

    def let(self, count: int) -> None:
        self._in.write(f"{count}\n")
        self._in.flush()

    def wait_for_steps(self, count: int) -> None:
        for _ in range(count):
            assert self._out.readline() == "step\n"

    def ends(self) -> tuple[int, str]:
        """Its exit code and what it said on stderr."""
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@contextmanager
def stepped(environment: dict[str, str], *options: str, fault: str = "") -> Iterator[Stepped]:
    command = [sys.executable, "-c", STEPPED.format(fault=fault), *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            yield Stepped(process)
        finally:
            process.kill()


def events_of(lines: Iterator[str]) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines if line]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def wait_until_draining(client: httpx.Client) -> httpx.Response:
    while (ready := client.get("/ready")).status_code == 200:
        pass
    return ready


@pytest.mark.parametrize("number", SIGNALS)
def test_running_answers_end_and_new_ones_are_refused(environment: dict[str, str], number: signal.Signals) -> None:
    with stepped(environment, "--drain-seconds", "60") as server, httpx.Client(base_url=server.url) as client:
        server.let(3)
        with client.stream("POST", CHAT, json=ENDLESS | {"max_tokens": 5}, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.wait_for_steps(4)
            server.process.send_signal(number)
            with httpx.Client(base_url=server.url) as other:
                ready = wait_until_draining(other)
                assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
                assert 1 <= int(ready.headers["retry-after"]) <= 60
                assert other.get("/health").status_code == 200
                for path, body in ((CHAT, SHORT), ("/generate", {"prompt": "x"}), ("/cache/clear", {})):
                    refused = other.post(path, json=body)
                    assert refused.status_code == 503 and refused.headers["connection"] == "close"
                    assert 1 <= int(refused.headers["retry-after"]) <= 60
                    assert refused.json()["error"]["code"] == "stopping"
                assert other.get("/v1/models").status_code == 200
            server.let(10)
            events = events_of(lines)
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        code, err = server.ends()
    assert code == 0, err
    assert "Traceback" not in err


@pytest.mark.parametrize("path", [CHAT, "/generate_stream"])
def test_after_the_limit_answers_are_cut_with_an_error(environment: dict[str, str], path: str) -> None:
    """Also while a step takes its time."""
    body = ENDLESS if path == CHAT else {"prompt": "Hello. " * 20, "max_new_tokens": 1900, "ignore_eos": True}
    with stepped(environment, "--drain-seconds", "0.2") as server:
        server.let(3)
        with httpx.stream("POST", server.url + path, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.wait_for_steps(4)
            server.process.send_signal(signal.SIGTERM)
            events = events_of(lines)
        server.let(1)
        code, err = server.ends()
    assert events[-1]["error"] == {
        "message": "the server is being stopped",
        "type": "server_error",
        "param": None,
        "code": "stopping",
    }
    assert (code, "Traceback" in err) == (0, False), err


def test_who_waits_for_a_whole_answer_is_told_with_a_status(environment: dict[str, str]) -> None:
    got: list[httpx.Response] = []
    with stepped(environment, "--drain-seconds", "0") as server:
        body = {"prompt": "Hello. " * 20, "max_new_tokens": 1900}
        asking = threading.Thread(
            target=lambda: got.append(httpx.post(f"{server.url}/generate", json=body, timeout=60))
        )
        asking.start()
        server.wait_for_steps(1)
        server.process.send_signal(signal.SIGTERM)
        asking.join(60)
        server.let(1)
        assert server.ends()[0] == 0
    assert got[0].status_code == 503 and got[0].headers["retry-after"] == "1"
    assert got[0].json()["error"]["code"] == "stopping"


@pytest.mark.parametrize(("first", "second"), [(1, 1), (0, 1), (1, 0)])
def test_a_second_signal_ends_it_at_once(environment: dict[str, str], first: int, second: int) -> None:
    """With an answer under way that would take for ever, and the worker in the middle of a step."""
    with stepped(environment, "--drain-seconds", "1000") as server, httpx.Client(base_url=server.url) as client:
        server.let(1)
        with client.stream("POST", CHAT, json=ENDLESS, timeout=60) as response:
            chunks = response.iter_raw()  # kept: without it the connection is closed
            next(chunks)
            server.process.send_signal(SIGNALS[first])
            with httpx.Client(base_url=server.url) as other:
                wait_until_draining(other)
            server.process.send_signal(SIGNALS[second])
            code, err = server.ends()
    assert code == 128 + SIGNALS[second]
    assert "Traceback" not in err


def test_the_store_is_written_before_the_end(environment: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    body = {"messages": [{"role": "user", "content": "Vodris paints in orange. " * 20}], "max_tokens": 4}

    def cached(url: str) -> int:
        usage = httpx.post(url + CHAT, json=body, timeout=60).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    for expected in (False, True):
        with served(environment, "--store", str(store)) as (process, line):
            assert (cached(url_in(line)) > 100) is expected
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        assert list(store.rglob("*.safetensors"))


# Before it serves.

LOADED = ["typer", "pydantic", "rekindle.settings", "fastapi", "numpy", "rekindle.api.server"]


@pytest.mark.parametrize(("module", "number"), list(zip(LOADED, SIGNALS * 3, strict=True)))
def test_a_signal_while_it_starts(environment: dict[str, str], number: signal.Signals, module: str) -> None:
    """In the middle of its imports: Python tells of each on stderr."""
    command = [sys.executable, "-X", "importtime", "-m", "rekindle", "serve", "--engine", "toy", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stderr is not None
            seen = next(line for line in process.stderr if line.split("|")[-1].strip() == module)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert seen and process.returncode == 0, err[-2000:]
    assert "Traceback" not in err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_model_is_loaded(environment: dict[str, str], number: signal.Signals) -> None:
    command = [sys.executable, "-m", "rekindle", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "Loading builtin" in process.stderr.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


# When it fails.


def staying(seconds: float) -> str:
    """How long a server whose worker has failed says why."""
    return f"import rekindle.api.server as server; server.FAILURE_SECONDS = {seconds}"


def test_a_worker_that_fails_ends_the_server_after_all_were_answered(environment: dict[str, str]) -> None:
    """Here: as soon as a signal says so, so that a busy machine has the time to ask."""
    secret = "correct horse battery staple"
    fault = f"{staying(60)}; raise ZeroDivisionError({secret!r} + '/home/somebody/model.gguf')"
    got: list[httpx.Response] = []
    options = ("--store-flush-seconds", "60")  # for as long the end may take
    with stepped(environment, *options, fault=fault) as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(body: dict[str, Any]) -> None:
            got.append(httpx.post(server.url + CHAT, json=body, timeout=60))

        asking = [threading.Thread(target=ask, args=[SHORT | {"stream": stream}]) for stream in (True, False)]
        for thread in asking:
            thread.start()
        server.wait_for_steps(1)
        assert client.get("/health").status_code == 200
        server.let(1)
        for thread in asking:
            thread.join(60)
        health, ready, late = client.get("/health"), client.get("/ready"), client.post(CHAT, json=SHORT)
        server.process.send_signal(signal.SIGTERM)
        code, err = server.ends()
    assert [answer.status_code for answer in got] == [500, 500]
    assert (health.status_code, health.json()["status"], health.json()["reason"]) == (
        503,
        "failed",
        "ZeroDivisionError",
    )
    assert (ready.status_code, ready.json(), late.status_code) == (503, {"status": "failed"}, 500)
    for answer in (*got, health, ready, late):
        assert secret not in answer.text and "/home/somebody" not in answer.text and "Hello" not in answer.text
        assert answer.status_code == 500 or answer.headers["retry-after"] == "1"
    assert code == 1
    assert err.splitlines()[-1] == "rekindle: the worker failed (ZeroDivisionError); the server cannot go on"


def test_a_failure_after_which_nothing_can_be_closed_ends_the_server_too(environment: dict[str, str]) -> None:
    hang = "from rekindle.kv.store import Store; Store.close = lambda self, seconds: threading.Event().wait()"
    soon = "from rekindle.cli import serve; serve.CLOSE_SECONDS = 0.5"
    fault = f"{hang}; {soon}; {staying(60)}; raise ZeroDivisionError"
    with stepped(environment, "--store-flush-seconds", "0", fault=fault) as server:
        server.let(1)
        assert httpx.post(server.url + CHAT, json=SHORT, timeout=60).status_code == 500
        server.process.send_signal(signal.SIGTERM)
        code, err = server.ends()
    assert code == 1
    assert "Timeout (" in err and "in run_server" in err  # it tells where it hangs, or how far a busy machine has come


STALLED = "rekindle: the worker failed (stalled); the server cannot go on"


def test_a_step_that_never_ends_is_an_alarm(environment: dict[str, str]) -> None:
    options = ("--stall-seconds", "0.3", "--drain-seconds", "0")
    with stepped(environment, *options, fault=staying(60)) as server, httpx.Client(base_url=server.url) as client:
        server.let(1)
        with client.stream("POST", CHAT, json=ENDLESS, timeout=60) as response:
            chunks = response.iter_raw()
            next(chunks)
            with httpx.Client(base_url=server.url) as other:
                while (health := other.get("/health")).status_code == 200:
                    pass
            assert health.json()["reason"] == "stalled"
            server.process.send_signal(signal.SIGTERM)
            rest = b"".join(chunks)
        code, err = server.ends()
    assert b'"code":"stopping"' in rest
    assert (code, err.splitlines()[-1]) == (1, STALLED)


def test_after_an_alarm_the_server_ends_by_itself(environment: dict[str, str]) -> None:
    with stepped(environment, "--stall-seconds", "0.3", fault=staying(0)) as server:
        server.let(1)
        answer = httpx.post(server.url + CHAT, json=ENDLESS, timeout=60)
        code, err = server.ends()
    assert '"code":"stopping"' in answer.text
    assert (code, err.splitlines()[-1]) == (1, STALLED)
