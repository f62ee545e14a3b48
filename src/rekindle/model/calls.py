"""Calls of functions in a conversation, and what came of them: as a chat template writes them.

Clients send a call as OpenAI does, its arguments as JSON in a string. Templates differ in what they make of it, and their
sources do not say, so each is shown a conversation with a call in it, in one form after the other, and what it writes tells

- in which form it writes calls. Most want the arguments as an object; some put that string into the text as it is, and
  some write a call only where the message has no content, not even an empty one. Where no form is written, a call is JSON
  that the assistant has said: better than a gap in the talk;
- whether it writes what functions return. What a template would skip without a word is refused, with a word.

The same call is written the same way in each turn, so the prompt of the next one begins with that of the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rekindle.errors import InvalidRequest
from rekindle.model.chunks import JOINT, plain

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages], str]
SPOKEN = ("system", "user", "assistant")  # roles of which nobody expects to be left out
_FUNCTION, _ARGUMENT, _RESULT = "qcalledq", "qaskedq", "qheardq"  # words that no template writes
_ID = "callnine9"  # some templates want nine letters and digits


@dataclass(frozen=True)
class Calling:
    """The form in which a template writes calls."""

    writes: bool  # at all
    as_strings: bool = False  # their arguments
    empty: str | None = ""  # the content of a message with nothing but calls

    @classmethod
    def of(cls, render: Render) -> Calling:
        """As a template shows it."""
        forms = [cls(True, as_strings, empty) for empty in ("", None) for as_strings in (False, True)]
        return next((form for form in forms if form._is_written(render)), cls(False))

    def _is_written(self, render: Render) -> bool:
        """With the arguments' names as JSON has them, or bare; not as Python would print an object, nor as JSON in JSON."""
        arguments = {_ARGUMENT: "x"}
        text = _shown(render, json.dumps(arguments) if self.as_strings else arguments, self.empty)
        return f'"{_ARGUMENT}"' in text if self.as_strings else _ARGUMENT in text and f"'{_ARGUMENT}'" not in text

    def written(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message as the template knows it. Raises InvalidRequest for calls that are none."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        called = [_called(each) for each in _all_mappings(calls)]
        if not self.writes:
            said = [plain(message.get("content")), *(json.dumps(each, ensure_ascii=False) for each in called)]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            return rest | {"content": JOINT.join(filter(None, said))}
        if self.as_strings:
            called = [each | {"arguments": _as_string(each["arguments"])} for each in called]
        whole = [{"type": "function", **call, "function": each} for call, each in zip(calls, called, strict=True)]
        return {**message, "content": message.get("content") or self.empty, "tool_calls": whole}


def leaves_out(render: Render, role: str) -> bool:
    """Whether messages of this role would not be in the text."""
    return _RESULT not in _shown(render, {}, "", role, refused=_RESULT)


def _shown(render: Render, arguments: Any, content: str | None, role: str = "tool", *, refused: str = "") -> str:
    """What comes of a conversation with a call in it, if need be without what it returned; `refused` if nothing does."""
    call = {"id": _ID, "type": "function", "function": {"name": _FUNCTION, "arguments": arguments}}
    talk: Messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": role, "content": _RESULT, "tool_call_id": _ID, "name": _FUNCTION},
    ]
    for messages in (talk, talk[:2]):
        try:
            return render(messages)
        except InvalidRequest:
            if refused:  # it says so itself
                return refused
    return ""


def _all_mappings(calls: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(calls, Sequence) and all(isinstance(call, Mapping) for call in calls):
        return calls
    raise _no_call()


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    """Name and arguments, these as an object if they can be read as JSON: whatever a model wrote is what it asked for."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _no_call()
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"name": function["name"], "arguments": arguments}


def _as_string(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _no_call() -> InvalidRequest:
    expected = '{"type": "function", "function": {"name": …, "arguments": …}}'
    return InvalidRequest(f"tool_calls: expected a list of {expected}", param="messages")
