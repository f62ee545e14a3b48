"""`/generate`, `/generate_stream`, `/cache/*`, `/health` and the root, on the toy engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

import rekindle
from rekindle.api.sse import Decoder

KEYS = {"text", "latency_ms", "tokens_per_sec", "cache_enabled", "prefix_cache_hit", "timings"}
TIMINGS = {
    "tokenize_ms",
    "cache_lookup_ms",
    "restore_ms",
    "prefill_ms",
    "ttft_ms",
    "decode_ms",
    "total_ms",
    "prefix_tokens_saved",
    "total_prompt_tokens",
    "cached_tokens",
    "suffix_tokens_processed",
}
PROMPT = "Vodris paints in orange. This one works as a farmer. This one belongs to Nouraix. Where is the firm?"


def generate(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 16} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, **fields: Any) -> list[str]:
    decoder, found = Decoder(), []
    with http.stream("POST", "/generate_stream", json={"prompt": PROMPT, "max_new_tokens": 16} | fields) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for data in answer.iter_raw():
            found += decoder.decode(data)
    assert not decoder.flush(), "the stream ended in the middle of an event"
    return found


def test_the_answer_has_exactly_the_promised_keys(http: httpx.Client) -> None:
    answer = generate(http)
    assert set(answer) == KEYS and set(answer["timings"]) == TIMINGS
    assert answer["latency_ms"] == answer["timings"]["total_ms"] >= answer["timings"]["ttft_ms"] > 0
    assert answer["tokens_per_sec"] > 0


def test_a_repeated_prompt_is_not_read_again(http: httpx.Client) -> None:
    http.post("/cache/clear")
    cold, warm = generate(http), generate(http)
    length = cold["timings"]["total_prompt_tokens"]
    assert not cold["prefix_cache_hit"] and warm["prefix_cache_hit"]
    assert cold["timings"]["suffix_tokens_processed"] == length and cold["timings"]["cached_tokens"] == 0
    assert warm["timings"]["suffix_tokens_processed"] == 0
    assert warm["timings"]["prefix_tokens_saved"] == warm["timings"]["cached_tokens"] == length
    assert warm["text"] == cold["text"]


def test_without_the_prefix_cache_nothing_is_reused(http: httpx.Client) -> None:
    text = generate(http)["text"]
    answer = generate(http, use_prefix_cache=False)
    assert not answer["prefix_cache_hit"] and answer["cache_enabled"] and answer["text"] == text


def test_without_the_kv_cache_the_answer_is_the_same(http: httpx.Client) -> None:
    text = generate(http)["text"]
    answer = generate(http, use_cache=False, use_prefix_cache=False)
    assert not answer["cache_enabled"] and answer["text"] == text


def test_stop_and_sampling_are_honoured(http: httpx.Client) -> None:
    text = generate(http)["text"]
    stop = text[5:8]
    assert generate(http, stop=[stop])["text"] == text[: text.index(stop)]
    hot = generate(http, temperature=1.0, seed=1)["text"]
    assert hot != text and generate(http, temperature=1.0, seed=1)["text"] == hot


def test_a_stream_is_tokens_then_numbers_then_done(http: httpx.Client) -> None:
    *tokens, numbers, done = events(http)
    assert done == "[DONE]"
    assert [json.loads(token)["index"] for token in tokens] == list(range(len(tokens)))
    assert "".join(json.loads(token)["token"] for token in tokens) == generate(http)["text"]
    last = json.loads(numbers)
    assert last.pop("finish_reason") in ("stop", "length")
    assert set(last) == KEYS - {"text"}


def test_cache_stats_keep_requests_and_tokens_apart(http: httpx.Client) -> None:
    before = http.get("/cache/stats").json()
    generate(http, prompt=PROMPT + " Never asked before this test.")
    generate(http, prompt=PROMPT + " Never asked before this test.")
    after = http.get("/cache/stats").json()
    assert {"cache_size", "hits", "misses", "hit_rate", "total_requests"} < set(after)
    assert after["total_requests"] == before["total_requests"] + 2 == after["hits"] + after["misses"]
    assert after["hits"] > before["hits"]
    assert after["hit_rate"] == pytest.approx(after["hits"] / after["total_requests"], abs=1e-4)
    assert after["token_hit_rate"] == pytest.approx(after["cached_tokens"] / after["prompt_tokens"], abs=1e-4)


def test_a_cleared_cache_forgets(http: httpx.Client) -> None:
    generate(http)
    answer = http.post("/cache/clear")
    assert answer.json() == {"status": "success", "message": "Prefix cache cleared"}
    assert http.get("/cache/stats").json()["cache_size"] == 0
    assert not generate(http)["prefix_cache_hit"]


def test_health(http: httpx.Client) -> None:
    answer = http.get("/health")
    assert answer.status_code == 200
    assert {"status", "model", "engine", "uptime_seconds", "running", "queued"} <= set(answer.json())


def test_the_root_names_routes_that_exist(http: httpx.Client) -> None:
    about = http.get("/").json()
    assert (about["name"], about["version"]) == ("rekindle", rekindle.__version__)
    for path in about["links"].values():
        answer = http.get(path)
        assert answer.status_code in (200, 405) or "open it as one" in answer.json()["error"]["message"]


def test_the_schema_knows_the_requests_and_no_page_needs_the_network(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "GenerateRequest"} <= set(schemas)
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404


def test_max_tokens_is_another_name_for_max_new_tokens(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "use_prefix_cache": False}
    short = http.post("/generate", json=body | {"max_tokens": 3}).json()
    assert short["text"] == http.post("/generate", json=body | {"max_new_tokens": 3}).json()["text"]
    assert len(short["text"]) < len(http.post("/generate", json=body | {"max_new_tokens": 12}).json()["text"])
