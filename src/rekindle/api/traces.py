"""The span of an HTTP request: FastAPI makes it, from the method and the route, and goes on with a client's `traceparent`.

All else that FastAPI would send is left out: its metrics are ours (`/metrics`), and its logs would hold what clients sent.
"""

from __future__ import annotations

from fastapi.telemetry import TelemetryConfig

from rekindle.api.requests import PROBES
from rekindle.serve.traces import Traces


def telemetry(traces: Traces | None) -> TelemetryConfig:
    """For `FastAPI(telemetry=...)`: spans for all requests but probes, or nothing."""
    config: TelemetryConfig = {
        "tracing": traces is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") in PROBES,
    }
    if traces is not None:
        config["tracer_provider"] = traces.provider
    return config
