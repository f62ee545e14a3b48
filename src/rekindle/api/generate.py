"""`POST /generate` and `POST /generate_stream`: a plain prompt, and numbers that show what caching is worth."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rekindle.api import sse
from rekindle.api.answers import Answers, Runner, while_connected
from rekindle.api.door import arrived
from rekindle.api.keys import caller_of
from rekindle.api.openai import begun, built
from rekindle.api.refusals import Json, refusal_of
from rekindle.api.report import report_of
from rekindle.api.wire import GenerateRequest
from rekindle.errors import RekindleError
from rekindle.serve.request import Done, Generation
from rekindle.serve.service import Service


def generate_router(runner: Runner) -> APIRouter:
    """Both endpoints."""
    router = APIRouter(tags=["simple"])

    @router.post("/generate")
    async def generate(request: Request, body: GenerateRequest) -> Response:
        """Continue a prompt. `tokens_per_sec` counts generated tokens over the whole latency, queueing included."""
        generation = await _generation(runner.service, request, body)
        with await runner.submit(request, [generation]) as answers:
            (answer,) = await while_connected(request, answers.whole())
        return Json({"text": answer.done.text} | _numbers(body, answer.done))

    @router.post("/generate_stream")
    async def generate_stream(request: Request, body: GenerateRequest) -> Response:
        """Continue a prompt, one event {"token", "index"} at a time; then the numbers of /generate, then [DONE]."""
        answers = await runner.submit(request, [await _generation(runner.service, request, body)])
        return await begun(request, answers, _stream(body, answers))

    return router


async def _generation(service: Service, request: Request, body: GenerateRequest) -> Generation:
    salt = caller_of(request).salt(body.cache_salt)
    prompt, tokenize_ms = await built(len(body.prompt), lambda: service.text_prompt(body.prompt, salt=salt))
    return Generation(
        prompt=prompt,
        max_tokens=body.max_new_tokens,
        sampling=body.sampling(service.engine_spec.vocab_size, temperature=0.0),
        stop=body.stops,
        ignore_eos=bool(body.ignore_eos),
        priority=body.priority or 0,
        use_kv_cache=body.use_cache,
        use_prefix_cache=body.use_prefix_cache,
        blend=service.blend_of(body.blend_wish, prompt) if body.use_cache and body.use_prefix_cache else None,
        pin_seconds=body.pin_seconds,
        arrived=arrived(request),
        tokenize_ms=tokenize_ms,
    )


async def _stream(body: GenerateRequest, answers: Answers) -> AsyncGenerator[bytes, None]:
    index = 0
    try:
        async for _, event in answers:
            if isinstance(event, Done):
                yield sse.encode({"finish_reason": event.reason} | _numbers(body, event)) + sse.DONE
            elif event.text:
                yield sse.encode({"token": event.text, "index": index})
                index += 1
    except RekindleError as error:
        yield sse.encode(refusal_of(error)[1])


def _numbers(body: GenerateRequest, done: Done) -> dict[str, Any]:
    usage, timings = done.usage, done.timings
    seconds = timings.total_ms / 1000
    report = report_of(body.rekindle, done)
    return ({"rekindle": report} if report else {}) | {
        "latency_ms": round(timings.total_ms, 3),
        "tokens_per_sec": round(usage.completion_tokens / seconds, 3) if seconds > 0 else 0.0,
        "cache_enabled": body.use_cache,
        "prefix_cache_hit": usage.cached_tokens > 0,
        "timings": {
            "tokenize_ms": round(timings.tokenize_ms, 3),
            "cache_lookup_ms": round(timings.lookup_ms, 3),
            "restore_ms": round(timings.restore_ms, 3),
            "prefill_ms": round(timings.prefill_ms, 3),
            "ttft_ms": round(timings.ttft_ms, 3),
            "decode_ms": round(timings.decode_ms, 3),
            "total_ms": round(timings.total_ms, 3),
            "prefix_tokens_saved": usage.cached_tokens,
            "total_prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "suffix_tokens_processed": usage.computed_tokens,
        },
    }
