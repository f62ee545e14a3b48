"""Bad input of many kinds: each gets its status and a message that says what is wrong, in the one shape of refusals,
and the server answers the next request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

CHAT, TEXT, GENERATE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"
MIB = 1 << 20


@dataclass(frozen=True)
class Bad:
    """One bad request."""

    name: str
    path: str
    body: Any  # bytes or a maker of byte chunks as they are, all else as JSON
    status: int
    message: str  # part of it
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    method: str = "POST"


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2} | fields).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Hello", "max_tokens": 2} | fields).encode()


def generate(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Hello", "max_new_tokens": 2} | fields).encode()


def said(content: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])


def chunked(num_mib: int) -> Iterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(num_mib):
        yield b"x" * MIB
    yield b'"}'


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


FORM = {"content-type": "application/x-www-form-urlencoded"}
CASES = [
    # not JSON, or not for us
    Bad("invalid JSON", CHAT, b'{"messages": [', 400, "not JSON", code="invalid_json"),
    Bad("invalid JSON, simple", GENERATE, b'{"prompt": "x",}', 400, "not JSON", code="invalid_json"),
    Bad("invalid UTF-8", CHAT, b'{"messages": "\xff\xfe"}', 400, "JSON"),
    Bad("no body", CHAT, b"", 400, "got nothing"),
    Bad("an array as body", CHAT, b"[1]", 400, "expected a JSON object as body, got an array"),
    Bad("a number as body", GENERATE, b"7", 422, "expected a JSON object as body"),
    Bad("deeply nested", CHAT, b'{"x":' + b"[" * 200_000, 400, "JSON"),
    Bad("a number of 5,000 digits", CHAT, b'{"seed": ' + b"1" * 5000 + b"}", 400, "JSON"),
    Bad("a form", CHAT, b"prompt=x", 415, "application/json", code="wrong_content_type", headers=FORM),
    Bad("no content type", GENERATE, b'{"prompt": "x"}', 415, "application/json", headers={}),
    Bad("10 MB", CHAT, b" " * (10 * MIB), 413, "larger than", code="body_too_large"),
    Bad("10 MB, chunked", GENERATE, lambda: chunked(10), 413, "larger than", code="body_too_large"),
    Bad("10 MB where no body is read", "/cache/clear", b" " * (10 * MIB), 413, "larger than"),
    Bad("unknown route", "/v1/engines", b"{}", 404, "/v1/engines", code="not_found"),
    Bad("wrong method", CHAT, b"", 405, "GET", code="method_not_allowed", method="GET"),
    Bad("wrong method, simple", "/health", b"{}", 405, "POST", code="method_not_allowed"),
    # wrong types
    Bad("temperature as text", CHAT, chat(temperature="1"), 400, "expected a number, got a string", "temperature"),
    Bad("temperature true", CHAT, chat(temperature=True), 400, "expected a number, got a boolean", "temperature"),
    Bad("max_tokens as text", CHAT, chat(max_tokens="5"), 400, "expected a whole number", "max_tokens"),
    Bad("max_tokens with a fraction", CHAT, chat(max_tokens=1.5), 400, "whole number, got 1.5", "max_tokens"),
    Bad("stream as text", CHAT, chat(stream="true"), 400, "expected a boolean, got a string", "stream"),
    Bad("messages as text", CHAT, chat(messages="hi"), 400, "expected an array, got a string", "messages"),
    Bad("a message as text", CHAT, chat(messages=["hi"]), 400, "expected an object", "messages[0]"),
    Bad("content as number", CHAT, said(5), 400, "a string or an array of text parts", "messages[0].content"),
    Bad("an image", CHAT, said([{"type": "image_url"}]), 400, "text parts", "messages[0].content"),
    Bad("stop as number", CHAT, chat(stop=5), 400, "a string or an array of", "stop"),
    Bad("prompt as number", TEXT, text(prompt=5), 400, "text, an array of texts", "prompt"),
    Bad("prompt of mixed types", TEXT, text(prompt=["x", 5]), 400, "text, an array of texts", "prompt"),
    Bad("prompt of booleans", TEXT, text(prompt=[True, False]), 400, "text, an array of texts", "prompt"),
    Bad("prompt as number, simple", GENERATE, generate(prompt=5), 422, "expected a string, got 5", "prompt"),
    Bad("use_cache as text", GENERATE, generate(use_cache="no"), 422, "expected a boolean", "use_cache"),
    Bad("model as number", CHAT, chat(model=5), 400, "expected a string", "model"),
    Bad("logit_bias of words", CHAT, chat(logit_bias={"cat": 1}), 400, "expected token ids", "logit_bias"),
    Bad("rekindle as text", CHAT, chat(rekindle="plan"), 400, "expected an object", "rekindle"),
    # missing and empty
    Bad("no messages", CHAT, b"{}", 400, "messages: this field is required", "messages", "missing_field"),
    Bad("empty messages", CHAT, chat(messages=[]), 400, "at least one element", "messages"),
    Bad(
        "a message without content", CHAT, chat(messages=[{"role": "user"}]), 400, "content is expected", "messages[0]"
    ),
    Bad("null as content", CHAT, said(None), 400, "content is expected in all messages but", "messages[0]"),
    Bad("a grammar", CHAT, chat(grammar='root ::= "x"'), 400, "use response_format with a json_schema", "grammar"),
    Bad("vLLM's schema", TEXT, text(guided_json={"type": "object"}), 400, "use response_format", "guided_json"),
    Bad("llama-server's limit", TEXT, text(n_predict=5), 400, "use max_tokens", "n_predict"),
    Bad("another's limit", CHAT, chat(max_new_tokens=5), 400, "use max_tokens", "max_new_tokens"),
    Bad("words that may not be said", CHAT, chat(bad_words=["x"]), 400, "use logit_bias", "bad_words"),
    Bad("a template of one's own", CHAT, chat(chat_template="{{ x }}"), 400, "the model's own", "chat_template"),
    Bad("an answer to go on", CHAT, chat(continue_final_message=True), 400, "completions", "continue_final_message"),
    Bad("ids to stop at", TEXT, text(stop_token_ids=[2]), 400, "use stop", "stop_token_ids"),
    Bad("sound", CHAT, chat(modalities=["text", "audio"]), 400, 'expected ["text"]', "modalities"),
    Bad(
        "a template's own",
        CHAT,
        chat(chat_template_kwargs={"self": 1}),
        400,
        "self can't be set there",
        "chat_template_kwargs",
    ),
    Bad("no /v1", "/chat/completions", b"{}", 404, "did you mean /v1/chat/completions?", code="not_found"),
    Bad("two /v1", "/v1/v1/completions", b"{}", 404, "did you mean /v1/completions?", code="not_found"),
    Bad("a slash", f"{CHAT}/", b"{}", 404, "did you mean /v1/chat/completions?", code="not_found"),
    Bad("Ollama's", "/api/generate", b"{}", 404, "did you mean /generate?", code="not_found"),
    Bad("a message without a role", CHAT, chat(messages=[{"content": "x"}]), 400, "required", "messages[0].role"),
    Bad("an unknown role", CHAT, chat(messages=[{"role": "cat"}]), 400, "'system'", "messages[0].role"),
    Bad("a misspelt role", CHAT, chat(messages=[{"role": "usr"}]), 400, "or 'function', got 'usr'", "messages[0].role"),
    Bad("no prompt", TEXT, b"{}", 400, "required", "prompt", "missing_field"),
    Bad("empty prompt", TEXT, text(prompt=""), 400, "none of them empty", "prompt"),
    Bad("prompt of nothing", TEXT, text(prompt=[]), 400, "none of them empty", "prompt"),
    Bad("prompt of empty ids", TEXT, text(prompt=[[]]), 400, "none of them empty", "prompt"),
    Bad("empty prompt, simple", GENERATE, generate(prompt=""), 422, "at least one character", "prompt"),
    Bad("empty prompt, stream", "/generate_stream", generate(prompt=""), 422, "at least one character", "prompt"),
    Bad("empty stop", CHAT, chat(stop=""), 400, "must not be empty", "stop"),
    Bad("a schema format without schema", CHAT, chat(response_format={"type": "json_schema"}), 400, "needs", None),
    # out of range
    Bad("negative max_tokens", CHAT, chat(max_tokens=-1), 400, "at least 1, got -1", "max_tokens"),
    Bad("zero max_tokens", TEXT, text(max_tokens=0), 400, "at least 1, got 0", "max_tokens"),
    Bad("negative max_new_tokens", GENERATE, generate(max_new_tokens=-1), 422, "at least 1", "max_new_tokens"),
    Bad("NaN temperature", CHAT, chat(temperature=float("nan")), 400, "finite", "temperature"),
    Bad("infinite temperature", TEXT, text(temperature=float("inf")), 400, "finite", "temperature"),
    Bad("NaN temperature, simple", GENERATE, generate(temperature=float("nan")), 422, "finite", "temperature"),
    Bad("temperature 1e400", CHAT, b'{"messages": [{"role": "user"}], "temperature": 1e400}', 400, "finite"),
    Bad("temperature of 400 digits", CHAT, chat(temperature=10**400), 400, "too large", "temperature"),
    Bad("negative temperature", CHAT, chat(temperature=-0.5), 400, "between", "temperature"),
    Bad("top_p of 2", CHAT, chat(top_p=2), 400, "between", "top_p"),
    Bad("top_k of -2", CHAT, chat(top_k=-2), 400, "between", "top_k"),
    Bad("presence_penalty of 3", CHAT, chat(presence_penalty=3), 400, "between", "presence_penalty"),
    Bad("logit_bias of 101", CHAT, chat(logit_bias={"5": 101}), 400, "between", "logit_bias"),
    Bad("logit_bias for no token", CHAT, chat(logit_bias={"2000000000": 1}), 400, "2000000000", "logit_bias"),
    Bad("n of 0", CHAT, chat(n=0), 400, "at least 1", "n"),
    Bad("a pin of 400 digits", CHAT, chat(rekindle={"pin": 10**400}), 400, "a time such as", "rekindle.pin"),
    Bad("a limit of 0", f"{RESPONSES}/a/input_items?limit=0", b"", 400, "at least 1, got '0'", "limit", method="GET"),
    Bad(
        "maybe", f"{RESPONSES}/a?stream=maybe", b"", 400, "expected true or false, got 'maybe'", "stream", method="GET"
    ),
    Bad("n of 1,000", CHAT, chat(n=1000), 400, "at most 128", "n"),
    Bad("too many stops", CHAT, chat(stop=["x"] * 17), 400, "at most 16", "stop"),
    Bad("21 logprobs", CHAT, chat(logprobs=True, top_logprobs=21), 400, "at most 20", "top_logprobs"),
    Bad("top_logprobs alone", CHAT, chat(top_logprobs=2), 400, "logprobs", "top_logprobs"),
    Bad("a token id too high", TEXT, text(prompt=[2_000_000_000]), 400, "2000000000", "prompt"),
    Bad("a token id beyond int32", TEXT, text(prompt=[1 << 40]), 400, "token ids", "prompt"),
    Bad("a negative token id", TEXT, text(prompt=[-1]), 400, "token ids", "prompt"),
    Bad("a prompt too long", GENERATE, generate(prompt="a " * 5000), 400, "", code="context_length_exceeded"),
    # not text, not here
    Bad("a lone surrogate", CHAT, said("a\ud800b"), 400, "surrogate", "messages[0].content"),
    Bad("a lone surrogate in a part", CHAT, said([{"type": "text", "text": "\udfff"}]), 400, "surrogate"),
    Bad("a lone surrogate, simple", GENERATE, generate(prompt="\ud83d"), 422, "surrogate", "prompt"),
    Bad("a lone surrogate in a prompt list", TEXT, text(prompt=["ok", "\udc00"]), 400, "surrogate", "prompt"),
    Bad("a lone surrogate in stop", CHAT, chat(stop=["\ud800"]), 400, "surrogate", "stop"),
    Bad("a lone surrogate in model", CHAT, chat(model="\ud800"), 400, "surrogate", "model"),
    Bad("a lone surrogate in a salt", CHAT, chat(cache_salt="\ud800"), 400, "surrogate", "cache_salt"),
    Bad("a lone surrogate in a schema", CHAT, chat(response_format=schema({"title": "\ud800"})), 400, "surrogate"),
    Bad("NaN in a schema", CHAT, chat(response_format=schema({"maximum": float("nan")})), 400, "NaN"),
    Bad("a schema of no known type", CHAT, chat(response_format=schema({"type": "cat"})), 400, "schema"),
    Bad("an unknown model", CHAT, chat(model="gpt-9"), 404, "gpt-9", "model", "model_not_found"),
    Bad("an unknown model, text", TEXT, text(model="../../etc/passwd"), 404, "only", "model", "model_not_found"),
]


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_input_is_refused_and_the_next_request_answered(http: httpx.Client, bad: Bad) -> None:
    content = bad.body() if callable(bad.body) else bad.body
    answer = http.request(bad.method, bad.path, content=content, headers=bad.headers)
    error = answer.json()["error"]
    assert answer.status_code == bad.status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert bad.message in error["message"]
    assert bad.param is None or error["param"] == bad.param
    assert bad.code is None or error["code"] == bad.code
    good = http.post(CHAT, content=chat(), headers={"content-type": "application/json"})
    assert good.status_code == 200 and good.json()["choices"]
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, GENERATE, "/generate_stream", RESPONSES, f"{RESPONSES}/input_tokens"])
def test_a_misspelt_name_is_a_mistake_in_what_is_ours_alone(http: httpx.Client, path: str) -> None:
    asked: dict[str, Any] = {"input": "Hello", "max_output_tokens": 2}
    if not path.startswith(RESPONSES):
        asked = {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello", "max_tokens": 2}
    assert http.post(path, json=asked | {"temprature": 1}).status_code == 200
    for ours, param, hint in (({"plann": True}, "plann", "plan"), ({"blend": {"ratoi": 0.1}}, "blend.ratoi", "ratio")):
        answer = http.post(path, json=asked | {"rekindle": ours})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["message"].endswith(f"unknown; did you mean '{hint}'?")
        assert (error["param"], error["code"]) == (f"rekindle.{param}", "unknown_field")


def test_a_name_that_is_no_text_is_refused_too(http: httpx.Client) -> None:
    for ours, param in (('{"\\ud800": 1}', "?"), ('{"blend": {"\\ud800": 1}}', "blend.?")):
        body = f'{{"messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 2, "rekindle": {ours}}}'
        answer = http.post(CHAT, content=body, headers={"content-type": "application/json"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, f"rekindle.{param}", "unknown_field")


def test_refusals_never_repeat_the_prompt(http: httpx.Client) -> None:
    secret = "correct horse battery staple"
    for fields in ({"temperature": "hot"}, {"stop": [secret, 5]}, {"response_format": {"type": secret}}):
        body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2} | fields
        answer = http.post(CHAT, json=body)
        assert answer.status_code == 400 and secret not in answer.text
    answer = http.post(GENERATE, json={"prompt": f"{secret} " * 2000})
    assert answer.status_code == 400 and secret not in answer.text


def test_a_wrong_method_names_the_right_one(http: httpx.Client) -> None:
    assert http.get(CHAT).headers["allow"] == "POST"
