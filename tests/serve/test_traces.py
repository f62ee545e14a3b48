"""Spans of answers: their tree, their times and what they say; and nothing where OpenTelemetry is not set up."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode
from tests.kv.doubles import DictTier
from tests.serve.conftest import Stage, ids
from tests.serve.test_fetch import ask, settled

from rekindle.errors import EngineError
from rekindle.serve.request import Generation
from rekindle.serve.service import Service
from rekindle.serve.traces import Traces, open_traces
from rekindle.settings import Settings

VARIABLES = [name for name in os.environ if name.startswith("OTEL_")]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name)


class Traced:
    """Spans in memory, and the observer that makes them."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.traces = Traces(self.provider)
        self.traces.bind("ember")

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        found = {span.name: span for span in self._memory.get_finished_spans()}
        assert len(found) == len(self._memory.get_finished_spans())
        return found

    def clear(self) -> None:
        self._memory.clear()


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_the_spans_of_an_answer() -> None:
    traced = Traced()
    stage = Stage(observer=traced.traces)
    stage.ask(ids(1, 50), 4)
    spans = traced.spans
    assert set(spans) == {"text_completion ember", "queue", "restore", "prefill", "decode"}
    whole = spans["text_completion ember"]
    for name in ("queue", "restore", "prefill", "decode"):
        span = spans[name]
        assert span.parent is not None and whole.context is not None
        assert (span.parent.span_id, span.parent.trace_id) == (whole.context.span_id, whole.context.trace_id)
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time  # type: ignore[operator]
    ends = [spans[name].end_time for name in ("queue", "restore", "prefill", "decode")]
    assert ends == sorted(ends)  # type: ignore[type-var]
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert attributes(spans["restore"]) == {"rekindle.tokens.computed": 50}
    assert attributes(spans["prefill"]) == {"rekindle.model_calls": 1}
    said = attributes(whole)
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.request.model"] == said["gen_ai.response.model"] == "ember"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (50, 4)
    assert said["gen_ai.usage.cache_read.input_tokens"] == 0
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.temperature"]) == (4, 0)
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert whole.parent is None and whole.status.status_code is StatusCode.UNSET


def test_the_names_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

    known = {value for name, value in vars(names).items() if name.startswith("GEN_AI_")}
    traced = Traced()
    Stage(observer=traced.traces).ask(ids(2, 30), 2)
    said = [name for span in traced.spans.values() for name in attributes(span)]
    assert {name for name in said if name.startswith("gen_ai.")} <= known
    assert all(name.startswith(("gen_ai.", "rekindle.")) for name in said)


def test_a_repeat_says_what_was_cached() -> None:
    traced = Traced()
    stage = Stage(observer=traced.traces)
    stage.ask(ids(3, 60), 2)
    traced.clear()
    stage.ask(ids(3, 60), 2)
    assert attributes(traced.spans["text_completion ember"])["gen_ai.usage.cache_read.input_tokens"] == 60
    assert attributes(traced.spans["restore"]) == {"rekindle.tokens.resident": 60}


def test_fetching_is_a_span() -> None:
    tier, prompt = DictTier("network"), ids(4, 100)
    first = Stage(tiers=[tier])
    ask(first, prompt)
    settled(first)
    traced = Traced()
    stage = Stage(tiers=[tier], observer=traced.traces)
    ask(stage, [*prompt, *ids(5, 6)], 2)
    spans = traced.spans
    assert attributes(spans["fetch"]) == {"rekindle.tokens.network": 100}
    assert attributes(spans["restore"]) == {"rekindle.tokens.network": 100, "rekindle.tokens.computed": 6}
    assert attributes(spans["text_completion ember"])["gen_ai.usage.cache_read.input_tokens"] == 100


def test_an_answer_that_was_never_begun_has_only_waited() -> None:
    traced = Traced()
    stage = Stage(observer=traced.traces)
    stage.submit(ids(6, 30)).run.cancel()
    stage.run()
    assert set(traced.spans) == {"text_completion ember", "queue"}
    assert attributes(traced.spans["text_completion ember"])["gen_ai.response.finish_reasons"] == ("cancelled",)


def test_a_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: object) -> object:
        raise EngineError("made to fail")

    traced = Traced()
    stage = Stage(observer=traced.traces)
    monkeypatch.setattr(stage.engine, "forward", fail)
    stage.ask(ids(7, 30), 2)
    whole = traced.spans["text_completion ember"]
    assert whole.status.status_code is StatusCode.ERROR
    assert attributes(whole)["error.type"] == "engine_error"
    assert "decode" not in traced.spans


def test_the_callers_span_is_the_parent() -> None:
    traced = Traced()
    with traced.provider.get_tracer("test").start_as_current_span("caller"):
        Stage(observer=traced.traces).ask(ids(8, 30), 2)
    caller, whole = traced.spans["caller"], traced.spans["text_completion ember"]
    assert whole.parent is not None and caller.context is not None
    assert whole.parent.span_id == caller.context.span_id


def test_what_is_not_sampled_costs_one_span(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    traces = Traces(provider)
    started: list[str] = []
    start = traces._tracer.start_span

    def count(name: str, *args: object, **options: object) -> object:
        started.append(name)
        return start(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(traces._tracer, "start_span", count)
    Stage(observer=traces).ask(ids(9, 30), 2)
    assert len(started) == 1


# Set-up.


def test_without_an_endpoint_there_are_none() -> None:
    assert open_traces({}) is None
    assert open_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is None
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert open_traces(endpoint | {"OTEL_SDK_DISABLED": "true"}) is None
    assert open_traces(endpoint | {"OTEL_TRACES_EXPORTER": "none"}) is None


def test_without_the_packages_there_are_none_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with Service.open(Settings(engine="toy", store="none", context=256)) as service:
        assert service.traces is None
        assert list(service.events(_short(service)))
    assert [record for record in caplog.records if "rekindle[otel]" in record.getMessage()]


def test_nothing_of_it_is_imported_by_default() -> None:
    code = (
        "import sys\n"
        "from rekindle.serve.service import Service\n"
        "from rekindle.settings import Settings\n"
        "with Service.open(Settings(engine='toy', store='none', context=256)): pass\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')], sys.modules.keys()"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An endpoint that keeps what it is sent."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", got
        server.shutdown()
        thread.join()


def test_spans_reach_an_endpoint(
    monkeypatch: pytest.MonkeyPatch, collector: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    endpoint, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    monkeypatch.setattr("rekindle.serve.traces.SHUTDOWN_SECONDS", 60.0)
    with Service.open(Settings(engine="toy", store="none", context=256)) as service:
        list(service.events(_short(service)))
    resources = [each for request in got for each in request.resource_spans]
    for resource in resources:
        assert {"service.name": "rekindle"}.items() <= {
            each.key: each.value.string_value for each in resource.resource.attributes
        }.items()
    names = [span.name for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert set(names) == {"text_completion ember", "queue", "restore", "prefill", "decode"}


def test_an_endpoint_where_nobody_listens_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("rekindle.serve.traces.SHUTDOWN_SECONDS", 0.1)
    with Service.open(Settings(engine="toy", store="none", context=256)) as service:
        assert list(service.events(_short(service)))


def _short(service: Service) -> Generation:
    return Generation(prompt=service.token_prompt(list(range(10, 40))), max_tokens=3, ignore_eos=True)
