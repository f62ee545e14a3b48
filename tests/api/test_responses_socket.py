"""`WS /v1/responses` as the official client sees it, and with plain sockets what that client would not send."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import ResponseErrorEvent, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.api.steps import steps_of
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

from rekindle.api import app as app_module
from rekindle.api import responses_socket as module
from rekindle.api import server as server_module
from rekindle.api.answers import Answers
from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

from .test_disconnect import Listener
from .test_limits import stepping

LONG = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 3
GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 8}
ENDS = ("response.completed", "response.incomplete", "response.failed", "error")
WAIT_SECONDS = 60


@pytest.fixture
def socket(url: str) -> Iterator[ClientConnection]:
    """Its queue has no end: a client that has stopped reading waits ten seconds for the other end's goodbye."""
    with connect(url.replace("http", "ws", 1) + "/v1/responses", proxy=None, max_queue=None) as socket:
        yield socket


def send(socket: ClientConnection, **fields: Any) -> None:
    socket.send(json.dumps({"type": "response.create"} | GREEDY | fields))


def receive(socket: ClientConnection) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(socket.recv(timeout=WAIT_SECONDS))
    return event


def answer(socket: ClientConnection) -> dict[str, Any]:
    """The event that ends the next response."""
    while (event := receive(socket))["type"] not in ENDS:
        pass
    return event


@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # of what that client does inside
def test_with_the_official_client_on_the_real_engines(ember: openai.OpenAI) -> None:
    with ember.responses.connect() as connection:
        ids: list[str] = []
        for text in (f"{LONG} Who paints in orange?", "And who works as a farmer?"):
            last = {"previous_response_id": ids[-1]} if ids else {}
            connection.response.create(model="ember", input=text, **last, **GREEDY)
            events = []
            while not events or events[-1].type not in ENDS:
                events.append(connection.recv())
            assert [event.sequence_number for event in events] == list(range(len(events)))
            response = events[-1].response
            assert response.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
            ids.append(response.id)
        details = response.usage.input_tokens_details
        assert response.usage.input_tokens - details.cached_tokens <= 16 < details.cached_tokens
        assert ember.responses.retrieve(ids[1]).output_text == response.output_text  # kept, as with POST


def test_a_prompt_may_be_read_before_it_is_needed(socket: ClientConnection) -> None:
    send(socket, input=LONG, instructions="Be short.", generate=False)
    kinds = [receive(socket) for _ in range(3)]
    assert [event["type"] for event in kinds] == ["response.created", "response.in_progress", "response.completed"]
    prepared = kinds[-1]["response"]
    assert prepared["output"] == [] and prepared["usage"]["output_tokens"] == 0
    read = prepared["usage"]["input_tokens"]
    send(socket, input="Who?", instructions="Be short.", previous_response_id=prepared["id"])
    usage = answer(socket)["response"]["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] >= read - 4  # all but the beginning of the answer
    assert usage["input_tokens"] > read


def test_what_is_not_stored_is_known_on_its_own_connection(socket: ClientConnection, client: openai.OpenAI) -> None:
    send(socket, input=LONG, store=False)
    first = answer(socket)["response"]
    send(socket, input="More.", store=False, previous_response_id=first["id"])
    second = answer(socket)["response"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 50
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first["id"])
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="ember", input="More.", previous_response_id=second["id"])


def test_streams_are_answered_side_by_side_and_in_their_order(socket: ClientConnection, service: Service) -> None:
    with steps_of(service) as steps:
        send(socket, input="One.", stream_id="slow", max_output_tokens=300, ignore_eos=True)
        send(socket, input="Two.", stream_id="slow", max_output_tokens=2)
        send(socket, input="Three.", stream_id="quick", max_output_tokens=2)
        send(socket, input="Four.", max_output_tokens=2)
        steps.wait(lambda: len(steps.generations) == 3)
    ends: list[dict[str, Any]] = []
    while len(ends) < 4:
        event = receive(socket)
        if event["type"] in ENDS:
            ends.append(event)
    streams = [event.get("stream_id") for event in ends]
    assert streams.index("quick") < streams.index("slow") and streams[-1] == "slow"
    slow = [event["response"]["usage"]["output_tokens"] for event in ends if event.get("stream_id") == "slow"]
    assert slow == [300, 2]
    assert "stream_id" not in ends[streams.index(None)]


NONSENSE: dict[str, tuple[str | bytes, str | None, str]] = {
    "no JSON": ("{", None, "expected a message in JSON"),
    "no object": ("[]", "type", "a JSON object"),
    "too deep": ("[" * 100_000, None, "expected a message in JSON"),
    "not a number": ('{"type": "response.create", "input": "x", "temperature": NaN}', "temperature", "finite"),
    "another type": ('{"type": "response.steer"}', "type", "got type 'response.steer'"),
    "binary": (b"x", None, "binary"),
    "no input": ('{"type": "response.create"}', "input", "required"),
    "a wrong field": ('{"type": "response.create", "input": "x", "temperature": "hot"}', "temperature", "a number"),
    "an unknown response": (
        '{"type": "response.create", "input": "x", "previous_response_id": "resp_1"}',
        "previous_response_id",
        "send the whole conversation",
    ),
    "half a character": ('{"type": "response.create", "input": "\\ud800"}', "input[0].content[0].text", "surrogate"),
}


@pytest.mark.parametrize(("text", "param", "words"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_and_the_connection_goes_on(
    socket: ClientConnection, text: str | bytes, param: str | None, words: str
) -> None:
    socket.send(text)
    event = receive(socket)
    assert event["type"] == "error" and event["status"] == 400
    assert event["error"]["param"] == param and words in event["error"]["message"], event
    send(socket, input="Hello.")
    assert answer(socket)["type"] != "error"


def test_a_response_is_cancelled_by_its_id_or_its_stream(socket: ClientConnection, service: Service) -> None:
    for by in ("response_id", "stream_id"):
        with steps_of(service) as steps:  # so that it does not end before
            send(socket, input="Talk.", stream_id="a", max_output_tokens=900, ignore_eos=True)
            send(socket, input="The next one.", stream_id="a", max_output_tokens=2)
            response = receive(socket)["response"]
            name = response["id"] if by == "response_id" else "a"
            socket.send(json.dumps({"type": "response.cancel", by: name}))
            steps.wait(lambda steps=steps: steps.generations[0].cancelled)  # type: ignore[misc]
        end = answer(socket)
        assert (end["type"], end["response"]["id"]) == ("response.incomplete", response["id"])
        assert end["response"]["status"] == "cancelled" and end["stream_id"] == "a"
        assert answer(socket)["response"]["usage"]["output_tokens"] == 2
    socket.send(json.dumps({"type": "response.cancel", "response_id": response["id"]}))
    event = receive(socket)
    assert event["type"] == "error" and "no such response under way" in event["error"]["message"]


def test_the_beginning_is_told_before_there_is_a_token() -> None:
    with stepping() as (url, steps), connect(url.replace("http", "ws", 1) + "/v1/responses", proxy=None) as socket:
        send(socket, input="Hello.")
        created, in_progress = receive(socket), receive(socket)
        assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
        socket.send(json.dumps({"type": "response.cancel", "response_id": created["response"]["id"]}))
        steps.wait(lambda: steps.generations[0].cancelled)
        steps.let_all()
        assert answer(socket)["response"]["status"] == "cancelled"


def test_every_event_is_valid_for_the_official_types(ember_url: str) -> None:
    """Some clients check them, which the official one does not."""
    with connect(ember_url.replace("http", "ws", 1) + "/v1/responses", proxy=None) as socket:
        send(socket, input="Vodris paints in orange. Who paints?", include=["message.output_text.logprobs"])
        events = [receive(socket)]
        while events[-1]["type"] not in ENDS:
            events.append(receive(socket))
        send(socket, input="x", previous_response_id="resp_1")
        error = receive(socket)
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    kinds = {type(adapter.validate_python(event)).__name__ for event in events}
    assert len(kinds) == 9 and "ResponseTextDeltaEvent" in kinds
    assert ResponseErrorEvent.model_validate(error["error"] | error).code == "previous_response_not_found"


def test_a_refusal_names_its_stream(socket: ClientConnection) -> None:
    send(socket, input=5, stream_id="a")
    assert receive(socket)["stream_id"] == "a"
    send(socket, input="x", previous_response_id="resp_1", stream_id="b")
    event = receive(socket)
    assert event["stream_id"] == "b" and event["error"]["code"] == "previous_response_not_found"


def test_random_messages_do_no_harm(socket: ClientConnection) -> None:
    random = Random(7)
    values: list[Any] = [None, True, -1, 1e300, "", "x", "\ud800", [], {}, [[]], {"role": "user"}, "resp_1", "a" * 300]
    names = ["input", "type", "stream_id", "generate", "store", "previous_response_id", "text", "tools", "metadata"]
    for number in range(300):
        message: Any = {
            "type": random.choice(["response.create", "response.create", "response.cancel", "session.update"])
        }
        for name in random.sample(names, random.randrange(4)):
            message[name] = random.choice(values)
        text = json.dumps(random.choice([message, message, message, values[number % len(values)]]))
        socket.send(text if random.random() < 0.9 else text[: random.randrange(len(text))])
    send(socket, input="Still there?", stream_id="last", max_output_tokens=2)
    refused = 0
    while (event := receive(socket)).get("stream_id") != "last" or event["type"] not in ENDS:
        refused += event["type"] == "error"
    assert event["type"] != "error" and refused > 100


def test_what_fails_on_the_server_ends_one_message_and_not_those_behind_it(
    socket: ClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_of, inputs = module.turn_of, iter(["fails", "goes on"])

    async def failing(*given: Any, **options: Any) -> Any:
        if next(inputs) == "fails":
            raise ZeroDivisionError
        return await turn_of(*given, **options)

    monkeypatch.setattr(module, "turn_of", failing)
    send(socket, input="Hello.")
    send(socket, input="Hello.")
    event = answer(socket)
    assert (event["type"], event["status"], event["error"]["code"]) == ("error", 500, "internal_error")
    assert "log says why" in event["error"]["message"] and "ZeroDivision" not in json.dumps(event)
    assert answer(socket)["response"]["status"] in ("completed", "incomplete")


def test_too_many_messages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    with ExitStack() as stack:
        url, steps = stack.enter_context(stepping())
        socket = stack.enter_context(connect(url.replace("http", "ws", 1) + "/v1/responses", proxy=None))
        send(socket, input="Long.")
        steps.wait_until_begun(1)  # it waits no more
        for _ in range(3):
            send(socket, input="Hello.")
        while (event := receive(socket))["type"] != "error":
            assert "completed" not in event["type"]
        assert event["status"] == 429 and "wait already" in event["error"]["message"]
        steps.let_all()
        assert all("error" not in answer(socket)["type"] for _ in range(3)), "the first, and the two that waited"


def test_hanging_up_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    with Service.open(Settings(engine="toy", context=4096, store="none")) as service, running(service) as url:
        listener = Listener(service, monkeypatch)
        with connect(url.replace("http", "ws", 1) + "/v1/responses", proxy=None) as socket:
            send(socket, input="Talk for ever.", max_output_tokens=4000, ignore_eos=True)
            send(socket, input="Never begun.")
            listener.wait(lambda events: len(events) >= 5)
        listener.wait(lambda events: listener.ends == ["cancelled"])
        service.check_integrity()  # comes after that step
        assert service.health()["running"] == 0


def test_a_server_that_drains_answers_first_and_then_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    apps: list[FastAPI] = []

    def create_app(service: Service) -> FastAPI:
        apps.append(app_module.create_app(service))
        return apps[-1]

    monkeypatch.setattr(server_module, "create_app", create_app)
    with (
        stepping(drain_seconds=WAIT_SECONDS) as (url, steps),
        connect(url.replace("http", "ws", 1) + "/v1/responses", proxy=None) as socket,
    ):
        send(socket, input="Talk.", max_output_tokens=40, ignore_eos=True)
        receive(socket)
        apps[0].state.load.drain()
        send(socket, input="Too late.")
        while (event := receive(socket))["type"] != "error":
            assert event["type"] == "response.in_progress"
        assert event["status"] == 503 and "being stopped" in event["error"]["message"]
        steps.let_all()
        assert answer(socket)["response"]["usage"]["output_tokens"] == 40
        with pytest.raises(ConnectionClosed) as caught:
            receive(socket)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001


def test_each_message_has_a_time_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(Answers, "fail_after", lambda answers, seconds, error: given.append(seconds))
    with stepping(request_timeout=300) as (url, steps), connect(f"ws{url[4:]}/v1/responses", proxy=None) as socket:
        steps.let_all()
        for _ in range(20):  # the connection is older each time
            sent = time.perf_counter()
            send(socket, input="Hello.")
            assert answer(socket)["type"] != "error"
            assert given.pop() >= 300 - (time.perf_counter() - sent) and not given


def test_a_key_is_needed() -> None:
    settings = Settings(engine="toy", context=512, store="none", api_key="right")
    with Service.open(settings) as service, running(service) as url:
        address = url.replace("http", "ws", 1) + "/v1/responses"
        with pytest.raises(InvalidStatus, match="401"):
            connect(address, proxy=None).close()
        protocols = [Subprotocol("rekindle"), Subprotocol("rekindle.key.right")]
        for options in ({"additional_headers": {"Authorization": "Bearer right"}}, {"subprotocols": protocols}):
            with connect(address, proxy=None, **options) as socket:
                assert socket.subprotocol == ("rekindle" if "subprotocols" in options else None)
                send(socket, input="Hello.")
                assert answer(socket)["type"] != "error"
        with pytest.raises(InvalidStatus, match="403"):
            connect(address, origin=Origin("http://evil.example"), proxy=None).close()
