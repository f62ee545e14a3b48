"""The simple sockets, over real connections: who hears what, who may come in, and what nonsense does."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tests.api.realtime_client import Realtime
from tests.api.steps import Steps, steps_of
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rekindle.api import server as server_module
from rekindle.api import sockets as module
from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

WAIT_SECONDS = 60
ASKED = {"type": "message", "data": "Who paints in orange?", "max_tokens": 6, "temperature": 0}


class Client:
    """One socket, with short words."""

    def __init__(self, url: str, path: str, **options: Any) -> None:
        address = url.replace("http", "ws", 1) + path
        self._stack = ExitStack()
        self.socket: ClientConnection = self._stack.enter_context(
            connect(address, open_timeout=WAIT_SECONDS, proxy=None, **options)
        )
        self.welcome = self.next()

    def close(self) -> None:
        self._stack.close()

    def send(self, message: Any) -> None:
        self.socket.send(json.dumps(message))

    def next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv(timeout=WAIT_SECONDS))
        return message

    def until(self, kind: str) -> list[dict[str, Any]]:
        """All messages up to the next of this type."""
        messages = [self.next()]
        while messages[-1]["type"] != kind:
            messages.append(self.next())
        return messages

    def ask(self, message: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        self.send(message or ASKED)
        return self.until("end")


@pytest.fixture
def clients(url: str) -> Iterator[Any]:
    with ExitStack() as opened:
        yield lambda path, **options: opened.enter_context(closing(Client(options.pop("url", url), path, **options)))


def tell_at_once(patch: pytest.MonkeyPatch) -> None:
    """While something is done on the sessions' thread the event loop stands: all that it tells waits to go out."""
    call = module.LiveSessions.call

    async def standing(live: module.LiveSessions, action: Callable[[Sessions], Any]) -> Any:
        loop = asyncio.get_running_loop()

        def done_meanwhile(sessions: Sessions) -> Any:
            stands, is_done = threading.Event(), threading.Event()

            def stand() -> None:
                stands.set()
                is_done.wait()

            loop.call_soon_threadsafe(stand)
            stands.wait()
            try:
                return action(sessions)
            finally:
                is_done.set()

        return await call(live, done_meanwhile)

    patch.setattr(module.LiveSessions, "call", standing)


def test_every_listener_of_a_session_hears_everything(clients: Any) -> None:
    inputs = [clients("/ws/input?session=a") for _ in range(2)]
    outputs = [clients("/ws/output?session=a") for _ in range(2)]
    other = clients("/ws?session=b")
    for speaker in inputs:
        speaker.send(ASKED)
        heard, again = (output.until("end") for output in outputs)
        assert heard == again
        assert heard[0]["type"] == "user_input" and heard[0]["data"] == ASKED["data"]
        end = heard[-1]
        assert "".join(each["data"] for each in heard if each["type"] == "token") == end["data"]
        assert end["usage"]["completion_tokens"] <= 6 and end["timings"]["ttft_ms"] > 0
    assert other.ask()[0]["turn"] == 1  # what was said elsewhere is not its turn


def test_partials_are_read_while_they_come(clients: Any, http: httpx.Client) -> None:
    client = clients("/ws?session=partials")
    for text in ("Who paints", "Who paints in", "Who paints in orange?"):
        client.send({"type": "partial", "data": text})
    client.send({"type": "partial", "data": " Tell me.", "append": True})
    heard = client.ask({"type": "message", "max_tokens": 4})
    assert heard[0]["data"] == "Who paints in orange? Tell me."
    (status,) = [each for each in http.get("/status").json()["sessions"] if each["session"] == "partials"]
    assert (status["turns"], status["draft"], status["state"]) == (1, "", "idle")


def test_interrupt_reset_contexts_and_rewinding(clients: Any, service: Service) -> None:
    client = clients("/ws?session=moves")
    with steps_of(service) as steps:  # so that it does not end before
        client.send(ASKED | {"max_tokens": 800, "data": "Go on for long."})
        steps.let(20)
        client.until("token")
        client.send({"type": "interrupt"})
        assert client.until("end")[-1]["reason"] == "interrupted"
    client.send({"type": "interrupt", "tokens": 0})
    assert client.until("system")[-1]["kind"] == "truncated"
    client.send({"type": "context", "context": "guide", "instructions": "You are a guide."})
    client.send({"type": "swap", "context": "guide"})
    assert client.until("system")[-1]["detail"] == {"context": "guide"}
    assert client.ask()[0]["turn"] == 1
    client.send({"type": "rewind", "turn": 0})
    assert client.until("system")[-1]["kind"] == "rewound"
    client.send({"type": "reset"})
    assert client.until("system")[-1]["kind"] == "reset"


def test_a_message_ends_the_answer_under_way(clients: Any, service: Service) -> None:
    client = clients("/ws?session=barge")
    with steps_of(service) as steps:
        client.send(ASKED | {"max_tokens": 800})
        steps.let(20)
        client.until("token")
        assert client.ask()[-1]["reason"] == "interrupted"
    assert client.until("end")[-1]["turn"] == 2


def test_who_comes_back_has_lost_nothing(clients: Any) -> None:
    first = clients("/ws?session=back")
    heard = first.ask()
    middle = heard[len(heard) // 2]["event"]
    second = clients(f"/ws/output?session=back&last_event={middle}")
    assert second.until("end") == [message for message in heard if message["event"] > middle]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ("no json", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "type"),
        ('{"type": "dance"}', "got type 'dance'; known: context, interrupt, message"),
        ('{"type": "message", "data": 5}', "data: expected a string"),
        ('{"type": "message", "data": "\\ud800"}', "data: expected text, got a lone surrogate"),
        ('{"type": "message", "data": " "}', "empty"),
        ('{"type": "message", "data": "a", "temperature": NaN}', "temperature: expected a finite number"),
        ('{"type": "context", "context": "a", "instructions": "\\udfff"}', "instructions: expected text"),
        ('{"type": "message", "data": "a", "max_tokens": 0}', "max_tokens"),
        ('{"type": "mesage", "data": "a"}', "got type 'mesage'; did you mean 'message'?"),
        ('{"data": "a"}', "got no type; known: context"),
        ('{"type": "context", "context": "", "instructions": "a"}', "at least one character, got an empty string"),
        ('{"type": "partial"}', "data: this field is required"),
        ('{"type": "swap", "context": "nowhere"}', "known: main"),
        ('{"type": "rewind", "turn": -1}', "turn"),
        ('{"type": "interrupt"}', "no answer"),
        (json.dumps({"type": "partial", "data": "x" * (1 << 18)}), "at most"),
        (b"bytes", "binary"),
    ],
)
def test_what_makes_no_sense_is_answered_with_an_error(clients: Any, sent: Any, says: str) -> None:
    client = clients("/ws?session=errors")
    client.send({"type": "reset"})
    client.until("system")
    client.socket.send(sent)
    (error,) = client.until("error")
    assert says in error["error"]["message"] and error["error"]["type"] == "invalid_request_error"
    assert client.ask()[-1]["turn"] == 1


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"type": "partial"}, "data", "missing_field"),
        ({"type": "message", "data": 5}, "data", "invalid_type"),
        ({"type": "message", "data": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"data": "a"}, "type", "missing_field"),
    ],
)
def test_mistakes_have_the_codes_that_they_have_over_http(
    clients: Any, message: dict[str, Any], param: str, code: str
) -> None:
    client = clients("/ws?session=codes")
    client.send(message)
    (error,) = client.until("error")
    assert (error["error"]["param"], error["error"]["code"]) == (param, code)


def test_a_socket_that_is_asked_for_as_a_page_says_what_it_is(http: httpx.Client) -> None:
    for path in ("/ws", "/ws/input", "/v1/realtime"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            404,
            f"{path} is a WebSocket: open it as one",
        )
    assert http.get("/ws/nothing").json()["error"]["message"] == "there is no GET /ws/nothing here"


def test_what_fails_on_the_server_hangs_up_instead_of_falling_silent(
    clients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Session, text: str) -> None:
        raise ZeroDivisionError

    client = clients("/ws?session=broken")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "replace", fail)
        client.send({"type": "partial", "data": "Who"})
        with pytest.raises(ConnectionClosed) as caught:
            client.next()
    assert caught.value.rcvd is not None and caught.value.rcvd.code == 1011
    assert "its log says why; come back with last_event" in caught.value.rcvd.reason
    assert clients("/ws?session=broken").ask()[-1]["type"] == "end"


def test_who_only_listens_can_not_speak(clients: Any) -> None:
    client = clients("/ws/output")
    client.send(ASKED)
    assert "/ws/input" in client.until("error")[-1]["error"]["message"]


@pytest.mark.parametrize(
    "query", ["session=", f"session={'x' * 65}", "resume=nothing", "last_event=-1", "last_event=x"]
)
def test_what_can_not_be_opened_is_refused_before_the_handshake(url: str, query: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        Client(url, f"/ws?{query}")
    assert refused.value.response.status_code == 400
    assert json.loads(refused.value.response.body)["error"]["message"]


@pytest.mark.parametrize("num_messages", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nonsense_in_any_number_disturbs_nobody(clients: Any, num_messages: int) -> None:
    seed = 7
    pick = random.Random(seed)
    values: list[Any] = ["", "x", 0, -1, 10**30, None, True, [], {}, 1.5, "\x00", "😀" * 50]
    kinds = ["message", "partial", "interrupt", "context", "swap", "rewind", "reset", "x", None, 3]
    names = ["data", "context", "turn", "tokens", "characters", "append", "instructions", "max_tokens"]
    quiet = clients(f"/ws?session=quiet{num_messages}")
    before = quiet.ask()[-1]
    wild = clients("/ws/input?session=wild")
    for number in range(num_messages // 100):
        for _ in range(100):
            message = {"type": pick.choice(kinds)} | {name: pick.choice(values) for name in pick.sample(names, 3)}
            text = json.dumps(message)
            wild.socket.send(text if pick.random() < 0.8 else text[: pick.randrange(len(text))])
        wild.send({"type": "swap", "context": f"the {number}th is over"})
        while f"the {number}th is over" not in wild.until("error")[-1]["error"]["message"]:
            pass
    quiet.send({"type": "rewind", "turn": 0})
    quiet.until("system")
    after = quiet.ask()[-1]
    assert (after["turn"], after["data"]) == (before["turn"], before["data"]), f"seed {seed}"


def test_who_has_more_to_read_than_is_kept_for_it_is_hung_up_on(clients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = clients("/ws?session=lazy")
    speaker.ask()
    monkeypatch.setattr(module, "OUTBOX", 1)
    tell_at_once(monkeypatch)
    with pytest.raises(ConnectionClosed) as closed:
        lazy = clients("/ws/output?session=lazy&last_event=0")
        while True:
            lazy.next()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
    assert "last_event" in closed.value.rcvd.reason
    assert speaker.ask()[-1]["turn"] == 2


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    settings = Settings(engine="toy", store="none", api_key=("first", "second"), cors_origin=("https://ok.example",))
    with Service.open(settings) as service, running(service) as url:
        yield url


def test_keys_open_sockets_and_keep_sessions_apart(locked: str, clients: Any) -> None:
    with pytest.raises(InvalidStatus) as refused:
        Client(locked, "/ws")
    assert refused.value.response.status_code == 401
    first = clients("/ws", url=locked, additional_headers={"Authorization": "Bearer first"})
    second = clients("/ws", url=locked, subprotocols=["rekindle", "rekindle.key.second"])
    assert second.socket.subprotocol == "rekindle"
    assert first.ask()[-1]["turn"] == second.ask()[-1]["turn"] == 1
    listed = httpx.get(f"{locked}/status", headers={"x-api-key": "second"}).json()["sessions"]
    assert [(each["session"], each["turns"]) for each in listed] == [("default", 1)]


def test_a_socket_that_is_none_is_refused_in_words(locked: str, url: str) -> None:
    for server, headers, status in ((url, {}, 404), (locked, {"x-api-key": "first"}, 404), (locked, {}, 401)):
        with pytest.raises(InvalidStatus) as refused:
            Client(server, "/v1/nothing", additional_headers=headers)
        response = refused.value.response
        assert response.status_code == status and response.body is not None
        assert (
            status == 401 or "there is no WebSocket /v1/nothing here" in json.loads(response.body)["error"]["message"]
        )


def test_a_key_has_no_more_answers_at_a_time_than_it_may(tmp_path: Path, clients: Any) -> None:
    settings = Settings(engine="toy", store=str(tmp_path), api_key=("first", "second"), max_per_key=1)
    with Service.open(settings) as service, running(service) as url:
        steps = Steps(service)  # no answer goes on
        one, two, other = (
            clients(f"/ws?session={name}", url=url, additional_headers={"x-api-key": key})
            for name, key in (("one", "first"), ("two", "first"), ("other", "second"))
        )
        one.send(ASKED)
        one.until("user_input")
        two.send(ASKED)
        assert two.until("error")[-1]["error"]["code"] == "overloaded"
        other.send(ASKED)
        other.until("user_input")
        steps.let_all()
        assert other.until("end")[-1]["turn"] == 1
        one.until("end")
        two.send(ASKED)  # what was refused was not said
        assert two.until("user_input")[-1]["data"] == ASKED["data"]
        assert two.until("end")[-1]["turn"] == 1
        handle = one.welcome["detail"]["handle"]
        with pytest.raises(InvalidStatus):
            Client(url, f"/ws?resume={handle}", additional_headers={"x-api-key": "second"})


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_speakers_session_that_made_way_comes_back_or_the_speaker_is_told_to(
    tmp_path: Path, clients: Any, is_kept: bool
) -> None:
    settings = Settings(engine="toy", store=str(tmp_path) if is_kept else "none", max_sessions=1)
    with Service.open(settings) as service, running(service) as url:
        speaker = clients("/ws/input?session=a", url=url)
        speaker.send({"type": "partial", "data": "Who paints"})
        speaker.send("nonsense")
        assert speaker.next()["type"] == "error"  # so what was said before has arrived
        clients("/ws/input?session=b", url=url)
        speaker.send({"type": "partial", "data": " in orange?", "append": True})
        if is_kept:
            speaker.send("nonsense")
            assert speaker.next()["type"] == "error"
            (listed,) = httpx.get(f"{url}/status").json()["sessions"]
            assert listed["session"] == "a" and listed["draft"] == "Who paints in orange?"
        else:
            with pytest.raises(ConnectionClosed) as closed:
                speaker.next()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "the session has ended; connect again")


@pytest.mark.parametrize(
    ("origin", "is_let_in"), [("https://ok.example", True), ("https://evil.example", False), ("null", False)]
)
def test_pages_of_other_origins_are_refused(locked: str, clients: Any, origin: str, is_let_in: bool) -> None:
    headers = {"x-api-key": "first", "Origin": origin}
    if is_let_in:
        assert clients("/ws", url=locked, additional_headers=headers).welcome["kind"] == "connected"
        return
    with pytest.raises(InvalidStatus) as refused:
        Client(locked, "/ws", additional_headers=headers)
    assert refused.value.response.status_code == 403


def test_a_page_of_the_server_itself_is_let_in(url: str, clients: Any) -> None:
    assert clients("/ws", additional_headers={"Origin": url}).welcome["type"] == "system"


def test_sockets_are_told_when_the_server_stops() -> None:
    with Service.open(Settings(engine="toy", store="none")) as service:
        with running(service) as url:
            client = Client(url, "/ws")
            client.ask()
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                client.next()
        client.close()
        assert closed.value.rcvd is not None and closed.value.rcvd.code in (1001, 1012)


class Draining:
    """Lets a server drain from within, and waits until it has asked whether there is more to tell."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._apps: list[FastAPI] = []
        self._asked = threading.Semaphore(0)
        create_app, holds = server_module.create_app, module.LiveSessions.holds

        def kept(service: Service) -> FastAPI:
            self._apps.append(create_app(service))
            return self._apps[-1]

        async def counted(live: module.LiveSessions, condition: Any) -> bool:
            is_so = await holds(live, condition)
            self._asked.release()
            return is_so

        patch.setattr(server_module, "create_app", kept)
        patch.setattr(module.LiveSessions, "holds", counted)

    def begin(self) -> None:
        self._apps[0].state.load.drain()
        for _ in range(3):
            assert self._asked.acquire(timeout=WAIT_SECONDS)


def both_asked(url: str) -> tuple[Client, Realtime]:
    """A client of either API, whose answer is under way."""
    client, realtime = Client(url, "/ws"), Realtime(url)
    client.send(ASKED)
    client.until("user_input")
    realtime.item("Hello.")
    realtime.send("response.create", response={"max_output_tokens": 6})
    realtime.until("response.created")
    return client, realtime


def test_a_server_that_drains_answers_live_sessions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    draining = Draining(monkeypatch)
    with Service.open(Settings(engine="toy", store="none", drain_seconds=WAIT_SECONDS)) as service:
        steps = Steps(service)
        with running(service) as url:
            client, realtime = both_asked(url)
            draining.begin()
            client.send(ASKED)
            assert client.until("error")[-1]["error"]["code"] == "stopping"
            steps.let_all()
            assert client.until("end")[-1]["reason"] in ("stop", "length")
            assert realtime.last("response.done")["response"]["status"] in ("completed", "incomplete")
            for socket in (client.socket, realtime.socket):
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv(timeout=WAIT_SECONDS)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        client.close()
        realtime.close()


def test_an_answer_that_a_server_has_no_time_for_is_told_to_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_CUT_SECONDS", WAIT_SECONDS)
    with Service.open(Settings(engine="toy", store="none", drain_seconds=0)) as service:
        steps = Steps(service)
        with running(service) as url:
            client, realtime = both_asked(url)
        assert client.until("end")[-1]["reason"] == "cancelled"
        assert realtime.last("response.done")["response"]["status"] == "cancelled"
        steps.let_all()
        client.close()
        realtime.close()
