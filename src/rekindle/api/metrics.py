"""`GET /metrics`: for Prometheus in its own text formats, for everybody else a few numbers as JSON.

Prometheus says in `Accept` that it wants text/plain or OpenMetrics; curl says that it takes anything, and a browser that
it would like HTML: both get JSON. Nothing here waits for the worker.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import psutil
from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from rekindle.api.refusals import Json
from rekindle.kv.tier import TierStats
from rekindle.serve.levels import OF_SLOWER_TIERS
from rekindle.serve.service import Service

_VARY = {"Vary": "Accept"}
_TEXTS = ("text/plain", "application/openmetrics-text")
_CPU_SECONDS = 1.0  # over which the processors' load is measured, at least


def metrics_router(service: Service) -> APIRouter:
    """This endpoint."""
    router = APIRouter(tags=["status"])
    machine = Machine()

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus' text where `Accept` asks for text/plain or OpenMetrics; otherwise JSON: see docs/metrics.md."""
        accept = ",".join(request.headers.getlist("accept"))
        if wants_text(accept):
            encode, content_type = choose_encoder(accept)
            text = await asyncio.to_thread(encode, service.metrics.registry)
            return Response(text, headers={"Content-Type": content_type} | _VARY)
        numbers = await asyncio.to_thread(overview, service)
        return Json(numbers | machine.numbers(), headers=_VARY)

    return router


def overview(service: Service) -> dict[str, Any]:
    """What a person would like to know at a glance. Times are in seconds."""
    metrics, stats = service.metrics, service.stats()
    levels = service.levels.numbers()
    return {
        "model": service.model_name,
        "status": service.health()["status"],
        "uptime_sec": round(time.time() - metrics.started, 1),
        "active_streams": metrics.num_running,
        "queued": metrics.num_queued,
        "swapped": metrics.num_swapped,
        "tokens_per_sec": round(metrics.tokens_per_second, 2),
        "total_requests": metrics.num_requests,
        "total_tokens_generated": metrics.num_generated,
        "prompt_tokens_by_source": metrics.prompt_tokens,
        "avg_ttft_sec": round(metrics.mean_ttft_seconds, 6),
        "avg_latency": round(metrics.mean_duration_seconds, 6),
        "cache_hit_rate": round(stats.hit_rate, 4),
        "cache_token_hit_rate": round(stats.token_hit_rate, 4),
        "cells_used": int(levels["cells_used"]),
        "cells_capacity": int(levels["cells_capacity"]),
        "residents": int(levels["residents"]),
        "tiers": {tier.name: tier_numbers(tier) for tier in service.levels.tiers()},
    }


def tier_numbers(tier: TierStats) -> dict[str, Any]:
    """One tier's totals, without its name. Look-ups in memory are not counted."""
    left_out = {"name", *OF_SLOWER_TIERS} if tier.name == "memory" else {"name"}
    return {name: value for name, value in vars(tier).items() if name not in left_out}


# What the client asked for.


@dataclass(frozen=True, order=True)
class _Wish:
    """How much a client wants a media type: the quality it gave, then how plainly it named it, then how early."""

    quality: float = 0.0
    plainness: int = 0  # 2: named, 1: as one of a kind (text/*), 0: as anything (*/*), or not at all
    earliness: int = 0


def wants_text(accept: str) -> bool:
    """Whether an `Accept` header (RFC 9110, 12.5.1) asks for Prometheus' text rather than for JSON."""
    ranges = [_range(part, -index) for index, part in enumerate(accept.split(","))]
    return max(_wish(kind, ranges) for kind in _TEXTS) > _wish("application/json", ranges)


def _range(part: str, earliness: int) -> tuple[str, float, int]:
    """("text/plain", quality, earliness); a quality that cannot be read counts as none given."""
    name, *parameters = (each.strip().lower() for each in part.split(";"))
    given = next((each[2:] for each in parameters if each.startswith("q=")), "1")
    try:
        return name, min(1.0, max(0.0, float(given))), earliness
    except ValueError:
        return name, 1.0, earliness


def _wish(kind: str, ranges: list[tuple[str, float, int]]) -> _Wish:
    """The plainest range that a media type lies in is the one that counts."""
    names = {"*/*": 0, f"{kind.partition('/')[0]}/*": 1, kind: 2}
    found = [(names[name], early, quality) for name, quality, early in ranges if name in names]
    if not found:
        return _Wish()
    plainness, early, quality = max(found)
    return _Wish(quality, plainness, early) if quality else _Wish()


# The machine.


class Machine:
    """Load and memory of this machine and this process. Belongs to one thread: the processors' load is its own."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cpu_percent = 0.0
        self._measured_at = float("-inf")

    def numbers(self) -> dict[str, float]:
        """All processors' load in percent, the machine's memory in use in percent, and this process's in MiB."""
        now = time.monotonic()
        if now - self._measured_at >= _CPU_SECONDS:  # over a shorter time it would be noise
            self._cpu_percent, self._measured_at = psutil.cpu_percent(), now
        return {
            "cpu_percent": self._cpu_percent,
            "ram_percent": psutil.virtual_memory().percent,
            "memory_mb": round(self._process.memory_info().rss / (1 << 20), 1),
        }
