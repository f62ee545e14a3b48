"""Pinning, warming, clearing and looking at what is kept, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 6
MESSAGES = [{"role": "system", "content": STORY}]
QUESTION = {"role": "user", "content": "What colour does Vodris paint in?"}


@pytest.fixture
def clean(http: httpx.Client) -> httpx.Client:
    """A server that keeps nothing yet."""
    for pin in http.get("/cache/pins").json()["pins"]:
        http.delete(f"/cache/pin/{pin['id']}")  # an answer's goes with its prompt's
    assert http.get("/cache/pins").json()["pins"] == []
    assert http.post("/cache/clear").json()["status"] == "success"
    return http


def good(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def cached(http: httpx.Client, prompt: str, **fields: Any) -> tuple[int, int]:
    """(reused, computed) tokens of a prompt."""
    timings = good(http.post("/generate", json={"prompt": prompt, "max_new_tokens": 2} | fields))["timings"]
    return timings["cached_tokens"], timings["suffix_tokens_processed"]


# Pins.


def test_a_pin_is_made_listed_renewed_and_ended(clean: httpx.Client) -> None:
    made = good(clean.post("/cache/pin", json={"prompt": STORY, "ttl": "10m", "name": "the story"}))
    assert set(made) == {"id", "name", "tokens", "bytes", "expires_in_seconds"}
    assert (made["name"], made["bytes"]) == ("the story", 0) and made["tokens"] > 100
    assert 500 < made["expires_in_seconds"] <= 600
    again = good(clean.post("/cache/pin", json={"prompt": STORY, "ttl": 3600}))
    assert again["id"] == made["id"] and 3500 < again["expires_in_seconds"] <= 3600
    listed = good(clean.get("/cache/pins"))
    assert [pin["id"] for pin in listed["pins"]] == [made["id"]]
    assert listed["pins"][0]["name"] == "the story" and listed["max_pinned_bytes"] > 0
    assert good(clean.get("/cache/stats"))["pins"] == 1
    assert good(clean.delete(f"/cache/pin/{made['id']}")) == {"status": "success", "id": made["id"]}
    assert good(clean.get("/cache/pins"))["pins"] == []


def test_a_pin_that_is_not_there_is_told(clean: httpx.Client) -> None:
    answer = clean.delete("/cache/pin/0123456789abcdef")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "pin_not_found"
    assert "0123456789abcdef" in answer.json()["error"]["message"]


def test_pinning_may_warm_too(clean: httpx.Client) -> None:
    made = good(clean.post("/cache/pin", json={"prompt": STORY, "ttl": "10m", "warm": True}))
    assert made["warmed"]["computed"] == made["tokens"] and made["bytes"] > 0
    assert good(clean.get("/cache/stats"))["pinned_bytes"] == made["bytes"]
    assert cached(clean, STORY) == (made["tokens"], 0)


@pytest.mark.parametrize("prompt", [{"messages": [*MESSAGES, QUESTION]}, {"tokens": list(range(5, 200))}])
def test_messages_and_tokens_are_pinned_too(clean: httpx.Client, prompt: dict[str, Any]) -> None:
    made = good(clean.post("/cache/pin", json=prompt | {"ttl": 60, "warm": True}))
    assert made["tokens"] > 100
    if "messages" in prompt:
        usage = good(clean.post("/v1/chat/completions", json=prompt | {"max_tokens": 2}))["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == made["tokens"]


def test_a_request_pins_its_prompt_and_says_so(clean: httpx.Client) -> None:
    body = {"messages": [*MESSAGES, QUESTION], "max_tokens": 4, "temperature": 0, "rekindle": {"pin": "10m"}}
    answer = good(clean.post("/v1/chat/completions", json=body))
    assert answer["usage"]["completion_tokens"] == 4  # of one token no KV is kept, so that its answer has no pin
    pin = answer["rekindle"]["pin"]
    assert pin["tokens"] == answer["usage"]["prompt_tokens"] and 500 < pin["expires_in_seconds"] <= 600
    assert {each["id"] for each in good(clean.get("/cache/pins"))["pins"]} > {pin["id"]}  # and its answer's
    good(clean.delete(f"/cache/pin/{pin['id']}"))
    assert good(clean.get("/cache/pins"))["pins"] == []


def test_streams_and_the_other_endpoints_pin_too(clean: httpx.Client) -> None:
    wish = {"rekindle": {"pin": 60, "plan": True}}
    stream = clean.post("/v1/chat/completions", json={"messages": [QUESTION], "max_tokens": 4, "stream": True} | wish)
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    reports = [chunk["rekindle"] for chunk in chunks if "rekindle" in chunk]
    assert len(reports) == 1 and set(reports[0]) == {"plan", "pin"}
    text = good(clean.post("/v1/completions", json={"prompt": STORY, "max_tokens": 4} | wish))
    assert text["rekindle"]["pin"]["tokens"] == text["usage"]["prompt_tokens"]
    plain = good(clean.post("/generate", json={"prompt": STORY, "max_new_tokens": 4} | wish))
    assert plain["rekindle"]["pin"]["id"] == text["rekindle"]["pin"]["id"]  # the same prompt
    last = clean.post("/generate_stream", json={"prompt": STORY, "max_new_tokens": 4} | wish).text.split("\n\n")[-3]
    assert json.loads(last.removeprefix("data: "))["rekindle"]["pin"]["id"] == plain["rekindle"]["pin"]["id"]


def test_what_is_not_asked_for_is_not_told(clean: httpx.Client) -> None:
    assert "rekindle" not in good(clean.post("/generate", json={"prompt": STORY, "max_new_tokens": 2}))
    assert good(clean.get("/cache/pins"))["pins"] == []


# Warming.


def test_warmed_prompts_cost_nothing_and_warming_again_neither(clean: httpx.Client) -> None:
    prompts = [STORY, [*range(5, 105)], {"messages": MESSAGES}]
    first = good(clean.post("/cache/warm", json={"prompts": prompts}))
    for part in first["prompts"]:
        assert part["tokens"] - 2 <= part["computed"] <= part["tokens"]  # the first token may be that of another prompt
    for name in ("tokens", "computed", "reused", "bytes"):
        assert first[name] == sum(part[name] for part in first["prompts"])
    assert first["bytes"] > 0 and all(part["bytes"] > 0 for part in first["prompts"])
    again = good(clean.post("/cache/warm", json={"prompts": prompts}))
    assert (again["computed"], again["reused"], again["bytes"]) == (0, first["tokens"], first["bytes"])
    assert cached(clean, STORY)[1] == 0
    chat = {"messages": [*MESSAGES, QUESTION], "max_tokens": 2}
    usage = good(clean.post("/v1/chat/completions", json=chat))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["prompts"][2]["tokens"]


@pytest.mark.parametrize("one", [{"prompt": STORY}, {"messages": MESSAGES}, {"tokens": list(range(5, 105))}])
def test_one_prompt_may_be_warmed_without_a_list(clean: httpx.Client, one: dict[str, Any]) -> None:
    warmed = good(clean.post("/cache/warm", json=one))
    assert len(warmed["prompts"]) == 1 and warmed["computed"] == warmed["tokens"] > 0


def test_warming_is_no_request_in_the_statistics(clean: httpx.Client) -> None:
    before = good(clean.get("/cache/stats"))
    good(clean.post("/cache/warm", json={"prompt": STORY}))
    after = good(clean.get("/cache/stats"))
    assert [after[name] - before[name] for name in ("total_requests", "prompt_tokens")] == [0, 0]


# Salts.


def test_salts_are_kept_apart_everywhere(clean: httpx.Client) -> None:
    good(clean.post("/cache/warm", json={"prompt": STORY, "cache_salt": "one"}))
    reused, computed = cached(clean, STORY, cache_salt="two")
    assert reused == 0 and computed > 100
    assert cached(clean, STORY)[0] == 0
    assert cached(clean, STORY, cache_salt="one")[1] == 0
    ids = {good(clean.post("/cache/pin", json={"prompt": STORY, "ttl": 60} | salt))["id"] for salt in SALTS}
    assert len(ids) == 3


SALTS: list[dict[str, str]] = [{}, {"cache_salt": "one"}, {"cache_salt": "two"}]


def test_keys_see_and_end_their_own_pins_alone() -> None:
    keys = ("sk-first-1f0c", "sk-second-77aa")
    settings = Settings(engine="toy", context=1024, api_key=tuple(map(SecretStr, keys)))
    with Service.open(settings) as service, running(service) as url:
        first, second = (httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) for key in keys)
        with first, second:
            for salt in SALTS:
                good(first.post("/cache/pin", json={"prompt": STORY, "ttl": 60} | salt))
            made = good(second.post("/cache/pin", json={"prompt": STORY, "ttl": 60}))
            assert len(good(first.get("/cache/pins"))["pins"]) == 3
            assert [pin["id"] for pin in good(second.get("/cache/pins"))["pins"]] == [made["id"]]
            assert first.delete(f"/cache/pin/{made['id']}").status_code == 404
            assert second.delete(f"/cache/pin/{made['id']}").status_code == 200
            good(first.post("/cache/warm", json={"prompt": STORY}))
            assert cached(second, STORY)[0] == 0
            assert cached(first, STORY)[1] == 0


# Statistics and clearing.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[httpx.Client, Service]]:
    """The built-in model with a folder."""
    settings = Settings(context=1024, threads=1, store=str(tmp_path))
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http, service


def test_every_tier_is_described(disk: tuple[httpx.Client, Service]) -> None:
    http, _ = disk
    good(http.post("/cache/warm", json={"prompt": STORY}))
    stats = good(http.get("/cache/stats"))
    assert [tier["name"] for tier in stats["tiers"]] == ["memory", "disk"]
    expected = {"name", "blocks", "bytes", "max_bytes", "hits", "misses", "evictions", "faults", "corrupt", "state"}
    for tier in stats["tiers"]:
        assert expected <= set(tier)
        assert tier["blocks"] == stats["blocks"] > 0 and tier["bytes"] > 0 and tier["state"] == "ok"
    assert (stats["dropped"], stats["pins"], stats["pinned_bytes"]) == (0, 0, 0)


def test_clearing_leaves_other_models_unless_asked(disk: tuple[httpx.Client, Service], tmp_path: Path) -> None:
    http, _ = disk
    with Service.open(Settings(context=1024, threads=1, store=str(tmp_path), kv_type="q8_0")) as other:
        other.warm(other.text_prompt(STORY))

    def num_files() -> int:
        return len(list((tmp_path / "v1").rglob("??/??/*.safetensors")))

    theirs = num_files()
    good(http.post("/cache/warm", json={"prompt": STORY}))
    assert num_files() > theirs > 0
    good(http.post("/cache/clear", json={"scope": "model"}))
    assert num_files() == theirs
    assert cached(http, STORY)[0] == 0
    good(http.post("/cache/clear", json={"scope": "all"}))
    assert num_files() == 0


def test_a_tier_that_can_not_be_cleared_is_no_success(disk: tuple[httpx.Client, Service], tmp_path: Path) -> None:
    """What was to be forgotten could be found again."""
    http, _ = disk
    good(http.post("/cache/warm", json={"prompt": STORY}))
    stored = tmp_path / "v1"
    stored.rename(tmp_path / "aside")
    stored.write_text("no folder")
    answer = http.post("/cache/clear")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "tier_unavailable"
    assert "not everything is cleared; the disk tier keeps what it has" in answer.json()["error"]["message"]
    stats = good(http.get("/cache/stats"))
    assert stats["blocks"] == 0, "what could be cleared is"
    stored.unlink()
    (tmp_path / "aside").rename(stored)
    good(http.post("/cache/clear"))
    assert not list(stored.rglob("*.safetensors"))


# Mistakes.

BAD: list[tuple[str, str, dict[str, Any], str, str | None]] = [
    ("no ttl", "/cache/pin", {"prompt": STORY}, "ttl: this field is required", "ttl"),
    ("a ttl of nonsense", "/cache/pin", {"prompt": STORY, "ttl": "soon"}, "a time such as 30s, 10m, 2h, 1d", "ttl"),
    ("a ttl of nothing", "/cache/pin", {"prompt": STORY, "ttl": 0}, "a time such as", "ttl"),
    ("a ttl that is true", "/cache/pin", {"prompt": STORY, "ttl": True}, "a time such as", "ttl"),
    ("a ttl of centuries", "/cache/pin", {"prompt": STORY, "ttl": "99999d"}, "at most", "ttl"),
    ("nothing to pin", "/cache/pin", {"ttl": 60}, "one of prompt (text), messages and tokens", "prompt"),
    ("two prompts", "/cache/pin", {"prompt": "a", "tokens": [1], "ttl": 60}, "got 2 of them", "prompt"),
    ("an empty prompt", "/cache/pin", {"prompt": "", "ttl": 60}, "at least one character", "prompt"),
    ("a misspelt field", "/cache/pin", {"prompt": STORY, "tll": 60}, "did you mean 'ttl'?", "tll"),
    (
        "a token id too high",
        "/cache/pin",
        {"tokens": [2_000_000_000], "ttl": 60},
        "token ids must be between",
        "prompt",
    ),
    ("a pin too long", "/cache/pin", {"prompt": "a " * 5000, "ttl": 60}, "the context holds 1024", "prompt"),
    (
        "arguments of no messages",
        "/cache/warm",
        {"prompt": "a", "chat_template_kwargs": {"a": 1}},
        "there are none",
        "chat_template_kwargs",
    ),
    ("an unknown model", "/cache/pin", {"prompt": STORY, "ttl": 60, "model": "gpt-9"}, "gpt-9", "model"),
    ("nothing to warm", "/cache/warm", {}, "expected one of prompts (an array), prompt", "prompts"),
    ("no prompts", "/cache/warm", {"prompts": []}, "at least one element", "prompts"),
    ("too many prompts", "/cache/warm", {"prompts": ["a"] * 1025}, "1024", "prompts"),
    ("a prompt of numbers", "/cache/warm", {"prompts": [1.5]}, 'text, token ids or {"messages": […]}', "prompts[0]"),
    (
        "an odd prompt",
        "/cache/warm",
        {"prompts": [{"massages": []}]},
        "did you mean 'messages'?",
        "prompts[0].massages",
    ),
    ("a warm prompt too long", "/cache/warm", {"prompts": ["a " * 5000]}, "the context holds 1024", "prompt"),
    ("an unknown scope", "/cache/clear", {"scope": "mine"}, "'model' or 'all'", "scope"),
    ("an unknown wish", "/generate", {"prompt": "a", "rekindle": {"pni": 1}}, "did you mean 'pin'?", "rekindle.pni"),
    ("a pin of nonsense", "/generate", {"prompt": "a", "rekindle": {"pin": "soon"}}, "a time such as", "rekindle.pin"),
    (
        "a pin of what is not kept",
        "/generate",
        {"prompt": "a", "use_prefix_cache": False, "rekindle": {"pin": 60}},
        "KV that is not kept cannot be pinned",
        "use_prefix_cache",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "message", "param"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_mistakes_are_told(clean: httpx.Client, path: str, body: dict[str, Any], message: str, param: str) -> None:
    answer = clean.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404, 422), error
    assert message in error["message"] and error["param"] == param
    assert good(clean.get("/cache/pins"))["pins"] == []


def test_an_unknown_wish_is_refused_as_openai_would(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'timings'"):
        client.chat.completions.create(model="ember", messages=[QUESTION], extra_body={"rekindle": {"timing": True}})  # type: ignore[list-item]


def test_too_much_to_pin_is_refused_before_anything_is_computed() -> None:
    settings = Settings(engine="toy", context=1024, store_memory=2_000)
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url) as http:
        answer = http.post("/generate", json={"prompt": STORY, "rekindle": {"pin": "1h"}})
        assert answer.status_code == 400 and "may be pinned" in answer.json()["error"]["message"]
        assert service.num_computed == 0
