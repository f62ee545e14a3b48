"""The talker whose model is in this process. It stands alone because it needs all that a server needs to be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rekindle.cli.talk import Answer, Answering, Message, Wish
from rekindle.serve.request import Done, Generation, Piece, Sampling
from rekindle.serve.service import Service


class Local:
    """A service in this process. Whoever opened it closes it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def chat(self, messages: Sequence[Message], wish: Wish) -> Answering:
        return self._answer(Generation(prompt=self._service.chat_prompt(messages), **_arguments(wish)))

    def complete(self, text: str, wish: Wish) -> Answering:
        return self._answer(Generation(prompt=self._service.text_prompt(text), **_arguments(wish)))

    def stats(self) -> dict[str, Any]:
        stats = self._service.stats()
        return vars(stats) | {"hit_rate": stats.hit_rate, "token_hit_rate": stats.token_hit_rate}

    def _answer(self, generation: Generation) -> Answering:
        for event in self._service.events(generation):
            if isinstance(event, Piece):
                yield event.text
            elif isinstance(event, Done):
                yield _local_answer(event)


def _arguments(wish: Wish) -> dict[str, Any]:
    return {"max_tokens": wish.max_tokens, "sampling": Sampling(temperature=wish.temperature)}


def _local_answer(done: Done) -> Answer:
    return Answer(
        text=done.text,
        finish_reason=done.reason,
        prompt_tokens=done.usage.prompt_tokens,
        cached_tokens=done.usage.cached_tokens,
        completion_tokens=done.usage.completion_tokens,
        timings=done.timings.as_dict,
        plan=done.plan.as_dict(),
    )
