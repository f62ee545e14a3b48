"""Chunks go through chat templates of every kind and come out with the same text, wherever they stand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest
from rekindle.model.chunks import (
    Chunk,
    Document,
    Part,
    has_chunks,
    parts_of,
    render,
    render_chunks,
    render_documents,
    split,
    tidy,
)
from rekindle.model.ember.dialogue import CHAT_TEMPLATE
from rekindle.model.template import ChatTemplate

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = "{% for message in messages %}[INST] {{ message['content'] | trim }} [/INST]{% endfor %}"
WITH_DOCUMENTS = (
    "{% for document in documents or [] %}<doc>{{ document['title'] }}: {{ document['text'] }}</doc>{% endfor %}"
    + CHATML
)
JSON_DOCUMENTS = "{% if documents %}{{ documents | tojson }}{% endif %}" + CHATML
EMBER = ChatTemplate(CHAT_TEMPLATE, bos="<|bos|>")
ONE, TWO = Chunk("First passage.\n  It goes on."), Chunk(" Second passage ")


def user(*parts: Part) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text_of(parts: list[Part]) -> str:
    return "".join(part.text if isinstance(part, Chunk) else part for part in parts)


def chunks_of(parts: list[Part]) -> list[Chunk]:
    return [part for part in parts if isinstance(part, Chunk)]


@pytest.mark.parametrize("source", [CHATML, INST, CHAT_TEMPLATE], ids=["chatml", "inst", "ember"])
def test_a_chunk_is_the_same_wherever_it_stands_and_alone(source: str) -> None:
    template = ChatTemplate(source)
    orders = [user("Read:", ONE, TWO, "Which?"), user(TWO, ONE), user("Which?", TWO, "and", ONE)]
    alone = render_chunks(template, [ONE, TWO])
    for message in orders:
        for before in ([], [{"role": "system", "content": "Be brief."}]):
            parts = render(template, [*before, message])
            assert sorted(chunk.text for chunk in chunks_of(parts)) == sorted(chunk.text for chunk in alone)


@pytest.mark.parametrize("source", [CHATML, INST, CHAT_TEMPLATE], ids=["chatml", "inst", "ember"])
def test_marking_does_not_change_the_text(source: str) -> None:
    template = ChatTemplate(source)
    messages = [{"role": "system", "content": "Be brief."}, user("Read:", ONE, TWO, "Which?")]
    plain = [messages[0], {"role": "user", "content": f"Read:\n{ONE.text}\n{TWO.text}\nWhich?"}]
    assert text_of(render(template, messages)) == template.render(plain)


def test_the_space_that_a_template_writes_before_a_line_belongs_to_the_chunk() -> None:
    assert render_chunks(EMBER, [ONE]) == [Chunk(" First passage.\n  It goes on.")]
    assert render(EMBER, [user(ONE, "Which?")])[0] == "<|bos|><|user|>"
    assert render_chunks(ChatTemplate(CHATML), [ONE]) == [ONE]


def test_documents_are_given_to_a_template_that_takes_them() -> None:
    template = ChatTemplate(WITH_DOCUMENTS)
    parts = render(template, [user("Which?")], [Document("Text one.", "One"), Document("Text two.")])
    assert parts[:5] == ["<doc>One: ", Chunk("Text one."), "</doc><doc>: ", Chunk("Text two."), parts[4]]
    assert render_documents(template, [Document("Text one.", "One")]) == [Chunk("Text one.")]


def test_documents_in_json_are_what_the_template_makes_of_them() -> None:
    template = ChatTemplate(JSON_DOCUMENTS)
    given = [Document('He said "no".\nTwice.')]
    parts = render(template, [user("Which?")], given)
    assert chunks_of(parts) == render_documents(template, given) == [Chunk('He said \\"no\\".\\nTwice.')]


def test_documents_go_before_the_last_message_of_the_user_otherwise() -> None:
    template = ChatTemplate(CHATML)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, user("Which?")]
    given = [Document("Text one.", "One"), Document("Text two.")]
    parts = render(template, messages, given)
    assert chunks_of(parts) == [Chunk("One\nText one."), Chunk("Text two.")] == render_documents(template, given)
    assert "<|im_start|>user\nOne\nText one.\nText two.\nWhich?<|im_end|>" in text_of(parts)
    assert text_of(parts).index("Hello") < text_of(parts).index("One")
    with pytest.raises(InvalidRequest, match="before a user's message, and there is none"):
        render(template, messages[1:2], given)


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{{ message['content'][3:] }}{% endfor %}",
        "{% for message in messages %}{{ message['content'] }}{{ message['content'] }}{% endfor %}",
        "{% for message in messages %}{{ message['role'] }}{% endfor %}",
        "{% for message in messages %}{{ message['content'] | reverse }}{% endfor %}",
        "{% for message in messages %}"
        "{{ message['content'] | upper if message['role'] == 'system' else message['content'] }}{% endfor %}",
    ],
    ids=["loses", "repeats", "drops", "turns", "by role"],
)
def test_a_template_that_changes_chunks_by_where_they_stand_is_refused(source: str) -> None:
    messages = [{"role": "system", "content": [ONE]}, user("Which?")]
    with pytest.raises(InvalidRequest, match="does not write each chunk once") as refused:
        render(ChatTemplate(source), messages)
    assert refused.value.param == "messages"


def test_a_template_that_takes_documents_and_writes_none_is_refused() -> None:
    template = ChatTemplate("{% if documents and tools %}{{ documents }}{% endif %}" + CHATML)
    with pytest.raises(InvalidRequest, match="does not write each chunk once") as refused:
        render(template, [user("Which?")], [Document("Text.")])
    assert refused.value.param == "documents"


def test_characters_that_could_be_marks_are_kept() -> None:
    strange = Chunk("\ue000 inside \ue001")
    parts = render(ChatTemplate(CHATML), [user("\ue002", strange, "\U000f0000")])
    assert chunks_of(parts) == [strange] and "\ue002" in text_of(parts) and "\U000f0000" in text_of(parts)
    everything = "".join(chr(code) for codes in ((0xE000, 0xF900), (0xF0000, 0xFFFFE)) for code in range(*codes))
    with pytest.raises(InvalidRequest, match="private use"):
        render(ChatTemplate(CHATML), [user(Chunk(everything))])


def test_parts_of_messages() -> None:
    marked = {"type": "text", "text": "b", "cache": "chunk"}
    assert parts_of(["a", marked, {"type": "text", "text": "c"}]) == ["a", "\n", Chunk("b"), "\n", "c"]
    assert parts_of(None) == [""] and parts_of("a") == ["a"] and parts_of(Chunk("a")) == [Chunk("a")]
    assert has_chunks([{"role": "user", "content": [marked]}]) and has_chunks([user(ONE)])
    assert not has_chunks([user("a"), {"role": "user", "content": "b"}, {"role": "assistant", "content": None}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "text or a list of parts"),
        ([3], "each part of a message"),
        ([{"type": "image_url"}], "each part of a message"),
        ([{"type": "text", "text": 3}], "each part of a message"),
        ([{"type": "text", "text": "a", "cache": "document"}], "expected \"chunk\", got 'document'"),
    ],
)
def test_other_content_is_refused(content: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parts_of(content)


@pytest.mark.parametrize("given", [3, {"title": "no text"}, {"text": 3}, {"text": "a", "title": 3}, None])
def test_what_is_no_document_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="a document is expected as"):
        Document.of(given)


def test_what_is_no_text_is_no_chunk() -> None:
    with pytest.raises(InvalidRequest, match="a chunk is text, got int"):
        Chunk(3)  # type: ignore[arg-type]
    assert Document.of("a") == Document.of(Chunk("a")) == Document("a")


def test_chunks_stand_between_separators() -> None:
    assert split("system # # one # # two # # question", " # # ") == [
        "system # # ",
        Chunk("one"),
        " # # ",
        Chunk("two"),
        " # # question",
    ]
    assert split("no chunks # # here", " # # ") == ["no chunks # # here"]
    assert split("a # # b # # c", None) == ["a # # b # # c"]
    assert split(" # # a # # ", " # # ") == [" # # ", Chunk("a"), " # # "]


@given(st.lists(st.text("ab#", max_size=5), max_size=8))
def test_splitting_keeps_the_text(pieces: list[str]) -> None:
    text = "##".join(pieces)
    parts = split(text, "##")
    assert text_of(parts) == text
    assert tidy(parts) == parts or parts == [text]
