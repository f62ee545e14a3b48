"""The metrics there are: names, kinds, labels and meanings. The documentation's table is made from this list.

Names follow Prometheus' conventions: base units, `_total` after counters, one prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "rekindle_"

# Edges for a server without a GPU. ITL: from a tiny model alone to a large one beside a prompt that is being read.
_ITL_EDGES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
_STALL_EDGES = (5, 10, 30)  # of an answer that was swapped out, or whose machine has other things to do
# TTFT: from an exact repeat, which computes nothing, to a long prompt behind others.
_TTFT_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120)
_RESTORE_EDGES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_DURATION_EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600)


@dataclass(frozen=True)
class Metric:
    """One metric; `rekindle_` comes before its name, and `_total` or `_info` after it where that is the custom."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()  # upper bounds of a histogram's buckets, in seconds

    @property
    def full_name(self) -> str:
        """As in a query; a histogram's is followed by _bucket, _sum or _count there."""
        return PREFIX + self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


METRICS = (
    Metric("build", "info", "Versions of what runs here.", ("version", "llama_cpp_python", "python")),
    Metric("model", "info", "The model that is served.", ("model", "engine", "kv_type", "fingerprint")),
    Metric("worker_up", "gauge", "1 while the thread that owns the engine is well."),
    Metric("http_requests", "counter", "HTTP requests answered.", ("method", "route", "status")),
    Metric(
        "requests", "counter", "Answers asked for, by how they ended; one HTTP request may ask several.", ("outcome",)
    ),
    Metric("requests_running", "gauge", "Requests that are being read or decoded."),
    Metric("requests_queued", "gauge", "Requests that wait to be admitted."),
    Metric("requests_swapped", "gauge", "Requests taken out of the engine to make room, which wait to be resumed."),
    Metric("swaps", "counter", "Running requests taken out of the engine to make room."),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "From arrival to the first token, queueing included.",
        (),
        _TTFT_EDGES,
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Between two tokens of one answer.",
        (),
        (*_ITL_EDGES, *_STALL_EDGES),
    ),
    Metric("request_queue_seconds", "histogram", "From submission to admission, fetching excluded.", (), _TTFT_EDGES),
    Metric(
        "request_restore_seconds",
        "histogram",
        "Fetching KV from slower tiers and putting it into the engine, of requests that did.",
        (),
        _RESTORE_EDGES,
    ),
    Metric(
        "request_prefill_seconds",
        "histogram",
        "From admission to the first token, restoring excluded, of requests that computed some of their prompt.",
        (),
        _TTFT_EDGES,
    ),
    Metric(
        "request_duration_seconds", "histogram", "From arrival to the end of a complete answer.", (), _DURATION_EDGES
    ),
    Metric(
        "prompt_tokens", "counter", "Prompt tokens of admitted requests, by where their KV comes from.", ("source",)
    ),
    Metric("chunks", "counter", "Chunks of requests that blend, by what became of them.", ("outcome",)),
    Metric("generated_tokens", "counter", "Tokens of answers."),
    Metric("computed_tokens", "counter", "Tokens that the engine has computed, of prompts and answers."),
    Metric("model_calls", "counter", "Calls of the model."),
    Metric("cells_capacity", "gauge", "KV cells of the engine; one holds one token."),
    Metric("cells_used", "gauge", "KV cells in use, by requests and residents."),
    Metric("sequences_used", "gauge", "Sequences open in the engine."),
    Metric("residents", "gauge", "Idle sequences kept in the engine for the next request."),
    Metric("resident_tokens", "gauge", "Tokens of residents; cells that residents share count once for each."),
    Metric("resident_evictions", "counter", "Residents that left the engine."),
    Metric("sessions", "gauge", "Live sessions; hibernating ones need not be in the engine.", ("state",)),
    Metric("session_window_moves", "counter", "Times that the oldest turns of a live session went to make room."),
    Metric("session_dropped_tokens", "counter", "Tokens of live sessions that went to make room."),
    Metric(
        "session_slid_tokens",
        "counter",
        "Tokens of live sessions that slid: turned once more, or placed anew as first computed.",
        ("how",),
    ),
    Metric("tier_blocks", "gauge", "Blocks kept, for a shared tier as far as this server knows.", ("tier",)),
    Metric("tier_bytes", "gauge", "Bytes kept, for a shared tier as far as this server knows.", ("tier",)),
    Metric("tier_capacity_bytes", "gauge", "The tier's budget; missing where it has none of ours.", ("tier",)),
    Metric("tier_pinned_bytes", "gauge", "Bytes that are pinned and do not leave to make room.", ("tier",)),
    Metric("tier_up", "gauge", "1 while the tier works, 0 after a fault, until it works again.", ("tier",)),
    Metric("tier_hits", "counter", "Blocks that were asked of a slower tier and found.", ("tier",)),
    Metric("tier_misses", "counter", "Blocks that were asked of a slower tier and not found.", ("tier",)),
    Metric("tier_read_bytes", "counter", "Bytes of blocks that a slower tier has given.", ("tier",)),
    Metric("tier_written_bytes", "counter", "Bytes of blocks that were written to a slower tier.", ("tier",)),
    Metric("tier_evictions", "counter", "Blocks that left to make room.", ("tier",)),
    Metric("tier_faults", "counter", "Operations that failed.", ("tier",)),
    Metric("tier_corrupt_blocks", "counter", "Blocks set aside because they were not what was written.", ("tier",)),
    Metric("store_dropped_blocks", "counter", "Blocks never written to slower tiers because the queue was full."),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def metrics_table() -> str:
    """A Markdown table of all metrics."""
    rows = [("metric", "type", "labels", "meaning"), ("---",) * 4]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        kind = "gauge, always 1" if metric.kind == "info" else metric.kind
        rows.append((f"`{metric.full_name}`", kind, labels, metric.help))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
