"""Failures inside the server: what a client is told, and that it is not told more. The failures are made by hand; what
meets them is the real thing.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from rekindle.errors import ContextFull, EngineError, Overloaded, RekindleError
from rekindle.serve.request import Event, Failed, Generation, Piece, Sink
from rekindle.serve.service import Service, Ticket

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello, who is there?"}],
    "max_tokens": 12,
    "temperature": 0,  # an answer of fewer pieces than shall be seen would never fail
}
SECRET = "/home/somebody/model.gguf"
CHAT = "/v1/chat/completions"


def fail_after(num_pieces: int, error: RekindleError, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the service's next requests fail after some pieces."""
    submit = service.submit

    def failing(generation: Generation, sink: Sink) -> Ticket:
        seen: list[Event] = []

        def cut(event: Event) -> None:
            seen.append(event)
            if len(seen) <= num_pieces and isinstance(event, Piece):
                sink(event)
            elif len(seen) == num_pieces + 1:
                sink(Failed(error))

        return submit(generation, cut)

    monkeypatch.setattr(service, "submit", failing)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_a_status(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    fail_after(0, ContextFull("no free cells"), service, monkeypatch)
    answer = http.post(CHAT, json=BODY | {"stream": stream})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"] == {
        "message": "no free cells",
        "type": "server_error",
        "param": None,
        "code": "context_full",
    }


def test_a_failure_in_a_stream_is_its_last_event(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(3, ContextFull("no free cells"), service, monkeypatch)
    stream = client.chat.completions.create(model="ember", stream=True, **BODY)
    with stream, pytest.raises(openai.APIError, match="no free cells"):
        for _ in stream:
            pass


@pytest.mark.parametrize(("path", "body"), [(CHAT, BODY), ("/generate_stream", {"prompt": "Hello, who is there?"})])
def test_a_broken_stream_is_not_done(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    fail_after(3, EngineError(f"decode failed in {SECRET}"), service, monkeypatch)
    answer = http.post(path, json=body | {"stream": True})
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert answer.status_code == 200 and len(events) > 3
    error = json.loads(events[-1])["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_error")
    assert SECRET not in answer.text and "[DONE]" not in answer.text


def test_too_much_work_is_429(http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(0, Overloaded("256 requests wait already"), service, monkeypatch)
    answer = http.post(CHAT, json=BODY)
    assert answer.status_code == 429 and answer.headers["retry-after"]
    assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("error", [EngineError(f"lost {SECRET}"), RuntimeError(f"lost {SECRET}")], ids=["ours", "any"])
def test_an_inner_failure_tells_nothing_and_ends_nothing(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(service, "chat_prompt", broken)
        for _ in range(2):
            answer = http.post(CHAT, json=BODY)
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
            assert SECRET not in answer.text and "Traceback" not in answer.text
    assert http.post(CHAT, json=BODY).status_code == 200


def test_when_one_of_several_submissions_fails_the_others_are_cancelled(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, tickets = service.submit, []

    class Spy:
        def __init__(self, ticket: Ticket) -> None:
            self.ticket, self.cancelled = ticket, False

        def cancel(self) -> None:
            self.cancelled = True
            self.ticket.cancel()

    def full(generation: Generation, sink: Sink) -> Ticket:
        if len(tickets) == 2:
            raise Overloaded("full")
        tickets.append(Spy(submit(generation, sink)))
        return tickets[-1]

    monkeypatch.setattr(service, "submit", full)
    assert http.post(CHAT, json=BODY | {"n": 3}).status_code == 429
    assert [ticket.cancelled for ticket in tickets] == [True, True]


def test_health_is_503_when_the_worker_has_failed(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = service.health()
    monkeypatch.setattr(service, "health", lambda: health | {"status": "failed"})
    answer = http.get("/health")
    assert answer.status_code == 503 and answer.json()["status"] == "failed"
