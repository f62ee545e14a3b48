"""How the server is: `/health`, `/ready` and the root.

`/health` is for a supervisor: when it says 503 the process is of no use any more and should be started anew. `/ready` is
for a load balancer: while it says 503, requests should go elsewhere.
"""

from __future__ import annotations

from fastapi import APIRouter

import rekindle
from rekindle.api.load import Load, retry_after
from rekindle.api.refusals import Json
from rekindle.serve.service import Service

_ROUTES = {
    "models": "/v1/models",
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "realtime": "/v1/realtime",
    "generate": "/generate",
    "generate_stream": "/generate_stream",
    "cache_stats": "/cache/stats",
    "cache_clear": "/cache/clear",
    "cache_pin": "/cache/pin",
    "cache_pins": "/cache/pins",
    "cache_warm": "/cache/warm",
    "cache_verify": "/cache/verify",
    "cache_prune": "/cache/prune",
    "live": "/ws",
    "live_status": "/status",
    "health": "/health",
    "ready": "/ready",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
}


def status_router(service: Service, load: Load) -> APIRouter:
    """These endpoints."""
    router = APIRouter(tags=["status"])

    @router.get("/")
    async def root() -> Json:
        """What this is and where to go."""
        about = {"name": "rekindle", "version": rekindle.__version__, "model": service.model_name}
        return Json(about | {"links": _ROUTES})

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Json:
        """200 while the worker is well, 503 with the kind of its error otherwise."""
        state = service.health()
        return Json(state) if state["status"] == "ok" else Json(state, status_code=503, headers=retry_after(None))

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> Json:
        """200 if a request would be taken now; 503 when the queue is full, the server drains, or its worker failed."""
        state = service.health()
        if state["status"] != "ok":
            return Json({"status": "failed"}, status_code=503, headers=retry_after(None))
        if load.draining:
            return Json({"status": "draining"}, status_code=503, headers=retry_after(load.until_end()))
        if state["queued"] >= service.settings.max_queue:
            return Json({"status": "queue full"}, status_code=503, headers=retry_after(load.until_room()))
        return Json({"status": "ready"})

    return router
