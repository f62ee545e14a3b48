"""The simple sockets' messages: JSON objects with a `type`, in and out.

in   message      the user's message; without `data`, the draft as it is. It is answered; an answer under way ends
     partial      the draft as it is now, or with "append": true what it goes on with
     interrupt    the answer ends; `characters` or `tokens` say how much of it was heard
     context      a named context with these instructions, in place of one that there may be
     swap         go on in another context
     rewind       go back to the end of this turn
     reset        forget all turns
     Other fields are not looked at.

out  user_input, token, end (with reason, usage and timings), spent (those of an answer that was interrupted), system (with
     its kind), error
     Each has the number of its event, by which a client that comes back says what it has got.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from rekindle.api.connection import type_of
from rekindle.api.refusals import invalid_message, refusal_of
from rekindle.api.wire import Str, Wire
from rekindle.errors import InvalidRequest
from rekindle.serve.request import Done, Sampling
from rekindle.serve.sessions.news import End, Failure, News, Spent, System, Token, UserInput
from rekindle.serve.sessions.session import Session


class TextOnly(Wire):
    """Base of what is said: a text, all of which is read exactly and while it comes."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_chunks(cls, value: Any) -> Any:
        for name in _OF_CHUNKS if isinstance(value, dict) else ():
            if value.get(name) is not None and (name != "data" or isinstance(value[name], list)):
                raise InvalidRequest(
                    f"{name}: expected one text as data; chunks are marked, and blended, in messages of "
                    "/v1/chat/completions, /v1/responses and /v1/realtime",
                    param=name,
                )
        return value


_OF_CHUNKS = ("data", "cache", "documents", "rekindle")


class MessageIn(TextOnly):
    """The user's message."""

    type: Literal["message"]
    data: Str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)

    def apply(self, session: Session) -> None:
        """Say it, and have it answered."""
        if session.state == "answering":
            session.interrupt()
        sampling = None if self.temperature is None else Sampling(temperature=self.temperature)
        session.say(self.data, max_tokens=self.max_tokens, sampling=sampling)


class PartialIn(TextOnly):
    """What is just being typed or spoken."""

    type: Literal["partial"]
    data: Str
    append: bool = False

    def apply(self, session: Session) -> None:
        """Have it read."""
        if self.append:
            session.append(self.data)
        else:
            session.replace(self.data)


class InterruptIn(Wire):
    """The user has heard enough."""

    type: Literal["interrupt"]
    characters: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)

    def apply(self, session: Session) -> None:
        """End or cut the answer."""
        session.interrupt(characters=self.characters, tokens=self.tokens)


class ContextIn(Wire):
    """A context of its own."""

    type: Literal["context"]
    context: Str = Field(min_length=1, max_length=64)
    instructions: Str

    def apply(self, session: Session) -> None:
        """Make it, and have its instructions read."""
        session.add_context(self.context, head_of(self.instructions))


class SwapIn(Wire):
    """Go on elsewhere."""

    type: Literal["swap"]
    context: Str

    def apply(self, session: Session) -> None:
        """Go on there."""
        session.swap(self.context)


class RewindIn(Wire):
    """Go back."""

    type: Literal["rewind"]
    turn: int = Field(ge=0)

    def apply(self, session: Session) -> None:
        """Go back to this turn's end."""
        session.rewind(self.turn)


class ResetIn(Wire):
    """Begin anew."""

    type: Literal["reset"]

    def apply(self, session: Session) -> None:
        """Forget all turns."""
        session.reset()


Incoming = MessageIn | PartialIn | InterruptIn | ContextIn | SwapIn | RewindIn | ResetIn
_INCOMING: TypeAdapter[Incoming] = TypeAdapter(Annotated[Incoming, Field(discriminator="type")])
TYPES = ("message", "partial", "interrupt", "context", "swap", "rewind", "reset")


def head_of(instructions: str) -> list[dict[str, str]]:
    """Instructions as a context's head; none if they are empty."""
    return [{"role": "system", "content": instructions}] if instructions.strip() else []


def decode(value: dict[str, Any]) -> Incoming:
    """A message. Raises InvalidRequest that says what was expected."""
    type_of(value, TYPES)
    try:
        return _INCOMING.validate_python(value)
    except ValidationError as error:
        raise invalid_message(error, skip=1) from None


def encode(number: int, news: News) -> dict[str, Any]:
    """News as a message."""
    return {"event": number} | _body(news)


def _body(news: News) -> dict[str, Any]:
    match news:
        case UserInput():
            return {"type": "user_input", "turn": news.turn, "data": news.text}
        case Token():
            return {"type": "token", "turn": news.turn, "data": news.text}
        case End():
            return {"type": "end", "turn": news.turn, "reason": news.reason, "data": news.text} | _numbers(news.done)
        case Spent():
            return {"type": "spent", "turn": news.turn} | _numbers(news.done)
        case System():
            return {"type": "system", "kind": news.kind, "data": news.message, "detail": news.detail}
        case Failure():
            return {"type": "error", "turn": news.turn} | refusal_of(news.error)[1]


def _numbers(done: Done | None) -> dict[str, Any]:
    if done is None:
        return {}
    usage = done.usage
    tokens = {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "computed_tokens": usage.computed_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    return {"usage": tokens, "timings": done.timings.as_dict}
