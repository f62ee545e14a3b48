"""The Python API: mistakes are told in its own words, and its names can be found."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import rekindle
from rekindle.errors import InvalidRequest, PromptTooLong
from rekindle.model.chunks import Chunk
from rekindle.serve.local import LLM


@pytest.fixture(scope="module")
def toy() -> Iterator[LLM]:
    with rekindle.load(engine="toy", store="none") as llm:
        yield llm


@pytest.mark.parametrize(
    ("wrong", "message"), [("max_new_tokens", "did you mean 'max_tokens'"), ("beams", "known: .*top_p")]
)
def test_an_unknown_option_of_an_answer_is_told(wrong: str, message: str) -> None:
    with rekindle.load(engine="toy", store="none") as llm:
        with pytest.raises(InvalidRequest, match=f"unknown option '{wrong}'.*{message}"):
            llm.generate("Hello", **{wrong: 3})
        assert llm.generate("Hello", max_tokens=2, seed=1, top_p=0.5) == llm.generate("Hello", max_tokens=2)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": True}, "temperature must be a number between 0 and 100, got True"),
    ({"temperature": "warm"}, "temperature must be a number between 0 and 100, got 'warm'"),
    ({"temperature": None}, "temperature must be .*, got None"),
    ({"top_p": 1.5}, "top_p must be a number between 0 and 1, got 1.5"),
    ({"top_k": 1.5}, "top_k must be a whole number"),
    ({"top_k": True}, "top_k must be a whole number .* got True"),
    ({"min_p": float("nan")}, "min_p must be .* got nan"),
    ({"seed": 0.5}, "seed must be a whole number"),
    ({"seed": -1}, "seed must be a whole number"),
    ({"presence_penalty": False}, "presence_penalty must be a number between -2 and 2, got False"),
    ({"frequency_penalty": "x"}, "frequency_penalty must be"),
    ({"logit_bias": {1: True}}, "logit_bias.1. must be a number between -100 and 100, got True"),
    ({"logit_bias": {"1": 1}}, "a token id of logit_bias must be a whole number of at least 0, got '1'"),
    ({"logit_bias": [1]}, "logit_bias must be a mapping"),
    ({"max_tokens": True}, "max_tokens must be a whole number of at least 1, got True"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"max_tokens": "3"}, "max_tokens must be .* got '3'"),
    ({"priority": 0.5}, "priority must be a whole number, got 0.5"),
    ({"stop": ["a", 3]}, "a stop string must not be .* anything but text"),
    ({"stop": [""]}, "must not be empty"),
    ({"stop": 3}, "stop: expected a text or a list of texts, got int"),
    ({"seed": 10**5000}, "seed must be a whole number .* got a number beyond all limits"),
    ({"blend": {"ratio": True}}, "blend.ratio must be a number between 0 and 1, got True"),
    ({"blend": {"ratio": "0.5"}}, "blend.ratio must be .* got '0.5'"),
    ({"blend": {"layer": True}}, "blend.layer must be a whole number of at least 1, got True"),
    ({"blend": {"layer": 0}}, "blend.layer must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_number_is_a_number(toy: LLM, options: dict[str, Any], message: str) -> None:
    """True is not 1, a text is no number, and the mistake is told before anything is generated."""
    with pytest.raises(InvalidRequest, match=message):
        toy.generate("Hello", **options)


@pytest.mark.parametrize("prompt", [None, 5, b"Hello", {"role": "user", "content": "Hello"}], ids=repr)
def test_what_is_no_prompt_is_told(toy: LLM, prompt: Any) -> None:
    for ask in (toy.generate, toy.chat, toy.warm, partial(toy.pin, ttl="1m")):
        with pytest.raises(InvalidRequest, match=f"a prompt is text, .* got {type(prompt).__name__}"):
            ask(prompt)


def test_one_of_several_that_is_too_long_is_named_before_any_is_warmed(toy: LLM) -> None:
    before = toy.service.num_computed
    with pytest.raises(PromptTooLong, match=r"prompts\[1\]: the prompt has \d+ tokens; the context holds"):
        toy.warm([Chunk("It fits. " * 9), Chunk("too long " * 5000)])
    assert toy.service.num_computed == before


@pytest.mark.parametrize("ttl", [True, None, [1], 0, -1.0, "soon"], ids=repr)
def test_a_time_is_a_time(toy: LLM, ttl: Any) -> None:
    with pytest.raises(InvalidRequest, match="ttl: expected a time such as 30s"):
        toy.pin("Hello", ttl=ttl)


def test_numpys_numbers_are_numbers(toy: LLM) -> None:
    mine: dict[str, Any] = {"temperature": np.float32(0), "max_tokens": np.int64(2), "top_k": np.int32(3)}
    assert toy.generate("Hello", stop=None, **mine) == toy.generate("Hello", temperature=0, max_tokens=2)


def test_names_that_are_loaded_late_can_be_completed() -> None:
    listed = dir(rekindle)
    assert {"LLM", "SimpleKVCache", "load", "__version__"} <= set(listed)
    assert all(hasattr(rekindle, name) for name in rekindle.__all__)
    assert "import_module" not in listed
