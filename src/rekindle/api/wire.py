"""Requests on the wire. Types are strict (a number is not a string, true is not a number), unknown fields are ignored.

What a field may be is checked here if the wire format decides it, and by `serve/` if it follows from what is generated
(`Sampling`, `Generation`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rekindle.api.refusals import NAME, UNKNOWN_FIELD
from rekindle.errors import InvalidRequest, nearest
from rekindle.reuse.blend import SELECTS
from rekindle.serve.durations import EXPECTED, seconds_of
from rekindle.serve.marked import Wish
from rekindle.serve.request import MAX_TOP_LOGPROBS, Sampling

MAX_CHOICES = 128
MAX_STOPS = 16
NOT_TEXT = "not_text"
_MAX_ID = (1 << 31) - 1
_SEEDS = (1 << 63) - 1  # a mask: any integer makes a seed that is not negative


class Wire(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


def expect(what: str) -> WrapValidator:
    """For unions: one message that says what may come, instead of one for each member."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            for each in error.errors(include_url=False, include_input=False):
                if each["type"] in (NOT_TEXT, UNKNOWN_FIELD):
                    told = each.get("ctx", {}) | {"reason": each["msg"]}
                    raise PydanticCustomError(each["type"], "{reason}", told) from None
            raise PydanticCustomError("invalid_value", "expected {what}", {"what": what}) from None

    return WrapValidator(check)


def _is_text(value: str) -> str:
    """Python's JSON reader lets halves of UTF-16 pairs in; no tokenizer and no encoder takes them."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        where = {"at": error.start}
        raise PydanticCustomError(NOT_TEXT, "expected text, got a lone surrogate at character {at}", where) from None
    return value


def _is_some(value: str) -> str:
    if not value:
        raise PydanticCustomError("empty", "expected at least one character, got an empty string")
    return value


def _seconds(value: Any) -> float:
    """A span of time."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return seconds_of(value)
        except InvalidRequest:
            pass
    raise PydanticCustomError("invalid_value", "expected {what}", {"what": EXPECTED})


def _plain_json(value: dict[str, Any], handler: Any) -> Any:
    """Refuse what Python's JSON reader lets in although it isn't JSON, where no type says so."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise PydanticCustomError("invalid_value", "expected plain JSON without NaN or lone surrogates") from None
    return handler(value)


# Arrays fail at their first bad element: a large array of the wrong kind makes one error, not millions.
TokenId = Annotated[int, Field(ge=0, le=_MAX_ID)]
Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Str = Annotated[str, AfterValidator(_is_text)]
Text = Annotated[Str, AfterValidator(_is_some)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
Stop = Annotated[
    Str | Annotated[list[Str], Field(max_length=MAX_STOPS, fail_fast=True)] | None,
    expect(f"a string or an array of at most {MAX_STOPS} strings"),
]
Prompts = Annotated[
    Text | Texts | TokenIds | TokenIdLists,
    expect("text, an array of texts, an array of token ids or an array of such arrays, none of them empty"),
]
Span = Annotated[float, BeforeValidator(_seconds), WithJsonSchema({"type": ["string", "number"]})]
JsonObject = Annotated[dict[str, Any], WrapValidator(_plain_json)]


class JsonSchema(Wire):
    """A named schema, as OpenAI sends it."""

    name: Str | None = None
    schema_: JsonObject = Field(alias="schema")


class ResponseFormat(Wire):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("invalid_value", 'type "json_schema" needs the field json_schema')
        return self

    @property
    def constraint(self) -> dict[str, Any] | None:
        """The schema of the answer, None for any text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Wire):
    include_usage: bool | None = None


class Ours(Wire):
    """Base of what no other API has: a name that is not known is a mistake."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_unknown(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                shown = name[:40].encode("utf-8", "replace").decode()  # half a surrogate pair can't be told
                told = {NAME: shown, "hint": nearest(name, cls.model_fields)}
                raise PydanticCustomError(UNKNOWN_FIELD, "this field is unknown{hint}", told)
        return value


class BlendOptions(Ours):
    """How chunks are placed and mended; what is not said is as the server was set."""

    select: Str | None = Field(
        None,
        description=f"which tokens of placed chunks are computed anew: {', '.join(SELECTS)}, as the engine has them",
    )
    layer: int | None = Field(None, ge=1, description="of deviation: the layer at which it is judged, from 0")
    judge: Literal["K", "V"] | None = Field(None, description="of deviation: what is compared there, V by default")
    ratio: float | None = Field(None, ge=0, le=1, description="how much of what is placed is computed anew")
    _wanted: bool = PrivateAttr(default=True)

    @classmethod
    def no(cls) -> BlendOptions:
        """Don't."""
        options = cls.model_validate({})
        options._wanted = False
        return options

    @property
    def wish(self) -> Wish:
        """For the service."""
        return self.model_dump(exclude_none=True) if self._wanted else False


def _blend(value: Any) -> Any:
    """True for blending as the server was set, false for none."""
    if isinstance(value, bool):
        return BlendOptions.model_validate({}) if value else BlendOptions.no()
    if value is None or isinstance(value, dict | BlendOptions):
        return value
    raise PydanticCustomError("invalid_value", "expected true, false or an object of select and ratio")


class RekindleOptions(Ours):
    """What to tell about the work itself, what to keep of it, and whether chunks may be placed."""

    plan: bool = Field(False, description="which spans of the prompt were reused or computed, and why")
    timings: bool = Field(False, description="where the time went, in milliseconds")
    pin: Span | None = Field(None, description="keep the KV of prompt and answer for so long: 10m, 2h, or seconds")
    blend: Annotated[
        BlendOptions | None, BeforeValidator(_blend, json_schema_input_type=bool | BlendOptions | None)
    ] = Field(
        None, description="place marked chunks wherever they stand: true, false, or an object of select and ratio"
    )

    @property
    def as_dict(self) -> dict[str, Any]:
        """What was said, as it was said."""
        said = self.model_dump(exclude_unset=True, exclude={"blend"})
        return said if self.blend is None else said | {"blend": True if self.blend.wish == {} else self.blend.wish}

    @property
    def blend_wish(self) -> Wish:
        """None if nothing is said; what is to be pinned is read exactly unless blending is asked for."""
        if self.blend is None:
            return None if self.pin is None else False
        return self.blend.wish


def fields_of_others(by_schema: str, limit: str, **more: str) -> dict[str, str]:
    """Those of llama-server and vLLM that are refused, and what to do instead; `limit` is the field for it here."""
    schemas = ("grammar", "json_schema", "structured_outputs")
    guided = ("guided_choice", "guided_grammar", "guided_json", "guided_regex")
    return {
        "allowed_token_ids": "use logit_bias",
        "bad_words": "use logit_bias",
        "chat_template": "messages are written as the model's own says",
        "continue_final_message": "send the text to be continued to /v1/completions",
        "n_predict": f"use {limit}",
        "stop_token_ids": "use stop, with the tokens' text",
        "use_beam_search": "use n, and choose",
        **dict.fromkeys((*schemas, *guided), by_schema),
        **more,
    }


class GenerationFields(Wire):
    """What all requests for answers share; null is as good as absent."""

    of_others: ClassVar[dict[str, str]] = fields_of_others("use response_format with a json_schema", "max_tokens")

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: all")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop = None
    ignore_eos: bool | None = Field(None, description="go on after the end of turn, for measurements")
    priority: Priority | None = Field(None, description="lower goes earlier, with the policy of that name; default 0")
    cache_salt: Str | None = Field(None, description="requests with different salts never share KV")
    rekindle: RekindleOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_nothing_of_others(cls, value: Any) -> Any:
        """Hints may be ignored; what says which answers are good, or where they end, may not."""
        for name in cls.of_others.keys() & value.keys() if isinstance(value, dict) else ():
            if value[name]:
                raise InvalidRequest(f"{name} is not supported here: {cls.of_others[name]}", param=name)
        return value

    def sampling(
        self, vocab_size: int, *, choice: int = 0, temperature: float = 1.0, top_logprobs: int | None = None
    ) -> Sampling:
        """How choice number `choice` is sampled; a seed makes the choices differ, the same way each time."""
        return Sampling(
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_by_token(self.logit_bias or {}, vocab_size),
            seed=None if self.seed is None else (self.seed + choice) & _SEEDS,
            top_logprobs=top_logprobs,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def pin_seconds(self) -> float | None:
        return None if self.rekindle is None else self.rekindle.pin

    @property
    def blend_wish(self) -> Wish:
        return None if self.rekindle is None else self.rekindle.blend_wish


def _by_token(biases: dict[str, float], vocab_size: int) -> dict[int, float]:
    for name in biases:
        if not (name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < vocab_size):
            expected = f"token ids from 0 to {vocab_size - 1} as keys"
            raise InvalidRequest(f"logit_bias: expected {expected}, got {name[:20]!r}", param="logit_bias")
    return {int(name): bias for name, bias in biases.items()}


class OpenAIFields(GenerationFields):
    """What chats and completions share."""

    of_others = GenerationFields.of_others | {"max_new_tokens": "use max_tokens"}

    model: Str | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def constraint(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.constraint


class CompletionRequest(OpenAIFields):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: Str | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.suffix:
            raise InvalidRequest("suffix is not supported: this server only continues a prompt", param="suffix")
        if self.best_of not in (None, self.num_choices):
            raise InvalidRequest("best_of is not supported beyond n: all n choices are returned", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo with logprobs is not supported: a prompt's tokens have none", param="echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


_BY_COMPLETIONS = "use /v1/completions, with response_format and a json_schema"


class GenerateRequest(GenerationFields):
    """`POST /generate` and `POST /generate_stream`. The default temperature is 0: greedy."""

    of_others = fields_of_others(_BY_COMPLETIONS, "max_new_tokens", response_format=_BY_COMPLETIONS)

    prompt: Text
    max_new_tokens: int = Field(128, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    use_cache: bool = Field(True, description="false: read the whole sequence again for every token")
    use_prefix_cache: bool = Field(True, description="false: neither read nor write KV of other requests")
