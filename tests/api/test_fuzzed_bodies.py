"""Random bodies: whatever comes in, a 500 never goes out, and every refusal has the one shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOADED = HealthCheck.too_slow  # which a busy machine is
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, LOADED])
NUMBERS = st.integers() | st.integers(-2, 25) | st.floats() | st.sampled_from([1 << 31, 1 << 63, 10**400, -(10**30)])
TEXTS = st.text(max_size=20) | st.sampled_from(["", "\ud800", "\x00", "\u2028", "<|end|>", "a" * 300])
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}, optional={"cache": st.just("chunk") | ANY})
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | ANY, "content": TEXTS | st.lists(PARTS, max_size=3) | ANY}), max_size=4
)
DOCUMENTS = st.lists(st.fixed_dictionaries({"text": TEXTS | ANY}, optional={"title": TEXTS | ANY}), max_size=3) | ANY
IDS = st.lists(st.integers(-1, 5000), max_size=8)
PROMPTS = TEXTS | IDS | st.lists(IDS, max_size=3) | st.lists(TEXTS, max_size=3) | ANY
FORMATS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"]) | ANY},
    optional={"json_schema": st.fixed_dictionaries({"schema": st.dictionaries(TEXTS, ANY, max_size=3)}) | ANY},
)
SAMPLING = {
    "temperature": st.floats(0, 2) | ANY,
    "top_p": st.floats(0, 1) | ANY,
    "top_k": st.integers(-1, 50) | ANY,
    "min_p": st.floats(0, 1) | ANY,
    "presence_penalty": st.floats(-2, 2) | ANY,
    "frequency_penalty": st.floats(-2, 2) | ANY,
    "logit_bias": st.dictionaries(st.integers(0, 3000).map(str), st.floats(-100, 100), max_size=3) | ANY,
    "seed": st.integers() | ANY,
    "stop": TEXTS | st.lists(TEXTS, max_size=3) | ANY,
    "ignore_eos": st.booleans() | ANY,
}
BLENDS = ANY | st.fixed_dictionaries(
    {}, optional={"select": st.sampled_from(["first", "none", "query"]) | ANY, "ratio": st.floats(0, 1) | ANY}
)
OPENAI = SAMPLING | {
    "n": st.integers(1, 3) | ANY,
    "stream": st.booleans() | ANY,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | ANY,
    "rekindle": st.fixed_dictionaries({"plan": st.booleans(), "timings": st.booleans()}, optional={"blend": BLENDS})
    | ANY,
    "cache_salt": TEXTS | ANY,
    "model": st.sampled_from(["ember", "builtin"]) | ANY,
    "response_format": FORMATS | ANY,
    "frobnicate": ANY,
}
LENGTHS = (
    st.integers(1, 4) | st.integers(-2, 0) | st.text(max_size=2) | st.booleans()
)  # never long, for the test's sake
CHATS = st.fixed_dictionaries(
    {"messages": MESSAGES, "max_tokens": LENGTHS},
    optional=OPENAI
    | {"logprobs": st.booleans() | ANY, "top_logprobs": st.integers(0, 20) | ANY, "documents": DOCUMENTS},
)
COMPLETIONS = st.fixed_dictionaries(
    {"prompt": PROMPTS, "max_tokens": LENGTHS},
    optional=OPENAI | {"logprobs": st.integers(0, 20) | ANY, "echo": st.booleans() | ANY, "suffix": TEXTS | ANY},
)
GENERATES = st.fixed_dictionaries(
    {"prompt": TEXTS | ANY, "max_new_tokens": LENGTHS},
    optional=SAMPLING | {"use_cache": st.booleans() | ANY, "use_prefix_cache": st.booleans() | ANY},
)

TEXT_PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "output_text", "refusal"]) | TEXTS, "text": TEXTS},
    optional={"cache": st.just("chunk") | ANY},
)
CONTENTS = TEXTS | st.lists(TEXT_PARTS, max_size=3) | ANY
ITEMS = st.fixed_dictionaries(
    {"role": ROLES | ANY, "content": CONTENTS},
    optional={"type": st.sampled_from(["message", "function_call", "reasoning"]) | ANY},
) | st.fixed_dictionaries(
    {"type": st.sampled_from(["function_call", "function_call_output"])},
    optional={"call_id": TEXTS | ANY, "name": TEXTS | ANY, "arguments": TEXTS | ANY, "output": CONTENTS},
)
RESPONSES = st.fixed_dictionaries(
    {"input": TEXTS | st.lists(ITEMS, max_size=3) | ANY, "max_output_tokens": LENGTHS},
    optional=OPENAI
    | {
        "previous_response_id": TEXTS | ANY,
        "instructions": TEXTS | ANY,
        "store": st.booleans() | ANY,
        "text": st.fixed_dictionaries({"format": FORMATS | ANY}) | ANY,
        "include": st.just(["message.output_text.logprobs"]) | ANY,
        "top_logprobs": st.integers(0, 20) | ANY,
        "metadata": st.dictionaries(TEXTS, TEXTS, max_size=3) | ANY,
        "tools": ANY,
        "conversation": ANY,
        "documents": DOCUMENTS,
    },
)


def check(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 413, 422), (answer.status_code, answer.text, content)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        last = answer.text.rstrip("\n").rpartition("\n\n")[2]
        assert answer.text.endswith("data: [DONE]\n\n") or '"status":"' in last, (answer.text[-300:], content)
    else:
        assert answer.json()


@FEW
@given(body=CHATS)
def test_chats(http: httpx.Client, body: Any) -> None:
    check(http, "/v1/chat/completions", json.dumps(body).encode())


@FEW
@given(body=RESPONSES)
def test_responses(http: httpx.Client, body: Any) -> None:
    check(http, "/v1/responses", json.dumps(body).encode())


@FEW
@given(body=COMPLETIONS)
def test_completions(http: httpx.Client, body: Any) -> None:
    check(http, "/v1/completions", json.dumps(body).encode())


@FEW
@given(body=GENERATES, path=st.sampled_from(["/generate", "/generate_stream"]))
def test_generates(http: httpx.Client, body: Any, path: str) -> None:
    check(http, path, json.dumps(body).encode())


@FEW
@given(content=st.binary(max_size=60) | ANY.map(lambda value: json.dumps(value).encode()))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/generate"])
def test_anything(http: httpx.Client, content: bytes, path: str) -> None:
    check(http, path, content)
