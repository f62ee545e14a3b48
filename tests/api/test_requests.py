"""The request's id and the line at its end."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.api.steps import Steps, post

from rekindle.api import requests
from rekindle.api.server import running
from rekindle.errors import EngineError
from rekindle.serve.metrics import Metrics
from rekindle.serve.request import request_id
from rekindle.serve.service import Service
from rekindle.settings import Settings

SECRET = "the-prompt-is-nobodys-business"
PROMPT = f"{SECRET} one two three four five six seven eight nine ten"


class Lines(logging.Handler):
    """The access log's records, to be waited for: a line may come a moment after the response."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[dict[str, Any]] = []
        self._came = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._came:
            self.fields.append(record.__dict__["fields"])
            self._came.notify_all()

    def of(self, identity: str) -> dict[str, Any]:
        """The one line of a request."""
        with self._came:
            assert self._came.wait_for(lambda: any(line["request_id"] == identity for line in self.fields), 60)
            (line,) = [line for line in self.fields if line["request_id"] == identity]
            return line


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger("rekindle.access"), Lines()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


def test_a_sane_id_of_the_clients_own_comes_back(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "abc-1:2/3"}).headers["x-request-id"] == "abc-1:2/3"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'quote"', "line\tbreak", "ü"])
def test_any_other_is_replaced(http: httpx.Client, given: str) -> None:
    answered = http.get("/health", headers={"x-request-id": given.encode("latin-1")}).headers["x-request-id"]
    assert answered != given and answered.isalnum() and len(answered) == 32


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 200),
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/health", None, 405),
        ("POST", "/generate", {"prompt": 5}, 422),
        ("POST", "/generate", {"prompt": "x " * 5000}, 400),
        ("POST", "/v1/chat/completions", {"messages": []}, 400),
    ],
)
def test_every_response_has_one(http: httpx.Client, method: str, path: str, body: object, status: int) -> None:
    responses = [http.request(method, path, json=body) for _ in range(2)]
    assert [response.status_code for response in responses] == [status, status]
    first, second = (response.headers.get_list("x-request-id") for response in responses)
    assert len(first) == len(second) == 1 and first != second


def test_too_large_a_body_and_an_unexpected_error_have_one_too(
    service: Service, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b" " * (service.settings.max_body_bytes + 1)
    assert http.post("/generate", content=body, headers={"x-request-id": "large"}).headers["x-request-id"] == "large"

    def fail() -> None:
        raise ValueError("made to fail")

    monkeypatch.setattr(service, "stats", fail)
    response = http.get("/cache/stats", headers={"x-request-id": "broken"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "broken")


def test_the_openai_client_knows_it(client: openai.OpenAI) -> None:
    raw = client.completions.create(model="ember", prompt="hello", max_tokens=2, extra_headers={"x-request-id": "mine"})
    assert raw._request_id == "mine"


def test_the_line_of_an_answer(http: httpx.Client, lines: Lines) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "n": 2}
    response = http.post("/v1/completions", json=body, headers={"x-request-id": "line-1"})
    line, usage = lines.of("line-1"), response.json()["usage"]
    assert (line["method"], line["route"], line["status"], line["model"]) == ("POST", "/v1/completions", 200, "ember")
    assert line["prompt_tokens"] == line["cached_tokens"] + line["computed_tokens"] > 0
    assert line["completion_tokens"] == usage["completion_tokens"] == 12
    assert line["finish_reason"] == "length"
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
    assert SECRET not in json.dumps(lines.fields)


def test_the_line_of_a_repeat_says_what_was_cached(http: httpx.Client, lines: Lines) -> None:
    body = {"prompt": f"again and again {PROMPT}", "max_tokens": 2}
    for identity in ("first", "second"):
        http.post("/v1/completions", json=body, headers={"x-request-id": identity})
    assert lines.of("second")["cached_tokens"] == lines.of("first")["prompt_tokens"]


def test_the_line_of_a_stream_that_its_client_leaves(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "WAIT_SECONDS", 60.0)
    body = {"prompt": PROMPT, "max_new_tokens": 900, "ignore_eos": True}
    headers = {"x-request-id": "left"}
    with Service.open(Settings(engine="toy", store="none")) as service, running(service) as url:
        steps = Steps(service)
        steps.let(9)
        with httpx.stream("POST", f"{url}/generate_stream", json=body, headers=headers) as response:
            answer = response.iter_lines()  # kept: without it the connection is closed
            next(answer)
            steps.wait_until_begun(10)
        steps.wait(lambda: steps.generations[0].cancelled)
        steps.let_all()
        line = lines.of("left")
    assert (line["status"], line["finish_reason"]) == (200, "cancelled")
    assert 0 < line["completion_tokens"] <= 10


@pytest.mark.parametrize("patience", [0.0, 60.0], ids=["before the step ends", "after it"])
def test_the_line_of_whoever_leaves_in_the_first_step(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """However long that step takes: the prompt's tokens are known, and nobody else has ended the request."""
    monkeypatch.setattr(requests, "WAIT_SECONDS", patience)
    with Service.open(Settings(engine="toy", store="none")) as service, running(service) as url:
        steps = Steps(service)
        connection = post(url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 9}, x_request_id="soon-gone")
        steps.wait_until_begun(1)
        connection.close()
        steps.wait(lambda: steps.generations[0].cancelled)
        line = lines.of("soon-gone") if not patience else None
        steps.let_all()
        line = line or lines.of("soon-gone")
        assert line["prompt_tokens"] == len(service.model.tokenizer.encode(PROMPT, bos=True))
        assert (line["finish_reason"], line["completion_tokens"]) == ("cancelled", 1 if patience else 0)


def test_the_line_of_a_refusal(http: httpx.Client, lines: Lines) -> None:
    http.post("/v1/completions", json={"prompt": 1.5}, headers={"x-request-id": "bad"})
    line = lines.of("bad")
    assert line["status"] == 400 and "prompt_tokens" not in line


def test_the_line_of_a_path_that_leads_nowhere(http: httpx.Client, lines: Lines) -> None:
    http.get("/no/such/place?token=geheim", headers={"x-request-id": "lost"})
    assert (lines.of("lost")["route"], lines.of("lost")["path"]) == ("unknown", "/no/such/place")
    assert "geheim" not in json.dumps(lines.fields)


def test_the_line_names_the_key_and_never_shows_it(lines: Lines, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:sk-geheim-1\n")
    settings = Settings(engine="toy", store="none", context=256, api_key_file=str(keys))
    with Service.open(settings) as service, running(service) as url:
        for key, identity in (("sk-geheim-1", "with"), ("sk-geheim-2", "wrong")):
            headers = {"authorization": f"Bearer {key}", "x-request-id": identity}
            httpx.post(f"{url}/generate", json={"prompt": "hello", "max_new_tokens": 2}, headers=headers)
    assert lines.of("with")["key"] == "alice"
    assert lines.of("wrong")["status"] == 401 and "key" not in lines.of("wrong")
    assert "geheim" not in json.dumps(lines.fields)


def test_an_error_in_the_worker_is_logged_with_the_id(
    service: Service, http: httpx.Client, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    class Ids(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                found.append(request_id.get())

    def fail(work: object) -> object:
        raise EngineError("made to fail")

    monkeypatch.setattr(service._engine, "forward", fail)
    handler, logger = Ids(), logging.getLogger("rekindle")
    logger.addHandler(handler)
    response = http.post("/generate", json={"prompt": PROMPT}, headers={"x-request-id": "unlucky"})
    logger.removeHandler(handler)
    assert response.status_code == 500
    assert found and set(found) == {"unlucky"}
    assert lines.of("unlucky")["error"] == "engine_error"


def test_routes_are_counted_by_their_pattern(service: Service, http: httpx.Client) -> None:
    def count(route: str, status: int) -> float:
        labels = {"method": "GET", "route": route, "status": str(status)}
        return service.metrics.registry.get_sample_value("rekindle_http_requests_total", labels) or 0.0

    before = count("unknown", 404)
    for number in range(5):
        http.get(f"/made/up/{number}")
    assert count("unknown", 404) == before + 5
    http.get("/v1/models/ember")
    assert count("/v1/models/{model:path}", 200) >= 1


def test_a_websocket_has_an_id_too(lines: Lines) -> None:
    """Through the middleware alone."""
    from rekindle.api.requests import Requests

    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/ws", "headers": [(b"x-request-id", b"socket")]}
    asyncio.run(Requests(app, Metrics())(scope, receive, send))
    assert sent[0]["headers"] == [(b"x-request-id", b"socket")]
    assert (lines.of("socket")["method"], lines.of("socket")["status"]) == ("WEBSOCKET", 101)
