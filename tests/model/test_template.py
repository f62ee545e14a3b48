"""Chat templates are foreign code: they render as in the ecosystem, reach nothing, and what they raise is a refusal."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest, ModelError
from rekindle.model.template import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: object = None, **arguments: object) -> str:
    given = HELLO if messages is None else messages
    return ChatTemplate(source, bos="<s>", eos="</s>").render(given, **arguments)  # type: ignore[arg-type]


def test_messages_are_rendered_with_special_tokens_and_the_opening_of_the_answer() -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message['content'] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert render(source) == "<s><user>hello</s><assistant>"
    assert render(source, add_generation_prompt=False) == "<s><user>hello</s>"


def test_blocks_leave_no_white_space() -> None:
    """trim_blocks and lstrip_blocks, as the ecosystem's templates expect."""
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loop_controls_and_generation_marks_are_known() -> None:
    source = (
        "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
    )
    assert render(source + "{% endfor %}") == "02"
    assert render("<{% generation %}{{ messages[0].content }}{% endgeneration %}>") == "<hello>"


def test_content_may_come_in_parts() -> None:
    source = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ part.text if part.type == 'text' else '[' ~ part.type ~ ']' }}{% endfor %}{% endif %}{% endfor %}"
    )
    parts = [
        {"type": "text", "text": "a "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "b"},
    ]
    assert render(source, [{"role": "user", "content": parts}, *HELLO]) == "a [image_url]bhello"


def test_tools_and_documents_reach_the_template_and_are_none_without() -> None:
    source = "{{ tools is none }} {{ documents is none }}"
    assert render(source) == "True True"
    assert render(source, tools=[{}], documents=[]) == "False False"
    assert render("{{ tools | tojson }}", tools=[{"name": "größe", "n": 1}]) == '[{"name": "größe", "n": 1}]'
    assert render("{{ more }}{{ undefined }}", more=3) == "3"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_tojson_is_json_as_it_is(value: object) -> None:
    """Nothing is escaped for HTML, unlike Jinja's own filter."""
    assert render("{{ value | tojson }}", value=value) == json.dumps(value, ensure_ascii=False)


def test_tojson_takes_the_ecosystems_options() -> None:
    assert render("{{ v | tojson(indent=2) }}", v={"a": "<é>"}) == '{\n  "a": "<é>"\n}'
    assert (
        render("{{ v | tojson(ensure_ascii=True, sort_keys=True) }}", v={"b": 1, "a": "é"})
        == '{"a": "\\u00e9", "b": 1}'
    )
    assert render("{{ v | tojson(separators=(',', ':')) }}", v={"a": [1, 2]}) == '{"a":[1,2]}'


def test_the_date_is_todays() -> None:
    before, made, after = datetime.now(), render("{{ strftime_now('%Y-%m-%d') }}"), datetime.now()
    assert made in {f"{before:%Y-%m-%d}", f"{after:%Y-%m-%d}"}


def test_a_template_may_refuse_in_its_own_words() -> None:
    with pytest.raises(InvalidRequest, match="refused the messages: roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '%s' | format(messages.__init__.__globals__) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__['os'].popen('true') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(InvalidRequest):
        render(source, messages)
    assert messages == HELLO


def test_inner_attributes_do_not_exist() -> None:
    assert render("{{ raise_exception.__globals__ }}{{ ''.__class__ }}{{ messages.__init__ }}") == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ missing() }}",
        "{{ [1, 'a'] | sort }}",
        "{{ missing | tojson }}",
        "{{ messages | int + 'a' }}",
    ],
)
def test_whatever_a_template_raises_is_a_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refused"):
        render(source)


def test_endless_recursion_is_a_refusal() -> None:
    with pytest.raises(InvalidRequest):
        render("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}")


def test_no_messages_are_refused_before_the_template_sees_them() -> None:
    with pytest.raises(InvalidRequest, match="messages is empty"):
        render("hello", [])


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ messages",
        "{% endif %}",
        "{% nonsense %}",
        "{{ a | nofilter }}",
        "{% generation %}",
        "{{ " + "(" * 9999,
    ],
)
def test_broken_source_is_the_models_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template is not valid"):
        ChatTemplate(source)


@given(st.text(max_size=60))
def test_any_source_renders_or_is_refused(source: str) -> None:
    with suppress(ModelError, InvalidRequest):
        render(source.replace("(", "{{ ").replace(")", " }}").replace("[", "{% if ").replace("]", " %}"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_content_is_text_and_never_template(content: str) -> None:
    content = f"{{{{ 1 + 1 }}}}{content}"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content
