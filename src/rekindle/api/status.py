"""What is kept and how it goes: `/cache/stats`, `/cache/clear`, `/health` and the root."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

import rekindle
from rekindle.api.refusals import Json
from rekindle.serve.service import Service

_ROUTES = {
    "models": "/v1/models",
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "generate": "/generate",
    "generate_stream": "/generate_stream",
    "cache_stats": "/cache/stats",
    "cache_clear": "/cache/clear",
    "health": "/health",
    "openapi": "/openapi.json",
}


def status_router(service: Service) -> APIRouter:
    """These endpoints."""
    router = APIRouter(tags=["status"])

    @router.get("/")
    async def root() -> Json:
        """What this is and where to go."""
        about = {"name": "rekindle", "version": rekindle.__version__, "model": service.model_name}
        return Json(about | {"links": _ROUTES})

    @router.get("/health")
    async def health() -> Json:
        """200 while the worker is well, 503 otherwise."""
        state = service.health()
        return Json(state, status_code=200 if state["status"] == "ok" else 503)

    @router.get("/cache/stats")
    async def cache_stats() -> Json:
        """Reuse by request (hits, misses, hit_rate) and by token (cached_tokens, token_hit_rate), and what is kept."""
        stats = service.stats()
        rates = {"hit_rate": round(stats.hit_rate, 4), "token_hit_rate": round(stats.token_hit_rate, 4)}
        return Json(vars(stats) | rates)

    @router.post("/cache/clear")
    async def cache_clear() -> Json:
        """Forget everything that is kept; running requests go on."""
        await asyncio.to_thread(service.clear_cache)  # the worker may be in the middle of a step
        return Json({"status": "success", "message": "Prefix cache cleared"})

    return router
