"""Input items of `/v1/responses`: messages, calls of functions and what came of them.

A part of a message or of a function's output is marked as a chunk by `"cache": "chunk"`. Outputs are where that pays: an
agent looks the same page up again and again, behind another conversation each time.

This server has no functions, so it makes no calls, but it reads those that a conversation has, as chat completions do: see
`model/calls.py`. An item is one call; those that follow each other were made at once, in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rekindle.api.chat_wire import TextIn
from rekindle.api.wire import Str, Wire
from rekindle.errors import InvalidRequest
from rekindle.model.chunks import content_of

_OTHER_PARTS = ("input_image", "input_file", "input_audio")
_OTHER_ITEMS = ("reasoning", "item_reference", "file_search_call")
Message = dict[str, Any]  # as chat templates know it


class TextPart(TextIn):
    """One part of an item's content."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Str = ""
    refusal: Str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_understood(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in _OTHER_PARTS:
            raise InvalidRequest(f"this server reads text only, not parts of type {value['type']}", param="input")
        return value

    @property
    def words(self) -> str:
        return self.text or self.refusal

    def as_dict(self, kind: str) -> dict[str, Any]:
        """As it is listed."""
        return {"type": kind, "text": self.words} | ({} if self.cache is None else {"cache": self.cache})


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_value", "expected a string or an array of text parts")
    return value


Parts = Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts)]


class InputMessage(Wire):
    """What somebody has said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts

    def for_template(self) -> Message:
        """As chat templates know it; with chunks, the parts as they are."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content_of([part.part for part in self.content])}

    def as_item(self, item_id: str) -> dict[str, Any]:
        """As it is listed."""
        kind = "output_text" if self.role == "assistant" else "input_text"
        content = [part.as_dict(kind) for part in self.content]
        return {"id": item_id, "type": "message", "role": self.role, "status": "completed", "content": content}


class FunctionCall(Wire):
    """What the assistant has asked for."""

    type: Literal["function_call"]
    call_id: Str
    name: Str
    arguments: Str

    def for_template(self) -> Message:
        """As chat templates know it."""
        called = {"name": self.name, "arguments": self.arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": self.call_id, "type": "function", "function": called}],
        }

    def as_item(self, item_id: str) -> dict[str, Any]:
        """As it is listed."""
        return {"id": item_id, "status": "completed"} | self.model_dump()


class FunctionOutput(Wire):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: Str
    output: Parts

    @field_validator("output")
    @classmethod
    def _is_some(cls, parts: list[TextPart]) -> list[TextPart]:
        if not parts:
            raise PydanticCustomError("invalid_value", "expected a string or at least one text part")
        return parts

    def for_template(self) -> Message:
        """As chat templates know it; with chunks, the parts as they are."""
        return {
            "role": "tool",
            "tool_call_id": self.call_id,
            "content": content_of([each.part for each in self.output]),
        }

    def as_item(self, item_id: str) -> dict[str, Any]:
        """As it is listed."""
        output = [part.as_dict("input_text") for part in self.output]
        return {"id": item_id, "type": self.type, "call_id": self.call_id, "status": "completed", "output": output}


_KINDS: dict[Any, type[InputMessage | FunctionCall | FunctionOutput]] = {
    "message": InputMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionOutput,
}


def _item(value: Any) -> InputMessage | FunctionCall | FunctionOutput:
    """Of its type; without one it is a message."""
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if kind in _OTHER_ITEMS:
        known = ", ".join(_KINDS)
        raise InvalidRequest(f"this server knows items of type {known}, not {kind}", param="input")
    item = _KINDS.get(kind, InputMessage) if isinstance(kind, str) else InputMessage
    return item.model_validate(value)


def in_one_breath(messages: Sequence[Message]) -> list[Message]:
    """A conversation in which calls in a row are one message of the assistant, with the words before them.

    So chats have them, and templates that want the roles to alternate refuse anything else.
    """
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else {}
        calls = () if message["content"] else message.get("tool_calls", ())
        if calls and before.get("role") == "assistant":
            joined[-1] = before | {"tool_calls": [*before.get("tool_calls", ()), *calls]}
        else:
            joined.append(message)
    return joined


InputItem = Annotated[
    InputMessage | FunctionCall | FunctionOutput,
    PlainValidator(_item, json_schema_input_type=InputMessage | FunctionCall | FunctionOutput),
]
