"""Refusals as the official client's exceptions."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from rekindle.serve.service import Service

ASK = [{"role": "user", "content": "Hello"}]


def refused(client: openai.OpenAI, kind: type[openai.APIStatusError], **arguments: Any) -> Any:
    with pytest.raises(kind) as refusal:
        client.chat.completions.create(**{"model": "ember", "messages": ASK, "max_tokens": 2} | arguments)
    assert set(refusal.value.body) == {"message", "type", "param", "code"}
    return refusal.value


def test_an_unknown_model(client: openai.OpenAI) -> None:
    error = refused(client, openai.NotFoundError, model="gpt-9")
    assert (error.code, error.param, error.type) == ("model_not_found", "model", "invalid_request_error")
    assert "gpt-9" in error.message and "ember" in error.message


def test_a_prompt_that_is_too_long_tells_both_sizes(client: openai.OpenAI, service: Service) -> None:
    long = [{"role": "user", "content": "one two three " * service.max_tokens}]
    for stream in (False, True):
        error = refused(client, openai.BadRequestError, messages=long, stream=stream)
        assert error.code == "context_length_exceeded" and str(service.max_tokens) in error.message


def test_a_wrong_type_names_the_field(client: openai.OpenAI) -> None:
    error = refused(client, openai.BadRequestError, temperature="warm")
    assert (error.param, error.code) == ("temperature", "invalid_type")
    assert "temperature: expected a number, got a string" in error.message


def test_a_schema_that_is_none(client: openai.OpenAI) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    for stream in (False, True):
        error = refused(client, openai.BadRequestError, response_format=bad, stream=stream)
        assert "schema" in error.message


def test_tools_are_refused_and_not_ignored(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert refused(client, openai.BadRequestError, tools=[tool]).param == "tools"
    client.chat.completions.create(model="ember", messages=ASK, max_tokens=2, tools=[tool], tool_choice="none")


def test_more_choices_than_may_wait(client: openai.OpenAI, service: Service) -> None:
    with pytest.raises(openai.BadRequestError, match="choices"):
        client.completions.create(model="ember", prompt=["x"] * (service.settings.max_queue + 1), max_tokens=1)
