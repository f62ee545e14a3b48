"""`POST /v1/completions`: one prompt or several, as text or as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rekindle.api.answers import Answer, Runner
from rekindle.api.door import arrived
from rekindle.api.keys import caller_of
from rekindle.api.logprobs import CompletionLogprobs
from rekindle.api.openai import Choice, answer, built, check_model
from rekindle.api.wire import CompletionRequest
from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Done, Generation, Piece
from rekindle.serve.service import Service


class CompletionForm:
    """A choice is text; choice i belongs to prompt i // n."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, num_answers: int, logprobs: bool, echoes: Sequence[str]) -> None:
        self._logprobs = [CompletionLogprobs() for _ in range(num_answers)] if logprobs else None
        self._echoes = echoes  # for each answer what comes before it, "" for nothing

    def whole(self, index: int, answer: Answer) -> Choice:
        text = self._echoes[index] + answer.done.text
        logprobs = self._logprobs[index].take(answer.tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.done.reason}

    def opening(self, index: int) -> Choice | None:
        return _more(index, self._echoes[index]) if self._echoes[index] else None

    def piece(self, index: int, piece: Piece) -> Choice | None:
        if self._logprobs and piece.tokens:
            return _more(index, piece.text) | {"logprobs": self._logprobs[index].take(piece.tokens)}
        return _more(index, piece.text) if piece.text else None

    def closing(self, index: int, done: Done) -> Choice:
        return _more(index, "") | {"finish_reason": done.reason}


def _more(index: int, text: str) -> Choice:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def completions_router(runner: Runner) -> APIRouter:
    """The endpoint."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    service = runner.service

    @router.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue each prompt."""
        check_model(service, body.model)
        runner.load.check_num_answers(len(body.prompts) * body.num_choices)
        salt = caller_of(request).salt(body.cache_salt)
        num_characters = sum(len(prompt) for prompt in body.prompts)
        prompts, tokenize_ms = await built(num_characters, lambda: _prompts(service, body, salt))
        generations = [
            Generation(
                prompt=prompt,
                max_tokens=body.max_tokens,
                sampling=body.sampling(service.engine_spec.vocab_size, choice=choice, top_logprobs=body.logprobs),
                stop=body.stops,
                json_schema=body.constraint,
                blend=service.blend_of(body.blend_wish, prompt),
                pin_seconds=body.pin_seconds,
                ignore_eos=bool(body.ignore_eos),
                priority=body.priority or 0,
                arrived=arrived(request),
                tokenize_ms=tokenize_ms,
            )
            for prompt in prompts
            for choice in range(body.num_choices)
        ]
        echoes = [_echo(service, body, prompt) for prompt in body.prompts for _ in range(body.num_choices)]
        form = CompletionForm(len(generations), body.logprobs is not None, echoes)
        return await answer(request, runner, body, form, generations)

    return router


def _prompts(service: Service, body: CompletionRequest, salt: bytes) -> list[Prompt]:
    return [
        service.text_prompt(prompt, salt=salt) if isinstance(prompt, str) else service.token_prompt(prompt, salt=salt)
        for prompt in body.prompts
    ]


def _echo(service: Service, body: CompletionRequest, prompt: str | list[int]) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else service.detokenize(prompt)
