"""OpenTelemetry: for each answer a span with what it waited for, what was reused, read and decoded.

    POST /v1/chat/completions        of the HTTP request, made by FastAPI, with the client's `traceparent` as parent
      chat ember                     one answer; attributes as OpenTelemetry's conventions for generative AI name them
        queue, fetch, restore, prefill, decode

Spans are made when an answer has ended, from the moments its clock has kept: nothing is done for them before, and nothing
at all where OpenTelemetry's packages (`rekindle[otel]`) are missing or no endpoint is named, which is the default.
Attributes hold counts and settings, never text.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rekindle.errors import RekindleError
from rekindle.serve.metrics import sources_of
from rekindle.serve.observe import Observer
from rekindle.serve.request import FinishReason, request_id
from rekindle.serve.run import Run

if TYPE_CHECKING:
    from opentelemetry.trace import Status, TracerProvider

Attributes = Mapping[str, Any]
SERVICE_NAME = "rekindle"
SHUTDOWN_SECONDS = 3.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_log = logging.getLogger(__name__)


def open_traces(environ: Mapping[str, str] = os.environ) -> Traces | None:
    """Traces to the endpoint that OpenTelemetry's usual variables name; None if they name none, or packages are missing."""
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if is_off or not any(environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _log.warning('an OpenTelemetry endpoint is set, but there are no traces: %s; install "rekindle[otel]"', error)
        return None
    is_named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if is_named else {"service.name": SERVICE_NAME})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider, owns_provider=True)


class Traces(Observer):
    """Makes spans, with a provider of its own or the caller's. What it hears as an observer comes from the worker."""

    def __init__(self, provider: TracerProvider, *, owns_provider: bool = False) -> None:
        from opentelemetry import context, trace  # the interface alone: FastAPI brings it

        self.provider = provider
        self._owns_provider = owns_provider
        self._tracer = provider.get_tracer("rekindle")
        self._current_context = context.get_current
        self._inside = trace.set_span_in_context
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._model = ""

    def bind(self, model: str) -> None:
        """Name the model of all answers."""
        self._model = model

    def close(self) -> None:
        """Send what is left, for `SHUTDOWN_SECONDS` at most: nobody may be listening at the endpoint."""
        shutdown = getattr(self.provider, "shutdown", None)  # which the SDK's providers have
        if self._owns_provider and shutdown is not None:
            thread = threading.Thread(target=shutdown, name="rekindle-traces", daemon=True)
            thread.start()
            thread.join(SHUTDOWN_SECONDS)

    def finished(self, run: Run, reason: FinishReason) -> None:
        self._trace(run, {"gen_ai.response.finish_reasons": (reason,)}, None)

    def failed(self, run: Run, error: RekindleError) -> None:
        self._trace(run, {"error.type": error.code}, self._error)

    def _trace(self, run: Run, outcome: Attributes, status: Status | None) -> None:
        now, clock = time.perf_counter(), run.clock
        offset = time.time_ns() - int(now * 1e9)
        operation = _operation(run)
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            run.context.run(self._current_context),
            attributes={"gen_ai.operation.name": operation},
            start_time=offset + int(clock.arrived * 1e9),
        )
        if span.is_recording():
            span.set_attributes({**self._attributes(run), **outcome})
            if status is not None:
                span.set_status(status)
            parent = self._inside(span)
            for name, start, end, attributes in _phases(run, now):
                child = self._tracer.start_span(
                    name, parent, attributes=attributes, start_time=offset + int(start * 1e9)
                )
                child.end(offset + int(end * 1e9))
        span.end(offset + int(now * 1e9))

    def _attributes(self, run: Run) -> dict[str, Any]:
        sampling, generation = run.generation.sampling, run.generation
        settings = {
            "gen_ai.request.max_tokens": generation.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.seed": sampling.seed,
            "rekindle.request_id": run.context.get(request_id) or None,
        }
        return {name: value for name, value in settings.items() if value is not None} | {
            "gen_ai.provider.name": "rekindle",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.usage.input_tokens": len(run.prompt),
            "gen_ai.usage.output_tokens": len(run.generated),
            "gen_ai.usage.cache_read.input_tokens": 0 if run.plan is None else run.plan.reused,
        }


def _operation(run: Run) -> str:
    """As the conventions name it. A text that brings its own BOS was rendered by a chat template."""
    prompt = run.generation.prompt
    return "chat" if prompt.text is not None and not prompt.bos else "text_completion"


def _phases(run: Run, now: float) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Name, start, end and attributes of what an answer went through, as far as it came."""
    clock, plan = run.clock, run.plan
    yield "queue", clock.submitted, clock.admitted or now, {}
    if clock.fetch_ended:
        tokens = {f"rekindle.tokens.{tier}": count for tier, count in run.fetched.tokens.items()}
        yield "fetch", clock.fetch_started, clock.fetch_ended, tokens
    if plan is None:
        return
    sources = {f"rekindle.tokens.{source}": count for source, count in sources_of(plan, run.fetched).items()}
    yield "restore", clock.planned, clock.restored, sources
    yield "prefill", clock.restored, clock.first_token or now, {"rekindle.model_calls": run.prefill_calls}
    if clock.first_token:
        yield "decode", clock.first_token, clock.last_token, {}
