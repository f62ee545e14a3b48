"""Chunks over HTTP: marked, warmed, placed where they have moved to, and told of in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

PASSAGES = [
    "Vodris paints in orange. This one works as a farmer. " * 6,
    "Nouraix is based in Viniton. This one likes the sea. " * 6,
    "Ostrel drives a red van. This one was born in Palluk. " * 6,
]
QUESTION = "What colour does Vodris paint in?"
CHAT = "/v1/chat/completions"
REPORT = {"plan": True}


@pytest.fixture(scope="module", params=["llama", "torch"])
def ember_http(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """The built-in model, with a separator for plain prompts."""
    settings = Settings(engine=request.param, store="none", threads=1, context=4096, chunk_separator=" # # ")
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def real(ember_http: httpx.Client) -> httpx.Client:
    good(ember_http.post("/cache/clear"))
    return ember_http


def good(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def chunk(text: str) -> dict[str, str]:
    return {"type": "text", "text": text, "cache": "chunk"}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def chat(*passages: str, **fields: Any) -> dict[str, Any]:
    content = [words("Read this:"), *map(chunk, passages), words(QUESTION)]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0} | fields


def blended(**options: Any) -> dict[str, Any]:
    return {"rekindle": REPORT | {"blend": options or True}}


# Marked, warmed, placed.


def test_warmed_passages_are_placed_where_they_stand(real: httpx.Client) -> None:
    warmed = good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    assert len(warmed["chunks"]) == 3 and warmed["computed"] >= warmed["tokens"] - 3 and warmed["bytes"] > 0
    answer = good(real.post(CHAT, json=chat(*PASSAGES[::-1], **blended(select="first", ratio=0.15))))
    plan, usage = answer["rekindle"]["plan"], answer["usage"]
    assert [each["placed"] > 0 for each in plan["chunks"]] == [True] * 3
    for each, size in zip(plan["chunks"], (part["tokens"] - 1 for part in warmed["chunks"][::-1]), strict=True):
        assert each["stop"] - each["start"] == size == each["placed"] + each["recomputed"] + each["exact"]
        assert each["recomputed"] >= 0.15 * size - 1  # more where that takes no longer
        assert each["moved"] == each["start"] - 1 and each["why"]
    placed = sum(each["placed"] for each in plan["chunks"])
    assert usage["prompt_tokens_details"]["blended_tokens"] == placed
    assert plan["reused"] == usage["prompt_tokens_details"]["cached_tokens"] >= placed
    assert plan["total"] == usage["prompt_tokens"] == plan["computed"] + plan["reused"]
    assert {step["kind"] for step in plan["steps"]} >= {"compute", "place"}
    again = good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    assert again["computed"] == 0


@pytest.mark.parametrize("options", [{"select": "deviation", "layer": 2}, {"select": "query"}])
def test_choices_that_look_are_reported_or_refused(real: httpx.Client, options: dict[str, Any]) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    answer = real.post(CHAT, json=chat(*PASSAGES[::-1], **blended(ratio=0.15, **options)))
    if "torch" not in good(real.get("/health"))["engine"]:
        assert answer.status_code == 400
        assert "one of none, first, remembered, auto, got" in answer.json()["error"]["message"]
        return
    body = good(answer)
    plan, usage = body["rekindle"]["plan"], body["usage"]
    looked = plan["looked"]
    assert looked["token_layers"] == looked["tokens"] * looked["layers"] > 0 and looked["num_layers"] == 4
    assert looked["layers"] == options.get("layer", 4)
    assert plan["budget"] == pytest.approx((plan["computed"] + looked["token_layers"] / 4) / plan["total"], abs=1e-4)
    placed = sum(each["placed"] for each in plan["chunks"])
    assert usage["prompt_tokens_details"]["blended_tokens"] == placed > 100
    assert any(looked["reason"] in (each["why"] or "") for each in plan["chunks"])


def test_at_ratio_one_the_answer_is_that_of_full_prefill(real: httpx.Client) -> None:
    body = chat(*PASSAGES, logprobs=True, top_logprobs=2, max_tokens=8)
    full = good(real.post(CHAT, json=body))
    good(real.post("/cache/clear"))
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    all_anew = good(real.post(CHAT, json=body | blended(ratio=1.0)))
    assert sum(each["placed"] for each in all_anew["rekindle"]["plan"]["chunks"]) == 0
    assert all_anew["choices"][0]["message"] == full["choices"][0]["message"]
    pairs = [
        (one["logprob"], other["logprob"])
        for one, other in zip(*(each["choices"][0]["logprobs"]["content"] for each in (full, all_anew)), strict=True)
    ]
    assert max(abs(one - other) for one, other in pairs) < 0.02


def test_marking_alone_is_exact(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    marked = good(real.post(CHAT, json=chat(*PASSAGES, rekindle=REPORT)))
    assert marked["usage"]["prompt_tokens_details"]["cached_tokens"] <= 1
    assert marked["usage"]["prompt_tokens_details"].get("blended_tokens", 0) == 0
    plain = {"messages": [{"role": "user", "content": "\n".join(["Read this:", *PASSAGES, QUESTION])}], "max_tokens": 4}
    answer = good(real.post(CHAT, json=plain | {"temperature": 0}))
    assert answer["choices"][0]["message"] == marked["choices"][0]["message"]
    assert answer["usage"]["prompt_tokens"] == marked["usage"]["prompt_tokens"]
    off = good(real.post(CHAT, json=chat(*PASSAGES[::-1], rekindle=REPORT | {"blend": False})))
    assert not any(each["placed"] for each in off["rekindle"]["plan"].get("chunks", []))


def test_documents_are_chunks(real: httpx.Client) -> None:
    documents = [{"title": f"Passage {index}", "text": text} for index, text in enumerate(PASSAGES)]
    warmed = good(real.post("/cache/warm", json={"documents": documents}))
    assert len(warmed["chunks"]) == 3
    body = {"messages": [{"role": "user", "content": QUESTION}], "documents": documents[::-1], "max_tokens": 4}
    plan = good(real.post(CHAT, json=body | blended(select="none")))["rekindle"]["plan"]
    sizes = [each["placed"] + each["recomputed"] for each in plan["chunks"]]
    assert sizes == [part["tokens"] - 1 for part in warmed["chunks"][::-1]] and plan["chunks"][2]["placed"] > 0
    assert plan["chunks"][0]["start"] < plan["chunks"][1]["start"] < plan["chunks"][2]["stop"] < plan["total"]


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_separated_chunks_of_plain_prompts(real: httpx.Client, path: str) -> None:
    warmed = good(real.post("/cache/warm", json={"chunks": PASSAGES, "chat": False}))
    prompt = " # # ".join(["Read this.", *PASSAGES[::-1], QUESTION])
    answer = good(real.post(path, json={"prompt": prompt, "max_tokens": 4} | blended(select="none")))
    plan = answer["rekindle"]["plan"]
    sizes = [each["placed"] + each["recomputed"] for each in plan["chunks"]]
    assert sizes == [part["tokens"] - 1 for part in warmed["chunks"][::-1]] and plan["chunks"][2]["placed"] > 0


def test_a_chunk_met_for_the_first_time_is_computed_in_place(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES[1:]}))
    plan = good(real.post(CHAT, json=chat(*PASSAGES, **blended(select="none"))))["rekindle"]["plan"]
    assert [each["placed"] > 0 for each in plan["chunks"]] == [False, True, True]
    assert plan["chunks"][0]["why"].startswith("not kept on its own")
    assert plan["chunks"][0] | {"exact": 0, "why": None} == {
        "index": 0,
        "start": plan["chunks"][0]["start"],
        "stop": plan["chunks"][0]["stop"],
        "exact": 0,
        "placed": 0,
        "recomputed": 0,
        "moved": None,
        "why": None,
    }


def test_streams_end_with_the_plan(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    body = chat(*PASSAGES, stream=True, stream_options={"include_usage": True}, **blended(select="none"))
    lines = [line[6:] for line in real.post(CHAT, json=body).text.splitlines() if line.startswith("data: {")]
    last = json.loads(lines[-1])
    assert [each["placed"] > 0 for each in last["rekindle"]["plan"]["chunks"]] == [True] * 3
    assert last["usage"]["prompt_tokens_details"]["blended_tokens"] > 0


def test_salts_share_no_chunks(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES, "cache_salt": "one"}))
    for salt, expected in (({}, False), ({"cache_salt": "two"}, False), ({"cache_salt": "one"}, True)):
        plan = good(real.post(CHAT, json=chat(*PASSAGES, **blended(select="none"), **salt)))["rekindle"]["plan"]
        assert [each["placed"] > 0 for each in plan["chunks"]] == [expected] * 3, salt
        good(real.post("/cache/clear") if not expected else real.get("/health"))
        if not expected:
            good(real.post("/cache/warm", json={"chunks": PASSAGES, "cache_salt": "one"}))


def test_a_server_may_blend_whatever_is_marked() -> None:
    settings = Settings(store="none", threads=1, context=2048, blend="marked", blend_select="first", blend_ratio=0.5)
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        good(http.post("/cache/warm", json={"chunks": PASSAGES}))
        plan = good(http.post(CHAT, json=chat(*PASSAGES, rekindle=REPORT)))["rekindle"]["plan"]
        assert all(each["placed"] > 0 and each["recomputed"] > 0.8 * each["placed"] for each in plan["chunks"])
        pinned = good(http.post(CHAT, json=chat(*PASSAGES, rekindle=REPORT | {"pin": 60})))["rekindle"]
        assert pinned["pin"]["tokens"] > 0 and not any(each["placed"] for each in pinned["plan"].get("chunks", []))


# Bad input, on the toy engine.


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"rekindle": {"blend": "yes"}}, "rekindle.blend", "expected true, false or an object"),
        ({"rekindle": {"blend": 0.15}}, "rekindle.blend", "expected true, false or an object"),
        (
            {"rekindle": {"blend": {"select": "best"}}},
            "rekindle.blend.select",
            "one of none, first, remembered, auto, got 'best'",
        ),
        ({"rekindle": {"blend": {"select": "frist"}}}, "rekindle.blend.select", "did you mean 'first'?"),
        ({"rekindle": {"blend": {"select": 3}}}, "rekindle.blend.select", "expected a string"),
        ({"rekindle": {"blend": {"layer": 0}}}, "rekindle.blend.layer", "expected at least 1"),
        ({"rekindle": {"blend": {"layer": 2}}}, "rekindle.blend.layer", "with select 'auto' there is nothing to judge"),
        ({"rekindle": {"blend": {"judge": "Q"}}}, "rekindle.blend.judge", "expected 'K' or 'V'"),
        ({"rekindle": {"blend": {"ratio": 1.5}}}, "rekindle.blend.ratio", "expected at most 1"),
        ({"rekindle": {"blend": {"ratio": -0.1}}}, "rekindle.blend.ratio", "expected at least 0"),
        ({"rekindle": {"blend": {"ratio": "15%"}}}, "rekindle.blend.ratio", "expected a number"),
        ({"rekindle": {"blend": {"ratios": 0.1}}}, "rekindle.blend.ratios", "did you mean 'ratio'"),
        ({"documents": "text"}, "documents", "expected an array"),
        ({"documents": ["text"]}, "documents[0]", "expected an object"),
        ({"documents": [{"title": "no text"}]}, "documents[0].text", "required"),
        ({"documents": [{"text": ""}]}, "documents[0].text", "at least one character"),
        ({"documents": [{"text": "a"}] * 1025}, "documents", "1024"),
    ],
)
def test_bad_fields(http: httpx.Client, fields: dict[str, Any], param: str, message: str) -> None:
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "Hello"}]} | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and message in answer.json()["error"]["message"]


@pytest.mark.parametrize("mark", ["document", "", 1, True, ["chunk"]])
def test_bad_marks(http: httpx.Client, mark: Any) -> None:
    content = [{"type": "text", "text": "Hello", "cache": mark}]
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("messages[0].content")
    assert '"cache": "chunk"' in answer.json()["error"]["message"]


def test_documents_need_a_user(http: httpx.Client) -> None:
    body = {"messages": [{"role": "system", "content": "Be brief."}], "documents": [{"text": "a"}]}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "documents"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"chunks": []}, 422),
        ({"chunks": [""]}, 422),
        ({"chunks": "text"}, 422),
        ({"chunks": [1]}, 422),
        ({"documents": []}, 422),
        ({"chunks": ["a"], "prompt": "b"}, 400),
        ({"chunks": ["a"], "documents": [{"text": "a"}]}, 400),
        ({"prompt": "a", "chat": True}, 400),
        ({"chunks": ["a " * 2000]}, 400),
    ],
)
def test_bad_warming(http: httpx.Client, body: dict[str, Any], status: int) -> None:
    answer = http.post("/cache/warm", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("field", "long"),
    [("chunks", "a " * 2000), ("documents", {"text": "a " * 2000}), ("prompts", "a " * 2000)],
)
def test_one_that_is_too_long_is_named_before_any_is_computed(http: httpx.Client, field: str, long: Any) -> None:
    text = f"{field}, one that fits. " * 9  # which nobody else has asked for
    short = {"text": text} if field == "documents" else text
    answer = http.post("/cache/warm", json={field: [short, long]})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == f"{field}[1]"
    assert error["message"].startswith(f"{field}[1]: the prompt has ")
    warmed = good(http.post("/cache/warm", json={field: [short]}))
    assert warmed["computed"] >= warmed["tokens"] - 3 > 20  # others may begin alike


def test_an_empty_chunk_is_none_at_all(http: httpx.Client) -> None:
    whole = good(http.post(CHAT, json=chat("", "  ", PASSAGES[0], **blended())))
    assert whole["rekindle"]["plan"]["chunks"][0]["start"] == whole["rekindle"]["plan"]["chunks"][0]["stop"]


def test_what_is_blended_cannot_be_pinned(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=chat(*PASSAGES, rekindle={"blend": True, "pin": 60}))
    error = answer.json()["error"]
    assert answer.status_code == 400 and "pin" in error["message"] and error["param"] == "rekindle.blend"


@pytest.mark.parametrize("select", ["deviation", "query"])
def test_a_selection_that_this_engine_has_not_is_refused_with_those_that_it_has(
    http: httpx.Client, select: str
) -> None:
    answer = http.post(CHAT, json=chat(*PASSAGES, rekindle={"blend": {"select": select}}))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "rekindle.blend.select"
    assert f"one of none, first, remembered, auto, got '{select}'" in error["message"]
    assert "the torch engine can" in error["message"]


def test_the_report_says_why_nothing_was_blended(http: httpx.Client) -> None:
    marked = good(http.post(CHAT, json=chat("Nobody has met this.", **blended())))["rekindle"]["plan"]
    assert [each["why"].split(":")[0] for each in marked["chunks"]] == ["not kept on its own"]
    question = {"messages": [{"role": "user", "content": "Who has marked nothing here?"}]}
    assert good(http.post(CHAT, json=question | blended()))["rekindle"]["plan"]["chunks"] == []
    assert "chunks" not in good(http.post(CHAT, json=question | {"rekindle": REPORT}))["rekindle"]["plan"]


def test_a_gate_without_a_report_refuses_who_asks(tmp_path: Any) -> None:
    settings = Settings(engine="toy", context=1024, blend_gate=str(tmp_path / "missing"))
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url) as http:
        answer = http.post(CHAT, json=chat(*PASSAGES[:1], **blended()))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("blending_refused", "rekindle.blend")
        good(http.post(CHAT, json=chat(*PASSAGES[:1])))
