"""`POST /v1/chat/completions` on the wire: messages, what they are made of, and the documents that come with them.

Calls of functions and what came of them are read, as the chat template writes them (`model/calls.py`). This server makes
none, so it refuses the functions that could be called, unless the client says that none is to be: they are left out then.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from rekindle.api.wire import JsonObject, OpenAIFields, Str, Text, Wire, expect
from rekindle.errors import InvalidRequest
from rekindle.model import chunks
from rekindle.model.chunks import Chunk, Document
from rekindle.serve.request import MAX_TOP_LOGPROBS

MAX_DOCUMENTS = 1024
MAX_CALLS = 128  # of functions, in one message
OWN_ARGUMENTS = frozenset(  # of a template, which are not for a client to set, or have fields of their own
    {"add_generation_prompt", "bos_token", "documents", "eos_token", "messages", "salt", "self", "template", "tools"}
)
NO_CALLS = 'are not supported: this server makes no calls; send none, or the tool_choice "none"'


class TextIn(Wire):
    """Base of parts of messages; only text is understood. A chunk may be reused wherever it stands."""

    text: Str
    cache: Literal["chunk"] | None = None

    @property
    def words(self) -> str:
        """What it says."""
        return self.text

    @property
    def part(self) -> chunks.Part:
        return self.words if self.cache is None else Chunk(self.words)


class Part(TextIn):
    """One part of a message's content."""

    type: Literal["text"]


Content = Annotated[
    Str | Annotated[list[Part], Field(fail_fast=True)] | None,
    expect(
        'a string or an array of text parts, {"type": "text", "text": …}, with "cache": "chunk" where one is a chunk'
    ),
]


class CalledFunction(Wire):
    """What was called, and with what."""

    name: Text
    arguments: Annotated[Str | JsonObject, expect("JSON in a string, or an object")] = ""


class ToolCall(Wire):
    """A call that the assistant has made."""

    id: Str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Wire):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: Str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="of the assistant; written as the chat template does, or else as JSON"
    )
    tool_call_id: Str | None = None
    function_call: Any = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.function_call is not None:
            raise PydanticCustomError("invalid_value", "function_call is not supported: expected tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("invalid_value", "tool_calls are expected in messages of the assistant only")
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("invalid_value", "content is expected in all messages but the assistant's")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it; with chunks, the parts as they are."""
        content: Any = self.content or ""
        if isinstance(content, list):
            content = chunks.content_of([part.part for part in content])
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {name: value for name, value in more.items() if value is not None}

    @property
    def num_characters(self) -> int:
        """About what there is to tokenise."""
        texts = [part.text for part in self.content] if isinstance(self.content, list) else [self.content or ""]
        return sum(map(len, texts)) + sum(len(str(call.function.arguments)) for call in self.tool_calls or ())


class DocumentIn(Wire):
    """A text that was looked up for the question; a chunk."""

    title: Str | None = None
    text: Text

    @property
    def document(self) -> Document:
        return Document(self.text, self.title or "")


Documents = Annotated[list[DocumentIn], Field(max_length=MAX_DOCUMENTS, fail_fast=True)]


def _for_clients(given: dict[str, Any]) -> dict[str, Any]:
    for name in OWN_ARGUMENTS & given.keys():
        raise InvalidRequest(f"chat_template_kwargs: {name} can't be set there", param="chat_template_kwargs")
    return given


TemplateArguments = Annotated[JsonObject, AfterValidator(_for_clients)]


class ChatRequest(OpenAIFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    documents: Documents | None = Field(None, description="each a chunk; put where the chat template says")
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] | None = Field(None, description='only with the tool_choice "none", and then left out')
    tool_choice: Any = None
    functions: Any = None
    modalities: Any = None
    chat_template_kwargs: TemplateArguments | None = Field(None, description="for the chat template: enable_thinking …")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.tools and self.tool_choice != "none":
            raise InvalidRequest(f"tools {NO_CALLS}", param="tools")
        if self.functions:
            raise InvalidRequest(f"functions {NO_CALLS}", param="functions")
        if self.modalities not in (None, ["text"]):
            raise InvalidRequest('modalities: expected ["text"], for this server writes text only', param="modalities")
        return self
