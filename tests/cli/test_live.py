"""`rekindle live`: lines in, answers out, in one terminal or two, and what happens when the server is not there."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.api.steps import Steps
from websockets.sync.server import ServerConnection, serve

from rekindle.api.server import running
from rekindle.cli.client import ServerError
from rekindle.cli.live_line import Address, Line
from rekindle.cli.live_talk import Wish, show
from rekindle.errors import InvalidRequest
from rekindle.serve.service import Service
from rekindle.settings import Settings

from .conftest import Run
from .test_terminal import CTRL_C, CTRL_D, Terminal, on_a_terminal

QUESTION = "Vodris paints in orange. Who paints in orange?"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Service.open(Settings(threads=1, store="none")) as service, running(service) as url:
        yield url


@pytest.fixture(scope="module")
def at(url: str) -> list[str]:
    return ["--port", str(urlsplit(url).port)]


@pytest.fixture
def port() -> Iterator[int]:
    """One for a server that comes back: nobody else is given it meanwhile, and nobody answers there."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def address_of(url: str, session: str) -> Address:
    return Address.of("", 0, url, session, None)


@contextmanager
def listening(url: str, session: str) -> Iterator[Line]:
    with Line(address_of(url, session), "/ws", 0) as line:
        line.open()
        yield line


def until(line: Line, kind: str) -> dict[str, Any]:
    while True:
        message = line.receive(timeout=60)
        assert message is not None
        if message["type"] == kind:
            return message


def status_of(url: str, session: str) -> dict[str, Any]:
    """What the server says of a session, once it has read all that it was told; empty if there is none."""
    while True:
        listed = [each for each in httpx.get(f"{url}/status").json()["sessions"] if each["session"] == session]
        if not listed or not listed[0]["reading"]:
            return listed[0] if listed else {}


def test_both_directions_without_a_terminal(run: Run, at: list[str]) -> None:
    lines = f"{QUESTION}\n\nreset\nswap nowhere\nswap guide\nquit\nnever said\n"
    result = run("live", *at, "--session", "both", "--context", "guide=You are a guide.", stdin=lines)
    assert result.returncode == 0
    assert result.stdout.strip().count("\n") == 0 and "Vodris" in result.stdout
    assert "tokens reused" in result.stderr and "first token after" in result.stderr
    assert "(the conversation begins anew)" in result.stderr and "no context 'nowhere'" in result.stderr
    assert "(the context is guide)" in result.stderr


def test_what_one_says_another_hears(
    run: Run, run_here: Run, url: str, at: list[str], environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "rekindle", "live", "out", "--url", url, "--session", "two"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as out:
        assert out.stdout is not None and out.stderr is not None
        try:
            while not status_of(url, "two").get("listeners"):
                pass
            say = ("live", "in", *at, "--session", "two", "--max-tokens", "4")
            spoken = run(*say, stdin="Hello.\nquit\n")
            assert (spoken.returncode, spoken.stdout, spoken.stderr) == (0, "", "")
            assert out.stdout.readline() == "> Hello.\n"
            assert out.stdout.readline().strip()
            assert "first token after" in out.stderr.readline()
            assert run_here(*say, stdin="reset\n").returncode == 0  # not before: it would cut the answer off
            assert out.stderr.readline() == "(the conversation begins anew)\n"
            interrupt(out, lambda: out.send_signal(signal.SIGINT))
        finally:
            out.kill()


def test_what_is_typed_is_read_before_the_return_key(url: str, at: list[str], environment: dict[str, str]) -> None:
    with ExitStack() as stack:
        process, terminal = stack.enter_context(on_a_terminal(environment, "live", *at, "--session", "typed"))
        terminal.press(b"Hellp\x7fo th")  # before anybody looks
        terminal.wait_for(b"Session typed.")
        while status_of(url, "typed").get("draft") != "Hello th":
            pass
        listener = stack.enter_context(listening(url, "typed"))
        terminal.press(b"\x1b[Dere, what is on\xc3\xa4")
        terminal.press(b"\x7f your mind today?")
        while status_of(url, "typed")["draft"] != "Hello there, what is on your mind today?":
            pass
        terminal.press(b"\n")
        assert until(listener, "user_input")["data"] == "Hello there, what is on your mind today?"
        end = until(listener, "end")
        assert end["usage"]["computed_tokens"] <= 3 < end["usage"]["prompt_tokens"] - 3  # the end of the message
        terminal.wait_for(b"after the return key)")
        terminal.wait_for(b"> ")
        terminal.press(CTRL_D)
        assert process.wait(60) == 0


def test_who_only_listens_is_told_so_on_a_terminal(at: list[str], environment: dict[str, str]) -> None:
    with on_a_terminal(environment, "live", "out", *at, "--session", "quiet") as (process, terminal):
        terminal.wait_for(b"Listening to session quiet; Ctrl-C ends.")
        interrupt(process, lambda: terminal.press(CTRL_C))


def interrupt(process: subprocess.Popen[Any], press: Callable[[], None]) -> None:
    """Until it has ended: what comes just before Python begins to wait is noticed only with the next."""
    while process.poll() is None:
        press()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    assert process.returncode in (130, -signal.SIGINT)  # one that comes while it is ending ends it at once


def test_two_turns_somebody_else_and_commands_on_a_terminal(
    url: str, at: list[str], environment: dict[str, str]
) -> None:
    options = ("--session", "shared", "--max-tokens", "4", "--context", "guide=You are a guide.")
    with on_a_terminal(environment, "live", *at, *options) as (process, terminal):
        terminal.wait_for(b"> ")
        ask(terminal, b"Hello.")
        ask(terminal, b"Hello again.")
        terminal.press(b"half a wo")
        while status_of(url, "shared")["draft"] != "half a wo":
            pass
        with listening(url, "shared") as other:
            other.send({"type": "message", "data": "Somebody else.", "max_tokens": 4})
        terminal.wait_for(b"> Somebody else.")
        terminal.wait_for(b"> half a wo")  # what was being typed is there again
        terminal.press(b"\x15swap guide\n")
        terminal.wait_for(b"(the context is guide)")
        terminal.wait_for(b"> ")
        terminal.press(b"reset\n")
        terminal.wait_for(b"(the conversation begins anew)")
        assert status_of(url, "shared")["turns"] == 0 and status_of(url, "shared")["context"] == "guide"
        terminal.wait_for(b"> ")
        terminal.press(b"quit\n")
        assert process.wait(60) == 0


def ask(terminal: Terminal, words: bytes) -> None:
    terminal.press(words + b"\n")
    terminal.wait_for(words)
    terminal.wait_for(b"first token after")
    terminal.wait_for(b"> ")


def test_ctrl_c_interrupts_an_answer_and_then_ends(url: str, at: list[str], environment: dict[str, str]) -> None:
    with on_a_terminal(environment, "live", *at, "--session", "broken") as (process, terminal):
        terminal.wait_for(b"> ")
        with listening(url, "broken") as listener:
            listener.send({"type": "message", "data": "Go on.", "max_tokens": 1900})
            until(listener, "token")
            terminal.wait_for(b"> Go on.")
            terminal.press(CTRL_C)
            assert until(listener, "end")["reason"] in ("interrupted", "stop")
        terminal.wait_for(b"> ")
        interrupt(process, lambda: terminal.press(CTRL_C))  # the first may come while the end is not yet known


def test_on_a_terminal_a_restart_of_the_server_is_told_and_survived(
    tmp_path: Path, environment: dict[str, str], port: int
) -> None:
    settings = Settings(threads=1, context=2048, store=str(tmp_path))
    with ExitStack() as stack:
        with Service.open(settings) as service, running(service, port=port) as url:
            terminal = stack.enter_context(on_a_terminal(environment, "live", "--url", url, "--max-tokens", "4"))[1]
            terminal.wait_for(b"> ")
            ask(terminal, b"Hello.")
            terminal.press(b"half a wo")
            terminal.wait_for(b"half a wo")
        terminal.wait_for(b"cannot talk to ws://127.0.0.1")
        terminal.wait_for(b"the next attempt is in 1 s")
        terminal.wait_for(b"> half a wo")
        with Service.open(settings) as service, running(service, port=port):
            terminal.press(b"rd\n")
            terminal.wait_for(b"first token after")
            (status,) = httpx.get(f"{url}/status").json()["sessions"]
            assert status["turns"] == 2


def test_pauses_double_up_to_ten_seconds_and_then_it_gives_up() -> None:
    pauses: list[float] = []
    line = Line(Address("ws://127.0.0.1:9", "x"), "/ws", 6, pause=pauses.append)
    with pytest.raises(ServerError, match=r"cannot talk to ws://127\.0\.0\.1:9: "):
        line.send({"type": "reset"})
    assert pauses == [1, 2, 4, 8, 10, 10]


def test_what_will_never_be_there_is_not_tried_again(url: str) -> None:
    for address, says in (
        (address_of("nonsense.invalid", "x"), "cannot talk to ws://nonsense.invalid: "),
        (address_of(f"{url}/elsewhere/ws", "x"), "refused (404): there is no WebSocket /elsewhere/ws here"),
    ):
        with Line(address, "/ws", 10, pause=lambda seconds: pytest.fail("it waits")) as line:
            with pytest.raises(ServerError) as error:
                line.open()
            assert says in str(error.value)


def test_something_else_than_a_session_is_told() -> None:
    def greet(socket: ServerConnection) -> None:
        socket.send('{"type": "hello"}')

    with serve(greet, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.socket.getsockname()[1]
        line = Line(Address(f"ws://127.0.0.1:{port}", "x"), "/ws", 10)
        with line, pytest.raises(ServerError, match="is it a Rekindle server"):
            line.open()
        server.shutdown()
        thread.join()


def test_a_url_may_name_the_socket(url: str) -> None:
    for end in ("", "/", "/ws", "/ws/input", "/v1/"):
        with Line(address_of(f"{url.replace('http', 'ws', 1)}{end}", "named"), "/ws", 0) as line:
            assert line.open()["data"] == "session named"


def test_without_a_server_it_says_so(run_here: Run) -> None:
    for command in (["live"], ["live", "in"], ["live", "out"]):
        result = run_here(*command, "--port", "9", "--max-retries", "0", stdin="Hello.\n")
        assert result.returncode == 1
        assert result.stderr.startswith("rekindle: cannot talk to ws://127.0.0.1:9: ")
        assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_what_the_server_refuses_is_told_and_not_tried_again(run_here: Run, at: list[str]) -> None:
    result = run_here("live", *at, "--session", "x" * 65, stdin="Hello.\n")
    assert result.returncode == 2
    assert "expected a name of 1 to 64 characters" in result.stderr and "attempt" not in result.stderr


def test_a_key_is_needed_and_a_wrong_one_is_refused(run: Run, run_here: Run) -> None:
    settings = Settings(engine="toy", context=256, store="none", api_key="right")
    with Service.open(settings) as service, running(service) as url:
        for key in ([], ["--api-key", "wrong"]):
            result = run_here("live", "--url", url, *key, stdin="Hello.\n")
            assert result.returncode == 1
            assert "refused (401)" in result.stderr and "with --api-key or in REKINDLE_API_KEY" in result.stderr
            assert "attempt" not in result.stderr
        assert run("live", "--url", url, "--api-key", "right", stdin="reset\n").returncode == 0
        by_environment = run("live", "--url", url, stdin="reset\n", env={"REKINDLE_API_KEY": "right"})
        assert by_environment.returncode == 0 and "begins anew" in by_environment.stderr


def test_after_a_restart_the_conversation_goes_on(tmp_path: Path, port: int) -> None:
    settings = Settings(threads=1, store=str(tmp_path))
    with Service.open(settings) as service, running(service, port=port) as url:
        line = Line(address_of(url, "kept"), "/ws", 5, pause=lambda seconds: None)
        line.send({"type": "message", "data": "Hello.", "max_tokens": 4})
        first = until(line, "end")
    with Service.open(settings) as service, running(service, port=port), line:
        line.send({"type": "message", "data": "Hello again.", "max_tokens": 4})
        second = until(line, "end")
    assert (first["turn"], second["turn"]) == (1, 2)
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


def test_an_answer_that_ends_with_its_server_has_an_end(port: int) -> None:
    """Of a server that dies, and can tell nobody."""
    settings = Settings(engine="toy", store="none")
    with Service.open(settings) as service, running(service, port=port) as url:
        steps = Steps(service)
        line = Line(address_of(url, "lost"), "/ws", 10, pause=lambda seconds: None)
        line.send({"type": "message", "data": "Hello.", "max_tokens": 4})
        turn = until(line, "user_input")["turn"]
        assert line._socket is not None
        line._socket.socket.shutdown(socket.SHUT_RDWR)
        steps.let_all()
    with Service.open(settings) as service, running(service, port=port), line:
        assert line.receive() == {"type": "end", "turn": turn, "reason": "cancelled", "data": ""}
        line.send({"type": "message", "data": "Hello again.", "max_tokens": 4})
        assert until(line, "end")["reason"] in ("length", "stop")


def test_what_was_said_while_the_line_was_broken_is_told(url: str) -> None:
    with listening(url, "cut") as other, Line(address_of(url, "cut"), "/ws", 5) as line:
        line.open()
        other.send({"type": "reset"})
        assert until(line, "system")["kind"] == "reset"
        line.close()
        other.send({"type": "message", "data": "Hello.", "max_tokens": 4})
        missed = until(other, "end")
        assert until(line, "user_input")["data"] == "Hello."
        assert until(line, "end") == missed


@pytest.mark.parametrize("url", ["ftp://here", "http://", "http://here:many"])
def test_an_address_that_is_none(url: str, run_here: Run) -> None:
    result = run_here("live", "--url", url)
    assert result.returncode == 2 and "expected a URL such as" in result.stderr


def test_options_before_in_or_out_are_refused_instead_of_forgotten(run_here: Run) -> None:
    result = run_here("live", "--session", "x", "in", stdin="Hello.\n")
    assert result.returncode == 2
    assert "--session goes behind 'in': rekindle live in --session" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quit\n", None),
        ("reset\n", {"type": "reset"}),
        ("swap guide\n", {"type": "swap", "context": "guide"}),
        ("reset it, please\n", {"type": "message", "data": "reset it, please", "temperature": 0.5}),
        ("swap\n", {"type": "message", "data": "swap", "temperature": 0.5}),
        ("swap the two\n", {"type": "message", "data": "swap the two", "temperature": 0.5}),
    ],
)
def test_words(line: str, message: dict[str, object] | None) -> None:
    assert Wish(temperature=0.5).message(line) == message


def test_contexts_are_made_where_they_are_missing() -> None:
    wish = Wish(contexts=["main=Be short.", "guide = You guide. "])
    made = [each["context"] for each in wish.missing({"contexts": ["main"], "turns": 0})]
    assert made == ["main", "guide"]
    assert list(wish.missing({"contexts": ["main", "guide"], "turns": 1})) == []
    with pytest.raises(InvalidRequest, match="NAME=INSTRUCTIONS"):
        list(Wish(contexts=["guide"]).missing({}))


@pytest.mark.parametrize(
    "end", [{"type": "end", "reason": "interrupted"}, {"type": "error", "error": {"message": "the worker failed"}}]
)
def test_the_line_of_an_answer_ends_with_it_in_whatever_way(
    end: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    show({"type": "token", "turn": 1, "data": "Once upon"})
    show(end | {"turn": 1, "data": ""})
    assert capsys.readouterr().out == "Once upon\n"
