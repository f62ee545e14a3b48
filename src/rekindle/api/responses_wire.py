"""`/v1/responses` on the wire: what may be asked, as OpenAI's clients write it.

Only text is understood; `responses_items.py` has what may come in. What asks for something else that would
change the answer (tools, images, conversations kept by name, work in the background) is refused; what would not (labels,
hints about caching, effort of reasoning) is accepted, and has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from rekindle.api.chat_wire import NO_CALLS, Documents, TemplateArguments
from rekindle.api.responses_items import InputItem, Message, in_one_breath
from rekindle.api.wire import GenerationFields, JsonObject, Str, Wire, fields_of_others
from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Document, Part, content_of
from rekindle.serve.request import MAX_TOP_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
_MAX_LABELS, _MAX_LABEL, _MAX_VALUE = 16, 64, 512


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


def _apart(contents: Sequence[str | list[Part]]) -> str | list[Part]:
    """Contents of messages as that of one, an empty line between each two."""
    parts: list[Part] = []
    for number, content in enumerate(contents):
        parts += [""] * (number > 0)
        parts += [content] if isinstance(content, str) else content
    return content_of(parts)


class ResponseRequest(GenerationFields):
    """`POST /v1/responses`, and `response.create` on its socket."""

    of_others = fields_of_others(
        "use text.format with a json_schema",
        "max_output_tokens",
        response_format="use text.format",
        max_tokens="use max_output_tokens",
        max_completion_tokens="use max_output_tokens",
        max_new_tokens="use max_output_tokens",
        messages="use input",
    )

    input: Annotated[list[InputItem], Field(min_length=1, fail_fast=True), BeforeValidator(_as_messages)]
    model: Str | None = None
    instructions: Str | None = Field(
        None, description="goes before all else, and does not come with a previous response"
    )
    documents: Documents | None = Field(
        None, description="each a chunk; they do not come with a previous response either"
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
    chat_template_kwargs: TemplateArguments | None = Field(
        None, description="for the chat template; they do not come with a previous response"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.tools and self.tool_choice != "none":
            raise InvalidRequest(f"tools {NO_CALLS}", param="tools")
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
    def looked_up(self) -> list[Document]:
        return [each.document for each in self.documents or ()]

    def messages(self) -> list[Message]:
        """What is new in the conversation."""
        return [item.for_template() for item in self.input]

    def prompted(self, conversation: list[Message]) -> list[Message]:
        """A whole conversation as the template gets it: one system message goes first, whoever gave its parts."""
        heads = [self.instructions] if self.instructions else []
        count = 0
        while count < len(conversation) and conversation[count]["role"] == "system":
            heads.append(conversation[count]["content"])
            count += 1
        first = [{"role": "system", "content": _apart(heads)}] if heads else []
        return first + in_one_breath(conversation[count:])

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
