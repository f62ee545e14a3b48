"""What a request with `"rekindle": {…}` is told of the work it made, beside its answer."""

from __future__ import annotations

from typing import Any

from rekindle.api.wire import RekindleOptions
from rekindle.kv.pins import Pin
from rekindle.serve.request import Done, Usage


def report_of(options: RekindleOptions | None, done: Done) -> dict[str, Any]:
    """Plan, timings and pin, as far as they were asked for; empty if nothing was."""
    if options is None:
        return {}
    unmarked: dict[str, Any] = {"chunks": []} if options.blend else {}  # so it is seen that nothing was marked
    plan = {"plan": unmarked | done.plan.as_dict()} if options.plan else {}
    timings = {"timings": done.timings.as_dict} if options.timings else {}
    pin = {"pin": pin_as_dict(done.pin)} if done.pin is not None else {}
    return plan | timings | pin


def blended_tokens(*usages: Usage) -> dict[str, int]:
    """Which of the cached tokens are reused, but not exactly; where chunks were placed."""
    num_blended = sum(usage.blended_tokens for usage in usages)
    return {"blended_tokens": num_blended} if num_blended else {}


def pin_as_dict(pin: Pin) -> dict[str, Any]:
    """For the wire."""
    return {
        "id": pin.id,
        "name": pin.name,
        "tokens": pin.num_tokens,
        "bytes": pin.num_bytes,
        "expires_in_seconds": round(pin.expires_in, 1),
    }
