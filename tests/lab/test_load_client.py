"""One server as a client sees it: what good and bad servers answer. The bad ones are real sockets that misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest

from rekindle.api.server import running
from rekindle.errors import InvalidRequest
from rekindle.lab.load.client import Answer, ServerError, Target
from rekindle.lab.load.run import Wish, run_load
from rekindle.lab.load.texts import TOKENS_PER_WORD
from rekindle.lab.load.workloads import Sizes
from rekindle.serve.service import Service
from rekindle.settings import Settings

T = TypeVar("T")
Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
MODELS = {"data": [{"id": "fake", "owned_by": "llamacpp"}]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Service.open(Settings(engine="toy", context=2_048, store="none")) as service, running(service) as url:
        yield url


@contextmanager
def server(reply: Reply, models: Any = MODELS) -> Iterator[str]:
    """A server that answers chat completions as told."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            send(self, 200, models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/v1/chat/completions":
                reply(self, body)
            else:
                send(self, 404, {"error": {"message": "no such path"}})

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, value: Any, kind: str = "application/json") -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("content-type", kind)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def stream(handler: BaseHTTPRequestHandler, *events: Any, ends: bool = True) -> None:
    """Server-sent events, then the end of the connection."""
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("connection", "close")
    handler.end_headers()
    for event in events:
        handler.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
    if ends:
        handler.wfile.write(b"data: [DONE]\n\n")
    handler.close_connection = True


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]} | more


def use(url: str, work: Callable[[Target], Awaitable[T]], **options: Any) -> T:
    async def go() -> T:
        async with Target(url, **options) as target:
            return await work(target)

    return asyncio.run(go())


def ask(url: str, **options: Any) -> Answer:
    return use(url, lambda target: target.ask([{"role": "user", "content": "hello there"}], 8), **options)


def test_an_answer_is_counted_and_timed(url: str) -> None:
    answer = ask(url)
    assert answer.error is None
    assert (answer.completion_tokens, answer.cached_tokens) == (8, 0)
    assert answer.prompt_tokens and answer.computed_tokens == answer.prompt_tokens
    assert len(answer.arrivals) > 1 and len(answer.gaps) == len(answer.arrivals) - 1
    assert answer.ttft is not None and 0 < answer.ttft < answer.ended - answer.due
    assert answer.text


def test_a_repeated_prompt_is_seen_to_be_cached(url: str) -> None:
    messages = [{"role": "user", "content": "the same words again and again " * 10}]
    first = use(url, lambda target: target.ask(messages, 4))
    again = use(url, lambda target: target.ask(messages, 4))
    assert first.cached_tokens == 0
    assert again.computed_tokens == 0


def test_connect_finds_the_name_and_what_the_server_can_do(url: str) -> None:
    async def work(target: Target) -> tuple[str, bool, float]:
        await target.connect()
        return target.name, target.fixes_length, await target.tokens_per_word()

    name, fixes_length, tokens_per_word = use(url + "/v1/", work)
    assert (name, fixes_length) == ("rekindle", True)
    assert 1 < tokens_per_word < 5


def test_text_is_as_long_as_asked_by_the_measured_tokens_per_word(url: str) -> None:
    from rekindle.lab.load.texts import Texts

    async def work(target: Target) -> int | None:
        texts = Texts(seed=3, tokens_per_word=await target.tokens_per_word())
        message = {"role": "user", "content": texts.text("x", 500)}
        return (await target.ask([message], 1)).prompt_tokens

    assert use(url, work) == pytest.approx(500, rel=0.08)


def test_a_server_that_refuses_what_openai_does_not_know_is_asked_without_it() -> None:
    seen: list[set[str]] = []

    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        seen.append(set(body) & {"ignore_eos", "stream_options"})
        if "ignore_eos" in body:
            send(handler, 400, {"error": {"message": "Unrecognized request argument: ignore_eos"}})
        else:
            stream(handler, text("a"), {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})

    async def work(target: Target) -> tuple[bool, float]:
        await target.connect()
        return target.fixes_length, await target.tokens_per_word()

    with server(reply) as fake:
        assert use(fake, work) == (False, TOKENS_PER_WORD)  # the same count whatever the text: no measure
    assert seen[:2] == [{"ignore_eos", "stream_options"}, {"stream_options"}]


def test_llama_servers_own_word_for_cached_tokens_is_understood() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1}
    with server(lambda handler, _: stream(handler, text("a"), text("", usage=usage, timings={"cache_n": 5}))) as fake:
        assert ask(fake).computed_tokens == 4


def test_a_line_separator_in_a_text_does_not_break_an_event() -> None:
    event = json.dumps(text("a\u2028b"), ensure_ascii=False)
    with server(lambda handler, _: stream(handler, event)) as fake:
        assert ask(fake).text == "a\u2028b"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda handler, _: send(handler, 500, {"error": {"message": "out of\nmemory"}}), "HTTP 500: out of memory"),
        (lambda handler, _: send(handler, 429, b"slow down", "text/plain"), "HTTP 429: {}"),
        (lambda handler, _: send(handler, 200, {"choices": []}), "expected text/event-stream, got application/json"),
        (lambda handler, _: stream(handler, text("a"), ends=False), "the answer broke off"),
        (lambda handler, _: stream(handler, text("a"), {"error": {"message": "lost"}}), "error in the stream: lost"),
        (lambda handler, _: stream(handler, "<html>"), "an event is not a JSON object: '<html>'"),
        (lambda handler, _: stream(handler, {"choices": ["a"]}), "an event is not a chat completion's: "),
    ],
)
def test_what_a_server_does_wrong_is_an_answer_with_the_reason(reply: Reply, reason: str) -> None:
    with server(reply) as fake:
        answer = ask(fake)
    assert answer.error is not None and answer.error.startswith(reason)


def test_a_connection_that_is_cut_in_the_middle_is_told_from_one_that_was_never_made() -> None:
    def reply(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("content-length", "100000")
        handler.end_headers()
        handler.wfile.write(f"data: {json.dumps(text('a'))}\n\n".encode())
        handler.close_connection = True

    with server(reply) as fake:
        answer = ask(fake)
    assert answer.error is not None and answer.error.startswith("the answer broke off: peer closed connection")
    assert len(answer.arrivals) == 1
    assert ask(fake).error == "no connection: All connection attempts failed"  # it is gone by now


def test_a_server_that_falls_silent_does_not_hang_the_client() -> None:
    over = threading.Event()

    def reply(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(f"data: {json.dumps(text('a'))}\n\n".encode())
        over.wait(30)

    with server(reply) as fake:
        answer = ask(fake, timeout_seconds=0.3)
        over.set()
    assert answer.error == "no end after 0.3 s"


def connect(url: str, **options: Any) -> None:
    use(url, lambda target: target.connect(), **options)


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ServerError, match=r"cannot reach http://127.0.0.1:1: .*is it running\?"):
        connect("127.0.0.1:1")


@pytest.mark.parametrize(("key", "reason"), [(None, "wants an API key"), ("wrong", "takes another API key")])
def test_a_server_that_wants_a_key_is_told_from_one_that_wants_another(key: str | None, reason: str) -> None:
    settings = Settings(engine="toy", store="none", api_key=("right",))  # type: ignore[arg-type]
    with Service.open(settings) as service, running(service) as url, pytest.raises(ServerError) as refused:
        run_load(Wish(sizes=Sizes(), url=url, api_key=key), None)
    assert str(refused.value) == f"{url} {reason} (HTTP 401); give it with --api-key"


def test_another_kind_of_server_is_told_from_one_of_openais_kind() -> None:
    with (
        server(lambda handler, _: None, models={"hello": "world"}) as fake,
        pytest.raises(ServerError, match="is this an OpenAI-compatible server"),
    ):
        connect(fake)


def test_a_server_that_answers_errors_only_is_not_loaded() -> None:
    with (
        server(lambda handler, _: send(handler, 503, {"error": {"message": "Loading model"}})) as fake,
        pytest.raises(ServerError, match="a first chat completion failed: HTTP 503: Loading model"),
    ):
        connect(fake)


def test_a_named_model_needs_no_list_of_models(url: str) -> None:
    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        stream(handler, text(body["model"]))

    with server(reply, models={}) as fake:
        connect(fake, model="mine")
        assert ask(fake, model="mine").text == "mine"


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://[::1", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a URL"):
        Target(url)
