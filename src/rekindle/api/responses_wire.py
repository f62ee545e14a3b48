"""`/v1/responses` on the wire: what may be asked, as OpenAI's clients write it.

Only text is understood, so input items are messages and their parts are texts. What asks for something else that would
change the answer (tools, images, conversations kept by name, work in the background) is refused; what would not (labels,
hints about caching, effort of reasoning) is accepted, and has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rekindle.api.wire import JsonObject, RekindleOptions, SamplingFields, Str, Wire
from rekindle.errors import InvalidRequest
from rekindle.serve.request import MAX_TOP_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
_OTHER_PARTS = ("input_image", "input_file", "input_audio")
_OTHER_ITEMS = ("function_call", "function_call_output", "reasoning", "item_reference", "file_search_call")
_MAX_LABELS, _MAX_LABEL, _MAX_VALUE = 16, 64, 512


class TextPart(Wire):
    """One part of a message's content."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Str = ""
    refusal: Str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_understood(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in _OTHER_PARTS:
            raise InvalidRequest(f"this server reads text only, not parts of type {value['type']}", param="input")
        return value


class InputMessage(Wire):
    """One input item."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[TextPart], Field(fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _is_message(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in _OTHER_ITEMS:
            raise InvalidRequest(f"this server knows messages only, not items of type {value['type']}", param="input")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise PydanticCustomError("invalid_value", "expected a string or an array of text parts")
        return value

    @property
    def text(self) -> str:
        return "\n".join(part.text or part.refusal for part in self.content)

    def for_template(self) -> dict[str, str]:
        """As chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}

    def as_item(self, item_id: str) -> dict[str, Any]:
        """As it is listed."""
        kind = "output_text" if self.role == "assistant" else "input_text"
        content = [{"type": kind, "text": part.text or part.refusal} for part in self.content]
        return {"id": item_id, "type": "message", "role": self.role, "status": "completed", "content": content}


def _as_messages(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_value", "expected a string or an array of messages")
    return value


class TextFormat(Wire):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Str | None = None
    description: Str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise PydanticCustomError("invalid_value", 'type "json_schema" needs the field schema')
        return self

    @property
    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)


class TextOptions(Wire):
    format: TextFormat | None = None
    verbosity: Str | None = None


Labels = Annotated[dict[Str, Str], BeforeValidator(lambda value: _labels(value))]


def _labels(value: Any) -> Any:
    if isinstance(value, dict) and (
        len(value) > _MAX_LABELS
        or any(len(str(name)) > _MAX_LABEL or len(str(label)) > _MAX_VALUE for name, label in value.items())
    ):
        expected = f"expected at most {_MAX_LABELS} labels of {_MAX_LABEL} and values of {_MAX_VALUE} characters"
        raise PydanticCustomError("invalid_value", "{expected}", {"expected": expected})
    return value


class ResponseRequest(SamplingFields):
    """`POST /v1/responses`, and `response.create` on its socket."""

    input: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True), BeforeValidator(_as_messages)]
    model: Str | None = None
    instructions: Str | None = Field(
        None, description="goes before all else, and does not come with a previous response"
    )
    previous_response_id: Str | None = Field(None, description="go on from there")
    store: bool | None = Field(
        None, description="keep the response for /v1/responses/ID and to go on from; default: true"
    )
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    include: list[Str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Labels | None = None
    user: Str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    cache_salt: Str | None = Field(None, description="requests with different salts share neither KV nor responses")
    rekindle: RekindleOptions | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.tools and self.tool_choice != "none":
            raise InvalidRequest("tools are not supported by this server", param="tools")
        for name, instead in (
            ("background", "ask with stream, or keep the connection open"),
            ("conversation", "use previous_response_id"),
            ("prompt", "use instructions and input"),
        ):
            if getattr(self, name):
                raise InvalidRequest(f"{name} is not supported by this server: {instead}", param=name)
        if self.truncation == "auto":
            raise InvalidRequest(
                "truncation is not supported by this server: leave older turns out", param="truncation"
            )
        return self

    @property
    def is_kept(self) -> bool:
        return self.store is not False

    @property
    def num_logprobs(self) -> int | None:
        """Of each token; None if none were asked for."""
        wanted = self.top_logprobs is not None or LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None

    @property
    def constraint(self) -> dict[str, Any] | None:
        """The schema of the answer, None for any text."""
        given = None if self.text is None else self.text.format
        if given is None or given.type == "text":
            return None
        return given.schema_ if given.type == "json_schema" else {"type": "object"}

    @property
    def pin_seconds(self) -> float | None:
        return None if self.rekindle is None else self.rekindle.pin

    @property
    def messages(self) -> list[dict[str, str]]:
        """What is new in the conversation."""
        return [message.for_template() for message in self.input]

    def prompted(self, conversation: list[dict[str, str]]) -> list[dict[str, str]]:
        """A whole conversation as the template gets it: one system message goes first, whoever gave its parts."""
        heads = [self.instructions] if self.instructions else []
        count = 0
        while count < len(conversation) and conversation[count]["role"] == "system":
            heads.append(conversation[count]["content"])
            count += 1
        first = [{"role": "system", "content": "\n\n".join(heads)}] if heads else []
        return first + conversation[count:]

    def echoed(self) -> Mapping[str, Any]:
        """What a response repeats of its request."""
        text = self.text or TextOptions()
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": dict(self.metadata or {}),
            "parallel_tool_calls": True,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self.is_kept,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": (text.format or TextFormat(schema=None)).as_dict},
            "tool_choice": "none" if self.tools else "auto",
            "tools": [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }
