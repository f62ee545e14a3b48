"""What the floors above talk to: one model with its tokenizer, template, engine, store and worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Event, Generation, Sink
from rekindle.settings import Settings


class Ticket(Protocol):
    """A submitted generation."""

    def cancel(self) -> None:
        """Stop it at the next step, wherever it is; its sink still gets a `Done` with reason "cancelled"."""


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Reuse so far, by request and by token, and what is kept. `vars()` of it is its wire form, with the two rates."""

    total_requests: int  # requests that looked for reuse
    hits: int  # of these, those that reused at least one token
    misses: int
    prompt_tokens: int  # tokens of these requests
    cached_tokens: int  # of these, tokens whose KV was reused
    cache_size: int  # entries kept: residents and stored blocks and tails
    residents: int
    resident_tokens: int
    blocks: int
    bytes: int  # in the store
    max_bytes: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """Share of requests that reused something."""
        return self.hits / self.total_requests if self.total_requests else 0.0

    @property
    def token_hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Service:
    """Thread-safe, but for `open` and `close`. A context manager."""

    settings: Settings

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """Load the model and start the worker. Raises ModelError or InvalidRequest."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the worker; running generations end as cancelled."""
        raise NotImplementedError

    @property
    def model_name(self) -> str:
        """What `/v1/models` lists, e.g. "ember"."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int:
        """The longest sequence (prompt and answer) in tokens."""
        raise NotImplementedError

    def text_prompt(self, text: str, *, salt: bytes = b"") -> Prompt:
        """Tokenise plain text, with the model's BOS. Raises InvalidRequest."""
        raise NotImplementedError

    def token_prompt(self, ids: Sequence[int], *, salt: bytes = b"") -> Prompt:
        """Use ids as they are. Raises InvalidRequest for ids that the vocabulary lacks."""
        raise NotImplementedError

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], *, salt: bytes = b"", **arguments: Any) -> Prompt:
        """Render messages with the model's chat template (`tools`, `documents` … as arguments) and tokenise them.

        Raises InvalidRequest if the template refuses them or the model has none.
        """
        raise NotImplementedError

    def submit(self, generation: Generation, sink: Sink) -> Ticket:
        """Queue a generation. Raises PromptTooLong, Overloaded, InvalidRequest at once; later errors reach the sink."""
        raise NotImplementedError

    def events(self, generation: Generation) -> Iterator[Event]:
        """Submit and yield events; ends after `Done`. Raises what `Failed` carries. Closing the iterator cancels."""
        raise NotImplementedError

    def stream(self, generation: Generation) -> AsyncIterator[Event]:
        """The same for asyncio. Closing the iterator, or cancelling its task, cancels the generation."""
        raise NotImplementedError

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        raise NotImplementedError

    def stats(self) -> CacheStats:
        raise NotImplementedError

    def clear_cache(self) -> None:
        """Forget all residents and everything stored. Running requests go on."""
        raise NotImplementedError

    def health(self) -> dict[str, Any]:
        """{"status": "ok" | "failed", "model", "engine", "uptime_seconds", "running", "queued"}."""
        raise NotImplementedError
