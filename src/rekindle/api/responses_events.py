"""A response as an object and as a stream of events, in OpenAI's shape and order:

    response.created, response.in_progress
        response.output_item.added
            response.content_part.added
                response.output_text.delta …
                response.output_text.done
            response.content_part.done
        response.output_item.done
    response.completed, response.incomplete or response.failed

Each event has the next `sequence_number`, from 0. The writer is a codec: events in, wire events out; `beginning` goes
before all else, `opening` before the first piece. An answer is one item, a message of one part.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from rekindle.api.logprobs import chat_logprobs
from rekindle.api.refusals import refusal_of
from rekindle.api.report import blended_tokens, report_of
from rekindle.api.responses_wire import ResponseRequest
from rekindle.errors import Overloaded, RekindleError
from rekindle.reuse.plan import Compute
from rekindle.serve.request import Done, Piece, TokenInfo

WireEvent = dict[str, Any]


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseWriter:
    """Writes one response."""

    def __init__(self, request: ResponseRequest, model: str) -> None:
        self.id = new_id("resp")
        self._item_id = new_id("msg")
        self._request = request
        self._head = {"id": self.id, "object": "response", "created_at": int(time.time()), "model": model}
        self._echoed = request.echoed()
        self._num_events = 0
        self._tokens: list[TokenInfo] = []  # whose logprobs were asked for
        self._text = ""
        self.is_cancelled = False  # by the client, which is told so at the end

    # The object.

    def whole(self, done: Done, tokens: Sequence[TokenInfo] = ()) -> dict[str, Any]:
        """A response that has come to its end."""
        status = "completed" if done.reason == "stop" else "incomplete"
        item = self._item(status, self._part(done.text, tokens))
        return self._body(status, [item], done) | self._report(done)

    def prepared(self, done: Done) -> dict[str, Any]:
        """A response without an answer: what was to be read has been read."""
        return self._body("completed", [], done) | self._report(done)

    def _body(
        self, status: str, output: Sequence[WireEvent], done: Done | None, error: WireEvent | None = None
    ) -> dict[str, Any]:
        is_over = status == "completed"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if is_over else None,
            "error": error,
            "incomplete_details": cut,
            "output": list(output),
            "usage": None if done is None else _usage(done),
            **self._echoed,
        }

    def _report(self, done: Done) -> dict[str, Any]:
        report = report_of(self._request.rekindle, done)
        return {"rekindle": report} if report else {}

    def _item(self, status: str, *parts: WireEvent) -> WireEvent:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": list(parts),
        }

    def _part(self, text: str, tokens: Sequence[TokenInfo] = ()) -> WireEvent:
        return {"type": "output_text", "annotations": [], "logprobs": self._logprobs(tokens), "text": text}

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> list[Any]:
        if self._request.num_logprobs is None:
            return []
        content: list[Any] = chat_logprobs(tokens)["content"]
        return content

    # The stream.

    def beginning(self) -> list[WireEvent]:
        """Before all else."""
        begun = self._body("in_progress", [], None)
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def opening(self) -> list[WireEvent]:
        """Before an answer."""
        return [
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress")),
            self._inside("response.content_part.added", part=self._part("")),
        ]

    def piece(self, piece: Piece) -> list[WireEvent]:
        """Some more of the answer."""
        has_logprobs = self._request.num_logprobs is not None and bool(piece.tokens)
        if has_logprobs:
            self._tokens += piece.tokens
        self._text += piece.text
        if not piece.text and not has_logprobs:
            return []
        logprobs = self._logprobs(piece.tokens)
        return [self._inside("response.output_text.delta", delta=piece.text, logprobs=logprobs)]

    def closing(self, done: Done) -> list[WireEvent]:
        """After an answer; the last event's response is `whole`."""
        body = self.whole(done, self._tokens)
        (item,) = body["output"]
        (part,) = item["content"]
        return [
            self._inside("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._inside("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self.last(body),
        ]

    def last(self, body: dict[str, Any]) -> WireEvent:
        """The event that a response of this body ends with."""
        return self._event(f"response.{body['status']}", response=body)

    def failed(self, error: RekindleError) -> WireEvent:
        """The answer broke off, or was cancelled; OpenAI has no event of its own for the latter."""
        output = [self._item("incomplete", self._part(self._text, self._tokens))] if self._text else []
        if self.is_cancelled:
            return self._event("response.incomplete", response=self._body("cancelled", output, None))
        code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        told = {"code": code, "message": refusal_of(error)[1]["error"]["message"]}
        return self._event("response.failed", response=self._body("failed", output, None, told))

    def _inside(self, kind: str, **fields: Any) -> WireEvent:
        """An event of the one part of the one item."""
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> WireEvent:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}


def _usage(done: Done) -> dict[str, Any]:
    """KV that is computed is kept, so it counts as written to the cache; behind a chunk that was placed nothing is."""
    usage, plan = done.usage, done.plan
    computed = (range(step.start, step.stop) for step in plan.steps if isinstance(step, Compute))
    num_written = sum(len(tokens) for tokens in computed if tokens.start < plan.exact)
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": num_written if usage.blended_tokens else usage.computed_tokens,
        }
        | blended_tokens(usage),
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
