"""What clients of the realtime API say: OpenAI's client events for text, and ours.

    session.update                                      the session's settings, as far as they are given
    conversation.item.create, delete, truncate, retrieve
    response.create, cancel
    input_text_buffer.append, replace, commit, clear    what is just being typed or recognised; it is read while it comes
    rekindle.context.create, rekindle.context.swap      named instructions with a conversation of their own
    rekindle.session.fork, pin, resume

OpenAI's fields that mean nothing here are ignored; those that ask for what this server lacks (audio, tools, stored prompts)
are refused. In the beta's form, `modalities` and `max_response_output_tokens` are understood too. Unknown fields of events
that are ours alone are mistakes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError, model_validator

from rekindle.api.chat_wire import TextIn
from rekindle.api.connection import type_of
from rekindle.api.refusals import invalid_message
from rekindle.api.wire import Ours, RekindleOptions, Span, Str, Wire, expect
from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Part, plain
from rekindle.serve.marked import Wish

MAX_ID = 512  # characters of an id that a client gives; longer ones are not repeated
_MAX_PARTS = 256
_AUDIO = "this server speaks text only: use input_text_buffer, input_text and output_text"


class Unsupported(InvalidRequest):
    """OpenAI has this, and this server does not."""

    code = "unsupported"


class ClientEvent(Wire):
    """Base of all: what it changes waits for the end of an answer under way."""

    waits: ClassVar[bool] = False

    event_id: Annotated[Str, Field(max_length=MAX_ID)] | None = None


class _OurEvent(Ours):
    waits: ClassVar[bool] = False

    event_id: Annotated[Str, Field(max_length=MAX_ID)] | None = None


Id = Annotated[Str, Field(min_length=1, max_length=MAX_ID)]
MaxTokens = Annotated[Annotated[int, Field(ge=1)] | Literal["inf"], expect('a whole number from 1 on or "inf"')]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Modalities = Annotated[list[Str], Field(max_length=8)]


# Settings.


class TokenLimits(Wire):
    """Of what is kept."""

    post_instructions: int | None = Field(None, ge=1)


class RetentionRatio(Wire):
    """How much is left when the oldest turns go."""

    type: Literal["retention_ratio"]
    retention_ratio: float = Field(ge=0, le=1)
    token_limits: TokenLimits | None = None


Truncation = Annotated[
    Literal["auto", "disabled"] | RetentionRatio,
    expect('"auto", "disabled" or {"type": "retention_ratio", "retention_ratio": a number from 0 to 1}'),
]


class _Choices(Wire):
    """What a session and a single response can choose."""

    place: ClassVar[str]  # of these in their event

    model: Str | None = None
    instructions: Str | None = None
    output_modalities: Modalities | None = Field(None, validation_alias=AliasChoices("output_modalities", "modalities"))
    max_output_tokens: MaxTokens | None = Field(
        None, validation_alias=AliasChoices("max_output_tokens", "max_response_output_tokens")
    )
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    prompt: Any = None
    chat_template_kwargs: Any = None
    rekindle: RekindleOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for name in _SPOKEN if isinstance(value, dict) else ():
            if _says_something(value.get(name)):
                raise Unsupported(f"{name} is not supported: {_AUDIO}", param=name)
        return value

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        wrong = [each for each in self.output_modalities or ["text"] if each != "text"]
        if wrong or self.output_modalities == []:
            raise Unsupported(f'output_modalities: expected ["text"]; {_AUDIO}', param="output_modalities")
        if self.tools:
            raise Unsupported("tools are not supported by this server; expected none", param="tools")
        if self.tool_choice not in (None, "auto", "none"):
            raise Unsupported("tool_choice: expected auto or none, for there are no tools", param="tool_choice")
        if self.prompt is not None:
            raise Unsupported("stored prompts are not supported; use instructions", param="prompt")
        if self.chat_template_kwargs:
            told = "chat_template_kwargs: a live session is written without; use /v1/chat/completions or /v1/responses"
            raise Unsupported(told, param=f"{self.place}.chat_template_kwargs")
        if self.rekindle is not None and self.rekindle.pin is not None:
            raise Unsupported("pin the session: rekindle.session.pin", param=f"{self.place}.rekindle.pin")
        return self


_SPOKEN = (
    "audio",
    "voice",
    "input_audio_format",
    "output_audio_format",
    "input_audio_transcription",
    "input_audio_noise_reduction",
    "turn_detection",
)


def _says_something(value: Any) -> bool:
    """Whether there is anything but nulls in it: to switch off what is not there is no mistake."""
    waiting = [value]  # instead of recursion: JSON may be deeper than the stack
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.values()
        elif each is not None:
            return True
    return False


_STATE = frozenset(
    [
        "session",
        "handle",
        "context",
        "contexts",
        "conversation_id",
        "state",
        "tokens",
        "window",
        "policy",
        "last_event_id",
    ]
)  # that a session's object tells


class SessionIn(_Choices):
    """Of `session.update`."""

    place = "session"

    @model_validator(mode="before")
    @classmethod
    def _may_be_as_it_was_told(cls, value: Any) -> Any:
        """Clients send the session object back with what they change: its state in `rekindle` is no option."""
        told = value.get("rekindle") if isinstance(value, dict) else None
        if not isinstance(told, dict):
            return value
        return value | {"rekindle": {name: each for name, each in told.items() if name not in _STATE}}

    type: Literal["realtime"] | None = None
    truncation: Truncation | None = None


# Items.


class PartIn(TextIn):
    """Of an item's content."""

    type: Literal["input_text", "output_text", "text"]


class ItemIn(Wire):
    """A message that is put into the conversation."""

    id: Id | None = None
    type: Literal["message"]
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[PartIn], Field(min_length=1, max_length=_MAX_PARTS, fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if isinstance(kind := value.get("type"), str) and kind != "message":
            raise Unsupported(f"items of type {kind[:40]!r} are not supported; expected message", param="item.type")
        parts = value.get("content")
        for part in parts[:_MAX_PARTS] if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("input_text", "output_text", "text"):
                raise Unsupported(f"content of type {kind[:40]!r} is not supported; {_AUDIO}", param="item.content")
        return value

    @property
    def text(self) -> str:
        return plain(self.parts)

    @property
    def parts(self) -> list[Part]:
        return [each.part for each in self.content]


class ReferenceIn(Wire):
    """An item of the conversation, by its id."""

    type: Literal["item_reference"]
    id: Id


_Input = Annotated[ReferenceIn | ItemIn, Field(discriminator="type")]


class ResponseIn(_Choices):
    """Of `response.create`."""

    place = "response"

    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[_Input], Field(max_length=4096, fail_fast=True)] | None = None
    metadata: dict[Annotated[Str, Field(max_length=64)], Annotated[Str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    documents: Any = None

    @model_validator(mode="after")
    def _is_here(self) -> Self:
        if self.documents is not None:
            raise Unsupported('documents are parts of messages here, with "cache": "chunk"', param="response.documents")
        return self

    def or_else(self, usual: RekindleOptions | None) -> ResponseIn:
        """With a session's options for what it does not say itself."""
        if usual is None:
            return self
        own = self.rekindle
        said = {} if own is None else {name: getattr(own, name) for name in own.model_fields_set}
        return self.model_copy(update={"rekindle": usual.model_copy(update=said)})

    @property
    def blend_wish(self) -> Wish:
        return None if self.rekindle is None else self.rekindle.blend_wish


# Events.


class SessionUpdate(ClientEvent):
    waits = True
    type: Literal["session.update"]
    session: SessionIn


class ItemCreate(ClientEvent):
    waits = True
    type: Literal["conversation.item.create"]
    item: ItemIn
    previous_item_id: Id | None = Field(None, description="root: before all others; default: behind them")


class ItemDelete(ClientEvent):
    waits = True
    type: Literal["conversation.item.delete"]
    item_id: Id


class ItemTruncate(ClientEvent):
    """`characters` or `tokens` of the text stay; OpenAI's `audio_end_ms` can only be 0, for there is no audio."""

    type: Literal["conversation.item.truncate"]
    item_id: Id
    content_index: int = Field(0, ge=0)
    audio_end_ms: int | None = Field(None, ge=0)
    characters: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        if self.content_index:
            raise InvalidRequest("content_index: expected 0, the only part", param="content_index")
        if self.characters is None and self.tokens is None and self.audio_end_ms != 0:
            raise Unsupported("there is no audio: say how many characters or tokens are kept", param="audio_end_ms")
        return self


class ItemRetrieve(ClientEvent):
    type: Literal["conversation.item.retrieve"]
    item_id: Id


class ResponseCreate(ClientEvent):
    type: Literal["response.create"]
    response: ResponseIn = Field(default_factory=lambda: ResponseIn.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _may_be_null(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("response", 0) is None:
            return {name: each for name, each in value.items() if name != "response"}
        return value


class ResponseCancel(ClientEvent):
    type: Literal["response.cancel"]
    response_id: Id | None = None


class BufferAppend(_OurEvent):
    type: Literal["input_text_buffer.append"]
    text: Str


class BufferReplace(_OurEvent):
    type: Literal["input_text_buffer.replace"]
    text: Str


class BufferCommit(_OurEvent):
    waits = True
    type: Literal["input_text_buffer.commit"]
    item_id: Id | None = None


class BufferClear(_OurEvent):
    type: Literal["input_text_buffer.clear"]


class ContextCreate(_OurEvent):
    type: Literal["rekindle.context.create"]
    context: Annotated[Str, Field(min_length=1, max_length=64)]
    instructions: Str = ""


class ContextSwap(_OurEvent):
    """With instructions, a context that there is not yet is made."""

    type: Literal["rekindle.context.swap"]
    context: Annotated[Str, Field(min_length=1, max_length=64)]
    instructions: Str | None = None


class SessionFork(_OurEvent):
    type: Literal["rekindle.session.fork"]
    session: Annotated[Str, Field(min_length=1, max_length=64)] | None = None


class SessionPin(_OurEvent):
    type: Literal["rekindle.session.pin"]
    ttl: Span


class SessionResume(_OurEvent):
    """Go on in another session, by its handle or its name."""

    type: Literal["rekindle.session.resume"]
    handle: Id | None = None
    session: Annotated[Str, Field(min_length=1, max_length=64)] | None = None
    last_event_id: Id | None = None

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.handle is None and self.session is None:
            raise InvalidRequest("expected a handle or the name of a session, got neither", param="handle")
        return self


Incoming = (
    SessionUpdate
    | ItemCreate
    | ItemDelete
    | ItemTruncate
    | ItemRetrieve
    | ResponseCreate
    | ResponseCancel
    | BufferAppend
    | BufferReplace
    | BufferCommit
    | BufferClear
    | ContextCreate
    | ContextSwap
    | SessionFork
    | SessionPin
    | SessionResume
)
_INCOMING: TypeAdapter[Incoming] = TypeAdapter(Annotated[Incoming, Field(discriminator="type")])
TYPES = tuple(each.model_fields["type"].annotation.__args__[0] for each in Incoming.__args__)
_NOT_HERE = ("input_audio_buffer.", "output_audio_buffer.", "transcription_session.")


def id_of(value: dict[str, Any]) -> str | None:
    """What a client calls its event, whatever else is wrong with it."""
    given = value.get("event_id")
    return given if isinstance(given, str) and len(given) <= MAX_ID else None


def decode(value: dict[str, Any]) -> Incoming:
    """An event. Raises InvalidRequest that says what was expected."""
    kind = value.get("type")
    if isinstance(kind, str) and kind.startswith(_NOT_HERE):
        raise Unsupported(f"{kind[:60]} is not supported: {_AUDIO}", param="type")
    type_of(value, TYPES)
    try:
        return _INCOMING.validate_python(value)
    except ValidationError as error:
        raise invalid_message(error, skip=1) from None
