"""Chunks in `/v1/responses`, over HTTP and its socket: marked as in chats, placed, told of, and gone on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from tests.api.test_chunks import CHAT, QUESTION, chat, good
from tests.api.test_chunks import PASSAGES as SPACED
from websockets.sync.client import connect

from rekindle.api.server import running
from rekindle.model.template import ChatTemplate
from rekindle.serve.service import Service
from rekindle.settings import Settings

PASSAGES = [text.strip() for text in SPACED]
PATH = "/v1/responses"
GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 4}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with (
        Service.open(Settings(engine="torch", store="none", threads=1, context=4096)) as service,
        running(service) as url,
    ):
        yield url


@pytest.fixture
def real(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        good(client.post("/cache/clear"))
        yield client


def words(text: str, **mark: str) -> dict[str, str]:
    return {"type": "input_text", "text": text} | mark


def chunk(text: str) -> dict[str, str]:
    return words(text, cache="chunk")


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def ask(*passages: str, **fields: Any) -> dict[str, Any]:
    content = [words("Read this:"), *map(chunk, passages), words(QUESTION)]
    return {"input": [user(*content)]} | GREEDY | fields


def blended(**options: Any) -> dict[str, Any]:
    return {"rekindle": {"plan": True, "blend": options or True}}


def placed(response: dict[str, Any]) -> list[bool]:
    return [each["placed"] > 0 for each in response["rekindle"]["plan"]["chunks"]]


def computed(response: dict[str, Any]) -> int:
    usage = response["usage"]
    return int(usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"])


def test_marks_are_those_of_chats(real: httpx.Client) -> None:
    """Same tokens, same plan, same answer, same figures."""
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    how = blended(select="first", ratio=0.15)
    response = good(real.post(PATH, json=ask(*PASSAGES[::-1], **how)))
    good(real.post("/cache/clear"))
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    completion = good(real.post(CHAT, json=chat(*PASSAGES[::-1], **how)))
    assert placed(response) == [True] * 3
    plan = response["rekindle"]["plan"]
    for mine, its in zip(plan["chunks"], completion["rekindle"]["plan"]["chunks"], strict=True):
        assert [mine[name] for name in ("start", "stop", "moved")] == [its[name] for name in ("start", "stop", "moved")]
        assert mine["recomputed"] >= 0.15 * (mine["stop"] - mine["start"]) - 1  # more where that takes no longer
    assert response["output"][0]["content"][0]["text"] == completion["choices"][0]["message"]["content"]
    details = response["usage"]["input_tokens_details"]
    assert details["blended_tokens"] == sum(each["placed"] for each in plan["chunks"])
    assert plan["computed"] == computed(response)
    exact = next(step for step in plan["steps"] if step["kind"] == "compute")
    assert details["cache_write_tokens"] == exact["stop"] - exact["start"]  # what stands before the first placed chunk


def test_marking_alone_is_exact(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    response = good(real.post(PATH, json=ask(*PASSAGES, rekindle={"plan": True})))
    plain = good(real.post(PATH, json=GREEDY | {"input": "\n".join(["Read this:", *PASSAGES, QUESTION])}))
    assert not any(each["placed"] for each in response["rekindle"]["plan"].get("chunks", []))
    assert "blended_tokens" not in response["usage"]["input_tokens_details"]
    assert response["output"][0]["content"] == plain["output"][0]["content"]
    assert response["usage"]["input_tokens"] == plain["usage"]["input_tokens"]
    assert computed(plain) == 0  # the marked prompt was the same tokens, and was kept
    assert response["usage"]["input_tokens_details"]["cache_write_tokens"] == computed(response)


def test_documents_are_chunks(real: httpx.Client) -> None:
    documents = [{"title": f"Passage {number}", "text": text} for number, text in enumerate(PASSAGES)]
    good(real.post("/cache/warm", json={"documents": documents}))
    body = {"input": QUESTION, "documents": documents[::-1]} | GREEDY | blended(select="none")
    response = good(real.post(PATH, json=body))
    assert placed(response) == [True] * 3
    counted = good(real.post(f"{PATH}/input_tokens", json=body))
    assert counted["input_tokens"] == response["usage"]["input_tokens"]
    after = good(real.post(PATH, json=GREEDY | {"input": "Again?", "previous_response_id": response["id"]}))
    assert after["usage"]["input_tokens"] < response["usage"]["input_tokens"]  # documents are of one request


def test_going_on_keeps_the_marks(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    first = good(real.post(PATH, json=ask(*PASSAGES[:2], **blended(select="none"))))
    then = {"input": [user(chunk(PASSAGES[2]), words("And now?"))], "previous_response_id": first["id"]} | GREEDY
    second = good(real.post(PATH, json=then | blended(select="none")))
    assert placed(first) == [True] * 2 and placed(second) == [True] * 3
    blended_tokens = second["usage"]["input_tokens_details"]["blended_tokens"]
    assert (
        computed(second)
        == second["usage"]["input_tokens"] - blended_tokens - second["rekindle"]["plan"]["steps"][0]["stop"]
    )
    items = good(real.get(f"{PATH}/{second['id']}/input_items"))["data"]
    assert items[0]["content"] == [chunk(PASSAGES[2]), words("And now?")]
    whole = [
        {"role": "user", "content": [words("Read this:"), *map(chunk, PASSAGES[:2]), words(QUESTION)]},
        {"role": "assistant", "content": first["output"][0]["content"][0]["text"]},
        user(chunk(PASSAGES[2]), words("And now?")),
    ]
    sent = good(real.post(PATH, json={"input": whole} | GREEDY | blended(select="none")))
    assert sent["usage"]["input_tokens"] == second["usage"]["input_tokens"]


def test_exact_turns_with_chunks_are_found_again(real: httpx.Client) -> None:
    first = good(real.post(PATH, json=ask(*PASSAGES)))
    then = {"input": "And now?", "previous_response_id": first["id"], "rekindle": {"plan": True}} | GREEDY
    second = good(real.post(PATH, json=then))
    total = first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= total - 1
    assert "blended_tokens" not in second["usage"]["input_tokens_details"]


@pytest.mark.parametrize("marked", [True, False])
def test_a_turn_with_a_new_chunk_finds_what_was_generated(real: httpx.Client, marked: bool) -> None:
    """In the tokens in which it was generated, which here are not those that a tokenizer would choose."""
    said = chunk(PASSAGES[0]) if marked else words(PASSAGES[0])
    wild = {"temperature": 1.5, "seed": 3, "max_output_tokens": 30, "ignore_eos": True}
    last = good(real.post(PATH, json={"input": [user(said, words("Tell me?"))]} | wild))
    for passage in PASSAGES[1:]:
        total = last["usage"]["input_tokens"] + last["usage"]["output_tokens"]
        body = {"input": [user(chunk(passage), words("And?"))], "previous_response_id": last["id"]} | wild
        last = good(real.post(PATH, json=body | {"rekindle": {"plan": True}}))
        assert last["usage"]["input_tokens_details"]["cached_tokens"] == total - 1  # the last one was never read
    plan = good(real.post(PATH, json=ask(*PASSAGES, **blended())))["rekindle"]["plan"]
    assert [each["stop"] - each["start"] > 50 for each in plan["chunks"]] == [True] * 3


def test_an_agents_tool_outputs_come_again(real: httpx.Client) -> None:
    """The same page, looked up in another conversation."""

    def looked_up(question: str, page: dict[str, str], call: str) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": question},
            {"type": "function_call", "call_id": call, "name": "read", "arguments": '{"page": 1}'},
            {"type": "function_call_output", "call_id": call, "output": [page]},
        ]

    good(real.post("/cache/warm", json={"chunks": PASSAGES[:1]}))
    body = {"input": looked_up("What about Vodris?", chunk(PASSAGES[0]), "call_1")} | GREEDY | blended(select="none")
    first = good(real.post(PATH, json=body))
    assert placed(first) == [True]
    size = first["rekindle"]["plan"]["chunks"][0]
    assert computed(first) <= first["usage"]["input_tokens"] - (size["stop"] - size["start"])
    more = looked_up("And once more?", chunk(PASSAGES[0]), "call_2")
    second = good(real.post(PATH, json={"input": more, "previous_response_id": first["id"]} | GREEDY | blended()))
    assert placed(second) == [True, True]
    kinds = [item["type"] for item in good(real.get(f"{PATH}/{first['id']}/input_items"))["data"]]
    assert kinds == ["function_call_output", "function_call", "message"]
    as_text = looked_up("What about Vodris?", words(PASSAGES[0]), "call_1")
    as_text[2]["output"] = PASSAGES[0]
    plain = good(real.post(PATH, json={"input": as_text} | GREEDY))
    assert plain["usage"]["input_tokens"] == first["usage"]["input_tokens"]


SKIPPING = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
CALLING = """{%- for m in messages -%}
    {{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|end|>
{%- endfor -%}"""


@pytest.mark.parametrize("template", [SKIPPING, CALLING])
def test_what_a_template_makes_of_calls(template: str) -> None:
    """Written as it knows them; what it would leave out without a word is refused."""
    called = {"type": "function_call", "call_id": "1", "name": "read", "arguments": '{"page": 1}'}
    items = [user(words("Look it up.")), called, {"type": "function_call_output", "call_id": "1", "output": "Orange."}]
    with Service.open(Settings(engine="toy", store="none")) as service:
        service.model = replace(service.model, template=ChatTemplate(template))
        with running(service) as url, httpx.Client(base_url=url) as http:
            answer = http.post(PATH, json={"input": items, "max_output_tokens": 1})
            if template == SKIPPING:
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
                assert "leaves out messages of the role 'tool'" in answer.json()["error"]["message"]
                good(http.post(PATH, json={"input": items[:2], "max_output_tokens": 1}))
            else:
                call = '{"id": "1", "type": "function", "function": {"name": "read", "arguments": {"page": 1}}}'
                text = f"user:Look it up.<|end|>assistant:[{call}]<|end|>tool:Orange.<|end|>"
                assert good(answer)["usage"]["input_tokens"] == len(service.model.tokenizer.encode(text))


def test_instructions_and_marked_system_messages_are_one(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES[:1]}))
    system = {"role": "developer", "content": [words("Rules:"), chunk(PASSAGES[0])]}
    body = {"input": [system, user(words(QUESTION))], "instructions": "Be brief."} | GREEDY
    response = good(real.post(PATH, json=body | blended(select="none")))
    assert placed(response) == [True]
    text = f"Be brief.\n\nRules:\n{PASSAGES[0]}"
    plain = good(real.post(PATH, json=GREEDY | {"input": QUESTION, "instructions": text}))
    assert plain["usage"]["input_tokens"] == response["usage"]["input_tokens"]


def test_streams_end_with_the_plan(real: httpx.Client, url: str) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        body = ask(*PASSAGES)
        stream: Any = client.responses.create(model="ember", stream=True, extra_body=blended(select="none"), **body)
        last = list(stream)[-1].response.model_dump()
    assert placed(last) == [True] * 3 and last["usage"]["input_tokens_details"]["blended_tokens"] > 0


def test_over_the_socket(real: httpx.Client, url: str) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES}))

    def end(**fields: Any) -> dict[str, Any]:
        socket.send(json.dumps({"type": "response.create"} | fields))
        while (event := json.loads(socket.recv(timeout=60)))["type"] in (
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            "response.output_text.delta", "response.output_text.done", "response.content_part.done",
            "response.output_item.done",
        ):  # fmt: skip
            pass
        return dict(event)

    with connect(url.replace("http", "ws", 1) + PATH, open_timeout=60, proxy=None) as socket:
        first = end(**ask(*PASSAGES[:2], **blended(select="none")), store=False)["response"]
        assert placed(first) == [True] * 2
        more = {"input": [user(chunk(PASSAGES[2]), words("And now?"))], "previous_response_id": first["id"]}
        second = end(**more, **GREEDY, **blended(select="none"))["response"]
        assert placed(second) == [True] * 3
        refused = end(**ask(*PASSAGES, **blended()), generate=False)
        assert refused["type"] == "error" and "warm its chunks" in refused["error"]["message"]
        ready = end(**ask(*PASSAGES[::-1]), generate=False)["response"]
        assert ready["output"] == [] and computed(ready) > 100  # read exactly


def test_salts_share_no_chunks(real: httpx.Client) -> None:
    good(real.post("/cache/warm", json={"chunks": PASSAGES, "cache_salt": "one"}))
    how = blended(select="none")
    assert placed(good(real.post(PATH, json=ask(*PASSAGES, cache_salt="two", **how)))) == [False] * 3
    assert placed(good(real.post(PATH, json=ask(*PASSAGES, cache_salt="one", **how)))) == [True] * 3


def test_a_server_may_blend_whatever_is_marked() -> None:
    settings = Settings(store="none", threads=1, context=2048, blend="marked", blend_select="none")
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        good(http.post("/cache/warm", json={"chunks": PASSAGES}))
        assert placed(good(http.post(PATH, json=ask(*PASSAGES, rekindle={"plan": True})))) == [True] * 3
        off = good(http.post(PATH, json=ask(*PASSAGES[::-1], rekindle={"plan": True, "blend": False})))
        assert not any(each["placed"] for each in off["rekindle"]["plan"].get("chunks", []))
