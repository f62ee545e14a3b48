"""What is kept, from outside: `/cache/stats`, `/cache/clear`, `/cache/pin`, `/cache/pins`, `/cache/warm`.

Where API keys are set, everybody sees and ends the pins of their own key alone, and what is warmed is for that key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from rekindle.api.answers import Runner, while_connected
from rekindle.api.cache_wire import ClearRequest, PinRequest, PromptFields, WarmRequest
from rekindle.api.door import arrived
from rekindle.api.keys import caller_of
from rekindle.api.openai import built, check_model
from rekindle.api.refusals import Json
from rekindle.api.report import pin_as_dict
from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Chunk, Document
from rekindle.reuse.prompt import Prompt
from rekindle.serve.kept import CacheStats, Warmed
from rekindle.serve.request import Generation
from rekindle.serve.service import Service


class UnknownPin(InvalidRequest):
    """There is no pin of this id, or it is somebody else's."""

    status = 404
    code = "pin_not_found"


def cache_router(runner: Runner) -> APIRouter:
    """These endpoints."""
    router = APIRouter(prefix="/cache", tags=["cache"])
    service = runner.service

    @router.get("/stats")
    async def stats() -> Json:
        """Reuse by request (hits, misses, hit_rate) and by token (cached_tokens, token_hit_rate), and what is kept."""
        return Json(stats_as_dict(service.stats()))

    @router.post("/clear")
    async def clear(body: ClearRequest | None = None) -> Json:
        """Forget everything that is kept of this server's model, or of all models; running requests go on."""
        scope = "model" if body is None else body.scope
        await asyncio.to_thread(service.clear_cache, every_model=scope == "all")  # the worker may be in a step
        return Json({"status": "success", "message": "Prefix cache cleared"})

    @router.post("/pin")
    async def pin(request: Request, body: PinRequest) -> Json:
        """Keep a prompt's KV for a time, whether it was read yet or not. Once more renews it."""
        (prompt,), _ = await _prompts(service, request, body, [body])
        made = await asyncio.to_thread(service.pin, prompt, body.ttl, name=body.name)
        if not body.warm:
            return Json(pin_as_dict(made))
        warmed = await _warm(runner, request, prompt, 0.0)
        now = next((each for each in service.pins() if each.id == made.id), made)
        return Json(pin_as_dict(now) | {"warmed": warmed.as_dict()})

    @router.get("/pins")
    async def pins(request: Request) -> Json:
        """The pins that have not ended; which end first, first."""
        listed = [pin_as_dict(each) for each in service.pins(owner=caller_of(request).salt())]
        stats = service.stats()
        bounds = {"pinned_bytes": stats.pinned_bytes, "max_pinned_bytes": stats.max_pinned_bytes}
        return Json({"pins": listed} | bounds)

    @router.delete("/pin/{pin_id}")
    async def unpin(request: Request, pin_id: str) -> Json:
        """End a pin."""
        if not service.unpin(pin_id, owner=caller_of(request).salt()):
            raise UnknownPin(f"there is no pin {pin_id[:40]!r}; GET /cache/pins lists those there are", param="id")
        return Json({"status": "success", "id": pin_id})

    @router.post("/warm")
    async def warm(request: Request, body: WarmRequest) -> Json:
        """Compute the KV of prompts ahead of time, while no request has work, and store it. Nothing is answered.

        Chunks and documents are computed on their own, so that requests that blend can place them wherever they stand.
        """
        if body.alone is None:
            prompts, tokenize_ms = await _prompts(service, request, body, body.wanted)
        else:
            prompts, tokenize_ms = await _chunks(service, request, body, body.alone)
        service.check_lengths(prompts, body.name)  # before anything is computed
        warmed = [await _warm(runner, request, prompt, tokenize_ms / len(prompts)) for prompt in prompts]
        parts = [each.as_dict() for each in warmed]
        totals = {name: sum(part[name] for part in parts) for name in ("tokens", "computed", "reused", "bytes")}
        seconds = round(sum(each.seconds for each in warmed), 3)
        return Json(totals | {"seconds": seconds, "prompts" if body.alone is None else "chunks": parts})

    return router


async def _prompts(
    service: Service, request: Request, body: PinRequest | WarmRequest, wanted: Sequence[PromptFields]
) -> tuple[list[Prompt], float]:
    """What is to be kept, as the requests that will need it begin with; and the milliseconds that took."""
    check_model(service, body.model)
    salt = caller_of(request).salt(body.cache_salt)
    num_characters = sum(each.num_characters for each in wanted)
    return await built(num_characters, lambda: [_prompt(service, each, salt) for each in wanted])


async def _chunks(
    service: Service, request: Request, body: WarmRequest, alone: Sequence[Chunk | Document]
) -> tuple[list[Prompt], float]:
    """Each on its own, and the milliseconds that took."""
    check_model(service, body.model)
    salt = caller_of(request).salt(body.cache_salt)
    num_characters = sum(len(each.text) for each in alone)
    return await built(num_characters, lambda: service.chunk_prompts(alone, salt=salt, chat=body.chat))


def _prompt(service: Service, wanted: PromptFields, salt: bytes) -> Prompt:
    if wanted.prompt is not None:
        return service.text_prompt(wanted.prompt, salt=salt)
    if wanted.tokens is not None:
        return service.token_prompt(wanted.tokens, salt=salt)
    messages = [message.for_template() for message in wanted.messages or ()]
    return service.opening_prompt(messages, salt=salt, **(wanted.chat_template_kwargs or {}))


async def _warm(runner: Runner, request: Request, prompt: Prompt, tokenize_ms: float) -> Warmed:
    generation = Generation(prompt=prompt, warm=True, arrived=arrived(request), tokenize_ms=tokenize_ms)
    with await runner.submit(request, [generation]) as answers:
        (answer,) = await while_connected(request, answers.whole())
    return await asyncio.to_thread(runner.service.warmed, prompt, answer.done)


def stats_as_dict(stats: CacheStats) -> dict[str, Any]:
    """For the wire."""
    rates = {"hit_rate": round(stats.hit_rate, 4), "token_hit_rate": round(stats.token_hit_rate, 4)}
    tiers = [asdict(tier) for tier in stats.tiers]
    for tier in tiers:
        if tier["name"] == "memory":  # asked at every step; what it serves is what requests reuse
            tier |= {"hits": None, "misses": None}
    return vars(stats) | rates | {"tiers": tiers}
