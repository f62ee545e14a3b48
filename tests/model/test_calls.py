"""Calls of functions reach a chat template in the form that it writes, or as words; nothing is left out without a word."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Chunk, render
from rekindle.model.ember.dialogue import CHAT_TEMPLATE
from rekindle.model.template import ChatTemplate


def calls(arguments: str) -> str:
    """How a template writes each."""
    return "{% for c in m.tool_calls or [] %}[{{ c.function.name }} " + arguments + "]{% endfor %}"


EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
AS_OBJECT = EACH + calls("{{ c.function.arguments | tojson }}") + "{% endfor %}"
AS_STRING = EACH + calls("{{ '' + c.function.arguments }}") + "{% endfor %}"
PRINTED = EACH + calls("{{ c.function.arguments }}") + "{% endfor %}"
EACH_ARGUMENT = (
    EACH + calls("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}") + "{% endfor %}"
)
IF_NONE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is none %}"
    + calls("{{ '' + c.function.arguments }}")
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NO_CALLS = EACH + "{% endfor %}"
NINE = (
    EACH
    + "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    + "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
)
ONLY_SPOKEN = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)

ARGUMENTS = {"city": "Köln", "days": 2}
WRITTEN = '{"city": "Köln", "days": 2}'


def call(arguments: Any = WRITTEN, name: str = "weather") -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


def talk(*calls: dict[str, Any], content: str | None = "") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Hot?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        {"role": "tool", "tool_call_id": "call12345", "content": "Rain."},
    ]


@pytest.mark.parametrize("arguments", [WRITTEN, ARGUMENTS], ids=["string", "object"])
@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize(
    ("source", "written"),
    [
        (AS_OBJECT, f"[weather {WRITTEN}]"),
        (AS_STRING, f"[weather {WRITTEN}]"),
        (PRINTED, f"[weather {WRITTEN}]"),
        (EACH_ARGUMENT, "[weather city=Köln;days=2;]"),
        (IF_NONE, f"[weather {WRITTEN}]"),
        (NINE, f"[weather {WRITTEN}]"),
        (NO_CALLS, '{"name": "weather", "arguments": ' + WRITTEN + "}"),
    ],
    ids=["object", "string", "printed", "each", "none", "nine", "words"],
)
def test_a_call_is_written_in_the_templates_form(
    source: str, written: str, arguments: Any, content: str | None
) -> None:
    text = ChatTemplate(source).render(talk(call(arguments), content=content))
    assert text == f"<user>Hot?<assistant>{written}<tool>Rain."


def test_what_is_said_beside_calls_stays() -> None:
    assert "I look.[weather {}][clock {}]" in ChatTemplate(AS_OBJECT).render(
        talk(call(""), call({}, "clock"), content="I look.")
    )
    words = '<assistant>I look.\n{"name": "weather", "arguments": {}}\n{"name": "clock", "arguments": {}}<tool>'
    assert words in ChatTemplate(NO_CALLS).render(talk(call(""), call({}, "clock"), content="I look."))


def test_arguments_that_are_no_json_stay_what_the_model_wrote() -> None:
    assert '[weather "{city: "]' in ChatTemplate(AS_OBJECT).render(talk(call("{city: "))).replace('\\"', '"')
    assert "[weather {city: ]" in ChatTemplate(AS_STRING).render(talk(call("{city: ")))


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans())))
def test_whatever_is_called_is_the_same_as_string_and_as_object(arguments: dict[str, Any]) -> None:
    template = ChatTemplate(AS_OBJECT)
    assert template.render(talk(call(json.dumps(arguments)))) == template.render(talk(call(arguments)))


def test_what_a_template_would_skip_is_refused() -> None:
    template = ChatTemplate(ONLY_SPOKEN)
    with pytest.raises(InvalidRequest, match="leaves out messages of the role 'tool'; send what they say") as refusal:
        template.render(talk(call()))
    assert refusal.value.param == "messages"
    assert template.render(talk(call())[:2]) == 'Hot?{"name": "weather", "arguments": ' + WRITTEN + "}"
    with pytest.raises(InvalidRequest, match="role 'function'"):
        template.render([{"role": "function", "name": "f", "content": "x"}])
    with pytest.raises(InvalidRequest, match="refused the messages: no tools"):  # in its own words
        ChatTemplate(STRICT).render(talk(call()))


@pytest.mark.parametrize("bad", [["x"], [{}], [{"function": {"arguments": "{}"}}], {"a": 1}, 3])
def test_calls_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="tool_calls: expected a list of"):
        ChatTemplate(AS_OBJECT).render([{"role": "assistant", "content": "", "tool_calls": bad}])


def test_each_turn_begins_with_the_last_one() -> None:
    for source in (AS_OBJECT, AS_STRING, IF_NONE, NO_CALLS, CHAT_TEMPLATE):
        template = ChatTemplate(source)
        messages = talk(call()) + talk(call({"n": 1}, "clock"))
        texts = [template.render(messages[:length], add_generation_prompt=False) for length in range(1, 7)]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_chunks_stand_beside_calls() -> None:
    """Whatever characters the arguments have."""
    messages = talk(call({"odd": "\ue000 \ue001"}))
    messages[2]["content"] = [Chunk("Rain in the north."), "So?"]
    for source in (AS_OBJECT, NO_CALLS, CHAT_TEMPLATE):
        parts = render(ChatTemplate(source), messages)
        assert [part.text.strip() for part in parts if isinstance(part, Chunk)] == ["Rain in the north."]
        assert any("weather" in part for part in parts if isinstance(part, str))
