"""The API in front of the real engine and the built-in model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

VILLAGE = Path(__file__).parents[2] / "examples" / "village"
PASSAGES = [path.read_text("utf-8").strip() for path in sorted(VILLAGE.glob("*.txt"))][:3]
ASK = {"role": "user", "content": " ".join([*PASSAGES, "Where does everybody work?"])}
GREEDY: dict[str, Any] = {"model": "ember", "messages": [ASK], "temperature": 0, "max_tokens": 40}


def test_a_repeated_prompt_has_the_same_answer_and_no_model_call_before_its_first_token(ember: openai.OpenAI) -> None:
    report = {"rekindle": {"plan": True, "timings": True}}
    first = ember.chat.completions.create(**GREEDY, extra_body={"cache_salt": "fresh"})
    again = ember.chat.completions.create(**GREEDY, extra_body={"cache_salt": "fresh"} | report)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    assert again.choices[0].message.content == first.choices[0].message.content != ""
    assert again.model_extra["rekindle"]["timings"]["prefill_calls"] == 0
    assert again.model_extra["rekindle"]["plan"]["computed"] == 0


def test_a_second_turn_computes_only_the_new_message(ember: openai.OpenAI) -> None:
    first = ember.chat.completions.create(**GREEDY)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    thanks = {"role": "user", "content": "And who is the oldest of them?"}
    second = ember.chat.completions.create(**GREEDY | {"messages": [ASK, said, thanks]})
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_stream_says_the_same_as_the_whole_answer(ember: openai.OpenAI) -> None:
    whole = ember.chat.completions.create(**GREEDY).choices[0].message.content
    with ember.chat.completions.create(**GREEDY, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_choices_of_one_prompt(ember: openai.OpenAI) -> None:
    # of one token: its logits are the same bits when they are asked for again, those of later tokens but nearly
    arguments = GREEDY | {"temperature": 8.0, "seed": 11, "n": 3, "max_tokens": 1}
    once, again = (ember.chat.completions.create(**arguments) for _ in range(2))
    texts = [choice.message.content for choice in once.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1


def test_a_stop_string_ends_an_answer(ember: openai.OpenAI) -> None:
    whole = ember.chat.completions.create(**GREEDY).choices[0].message.content
    stop = whole[len(whole) // 2 :][:5]
    stopped = ember.chat.completions.create(**GREEDY, stop=stop).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_logprobs_are_a_distribution(ember: openai.OpenAI) -> None:
    tokens = ember.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=20).choices[0].logprobs.content
    for token in tokens:
        assert 0 < sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-4
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)


def test_a_schema_binds_the_model(ember: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "town": {"enum": ["Viniton", "Zürich"]}},
        "required": ["sure", "town"],
        "additionalProperties": False,
    }
    answer = ember.chat.completions.create(
        **GREEDY | {"max_tokens": 100},
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content)
    assert isinstance(value["sure"], bool) and value["town"] in ("Viniton", "Zürich")


def test_without_the_kv_cache_the_words_are_the_same(ember_url: str) -> None:
    """`use_cache=false` reads everything again for every token: slow, and the same."""
    body = {"prompt": " ".join(PASSAGES), "max_new_tokens": 12}
    with httpx.Client(base_url=ember_url, timeout=60) as http:
        cached = http.post("/generate", json=body).json()
        again = http.post("/generate", json=body).json()
        fresh = http.post("/generate", json=body | {"use_cache": False, "use_prefix_cache": False}).json()
    assert cached["text"] == again["text"] == fresh["text"] != ""
    assert again["prefix_cache_hit"] and not fresh["prefix_cache_hit"] and not fresh["cache_enabled"]


def test_refusals_on_the_real_engine(ember: openai.OpenAI, ember_url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ember.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": "town " * 20_000}]})
    assert refusal.value.code == "context_length_exceeded"
    assert httpx.get(f"{ember_url}/health").json()["status"] == "ok"


def test_a_json_object_is_no_other_value(ember: openai.OpenAI) -> None:
    ask = {"role": "user", "content": "Vodris paints in orange. What colour does Vodris paint in?"}
    answer = ember.chat.completions.create(**GREEDY | {"messages": [ask]}, response_format={"type": "json_object"})
    assert (answer.choices[0].message.content or "").startswith("{")
