"""Chat templates: the model's own Jinja source, rendered in Jinja's sandbox as the ecosystem does.

A template comes with a model file, so it is not trusted: it runs in an immutable sandbox, sees only what it is given, and
whatever it raises is the caller's error, not ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rekindle.errors import InvalidRequest, ModelError
from rekindle.model.calls import SPOKEN, Calling, leaves_out
from rekindle.model.chunks import plain


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders messages to the text that the model was trained on."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        """Raises ModelError if the source is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        try:
            parsed = environment.parse(source)
            self._template: Template = environment.from_string(parsed)
            self.takes_documents = "documents" in find_undeclared_variables(parsed)
        except Exception as error:  # TemplateError, or what its compiler stumbles over, such as endless nesting
            raise ModelError(f"the model's chat template is not valid: {error}") from None
        self._special = {"bos_token": bos, "eos_token": eos}
        self._left_out: dict[str, bool] = {}  # by role, of those that have come up

    def render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The text of a conversation, ready for the assistant's next words. Raises InvalidRequest.

        Content in parts of text, see `plain`, is put together first: most templates would leave it out without a word.
        Parts of another type are left to the template. Calls of functions are given as it knows them, see `calls`.
        """
        if not messages:
            raise InvalidRequest("messages is empty: at least one message is needed", param="messages")
        return self._rendered([self._known(_in_one(message)) for message in messages], **arguments)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        given = {"add_generation_prompt": True, "tools": None, "documents": None} | arguments
        try:
            return self._template.render(messages=messages, **self._special, **given)
        except Exception as error:  # the template is foreign code: whatever it raises, it refused these messages
            raise InvalidRequest(f"the model's chat template refused the messages: {error}", param="messages") from None

    def _known(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message as the template knows it. Raises InvalidRequest if it would leave it out."""
        role = message.get("role")
        if isinstance(role, str) and role not in SPOKEN:
            if role not in self._left_out:
                self._left_out[role] = leaves_out(self._rendered, role)
            if self._left_out[role]:
                raise InvalidRequest(
                    f"the model's chat template leaves out messages of the role {role!r}; "
                    "send what they say as a message of the user",
                    param="messages",
                )
        return self._calling.written(message) if message.get("tool_calls") else message

    @cached_property
    def _calling(self) -> Calling:
        return Calling.of(self._rendered)


def _in_one(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with one text as its content, if it is all text."""
    if not isinstance(message, Mapping):
        expected = '{"role": …, "content": …}'
        raise InvalidRequest(f"a message is expected as {expected}, got {type(message).__name__}", param="messages")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if isinstance(content, Sequence) and any(isinstance(p, Mapping) and p.get("type") != "text" for p in content):
        return message
    return {**message, "content": plain(content)}


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
