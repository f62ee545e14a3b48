"""Asking a model for an answer, wherever it runs: by a server's URL (`Remote`), or in this process (`talk_local.py`).

Both yield the answer's text as it comes and then one `Answer` with the numbers. An iterator that is closed (Ctrl-C)
stops its generation.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rekindle.cli.client import Client, ServerError
from rekindle.errors import counted

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How to answer."""

    max_tokens: int | None = None  # None: until the end of turn
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One complete answer and what it cost. cached + computed = prompt."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV was reused
    completion_tokens: int
    timings: Mapping[str, float]  # as `serve.request.Timings`
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def ttft_ms(self) -> float:
        return float(self.timings.get("ttft_ms", 0.0))

    @property
    def prefill_calls(self) -> int:
        """Model calls before the first token."""
        return int(self.timings.get("prefill_calls", 0))

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; None for an answer too short to have one."""
        decode_ms = float(self.timings.get("decode_ms", 0.0))
        return 1000 * (self.completion_tokens - 1) / decode_ms if self.completion_tokens > 1 and decode_ms > 0 else None

    @property
    def summary(self) -> str:
        """One line for people."""
        rate = self.tokens_per_second
        speed = "" if rate is None else f", then {rate:.0f} tokens/s"
        return (
            f"prompt: {counted(self.cached_tokens, 'token')} reused, {self.computed_tokens:,} computed; "
            f"first token after {self.ttft_ms:.1f} ms{speed}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.computed_tokens,
            "completion_tokens": self.completion_tokens,
        }
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": usage,
            "timings": dict(self.timings),
            "plan": dict(self.plan),
        }


Answering = Generator[str | Answer, None, None]


class Talker(Protocol):
    """Something that answers."""

    def chat(self, messages: Sequence[Message], wish: Wish) -> Answering:
        """The next message of a conversation, as text and then an `Answer`. Raises RekindleError."""

    def complete(self, text: str, wish: Wish) -> Answering:
        """Go on with a text, without a chat template. Raises RekindleError."""

    def stats(self) -> dict[str, Any]:
        """What the cache did so far."""


class Remote:
    """A running server."""

    def __init__(self, url: str, *, salt: str | None = None, key: str | None = None) -> None:
        """`salt` keeps this talker's KV apart from everybody else's; `key` is for a server that wants one."""
        self.client = Client(url, key=key)
        self._salt = salt

    def chat(self, messages: Sequence[Message], wish: Wish) -> Answering:
        asked = {"messages": [dict(message) for message in messages]}
        return self._answer("/v1/chat/completions", asked, wish)

    def complete(self, text: str, wish: Wish) -> Answering:
        return self._answer("/v1/completions", {"prompt": text}, wish)

    def stats(self) -> dict[str, Any]:
        return self.client.get("/cache/stats")

    def _answer(self, path: str, asked: Mapping[str, Any], wish: Wish) -> Answering:
        text, reason = "", "stop"
        for event in self.client.events(path, self._body(asked, wish)):
            for choice in event.get("choices", []):
                reason = choice.get("finish_reason") or reason
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                text += piece
                if piece:
                    yield piece
            if event.get("usage"):
                yield _remote_answer(text, reason, event)
                return
        raise ServerError(f"{self.client.url} ended its answer without the usage that was asked for")

    def _body(self, asked: Mapping[str, Any], wish: Wish) -> dict[str, Any]:
        salt = {} if self._salt is None else {"cache_salt": self._salt}
        limit = {} if wish.max_tokens is None else {"max_tokens": wish.max_tokens}
        return {
            **asked,
            **salt,
            **limit,
            "temperature": wish.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "rekindle": {"timings": True, "plan": True},
        }


def _remote_answer(text: str, reason: str, event: Mapping[str, Any]) -> Answer:
    usage, report = event["usage"], event.get("rekindle") or {}
    return Answer(
        text=text,
        finish_reason=reason,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        completion_tokens=usage["completion_tokens"],
        timings=report.get("timings", {}),
        plan=report.get("plan", {}),
    )
