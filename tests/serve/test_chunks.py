"""Chunks in the Python API: the same tokens wherever they stand, in conversations that go on, warmed and blended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

import rekindle
from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Chunk, Document, Part
from rekindle.reuse.prompt import Prompt
from rekindle.serve.marked import marked_prompt
from rekindle.serve.transcripts import Transcripts
from rekindle.tokens import Tokens, as_tokens

TEXTS = [
    "Vodris paints in orange.\nThis one works as a farmer. " * 4,
    "Nouraix is based in Viniton. This one likes the sea. " * 4,
]
CHUNKS = [rekindle.Chunk(text.strip()) for text in TEXTS]
QUESTION = "What colour does Vodris paint in?"


@pytest.fixture(scope="module")
def llm() -> Iterator[rekindle.LLM]:
    with rekindle.load(store="none", threads=1, context=2048) as llm:
        yield llm


def tokens_of(prompt: Prompt) -> list[list[int]]:
    return [prompt.tokens[chunk.start : chunk.stop].tolist() for chunk in prompt.chunks]


def cached(llm: rekindle.LLM) -> int:
    assert llm.last is not None
    return llm.last.usage.cached_tokens


def test_a_chunk_has_the_same_tokens_everywhere(llm: rekindle.LLM) -> None:
    service = llm.service
    alone = [prompt.tokens[len(service.head) :].tolist() for prompt in service.chunk_prompts(CHUNKS)]
    orders: list[list[Any]] = [
        [*CHUNKS, QUESTION],
        ["Read:", *CHUNKS[::-1], QUESTION],
        [QUESTION, CHUNKS[1], "and", CHUNKS[0]],
    ]
    for content in orders:
        prompt = service.chat_prompt([{"role": "user", "content": content}])
        assert sorted(tokens_of(prompt)) == sorted(alone)
    documents = [Document.of(chunk) for chunk in CHUNKS]
    asked = service.chat_prompt([{"role": "user", "content": QUESTION}], documents=documents)
    assert tokens_of(asked) == alone


def test_marking_gives_the_tokens_of_the_text(llm: rekindle.LLM) -> None:
    """For this tokenizer, which never merges over a line's end."""
    text = "\n".join([CHUNKS[0].text, CHUNKS[1].text, QUESTION])
    marked = llm.service.chat_prompt([{"role": "user", "content": [*CHUNKS, QUESTION]}])
    plain = llm.service.chat_prompt([{"role": "user", "content": text}])
    assert np.array_equal(marked.tokens, plain.tokens) and marked.text == plain.text


def test_parts_without_a_chunk_among_them_are_the_text_with_newlines_between_them(llm: rekindle.LLM) -> None:
    plain = llm.service.chat_prompt([{"role": "user", "content": f"Read this.\n{QUESTION}"}])
    for parts in (["Read this.", QUESTION], [{"type": "text", "text": "Read this."}, QUESTION]):
        prompt = llm.service.chat_prompt([{"role": "user", "content": parts}])
        assert prompt.text == plain.text and np.array_equal(prompt.tokens, plain.tokens)
    llm.generate(["Read this.", QUESTION], max_tokens=1)
    assert llm.last is not None and llm.last.plan.total == len(plain)


def test_all_forms_of_a_prompt_blend(llm: rekindle.LLM) -> None:
    llm.clear_cache()
    llm.warm(CHUNKS)
    none = {"select": "none"}
    llm.generate([*CHUNKS, QUESTION], max_tokens=2, blend=none)
    assert placed(llm) == [True, True]
    llm.chat([{"role": "user", "content": [CHUNKS[1], QUESTION]}], max_tokens=2, blend=none)
    assert placed(llm) == [True]
    llm.chat([{"role": "user", "content": QUESTION}], documents=CHUNKS, max_tokens=2, blend=none)
    assert placed(llm) == [True, True]
    llm.chat([{"role": "user", "content": QUESTION}], documents=[c.text for c in CHUNKS], max_tokens=2, blend=True)
    assert placed(llm) == [True, True]
    llm.generate(CHUNKS[0], max_tokens=2, documents=None)
    assert placed(llm) == []
    llm.warm(CHUNKS, raw=True)
    llm.generate(["Read: ", *CHUNKS, QUESTION], raw=True, max_tokens=2, blend=none)
    assert placed(llm) == [True, True]


def placed(llm: rekindle.LLM) -> list[bool]:
    assert llm.last is not None
    return [chunk.placed > 0 for chunk in llm.last.plan.chunks]


def test_a_conversation_with_chunks_goes_on_from_what_was_said(llm: rekindle.LLM) -> None:
    llm.clear_cache()
    first = {"role": "user", "content": [*CHUNKS, QUESTION]}
    said = llm.chat([first], max_tokens=12, temperature=1.5, seed=4)  # its text need not be tokenised as it was said
    assert llm.last is not None
    length = llm.last.usage.prompt_tokens + len(llm.last.tokens)
    llm.chat([first, {"role": "assistant", "content": said}, {"role": "user", "content": "Who?"}], max_tokens=2)
    assert cached(llm) >= length - 1
    other = {"role": "user", "content": [CHUNKS[1], CHUNKS[0], QUESTION]}
    llm.chat([other, {"role": "assistant", "content": said}, {"role": "user", "content": "Who?"}], max_tokens=2)
    assert cached(llm) < length / 2, "in another order it is another beginning"


def test_an_opening_with_chunks_is_what_such_conversations_begin_with(llm: rekindle.LLM) -> None:
    opening: list[dict[str, Any]] = [{"role": "system", "content": ["Read this:", *CHUNKS]}]
    llm.clear_cache()
    (warmed,) = llm.warm(opening)
    llm.chat([*opening, {"role": "user", "content": QUESTION}], max_tokens=2)
    assert cached(llm) == warmed.tokens
    assert len(llm.service.opening_prompt(opening).chunks) == 2


def test_separators_mark_chunks_of_plain_text() -> None:
    with rekindle.load(store="none", threads=1, context=2048, chunk_separator=" # # ") as llm:
        prompt = llm.service.text_prompt(" # # ".join(["Read.", *TEXTS, QUESTION]))
        expected = [llm.service.model.tokenizer.encode(text).tolist() for text in TEXTS]
        assert tokens_of(prompt) == expected
        assert llm.service.text_prompt("one # # two").chunks == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([1, 2, 3], documents=["a"]), "documents are put into a conversation"),
        (lambda llm: llm.chat([{"role": "user", "content": "Hello"}], documents="a text"), "got one str"),
        (lambda llm: llm.chat([{"role": "user", "content": "Hello"}], documents={"text": "a"}), "got one dict"),
        (lambda llm: llm.chat([{"role": "user", "content": "Hello"}], documents=3), "expected a list of texts"),
        (lambda llm: llm.generate("Hello", raw=True, documents=["a"]), "documents are put into a conversation"),
        (
            lambda llm: llm.chat([{"role": "user", "content": "Hello"}], documents=[{"title": "x"}]),
            "a document is expected",
        ),
        (lambda llm: llm.generate("Hello", blend="yes"), "blend: expected True, False, or"),
        (lambda llm: llm.generate("Hello", blends=True), "unknown option 'blends'; did you mean 'blend'"),
        (lambda llm: llm.warm([rekindle.Chunk("")]), "a chunk is empty"),
        (lambda llm: llm.generate([rekindle.Chunk("")], raw=True), "the prompt is empty"),
        (lambda llm: llm.generate([rekindle.Chunk("a"), 3]), "each part of a message"),
        (lambda llm: llm.generate([1, "a"]), "token ids must be between 0 and .* got str"),
        (lambda llm: llm.generate([1, 2.5]), "token ids must be between 0 and .* got float"),
        (lambda llm: llm.generate([1, -1]), "token ids must be between 0 and .* got -1"),
        (lambda llm: llm.generate(["a", 3]), "each part of a message"),
        (lambda llm: llm.generate(["a", 3], raw=True), "each part of a prompt .* got int"),
        (lambda llm: llm.chat([{"role": "user", "content": 3}]), "content is text or a list of parts"),
        (lambda llm: llm.service.chat_prompt(["Hello"]), "a message is expected as .* got str"),
        (
            lambda llm: llm.chat([{"role": "user", "content": [rekindle.Chunk(CHUNKS[0].text * 60)]}]),
            "the context holds",
        ),
    ],
)
def test_mistakes_are_told(llm: rekindle.LLM, call: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        call(llm)


def test_what_is_remembered_with_other_chunks_is_not_taken(llm: rekindle.LLM) -> None:
    """The same text, marked in another way, has other tokens at the edges of its chunks, and so other chunks."""
    one, other = TEXTS[0].strip(), TEXTS[1].strip()
    ways: list[list[Any]] = [
        [rekindle.Chunk(f"{one}\n{other}"), QUESTION],
        [rekindle.Chunk(one), other, QUESTION],
        [one, rekindle.Chunk(other), QUESTION],
        [rekindle.Chunk(one), rekindle.Chunk(other), QUESTION],
        [f"{one}\n{other}", QUESTION],
    ]
    service = llm.service
    for said in ways:
        answer = llm.chat([{"role": "user", "content": said}], max_tokens=8)
        for again in ways:
            messages = [
                {"role": "user", "content": again},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": [CHUNKS[1], "And?"]},
            ]
            marked = [part for part in (*again, CHUNKS[1]) if isinstance(part, rekindle.Chunk)]
            alone = [prompt.tokens[len(service.head) :].tolist() for prompt in service.chunk_prompts(marked)]
            assert tokens_of(service.chat_prompt(messages)) == alone


class Spaced:
    """A vocabulary of characters that, like Llama 2's, writes a space before every text."""

    vocab_size = 256
    bos: int | None = 1
    eos: int | None = 2

    def encode(self, text: str, *, bos: bool = False) -> Tokens:
        return as_tokens([*([1] if bos else []), *(f" {text}".encode() if text else b"")])

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def is_special(self, token: int) -> bool:
        return False

    def is_end(self, token: int) -> bool:
        return token == 2

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode()


def test_no_space_goes_between_a_chunk_and_what_follows_it() -> None:
    parts: list[Part] = ["Read:\n", Chunk("one"), "\n", Chunk("two"), "\nWhich?"]
    prompt = marked_prompt(Spaced(), Transcripts(), parts, salt=b"", bos=True)
    assert Spaced().decode(prompt.tokens.tolist()[1:]) == " Read:\n one\n two\nWhich?"
    assert tokens_of(prompt) == [list(b" one"), list(b" two")]
