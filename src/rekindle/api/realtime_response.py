"""One answer on its way to the clients: OpenAI's events for it, in their order.

    response.created
      response.output_item.added, conversation.item.added, response.content_part.added
        response.output_text.delta ...
      response.output_text.done, response.content_part.done, response.output_item.done, conversation.item.done
      rekindle.kv
    response.done

An answer that was interrupted is done at once; what it has cost is known, and told, a moment later.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rekindle.api.realtime_items import Item
from rekindle.api.refusals import refusal_of
from rekindle.api.report import blended_tokens, report_of
from rekindle.api.wire import RekindleOptions
from rekindle.errors import RekindleError
from rekindle.serve.request import Done
from rekindle.serve.sessions.line import Work

Emit = Callable[[dict[str, Any]], None]
Status = Literal["in_progress", "completed", "cancelled", "incomplete", "failed"]
_REASONS: dict[str, tuple[Status, str | None]] = {
    "stop": ("completed", None),
    "length": ("incomplete", "max_output_tokens"),
    "interrupted": ("cancelled", "client_cancelled"),
    "cancelled": ("cancelled", "turn_detected"),
}


@dataclass(frozen=True)
class Cost:
    """What was done for an answer before it was asked for."""

    computed: int  # tokens read while they came, since the answer before
    restored: int  # tokens put back from the store meanwhile
    tier: str | None  # from which they were
    dropped: int  # tokens that the window has lost

    @classmethod
    def between(cls, before: Work, now: Work, own: Done | None, dropped: int) -> Cost:
        """Of a session's work, all but what is this answer's own."""
        computed = now.computed - before.computed - (0 if own is None else own.usage.computed_tokens)
        restored = now.restored - before.restored - (0 if own is None else own.plan.placed)
        return cls(max(0, computed), max(0, restored), now.tier if restored > 0 else None, dropped)


class Response:
    """The answer and what of it was told."""

    def __init__(
        self,
        emit: Emit,
        *,
        conversation_id: str | None,
        max_output_tokens: int | None = None,
        metadata: dict[str, str] | None = None,
        options: RekindleOptions | None = None,
    ) -> None:
        """Without a conversation, its item is nobody's but the response's."""
        self.id = f"resp_{secrets.token_hex(8)}"
        self.item = Item("assistant", "", status="in_progress")
        self.status: Status = "in_progress"
        self._emit = emit
        self._conversation_id = conversation_id
        self._max_output_tokens: int | str = max_output_tokens or "inf"
        self._metadata = metadata
        self._options = options
        self._details: dict[str, Any] | None = None
        self._usage: dict[str, Any] | None = None
        self._num_deltas = 0

    @property
    def as_dict(self) -> dict[str, Any]:
        return {
            "object": "realtime.response",
            "id": self.id,
            "status": self.status,
            "status_details": self._details,
            "output": [] if self.status == "in_progress" else [self.item.as_dict],
            "conversation_id": self._conversation_id,
            "output_modalities": ["text"],
            "max_output_tokens": self._max_output_tokens,
            "usage": self._usage,
            "metadata": self._metadata,
        }

    @property
    def _place(self) -> dict[str, Any]:
        return {"response_id": self.id, "output_index": 0}

    @property
    def _part(self) -> dict[str, Any]:
        return self._place | {"item_id": self.item.id, "content_index": 0}

    def begin(self, previous: str | None) -> None:
        """It is asked for; its item stands behind another."""
        self._emit({"type": "response.created", "response": self.as_dict})
        self._emit({"type": "response.output_item.added", **self._place, "item": self.item.as_dict})
        if self._conversation_id is not None:
            item = {"previous_item_id": previous, "item": self.item.as_dict}
            self._emit({"type": "conversation.item.added", **item})
        self._emit({"type": "response.content_part.added", **self._part, "part": {"type": "text", "text": ""}})

    def leave(self) -> None:
        """Its item is not part of the conversation after all."""
        self._conversation_id = None

    def say(self, text: str) -> None:
        """Some more of it."""
        if text:
            self.item.text += text
            self._emit({"type": "response.output_text.delta", **self._part, "delta": text})

    def end(
        self,
        reason: str,
        text: str,
        *,
        previous: str | None,
        done: Done | None = None,
        cost: Cost | None = None,
        error: RekindleError | None = None,
    ) -> None:
        """It is over, and this is what is kept of it; `done` is None if that is not known yet."""
        self.status, why = ("failed", None) if error is not None else _REASONS[reason]
        self.item.text = text
        self.item.status = "completed" if self.status == "completed" else "incomplete"
        self._details = {"type": self.status} | ({} if why is None else {"reason": why})
        if error is not None:
            self._details["error"] = refusal_of(error)[1]["error"]
        self._emit({"type": "response.output_text.done", **self._part, "text": text})
        self._emit({"type": "response.content_part.done", **self._part, "part": {"type": "text", "text": text}})
        self._emit({"type": "response.output_item.done", **self._place, "item": self.item.as_dict})
        if self._conversation_id is not None:
            item = {"previous_item_id": previous, "item": self.item.as_dict}
            self._emit({"type": "conversation.item.done", **item})
        if done is not None:
            self._usage = _usage(done)
            self.tell_cost(done, cost)
        self._emit({"type": "response.done", "response": self.as_dict})

    def tell_cost(self, done: Done, cost: Cost | None) -> None:
        """What was reused for it and what was not."""
        usage, plan = done.usage, done.plan
        tokens = {
            "prompt": usage.prompt_tokens,
            "reused": usage.cached_tokens,
            "restored": plan.placed,
            "computed": usage.computed_tokens,
            "generated": usage.completion_tokens,
            "dropped": 0 if cost is None else cost.dropped,
        }
        if usage.blended_tokens:
            tokens["blended"] = usage.blended_tokens
        event: dict[str, Any] = {
            "type": "rekindle.kv",
            "response_id": self.id,
            "item_id": self.item.id,
            "tokens": tokens,
        }
        event["tier"] = plan.tier or ("engine" if usage.cached_tokens else None)
        event["miss"] = plan.miss
        event |= report_of(self._options, done) | {"timings": done.timings.as_dict}
        if cost is not None:
            event["ahead"] = {"computed": cost.computed, "restored": cost.restored, "tier": cost.tier}
        self._emit(event)


def _usage(done: Done) -> dict[str, Any]:
    usage = done.usage
    cached = {"text_tokens": usage.cached_tokens, "audio_tokens": 0, "image_tokens": 0}
    return {
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "input_token_details": {
            "text_tokens": usage.prompt_tokens,
            "audio_tokens": 0,
            "image_tokens": 0,
            "cached_tokens": usage.cached_tokens,
            "cached_tokens_details": cached,
        }
        | blended_tokens(usage),
        "output_token_details": {"text_tokens": usage.completion_tokens, "audio_tokens": 0},
    }
