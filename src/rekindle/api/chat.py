"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rekindle.api.answers import Answer, Runner
from rekindle.api.chat_wire import ChatRequest
from rekindle.api.door import arrived
from rekindle.api.keys import caller_of
from rekindle.api.logprobs import chat_logprobs
from rekindle.api.openai import Choice, answer, built, check_model
from rekindle.serve.request import Done, Generation, Piece
from rekindle.serve.service import Service


class ChatForm:
    """A choice is a message, a chunk's choice what is to be added to it."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def whole(self, index: int, answer: Answer) -> Choice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.done.text, "refusal": None},
            "logprobs": chat_logprobs(answer.tokens) if self._logprobs else None,
            "finish_reason": answer.done.reason,
        }

    def opening(self, index: int) -> Choice:
        return _delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> Choice | None:
        if self._logprobs and piece.tokens:
            return _delta(index, {"content": piece.text}) | {"logprobs": chat_logprobs(piece.tokens)}
        return _delta(index, {"content": piece.text}) if piece.text else None

    def closing(self, index: int, done: Done) -> Choice:
        return _delta(index, {}) | {"finish_reason": done.reason}


def _delta(index: int, delta: dict[str, str]) -> Choice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def chat_router(runner: Runner) -> APIRouter:
    """The endpoint."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post("/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Continue a conversation."""
        check_model(runner.service, body.model)
        runner.load.check_num_answers(body.num_choices)
        generations = await _generations(runner.service, request, body)
        return await answer(request, runner, body, ChatForm(bool(body.logprobs)), generations)

    return router


async def _generations(service: Service, request: Request, body: ChatRequest) -> list[Generation]:
    messages = [message.for_template() for message in body.messages]
    documents = [each.document for each in body.documents or ()]
    num_characters = sum(each.num_characters for each in body.messages) + sum(len(each.text) for each in documents)
    salt = caller_of(request).salt(body.cache_salt)
    prompt, tokenize_ms = await built(
        num_characters,
        lambda: service.chat_prompt(messages, documents=documents, salt=salt, **(body.chat_template_kwargs or {})),
    )
    blend = service.blend_of(body.blend_wish, prompt)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return [
        Generation(
            prompt=prompt,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            sampling=body.sampling(service.engine_spec.vocab_size, choice=choice, top_logprobs=top_logprobs),
            stop=body.stops,
            json_schema=body.constraint,
            blend=blend,
            pin_seconds=body.pin_seconds,
            ignore_eos=bool(body.ignore_eos),
            priority=body.priority or 0,
            arrived=arrived(request),
            tokenize_ms=tokenize_ms,
        )
        for choice in range(body.num_choices)
    ]
