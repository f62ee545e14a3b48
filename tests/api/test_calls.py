"""Calls of functions in the history of a chat: read as the template writes them, and never left out without a word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from rekindle.api.server import running
from rekindle.model.template import ChatTemplate
from rekindle.serve.service import Service
from rekindle.settings import Settings

PATH = "/v1/chat/completions"
CALLING = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|end|>{% endfor %}"
)
SKIPPING = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|end|>{% endfor %}"
CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"page": 1}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Look up who paints in orange, and tell me the name of the painter."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Vodris paints in orange. Selka paints in blue."},
]
TOOL = {"type": "function", "function": {"name": "read", "parameters": {}}}


@pytest.fixture(params=[CALLING, SKIPPING], ids=["calling", "skipping"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, Service, httpx.Client]]:
    with Service.open(Settings(engine="toy", store="none")) as service:
        service.model = replace(service.model, template=ChatTemplate(request.param))
        with running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield request.param, service, http


def test_what_a_template_makes_of_calls(served: tuple[str, Service, httpx.Client]) -> None:
    template, service, http = served
    answer = http.post(PATH, json={"messages": TALK, "max_tokens": 1})
    if template == SKIPPING:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "messages")
        assert "leaves out messages of the role 'tool'" in error["message"]
        return
    call = '{"id": "call_1", "type": "function", "function": {"name": "read", "arguments": {"page": 1}}}'
    text = f"user:{TALK[0]['content']}<|end|>assistant:[{call}]<|end|>tool:{TALK[2]['content']}<|end|>"
    assert answer.json()["usage"]["prompt_tokens"] == len(service.model.tokenizer.encode(text))
    warmed = http.post("/cache/warm", json={"messages": TALK}).json()
    assert warmed["prompts"][0]["tokens"] == answer.json()["usage"]["prompt_tokens"]


def test_an_agents_next_turn_finds_the_last_one(ember: openai.OpenAI) -> None:
    """On both real engines, with the built-in model, whose template knows no calls."""
    greedy = {"model": "ember", "temperature": 0.0, "max_tokens": 8}
    first = ember.chat.completions.create(messages=TALK, **greedy)
    without = ember.chat.completions.create(messages=[TALK[0], TALK[2]], **greedy)
    assert first.usage.prompt_tokens > without.usage.prompt_tokens + 5  # the call is in it
    answer = first.choices[0].message.model_dump()  # as the official client's users send it back
    more = [*TALK, answer, {"role": "user", "content": "And blue?"}]
    second = ember.chat.completions.create(messages=more, **greedy)
    kept = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens >= kept


def test_calls_that_make_no_sense_are_refused(http: httpx.Client) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0]", "messages of the assistant only"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, "messages[0]", "expected tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]},
            "messages[0].tool_calls[0].function.name",
            "required",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
            "messages[0].tool_calls[0].function.arguments",
            "expected JSON in a string, or an object",
        ),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "messages[0].tool_calls[0].type", "'custom'"),
    ]
    for message, param, said in wrong:
        answer = http.post(PATH, json={"messages": [message]})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param) and said in error["message"], error


def test_functions_to_call_are_refused_or_left_out(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": TALK, "max_tokens": 1, "temperature": 0}
    for name in ("tools", "functions"):
        answer = http.post(PATH, json=body | {name: [TOOL]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
        assert "makes no calls" in answer.json()["error"]["message"]
    plain, left_out = http.post(PATH, json=body), http.post(PATH, json=body | {"tools": [TOOL], "tool_choice": "none"})
    assert plain.json()["usage"]["prompt_tokens"] == left_out.json()["usage"]["prompt_tokens"]


def test_calls_that_were_made_at_once_are_one_message_in_responses_too() -> None:
    """With the words before them; what is called when those have returned is another."""
    calls = [CALL | {"id": name} for name in ("one", "two", "three")]
    returned = [{"role": "tool", "tool_call_id": call["id"], "content": f"Page {call['id']}."} for call in calls]
    said = {"role": "assistant", "content": "Let me see."}
    items = [
        {"role": "user", "content": "Look it up."},
        said,
        *({"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls[:2]),
        *(
            {"type": "function_call_output", "call_id": each["tool_call_id"], "output": each["content"]}
            for each in returned[:2]
        ),
        {"type": "function_call", "call_id": "three", **CALL["function"]},
        {"type": "function_call_output", "call_id": "three", "output": "Page three."},
    ]
    messages = [
        items[0],
        said | {"tool_calls": calls[:2]},
        *returned[:2],
        {"role": "assistant", "tool_calls": calls[2:]},
        returned[2],
    ]
    with Service.open(Settings(engine="toy", store="none")) as service:
        service.model = replace(service.model, template=ChatTemplate(CALLING))
        with running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
            chat = http.post(PATH, json={"messages": messages, "max_tokens": 1}).json()
            asked = {"input": items, "max_output_tokens": 1, "rekindle": {"plan": True}}
            response = http.post("/v1/responses", json=asked).json()
            first = http.post("/v1/responses", json={"input": items[:3], "max_output_tokens": 1}).json()
            listed = http.get(f"/v1/responses/{response['id']}/input_items").json()["data"]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == chat["usage"]["prompt_tokens"]
    assert [item["type"] for item in listed].count("function_call") == 3 and first["status"] == "incomplete"
