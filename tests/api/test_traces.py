"""The whole tree of spans over HTTP, from a client's `traceparent` down."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.serve.traces import Traces
from rekindle.settings import Settings

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
HEADERS = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "x-request-id": "traced"}
CHAT = {"messages": [{"role": "user", "content": "Hello there."}], "max_tokens": 3, "ignore_eos": True}
PHASES = {"queue", "restore", "prefill", "decode"}


class Memory(InMemorySpanExporter):
    """Spans end on two threads, some after the response was read: they can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._came = threading.Condition()

    def export(self, spans: object) -> SpanExportResult:
        with self._came:
            self._came.notify_all()
            return super().export(spans)  # type: ignore[arg-type]

    def wait_for(self, count: int) -> tuple[ReadableSpan, ...]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.get_finished_spans()) >= count, 60)
            return self.get_finished_spans()


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def traced(memory: Memory) -> Iterator[httpx.Client]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    with (
        Service.open(Settings(engine="toy", store="none", context=512), observers=[Traces(provider)]) as service,
        running(service) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


@pytest.mark.parametrize("stream", [False, True])
def test_the_tree_of_a_request(traced: httpx.Client, memory: Memory, stream: bool) -> None:
    assert traced.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=HEADERS).status_code == 200
    spans = {span.name: span for span in memory.wait_for(6)}
    server, chat = spans.pop("POST /v1/chat/completions"), spans.pop("chat ember")
    assert set(spans) == PHASES
    assert server.kind is SpanKind.SERVER
    assert (parent_of(server), parent_of(chat)) == (PARENT, id_of(server))
    assert {parent_of(span) for span in spans.values()} == {id_of(chat)}
    assert {span.context.trace_id for span in (server, chat, *spans.values()) if span.context} == {TRACE}
    assert server.attributes is not None and chat.attributes is not None
    assert (server.attributes["http.route"], server.attributes["http.response.status_code"]) == (
        "/v1/chat/completions",
        200,
    )
    assert chat.attributes["rekindle.request_id"] == "traced"
    assert chat.attributes["gen_ai.operation.name"] == "chat"


def test_every_choice_has_its_own(traced: httpx.Client, memory: Memory) -> None:
    traced.post("/v1/chat/completions", json=CHAT | {"n": 2}, headers=HEADERS)
    names = [span.name for span in memory.wait_for(1 + 2 * 5)]
    assert (names.count("chat ember"), names.count("decode")) == (2, 2)


def test_without_a_traceparent_a_trace_begins(traced: httpx.Client, memory: Memory) -> None:
    traced.post("/v1/chat/completions", json=CHAT)
    server = next(span for span in memory.wait_for(6) if span.kind is SpanKind.SERVER)
    assert server.parent is None and server.context is not None and server.context.trace_id != TRACE


def test_a_client_that_does_not_sample_is_obeyed(traced: httpx.Client, memory: Memory) -> None:
    traced.post("/v1/chat/completions", json=CHAT, headers={"traceparent": HEADERS["traceparent"][:-1] + "0"})
    traced.get("/v1/models")
    assert {span.name for span in memory.wait_for(1)} == {"GET /v1/models"}


def test_probes_leave_no_traces_and_refusals_do(traced: httpx.Client, memory: Memory) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert traced.get(path).status_code == 200
    assert traced.post("/generate", json={"prompt": 5}).status_code == 422
    (span,) = memory.wait_for(1)
    assert span.name == "POST /generate"


def test_no_text_is_in_a_span(traced: httpx.Client, memory: Memory) -> None:
    secret = "nobodys-business"
    messages = [{"role": "user", "content": secret}]
    traced.post("/v1/chat/completions", json=CHAT | {"messages": messages, "stop": [secret]}, headers=HEADERS)
    assert not [span for span in memory.wait_for(6) if secret in span.to_json()]
