"""Chat templates: the model's own Jinja source, rendered in Jinja's sandbox as the ecosystem does.

A template comes with a model file, so it is not trusted: it runs in an immutable sandbox, sees only what it is given, and
whatever it raises is the caller's error, not ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rekindle.errors import InvalidRequest, ModelError
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
            self.writes_calls = "tool_calls" in source
            self.takes_documents = "documents" in find_undeclared_variables(parsed)
        except Exception as error:  # TemplateError, or what its compiler stumbles over, such as endless nesting
            raise ModelError(f"the model's chat template is not valid: {error}") from None
        self._special = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The text of a conversation, ready for the assistant's next words. Raises InvalidRequest.

        Content in parts of text, see `plain`, is put together first: most templates would leave it out without a word.
        Parts of another type are left to the template.
        """
        if not messages:
            raise InvalidRequest("messages is empty: at least one message is needed", param="messages")
        messages = [_in_one(message) for message in messages]
        given = {"add_generation_prompt": True, "tools": None, "documents": None} | arguments
        try:
            return self._template.render(messages=messages, **self._special, **given)
        except Exception as error:  # the template is foreign code: whatever it raises, it refused these messages
            raise InvalidRequest(f"the model's chat template refused the messages: {error}", param="messages") from None

    def leaves_out(self, role: str) -> bool:
        """Whether messages of this role are not in the text: some templates skip what they don't know without a word."""
        mark = "Qheardq"  # a word that no template writes
        said = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x"},
            {"role": role, "content": mark},
        ]
        try:
            return mark not in self.render(said)
        except InvalidRequest:  # it says so itself
            return False


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
