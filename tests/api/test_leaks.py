"""Whatever is wrong with a request, its refusal holds no prompt, no path of this machine, no trace and no key: each error
of each kind, searched for all of them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.steps import Steps, address_of, read_until
from tests.api.test_bad_input import CASES, Bad

import rekindle
from rekindle.api.server import running
from rekindle.errors import EngineError
from rekindle.model.ember import weights_path
from rekindle.serve.service import Service
from rekindle.settings import Settings

SECRET = "correct horse battery staple"
KEY = "sk-leak-31337"
PATHS = {
    "working directory": str(Path.cwd()),
    "package": str(Path(rekindle.__file__).parent),
    "model": str(weights_path()),
    "home": f"{Path.home()}/",
    "temporary files": "/tmp/",
    "trace": "Traceback",
    "source": ".py",
    "key": KEY,
    "prompt": SECRET,
}


def check(text: str) -> None:
    assert [what for what, words in PATHS.items() if words in text] == [], text


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    settings = Settings(model=str(weights_path()), engine="toy", context=512, store="none", api_key=(KEY,))  # type: ignore[arg-type]
    with Service.open(settings) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, headers={"x-api-key": KEY}) as client:
        yield client


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_every_kind_of_bad_input(http: httpx.Client, bad: Bad) -> None:
    content = bad.body() if callable(bad.body) else bad.body
    if isinstance(content, bytes):
        content = content.replace(b'"Hello"', f'"{SECRET}"'.encode()).replace(b'"content": "x"', b'"content": "yz"')
    answer = http.request(bad.method, bad.path, content=content, headers=bad.headers)
    assert answer.status_code >= 400
    check(answer.text)
    check(str(answer.headers))


PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"{SECRET} " * 300}]}),
    ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": SECRET, "text": SECRET}]}]}),
    ("/v1/chat/completions", {"messages": SECRET}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "stop": [SECRET, 5]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "tools": [SECRET]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "response_format": {"type": SECRET}}),
    ("/v1/responses", {"input": f"{SECRET} " * 300}),
    ("/v1/responses", {"input": [{"role": SECRET, "content": SECRET}]}),
    ("/v1/responses", {"input": [{"type": SECRET, "role": "user", "content": [{"type": SECRET, "text": SECRET}]}]}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": SECRET, "text": SECRET}]}]}),
    ("/v1/responses", {"input": SECRET, "text": {"format": {"type": SECRET}}}),
    ("/v1/completions", {"prompt": f"{SECRET} " * 300}),
    ("/v1/completions", {"prompt": [SECRET, 5]}),
    ("/v1/completions", {"prompt": SECRET, "suffix": SECRET}),
    ("/generate", {"prompt": {SECRET: SECRET}}),
    ("/generate", {"prompt": SECRET, "temperature": SECRET}),
    ("/generate_stream", {"prompt": f"{SECRET} " * 300}),
]


@pytest.mark.parametrize(("path", "body"), PROMPTS)
def test_prompts_that_are_refused(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    assert 400 <= answer.status_code < 500
    check(answer.text)


@pytest.mark.parametrize("error", [EngineError, RuntimeError, OSError, KeyError])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/generate_stream"])
def test_inner_failures(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, error: type[Exception], path: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error(f"{weights_path()}: {SECRET} {KEY}")

    monkeypatch.setattr(service, "submit", fail)
    answer = http.post(path, json={"prompt": SECRET, "messages": [{"role": "user", "content": SECRET}]})
    assert answer.status_code == 500
    check(answer.text)


def test_a_failure_of_the_engine_in_a_step(http: httpx.Client, service: Service) -> None:
    """One that the scheduler hands to the request; the next one is answered."""
    forward, submit = service._engine.forward, service.submit
    steps = Steps(service)

    def fail(*_: object) -> None:
        raise EngineError(f"{weights_path()}: {SECRET}")

    service._engine.forward = fail  # type: ignore[method-assign, assignment]
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": f"{SECRET} {stream}"}], "stream": stream}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 500
        check(answer.text)
    service._engine.forward, service.submit = forward, submit  # type: ignore[method-assign]
    steps.check_nothing_is_left()
    assert http.post("/generate", json={"prompt": SECRET, "max_new_tokens": 2}).status_code == 200


HEAD = f"GET /{SECRET.replace(' ', '_')} HTTP/1.1\r\nHost: localhost\r\n"
BROKEN = {
    "no HTTP": f"{SECRET}\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a header without a colon": f"{HEAD}{SECRET}\r\n\r\n",
    "a header that is too long": f"{HEAD}X-Long: {'x' * 1_000_000}\r\n\r\n",
    "a URL that is too long": f"GET /{'x' * 1_000_000} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "too many headers": HEAD + "".join(f"X-{number}: {SECRET}\r\n" for number in range(20_000)) + "\r\n",
    "a length that is none": f"{HEAD}Content-Length: {SECRET}\r\n\r\n",
    "two lengths": f"{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a chunk that is none": f"POST /generate HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEY}\r\n"
    f"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n",
    "no host": "GET /health HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_http(
    url: str, http: httpx.Client, service: Service, caplog: pytest.LogCaptureFixture, data: str
) -> None:
    """Below the API: a short answer in plain text, or a closed connection, and the server goes on."""
    with socket.create_connection(address_of(url), timeout=30) as connection:
        try:
            connection.sendall(data.encode("latin-1"))
            connection.shutdown(socket.SHUT_WR)
            received = read_until(connection)
        except OSError:
            received = b""
    text = received.decode("latin-1")
    assert not text or text.startswith("HTTP/1.1 4")
    check(text)
    assert http.get("/health").status_code == 200
    assert SECRET not in caplog.text and KEY not in caplog.text
