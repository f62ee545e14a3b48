"""The Python API: `rekindle.load()` and a few methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any, Self

from rekindle.errors import InvalidRequest, nearest
from rekindle.kv.pins import Pin
from rekindle.model.chunks import Chunk, Document, Part
from rekindle.reuse.prompt import Prompt
from rekindle.serve.durations import seconds_of
from rekindle.serve.kept import CacheStats, Warmed
from rekindle.serve.marked import Wish
from rekindle.serve.policies import Policy
from rekindle.serve.request import Done, Generation, Piece, Sampling
from rekindle.serve.service import Service
from rekindle.settings import Settings

Messages = Sequence[Mapping[str, Any]]
Given = str | Chunk | Sequence[Part | Mapping[str, Any] | int]  # what a prompt may be; not of several kinds
_SAMPLING = frozenset(each.name for each in fields(Sampling)) - {"temperature"}
_OPTIONS = _SAMPLING | {"max_tokens", "temperature", "stop", "raw", "ignore_eos", "priority", "blend", "documents"}


def _check(prompt: Any) -> None:
    """Raises InvalidRequest for what is no prompt, nor a list of them."""
    if isinstance(prompt, bytes | Mapping) or not (isinstance(prompt, Chunk) or hasattr(prompt, "__len__")):
        expected = "text, a Chunk, a list of texts and Chunks, of messages, or of token ids"
        raise InvalidRequest(f"a prompt is {expected}; got {type(prompt).__name__}", param="prompt")


def _stops(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,)
    if stop is not None and not isinstance(stop, Iterable):
        raise InvalidRequest(f"stop: expected a text or a list of texts, got {type(stop).__name__}", param="stop")
    return tuple(stop or ())


def _several(prompts: Any) -> Sequence[Any]:
    """A list of prompts; one text and one conversation are a list of one."""
    _check(prompts)
    if isinstance(prompts, str | Chunk) or not len(prompts):
        return [prompts]
    first = prompts[0]
    is_one = isinstance(first, Mapping) or not (
        isinstance(first, Chunk) or hasattr(first, "__len__")
    )  # messages, or ids
    return [prompts] if is_one else prompts


class LLM:
    """A model in this process. A context manager; thread-safe but for `close`.

    A prompt is a string (a user's message, put through the chat template unless `raw=True` or the model has none), a list
    of texts and `rekindle.Chunk`s (the parts of such a message, with a newline between each two unless `raw=True`), a list
    of chat messages, or a list of token ids.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.last: Done | None = None  # how the latest answer ended: usage, timings, plan

    @classmethod
    def open(cls, model: str = "builtin", /, *, policy: str | Policy | None = None, **settings: Any) -> Self:
        """`policy` is a name or a `Policy` of your own. Raises ModelError, InvalidRequest."""
        if not isinstance(policy, str | Policy | None):
            raise InvalidRequest(f"policy: expected a name or an object of a Policy, got {policy!r}", param="policy")
        name, own = (None, policy) if isinstance(policy, Policy) else (policy, None)
        return cls(Service.open(Settings.load(None, model=model, policy=name, **settings), policy=own))

    def generate(
        self,
        prompt: Given,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = (),
        raw: bool = False,
        **options: Any,
    ) -> str:
        """The whole answer. Further arguments are those of `stream` and of `Sampling` (top_p, top_k, min_p, seed …)."""
        pieces = self.stream(prompt, max_tokens=max_tokens, temperature=temperature, stop=stop, raw=raw, **options)
        return "".join(pieces)

    def chat(
        self, messages: Messages, *, documents: Sequence[Any] | None = (), blend: Wish = None, **options: Any
    ) -> str:
        """The answer to a conversation. `documents`: what to answer from, each a chunk, put where the template says.

        Each is `{"title": …, "text": …}`, a text or a Chunk. `content` of a message is text, or a list of texts and Chunks.
        Further arguments are those of `stream`. Raises InvalidRequest.
        """
        return "".join(self.stream(messages, documents=documents, blend=blend, **options))

    def stream(
        self,
        prompt: Given,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = (),
        raw: bool = False,
        ignore_eos: bool = False,
        priority: int = 0,
        documents: Sequence[Any] | None = (),
        blend: Wish = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer piece by piece. Closing the iterator stops the generation.

        `blend`: place chunks wherever they stand (True, or `{"select": …, "ratio": …}`), or read all exactly (False).
        `sampling` has the other fields of `Sampling`: top_p, top_k, min_p, seed …  Raises InvalidRequest.
        """
        for name in sampling:
            if name not in _SAMPLING:
                raise InvalidRequest(f"unknown option {name!r}{nearest(name, _OPTIONS)}", param=name)
        made = self._prompt(prompt, raw, _documents(documents))
        generation = Generation(
            prompt=made,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, **sampling),
            stop=_stops(stop),
            ignore_eos=ignore_eos,
            priority=priority,
            blend=self.service.blend_of(blend, made),
        )
        for event in self.service.events(generation):
            if isinstance(event, Piece) and event.text:
                yield event.text
            elif isinstance(event, Done):
                self.last = event

    def pin(self, prompt: Given, *, ttl: str | float, name: str | None = None, raw: bool = False) -> Pin:
        """Keep a prompt's KV for a time ("30s", "10m", "2h", "1d" or seconds), whether it was read yet or not.

        A list of messages that does not end with the user's stands for every conversation that begins with it. Pinning the
        same prompt again renews its pin. Raises InvalidRequest if more would be pinned than may be.
        """
        return self.service.pin(self._beginning(prompt, raw), seconds_of(ttl), name=name)

    def unpin(self, pin_id: str) -> bool:
        """End a pin; False if there is none of this id."""
        return self.service.unpin(pin_id)

    def pins(self) -> list[Pin]:
        """The pins that have not ended; which end first, first."""
        return self.service.pins()

    def warm(
        self, prompts: str | Chunk | Messages | Sequence[str | Chunk | Messages | Sequence[int]], *, raw: bool = False
    ) -> list[Warmed]:
        """Compute the KV of prompts ahead of time and store it; what is stored already is not computed again.

        Takes one text, one conversation, or a list of prompts. A Chunk is computed on its own, so that it can be placed
        wherever it stands. Generations that are asked for meanwhile go first. Returns what each prompt has cost. Raises
        PromptTooLong.
        """
        alone = [self._alone(prompt, raw) for prompt in _several(prompts)]
        self.service.check_lengths(alone, "prompts")  # before anything is computed
        return [self.service.warm(prompt) for prompt in alone]

    def stats(self) -> CacheStats:
        return self.service.stats()

    def clear_cache(self) -> None:
        self.service.clear_cache()

    def close(self) -> None:
        self.service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _alone(self, prompt: Given, raw: bool) -> Prompt:
        """What is to be warmed."""
        if isinstance(prompt, Chunk):
            return self.service.chunk_prompts([prompt], chat=False if raw else None)[0]
        return self._beginning(prompt, raw)

    def _beginning(self, prompt: Given, raw: bool) -> Prompt:
        """A prompt that is to be kept: of messages what conversations have in common that begin with them."""
        _check(prompt)
        if not isinstance(prompt, str | Chunk) and len(prompt) and isinstance(prompt[0], Mapping):
            return self.service.opening_prompt(prompt)  # type: ignore[arg-type]  # a list of messages, all of one kind
        return self._prompt(prompt, raw)

    def _prompt(self, given: Given, raw: bool, documents: Sequence[Document] = ()) -> Prompt:
        _check(given)
        service = self.service
        prompt = [given] if isinstance(given, Chunk) else given
        is_text = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], str | Chunk))
        if is_text and not raw and service.model.template is not None:
            return service.chat_prompt([{"role": "user", "content": prompt}], documents=documents)
        if not is_text and len(prompt) and isinstance(prompt[0], Mapping):
            return service.chat_prompt(prompt, documents=documents)  # type: ignore[arg-type]  # messages, all of one kind
        if documents:
            raise InvalidRequest("documents are put into a conversation; this prompt is none", param="documents")
        return service.text_prompt(prompt) if is_text else service.token_prompt(prompt)  # type: ignore[arg-type]


def _documents(given: Any) -> list[Document]:
    """Each of them. One alone is no list of documents, though a text or a mapping can be iterated over."""
    given = () if given is None else given  # as null in the API
    if isinstance(given, (str, bytes, Mapping, Document, Chunk)) or not isinstance(given, Iterable):
        raise InvalidRequest(
            f"documents: expected a list of texts, Chunks or mappings, got one {type(given).__name__}",
            param="documents",
        )
    return [Document.of(each) for each in given]
