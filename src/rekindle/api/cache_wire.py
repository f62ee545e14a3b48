"""Requests on the wire about what is kept: pins, warming, and care of the store's folder."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rekindle.api.chat_wire import Documents, Message, TemplateArguments
from rekindle.api.wire import (
    Ours,
    Span,
    Str,
    Text,
    TokenIds,
    expect,
)
from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Chunk, Document

MAX_WARMED = 1024  # prompts in one request


class PromptFields(Ours):
    """One prompt, in one of three forms. Messages that don't end with the user's stand for all that may follow."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tokens: TokenIds | None = None
    chat_template_kwargs: TemplateArguments | None = Field(
        default=None, description="those of the chats with these messages"
    )

    @model_validator(mode="after")
    def _has_messages(self) -> Self:
        if self.chat_template_kwargs and self.messages is None:
            name = "chat_template_kwargs"
            raise InvalidRequest(f"{name} say how messages are written, and there are none", param=name)
        return self

    @property
    def num_given(self) -> int:
        return sum(each is not None for each in (self.prompt, self.messages, self.tokens))

    @property
    def num_characters(self) -> int:
        """About what there is to tokenise."""
        return sum(message.num_characters for message in self.messages or ()) + len(self.prompt or "")


class _OnePrompt(PromptFields):
    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.num_given != 1:
            expected = "expected one of prompt (text), messages and tokens"
            raise InvalidRequest(f"{expected}, got {self.num_given or 'none'} of them", param="prompt")
        return self


class PinRequest(_OnePrompt):
    """`POST /cache/pin`."""

    ttl: Span = Field(description="how long it is kept: 10m, 2h, or seconds")
    name: Annotated[Str, Field(max_length=200)] | None = Field(None, description="what to call it in /cache/pins")
    warm: bool = Field(False, description="compute what is not stored, too")
    cache_salt: Str | None = Field(None, description="the salt of the requests that need it")
    model: Str | None = None


WantedPrompt = Annotated[Text | TokenIds | _OnePrompt, expect('text, token ids or {"messages": […]}')]


class WarmRequest(PromptFields):
    """`POST /cache/warm`: one prompt or several, or chunks, each on its own."""

    prompts: Annotated[list[WantedPrompt], Field(min_length=1, max_length=MAX_WARMED, fail_fast=True)] | None = None
    chunks: Annotated[list[Text], Field(min_length=1, max_length=MAX_WARMED, fail_fast=True)] | None = None
    documents: Annotated[Documents, Field(min_length=1)] | None = Field(None, description="as chat requests have them")
    chat: bool | None = Field(
        None, description="chunks as they are in conversations, or in plain prompts; default: if there is a template"
    )
    cache_salt: Str | None = Field(None, description="the salt of the requests that need it")
    model: Str | None = None

    @model_validator(mode="after")
    def _is_some(self) -> Self:
        lists = (self.prompts, self.chunks, self.documents)
        if self.num_given + sum(each is not None for each in lists) != 1:
            expected = "expected one of prompts (an array), prompt, messages, tokens, chunks and documents"
            raise InvalidRequest(expected, param="prompts")
        if self.chat is not None and self.alone is None:
            raise InvalidRequest("chat says how chunks or documents are written, and there are none", param="chat")
        return self

    @property
    def name(self) -> str:
        """The field whose elements are warmed."""
        return "chunks" if self.chunks is not None else "prompts" if self.documents is None else "documents"

    @property
    def alone(self) -> list[Chunk | Document] | None:
        """What is to be computed on its own, so that it can be placed anywhere; None: prompts are."""
        if self.chunks is not None:
            return [Chunk(text) for text in self.chunks]
        return None if self.documents is None else [each.document for each in self.documents]

    @property
    def wanted(self) -> list[PromptFields]:
        """Each prompt."""
        if self.prompts is None:
            return [self]
        return [_wanted(each) for each in self.prompts]


def _wanted(given: str | list[int] | _OnePrompt) -> PromptFields:
    if isinstance(given, _OnePrompt):
        return given
    return PromptFields(prompt=given) if isinstance(given, str) else PromptFields(tokens=given)


class VerifyRequest(Ours):
    """`POST /cache/verify`."""

    repair: bool = Field(False, description="set aside what is torn")


class PruneRequest(Ours):
    """`POST /cache/prune`."""

    max_size: Str | int | None = Field(None, description="delete what was used least recently until the rest fits")
    older_than: Str | float | None = Field(None, description="delete what was not used for so long: 30d, or seconds")
    orphans: bool = Field(False, description="delete what has lost a predecessor")
    fingerprints: list[Str] = Field(default_factory=list, description="only of these models")
    dry_run: bool = Field(False, description="only say what would be deleted")


class ClearRequest(Ours):
    """`POST /cache/clear`."""

    scope: Literal["model", "all"] = Field("model", description="what this server's model has, or all models")
