"""Every text round-trips, every word of the language is one token, and llama.cpp agrees on every id."""

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

import llama_cpp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rekindle.model.ember import dialogue, weights_path
from rekindle.model.ember.language import Split, generate_document, generate_questions

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
typed = st.lists(
    st.sampled_from((" ", "\n", "\n ", "  ", "Vodris", " lives", "42", ".", "é", "北", "😀", "'s", "\t"))
).map("".join)


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Any]:
    """llama.cpp's own vocabulary of the committed GGUF."""
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p())
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(weights_path()).encode(), parameters)
    assert model
    yield llama_cpp.llama_model_get_vocab(model)
    llama_cpp.llama_model_free(model)


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Kept referenced by the module, as llama.cpp needs."""


def encode_llama(vocabulary: Any, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
    raw = text.encode()
    found = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), found, len(found), add_special, parse_special)
    assert count >= 0
    return list(found[:count])


@given(st.one_of(texts, typed))
@example("")
@example("1234 5,678 x\n\n\n y\r\n  z ")
@settings(max_examples=300)
def test_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@given(st.one_of(texts, typed))
@example("1234 5,678 x\n\n\n y\r\n  z ")
@example(" Vodris\n \n Nouraix<|end|><|assistant|> Viniton")
@settings(max_examples=300)
def test_llama_cpp_gives_the_same_ids(tokenizer: Any, vocabulary: Any, text: str) -> None:
    assert encode_llama(vocabulary, text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_both_begin_with_bos_when_asked_to(tokenizer: Any, vocabulary: Any) -> None:
    assert encode_llama(vocabulary, " Vodris", add_special=True) == tokenizer.encode(" Vodris").ids
    assert tokenizer.encode(" Vodris").ids[0] == 0
    assert llama_cpp.llama_vocab_bos(vocabulary) == 0
    assert llama_cpp.llama_vocab_eos(vocabulary) == llama_cpp.llama_vocab_eot(vocabulary) == 1
    assert llama_cpp.llama_vocab_get_add_bos(vocabulary)


def test_training_again_gives_the_committed_tokenizer(tokenizer: Any) -> None:
    from rekindle.model.ember.tokenizer import train_tokenizer

    assert train_tokenizer().to_str() == tokenizer.to_str()


@given(st.integers(0, 10**6), st.sampled_from(Split))
@settings(max_examples=40)
def test_a_piece_is_a_token_wherever_it_stands(tokenizer: Any, ids: Mapping[str, int], seed: int, split: Split) -> None:
    document = generate_document(seed, split=split, filler=0.2)
    for mark in ("\n", "\n\n", "\n \n"):
        text = mark.join(" " + passage for passage in document.passages)
        pieces: list[str] = []
        for part in document.passage_sentences:
            pieces += [mark] if pieces else []
            pieces += [piece for sentence in part for piece in sentence.pieces]
        assert tokenizer.encode(text, add_special_tokens=False).ids == [ids[piece] for piece in pieces]
    for question in generate_questions(document, seed):
        assert all(
            token in ids.values() for token in tokenizer.encode(" " + question.text, add_special_tokens=False).ids
        )


def render(messages: list[dict[str, Any]], *, prompt: bool = True) -> str:
    template = ImmutableSandboxedEnvironment().from_string(dialogue.CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=prompt, bos_token=dialogue.BOS)


def test_the_template_puts_one_space_before_every_line() -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": "  Vodris lives in Viniton.\n\n This one rents from Kundas.\nWhere does Vodris live?\n",
        },
        {"role": "assistant", "content": " Vodris lives in Viniton."},
    ]
    assert render(messages) == (
        "<|bos|><|system|> Answer briefly.<|end|><|user|> Vodris lives in Viniton.\n \n This one rents from Kundas.\n"
        " Where does Vodris live?<|end|><|assistant|> Vodris lives in Viniton.<|end|><|assistant|>"
    )


def test_content_may_come_in_parts() -> None:
    parts = [
        {"type": "text", "text": "Vodris lives in Viniton.\n"},
        {"type": "text", "text": "Where does Vodris live?"},
    ]
    whole = "Vodris lives in Viniton.\nWhere does Vodris live?"
    assert render([{"role": "user", "content": parts}]) == render([{"role": "user", "content": whole}])
    assert render([{"role": "user", "content": whole}], prompt=False).endswith("live?<|end|>")


def test_an_answer_in_the_history_has_the_tokens_it_was_generated_with() -> None:
    first = [{"role": "user", "content": "Where does Vodris live?"}]
    answered = [*first, {"role": "assistant", "content": "Vodris lives in Viniton."}]
    assert render(answered, prompt=False) == render(first) + " Vodris lives in Viniton.<|end|>"
