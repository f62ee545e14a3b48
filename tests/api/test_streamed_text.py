"""Text in streams: characters that are spread over tokens, line ends, and everything else that could break a frame."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

TRICKY = 'Zürich 東京 🎉 "quoted" \\ back\tslash, line\nnext\r\nand\u2028more\u0085: data: [DONE]'


def spelled(text: str) -> dict[str, Any]:
    """A response format that leaves the model only one answer: `text` as a JSON string."""
    schema = {"const": text}
    return {"type": "json_schema", "json_schema": {"name": "spelled", "schema": schema}}


@pytest.fixture(scope="module")
def request_body() -> dict[str, Any]:
    return {
        "model": "ember",
        "messages": [{"role": "user", "content": "Spell this, please, letter by letter."}],
        "response_format": spelled(TRICKY),
        "temperature": 0,
        "max_tokens": 400,
    }


def test_every_piece_is_whole_characters(client: openai.OpenAI, request_body: dict[str, Any]) -> None:
    with client.chat.completions.create(**request_body, stream=True, logprobs=True) as stream:
        chunks = [choice for chunk in stream for choice in chunk.choices]
    pieces = [choice.delta.content or "" for choice in chunks]
    assert json.loads("".join(pieces)) == TRICKY
    assert not any("\ufffd" in piece for piece in pieces)
    tokens = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert json.loads(b"".join(bytes(token.bytes) for token in tokens)) == TRICKY
    assert any(token.token == "\ufffd" for token in tokens), (
        "no character was spread over tokens: the test shows nothing"
    )


def test_line_based_clients_see_whole_frames(http: httpx.Client, request_body: dict[str, Any]) -> None:
    """httpx splits lines by Unicode's rules, as do many clients."""
    with http.stream("POST", "/v1/chat/completions", json=request_body | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert json.loads(text) == TRICKY


def test_random_tokens_never_give_half_characters(http: httpx.Client) -> None:
    """The toy engine's tokens are any tokens: their bytes are rarely text, and are replaced alike, streamed or not."""
    for seed in range(5):
        body = {"prompt": "Any tokens at all", "max_new_tokens": 60, "temperature": 1.0, "seed": seed}
        whole = http.post("/generate", json=body).json()["text"]
        with http.stream("POST", "/generate_stream", json=body) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert "".join(json.loads(line)["token"] for line in lines[:-2]) == whole, f"seed {seed}"
