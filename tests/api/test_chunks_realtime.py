"""Chunks in the realtime API: marked in items, placed in answers beside the session, which itself stays exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.api.realtime_client import GREEDY, Realtime, text_of
from tests.api.steps import steps_of
from tests.api.test_chunks import CHAT, QUESTION, good
from tests.api.test_chunks import PASSAGES as SPACED
from tests.api.test_sockets import Client

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

PASSAGES = [text.strip() for text in SPACED]
NONE = {"plan": True, "blend": {"select": "none"}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.open(Settings(engine="torch", store="none", threads=1, context=4096)) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as http:
        good(http.post("/cache/clear"))
        yield http


@pytest.fixture
def client(url: str) -> Iterator[Realtime]:
    client = Realtime(url)
    yield client
    client.close()


def part(text: str, **mark: str) -> dict[str, str]:
    return {"type": "input_text", "text": text} | mark


def marked(*passages: str, question: str = QUESTION) -> list[dict[str, str]]:
    return [*(part(each, cache="chunk") for each in passages), part(question)]


def tell(client: Realtime, *passages: str, question: str = QUESTION) -> dict[str, Any]:
    return client.item("", item={"content": marked(*passages, question=question)})


def placed(kv: dict[str, Any]) -> list[bool]:
    return [each["placed"] > 0 for each in kv["plan"]["chunks"]]


def test_chunks_of_a_conversation_are_placed(http: httpx.Client, client: Realtime) -> None:
    """As in a chat of the same parts: same tokens, same plan, same answer."""
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    sent = [each | {"type": "text"} for each in marked(*PASSAGES[::-1])]
    chat = {"messages": [{"role": "user", "content": sent}], "rekindle": NONE, "temperature": 0, "max_tokens": 6}
    same = good(http.post(CHAT, json=chat))
    good(http.post("/cache/clear"))
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    item = tell(client, *PASSAGES[::-1])
    assert item["content"] == marked(*PASSAGES[::-1])
    response = client.respond(rekindle=NONE)
    kv, usage = client.kv(), response["usage"]
    assert placed(kv) == [True] * 3
    blended = sum(each["placed"] for each in kv["plan"]["chunks"])
    assert kv["tokens"]["blended"] == blended == usage["input_token_details"]["blended_tokens"]
    assert kv["tokens"]["computed"] == kv["plan"]["computed"] == kv["tokens"]["prompt"] - kv["tokens"]["reused"]
    assert kv["tokens"]["reused"] >= blended
    assert same["usage"]["prompt_tokens"] == usage["input_tokens"]
    assert same["rekindle"]["plan"]["chunks"] == kv["plan"]["chunks"]
    assert same["choices"][0]["message"]["content"] == text_of(response)


def test_what_is_marked_is_read_only_when_it_is_answered(
    http: httpx.Client, client: Realtime, service: Service
) -> None:
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    before = service.num_computed
    tell(client, *PASSAGES)
    client.send("rekindle.context.create", context="other")  # has been done when the item has
    client.last("rekindle.context.created")
    assert service.num_computed - before <= 8  # the other's head, and what is studied of chunks: nothing
    client.respond(rekindle=NONE)
    assert client.kv()["tokens"]["computed"] < 40


def test_afterwards_the_session_is_exact(http: httpx.Client, client: Realtime, service: Service) -> None:
    """What was blended is read again for what comes next, while nobody waits."""
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    tell(client, *PASSAGES)
    first = client.respond(rekindle=NONE)
    client.until_read()
    client.item("And who else?")
    second = client.respond(rekindle={"plan": True, "blend": False})
    kv = client.kv()
    assert "blended" not in kv["tokens"] and kv["plan"]["chunks"] == []
    assert kv["ahead"]["computed"] > 270 and kv["tokens"]["computed"] < 30  # all three passages, and what is new
    said = [*client.conversation()]
    assert [who for who, _ in said] == ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in said[:3]]
    chat = good(http.post(CHAT, json={"messages": messages, "temperature": 0, "max_tokens": 6}))
    assert chat["choices"][0]["message"]["content"] == text_of(second)
    assert said[1][1] == text_of(first)
    service.check_integrity()


def test_marking_alone_is_exact(http: httpx.Client, client: Realtime) -> None:
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    tell(client, *PASSAGES[::-1])
    response = client.respond(rekindle={"plan": True})
    assert "blended" not in client.kv()["tokens"] and "chunks" not in client.kv()["plan"]
    text = "\n".join([*PASSAGES[::-1], QUESTION])
    chat = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 6}
    assert good(http.post(CHAT, json=chat))["choices"][0]["message"]["content"] == text_of(response)


def test_turns_with_chunks_follow_each_other(http: httpx.Client, client: Realtime) -> None:
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    tell(client, *PASSAGES[:2])
    client.respond(rekindle=NONE)
    tell(client, PASSAGES[2], question="And now?")
    client.respond(rekindle=NONE)
    kv = client.kv()
    assert len(kv["plan"]["chunks"]) == 3 and kv["plan"]["chunks"][2]["placed"] > 0
    assert [each["exact"] + each["placed"] > 0 for each in kv["plan"]["chunks"]] == [True] * 3
    assert [who for who, _ in client.conversation()] == ["user", "assistant", "user", "assistant"]


def test_beside_the_conversation(http: httpx.Client, client: Realtime) -> None:
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    message = {"type": "message", "role": "user", "content": marked(*PASSAGES)}
    client.send("response.create", response=GREEDY | {"conversation": "none", "input": [message], "rekindle": NONE})
    client.last("response.done")
    assert placed(client.kv()) == [True] * 3 and client.conversation() == []
    tell(client, PASSAGES[0])
    client.send("response.create", response=GREEDY | {"conversation": "none", "rekindle": NONE})
    client.last("response.done")
    assert placed(client.kv()) == [True]
    assert [who for who, _ in client.conversation()] == ["user"]


def test_a_blended_answer_can_be_cancelled(http: httpx.Client, client: Realtime, service: Service) -> None:
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    tell(client, *PASSAGES)
    long = {"temperature": 1, "seed": 1, "max_output_tokens": 3000, "rekindle": NONE}
    with steps_of(service) as steps:  # so that it does not end before
        client.send("response.create", response=long)
        client.send("response.create", response=long)
        client.send("response.cancel")
        assert client.error()["code"] == "conversation_already_has_active_response"
        steps.wait(lambda: steps.generations[0].cancelled)
    assert client.last("response.done")["response"]["status"] == "cancelled"
    assert client.ask("Go on.")["status"] in ("completed", "incomplete")


def test_a_server_may_blend_whatever_is_marked() -> None:
    settings = Settings(store="none", threads=1, context=2048, blend="marked", blend_select="none", engine="torch")
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        good(http.post("/cache/warm", json={"chunks": PASSAGES}))
        client = Realtime(url)
        tell(client, *PASSAGES)
        client.respond(rekindle={"plan": True})
        assert placed(client.kv()) == [True] * 3
        client.close()


def test_a_session_says_it_for_its_answers(http: httpx.Client, client: Realtime) -> None:
    """Once, and each answer may say something else."""
    good(http.post("/cache/warm", json={"chunks": PASSAGES}))
    client.send("session.update", session={"type": "realtime", "rekindle": NONE})
    told = client.last("session.updated")["session"]
    assert NONE.items() <= told["rekindle"].items()
    client.send("session.update", session=told)  # all that it told, as some clients do
    assert NONE.items() <= client.last("session.updated")["session"]["rekindle"].items()
    tell(client, *PASSAGES)
    client.respond()
    assert placed(client.kv()) == [True] * 3  # told without being asked, too
    client.item("And who else?")
    client.respond(rekindle={"blend": False})
    assert client.kv()["plan"]["chunks"] == []
    client.send("session.update", session={"rekindle": None})
    assert not NONE.keys() & client.last("session.updated")["session"]["rekindle"].keys()
    client.item("And now?")
    client.respond()
    assert "plan" not in client.kv()
    client.send("session.update", session={"rekindle": {"blend": True}})
    assert client.last("session.updated")["session"]["rekindle"]["blend"] is True


@pytest.mark.parametrize(
    ("session", "param", "words"),
    [
        ({"rekindle": {"blend": {"select": "frist"}}}, "rekindle.blend.select", "did you mean 'first'"),
        ({"rekindle": {"blend": {"ratio": True}}}, "session.rekindle.blend.ratio", "expected a number"),
        ({"rekindle": {"blnd": True}}, "session.rekindle.blnd", "did you mean 'blend'"),
        ({"rekindle": {"pin": "1m"}}, "session.rekindle.pin", "rekindle.session.pin"),
    ],
)
def test_what_a_session_is_refused(client: Realtime, session: dict[str, Any], param: str, words: str) -> None:
    client.send("session.update", session=session)
    error = client.error()
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("response", "param", "words"),
    [
        ({"rekindle": {"blend": {"select": "frist"}}}, "rekindle.blend.select", "did you mean 'first'"),
        ({"rekindle": {"blend": {"ratio": 2}}}, "response.rekindle.blend.ratio", "at most 1"),
        ({"rekindle": {"blnd": True}}, "response.rekindle.blnd", "did you mean 'blend'"),
        ({"rekindle": {"pin": "1m"}}, "response.rekindle.pin", "rekindle.session.pin"),
        ({"documents": [{"text": "x"}]}, "response.documents", '"cache": "chunk"'),
    ],
)
def test_what_is_refused(client: Realtime, response: dict[str, Any], param: str, words: str) -> None:
    client.send("response.create", response=response)
    error = client.error()
    assert error["param"] == param and words in error["message"], error


def test_a_wrong_mark_is_refused(client: Realtime) -> None:
    item = {"type": "message", "role": "user", "content": [part("x", cache="always")]}
    client.send("conversation.item.create", item=item)
    error = client.error()
    assert error["param"].endswith("content[0].cache") and "'chunk'" in error["message"]
    assert client.conversation() == []


@pytest.mark.parametrize(
    "message",
    [
        {"data": "x", "rekindle": {"blend": True}},
        {"data": "x", "cache": "chunk"},
        {"data": "x", "documents": [{"text": "y"}]},
        {"data": [{"type": "text", "text": "x", "cache": "chunk"}]},
    ],
)
def test_the_simple_socket_says_where_chunks_are_taken(url: str, message: dict[str, Any]) -> None:
    client = Client(url, "/ws?session=simple")
    client.send({"type": "message"} | message)
    told = client.until("error")[-1]["error"]
    client.close()
    for where in ("/v1/realtime", "/v1/responses", "/v1/chat/completions"):
        assert where in told["message"]
