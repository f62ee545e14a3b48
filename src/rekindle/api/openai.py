"""OpenAI's formats: what chat and text completions share, and the list of models.

A `Form` says how one choice looks; a `Writer` puts choices, usage and what the request asked to know about reuse into
one answer or into chunks. The writer is a codec: `encode` for each event, `flush` at the end.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rekindle.api import sse
from rekindle.api.answers import Answer, Answers, Runner, while_connected
from rekindle.api.refusals import Json, refusal_of
from rekindle.api.report import blended_tokens, report_of
from rekindle.api.wire import OpenAIFields
from rekindle.errors import InvalidRequest, RekindleError
from rekindle.serve.request import Done, Generation, Piece
from rekindle.serve.service import Service

T = TypeVar("T")
Choice = dict[str, Any]

INLINE_CHARACTERS = 8192  # about a millisecond of tokenising; longer prompts are tokenised in a thread


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class Form(Protocol):
    """How one choice of an endpoint is written."""

    id_prefix: str
    object: str
    chunk_object: str

    def whole(self, index: int, answer: Answer) -> Choice: ...
    def opening(self, index: int) -> Choice | None: ...
    def piece(self, index: int, piece: Piece) -> Choice | None: ...
    def closing(self, index: int, done: Done) -> Choice: ...


class Writer:
    """Writes the answers to one request."""

    def __init__(self, form: Form, model: str, num_answers: int, request: OpenAIFields) -> None:
        self._form = form
        self._head = {"id": form.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self._num_answers = num_answers
        self._num_choices = request.num_choices
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._options = request.rekindle
        self._opened: set[int] = set()
        self._ends: dict[int, Done] = {}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer to a request without streaming."""
        self._ends = {index: answer.done for index, answer in enumerate(answers)}
        choices = [self._form.whole(index, answer) for index, answer in enumerate(answers)]
        body = {"object": self._form.object, **self._head, "choices": choices, "usage": self._usage()}
        return body | self._report()

    def encode(self, index: int, event: Piece | Done) -> bytes:
        """The chunks for one event; may be empty."""
        chunks = []
        if index not in self._opened:
            self._opened.add(index)
            chunks.append(self._chunk(self._form.opening(index)))
        if isinstance(event, Piece):
            chunks.append(self._chunk(self._form.piece(index, event)))
        else:
            self._ends[index] = event
            last = len(self._ends) == self._num_answers and not self._with_usage
            chunks.append(self._chunk(self._form.closing(index, event), last=last))
        return b"".join(chunks)

    def flush(self) -> bytes:
        """The end of a stream that was not broken off."""
        if not self._with_usage:
            return sse.DONE
        chunk = {"object": self._form.chunk_object, **self._head, "choices": [], "usage": self._usage()}
        return sse.encode(chunk | self._report()) + sse.DONE

    def _chunk(self, choice: Choice | None, last: bool = False) -> bytes:
        if choice is None:
            return b""
        chunk = {"object": self._form.chunk_object, **self._head, "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        return sse.encode(chunk | self._report() if last else chunk)

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, by its first choice; the others of the same prompt share its KV."""
        usages = [self._ends[index].usage for index in range(self._num_answers)]
        firsts = usages[:: self._num_choices]
        prompt_tokens = sum(usage.prompt_tokens for usage in firsts)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)}
            | blended_tokens(*firsts),
        }

    def _report(self) -> dict[str, Any]:
        """What was asked to be told of the work; of several choices as a list, in their order."""
        reports = [report_of(self._options, done) for _, done in sorted(self._ends.items())]
        if not any(reports):
            return {}
        return {"rekindle": reports[0] if len(reports) == 1 else {"choices": reports}}


async def answer(
    request: Request, runner: Runner, fields: OpenAIFields, form: Form, generations: Sequence[Generation]
) -> Response:
    """Run the generations and answer as the request asked, whole or as a stream."""
    writer = Writer(form, runner.service.model_name, len(generations), fields)
    answers = await runner.submit(request, generations)
    if fields.stream:
        return await begun(request, answers, _stream(writer, answers))
    with answers:
        return Json(writer.whole(await while_connected(request, answers.whole())))


async def begun(request: Request, answers: Answers, stream: AsyncGenerator[bytes, None]) -> Response:
    """A stream of the answers, after their first event: a failure before it is still answered with a status."""
    try:
        await while_connected(request, answers.begin())
    except BaseException:
        answers.close()
        raise
    return sse.EventStream(stream, answers.close)


async def _stream(writer: Writer, answers: Answers) -> AsyncGenerator[bytes, None]:
    try:
        async for index, event in answers:
            if chunks := writer.encode(index, event):
                yield chunks
        yield writer.flush()
    except RekindleError as error:
        yield sse.encode(refusal_of(error)[1])


async def built(num_characters: int, build: Callable[[], T]) -> tuple[T, float]:
    """What `build` makes, and the milliseconds it took. Long work is done in a thread, so that streams go on."""
    started = time.perf_counter()
    result = build() if num_characters <= INLINE_CHARACTERS else await asyncio.to_thread(build)
    return result, (time.perf_counter() - started) * 1000


def check_model(service: Service, model: str | None) -> None:
    """Accept the model's name, what it was loaded by, or none. Raises UnknownModel."""
    if model is not None and model not in (service.model_name, service.settings.model):
        raise UnknownModel(f"there is no model {model[:100]!r} here, only {service.model_name!r}", param="model")


def models_router(service: Service) -> APIRouter:
    """`/v1/models`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    described = {
        "id": service.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "rekindle",
        "max_model_len": service.max_tokens,
    }

    @router.get("/models")
    async def models() -> Json:
        """The models served here: one."""
        return Json({"object": "list", "data": [described]})

    @router.get("/models/{model:path}")
    async def model(model: str) -> Json:
        """One model."""
        check_model(service, model)
        return Json(described)

    return router
