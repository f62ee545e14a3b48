"""The realtime API over real connections: what is told of what, in which order, and what nonsense does."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.realtime_client import Realtime, eventually, text_of
from tests.api.steps import Steps
from tests.api.test_sockets import Client, tell_at_once
from websockets.exceptions import ConnectionClosed, InvalidStatus

from rekindle.api import connection
from rekindle.api import realtime as module
from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

QUESTION = "Who paints in orange?"


@pytest.fixture(scope="module")
def steps() -> Iterator[Steps]:
    """The toy engine, which can be held."""
    with Service.open(Settings(engine="toy", store="none", context=1024)) as service:
        steps = Steps(service)
        steps.let_all()
        yield steps
        steps.let_all()
        service.check_integrity()


@pytest.fixture(scope="module")
def url(steps: Steps) -> Iterator[str]:
    with running(steps.service) as url:
        yield url


@pytest.fixture(autouse=True)
def go_on_at_the_end(steps: Steps) -> Iterator[None]:
    yield
    steps.let_all()


@pytest.fixture
def clients(url: str) -> Iterator[Any]:
    with ExitStack() as opened:
        yield lambda query="", **options: opened.enter_context(
            closing(Realtime(options.pop("url", url), query, **options))
        )


def test_an_answer_is_told_in_openais_order(clients: Any) -> None:
    client = clients()
    user = client.item(QUESTION)
    client.send("response.create", response={"max_output_tokens": 4, "temperature": 0, "metadata": {"a": "b"}})
    events = client.until("response.done")
    kinds = [event["type"] for event in events if event["type"] != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "rekindle.kv",
        "response.done",
    ]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    response = events[-1]["response"]
    assert "".join(deltas) == text_of(response)
    assert (response["metadata"], response["max_output_tokens"]) == ({"a": "b"}, 4)
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + response["usage"]["output_tokens"]
    added = next(event for event in events if event["type"] == "conversation.item.added")
    assert (added["previous_item_id"], added["item"]["status"]) == (user["id"], "in_progress")
    assert len({event["event_id"] for event in client.heard}) == len(client.heard)


def test_what_is_typed_is_read_before_it_is_committed(clients: Any) -> None:
    client = clients()
    question = "Who paints in orange, and who plays the tuba?"  # which no other test asks: none of it is in the engine
    for text in ("Who paints ", "in orange", " or red?"):
        client.send("input_text_buffer.append", text=text)
    client.send("input_text_buffer.replace", text=question)
    client.send("input_text_buffer.commit", item_id="mine")
    committed, added, _ = client.until("conversation.item.done")
    assert (committed["type"], committed["item_id"], added["item"]["id"]) == (
        "input_text_buffer.committed",
        "mine",
        "mine",
    )
    assert added["item"]["content"] == [{"type": "input_text", "text": question}]
    client.until_read()
    client.respond()
    kv = client.kv()
    assert kv["tokens"]["computed"] <= 1 and kv["tokens"]["reused"] + kv["tokens"]["computed"] == kv["tokens"]["prompt"]
    assert kv["ahead"]["computed"] > 0 and kv["tier"] == "engine" and kv["timings"]["ttft_ms"] > 0
    client.send("input_text_buffer.append", text="never mind")
    client.send("input_text_buffer.clear")
    client.until("input_text_buffer.cleared")
    client.send("input_text_buffer.commit", event_id="empty")
    assert client.error()["event_id"] == "empty"


def test_an_empty_buffer_is_refused_also_while_a_message_waits(clients: Any) -> None:
    client = clients()
    client.item(QUESTION)
    client.send("input_text_buffer.commit", event_id="empty")
    error = client.error()
    assert error["event_id"] == "empty" and "append text" in error["message"]


def test_items_are_put_in_taken_out_and_shown(clients: Any) -> None:
    client = clients()
    client.item("Ada is a baker.", role="system")
    client.item("Who are you?", item={"id": "one"})
    client.item("I am Ada.", role="assistant", item={"id": "two"})
    client.item("And I?", item={"id": "four"})
    client.item("Again?", item={"id": "three"}, previous_item_id="two")
    client.item("Be kind.", role="system", previous_item_id="root")
    said = [text for _, text in client.conversation()]
    assert said == ["Be kind.", "Ada is a baker.", "Who are you?", "I am Ada.", "Again?", "And I?"]
    client.send("conversation.item.retrieve", item_id="two")
    assert client.last("conversation.item.retrieved")["item"]["content"][0] == {
        "type": "output_text",
        "text": "I am Ada.",
    }
    client.send("conversation.item.delete", item_id="three")
    assert client.last("conversation.item.deleted")["item_id"] == "three"
    client.send("conversation.item.retrieve", item_id="three", event_id="gone")
    assert (client.error()["code"], client.heard[-1]["error"]["event_id"]) == ("item_not_found", "gone")


def test_a_system_message_amid_the_turns_is_refused(clients: Any) -> None:
    client = clients()
    client.ask(QUESTION)
    part = {"type": "input_text", "text": "Be kind."}
    item = {"type": "message", "role": "system", "content": [part]}
    client.send("conversation.item.create", item=item, event_id="late")
    error = client.error()
    assert error["event_id"] == "late" and "first user message" in error["message"]
    assert len(client.conversation()) == 2


def test_deleting_what_was_said_takes_it_from_the_prompt(clients: Any) -> None:
    client, other = clients(), clients()
    for text in ("One.", "Two."):
        client.ask(text)
    for item in [event["item"]["id"] for event in client.heard if event["type"] == "conversation.item.done"][:2]:
        client.send("conversation.item.delete", item_id=item)
        client.until("conversation.item.deleted")
    (role, text), (_, answer) = client.conversation()
    assert (role, text) == ("user", "Two.")
    other.item("Two.")
    other.item(answer, role="assistant")
    ours, theirs = client.ask("Three."), other.ask("Three.")
    assert ours["usage"]["input_tokens"] == theirs["usage"]["input_tokens"]
    assert text_of(ours) == text_of(theirs)


def test_cancel_keeps_what_was_said_and_tells_the_cost_later(clients: Any, steps: Steps) -> None:
    client = clients()
    response = client.begin(steps)
    client.send("response.cancel", response_id=response["id"])
    done = client.last("response.done")["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    steps.let_all()
    assert client.last("rekindle.kv")["response_id"] == response["id"]
    client.send("response.cancel", event_id="again")
    assert client.error() | {"message": ""} == {
        "type": "invalid_request_error",
        "code": "response_cancel_not_active",
        "message": "",
        "param": None,
        "event_id": "again",
    }
    assert client.ask("And now?")["status"] == "incomplete"


def test_an_answer_can_be_cut_to_what_was_heard(clients: Any, steps: Steps) -> None:
    client = clients()
    answer = client.ask(QUESTION, max_output_tokens=12)["output"][0]
    whole = answer["content"][0]["text"]
    client.send("conversation.item.truncate", item_id=answer["id"], content_index=0, audio_end_ms=700, characters=9)
    cut = client.last("conversation.item.truncated")
    assert whole.startswith(cut["text"]) and len(cut["text"]) <= 9 and cut["audio_end_ms"] == 700
    client.ask("And then?")
    client.send("conversation.item.truncate", item_id=answer["id"], content_index=0, characters=2)
    assert client.last("conversation.item.truncated")["text"] == cut["text"][:2]
    client.begin(steps)
    running = client.heard[-1]["item_id"]
    client.send("conversation.item.truncate", item_id=running, content_index=0, audio_end_ms=0)
    assert client.last("response.done")["response"]["status"] == "cancelled"
    assert client.last("conversation.item.truncated")["text"] == ""
    assert client.conversation()[-1] == ("assistant", "")


def test_what_comes_during_an_answer_is_done_at_its_end(clients: Any, steps: Steps) -> None:
    client = clients()
    client.begin(steps)
    client.send("conversation.item.create", item={"type": "message", "role": "user", "content": [_text("Next.")]})
    client.send("conversation.item.delete", item_id="nothing", event_id="wrong")
    client.send("response.create", event_id="early")
    error = client.error()
    assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", "early")
    client.send("response.cancel")
    client.until("response.done")
    assert client.last("conversation.item.done")["item"]["content"][0]["text"] == "Next."
    assert client.error()["event_id"] == "wrong"
    steps.let_all()
    client.respond()
    assert [role for role, _ in client.conversation()] == ["user", "assistant"] * 2


def test_only_so_much_waits_for_the_end_of_an_answer(clients: Any, steps: Steps) -> None:
    client = clients()
    client.begin(steps)
    for number in range(65):
        client.send("conversation.item.delete", item_id="nothing", event_id=str(number))
    error = client.error()
    assert (error["code"], error["event_id"], error["type"]) == ("overloaded", "64", "rate_limit_error")
    client.send("response.cancel")
    client.until("response.done")
    assert [client.error()["event_id"] for _ in range(64)] == [str(number) for number in range(64)]


def test_what_is_typed_behind_a_commit_that_waits_is_no_part_of_it(clients: Any, steps: Steps) -> None:
    client = clients()
    client.begin(steps)
    client.send("input_text_buffer.append", text="One")
    client.send("input_text_buffer.commit", item_id="one")
    client.send("input_text_buffer.replace", text="Never mind")
    client.send("input_text_buffer.clear")
    client.send("input_text_buffer.replace", text="Two")
    for number in range(100):  # more than may wait, were they not one
        client.send("input_text_buffer.append", text=f" {number}")
    client.send("input_text_buffer.commit", item_id="two")
    client.send("response.cancel")
    client.until("response.done")
    said = {}
    while len(said) < 2:
        item = client.last("conversation.item.done")["item"]
        if item["role"] == "user":
            said[item["id"]] = item["content"][0]["text"]
    assert said == {"one": "One", "two": "Two " + " ".join(map(str, range(100)))}


def test_settings_are_changed_as_far_as_they_are_given(clients: Any) -> None:
    client = clients()
    ratio = {"type": "retention_ratio", "retention_ratio": 0.5, "token_limits": {"post_instructions": 300}}
    client.send("session.update", session={"type": "realtime", "instructions": "Be kind.", "truncation": ratio})
    session = client.last("session.updated")["session"]
    assert (session["instructions"], session["truncation"], session["max_output_tokens"]) == ("Be kind.", ratio, "inf")
    assert 300 < session["rekindle"]["window"] < 400
    client.send("session.update", session={"temperature": 0.0, "max_output_tokens": 3, "audio": {"input": None}})
    session = client.last("session.updated")["session"]
    assert (session["instructions"], session["truncation"], session["temperature"]) == ("Be kind.", ratio, 0.0)
    client.item(QUESTION)
    client.send("response.create")
    response = client.last("response.done")["response"]
    assert response["usage"]["output_tokens"] <= 3 and response["max_output_tokens"] == 3
    client.send("session.update", session={"instructions": "", "truncation": "disabled", "max_output_tokens": "inf"})
    session = client.last("session.updated")["session"]
    assert (session["instructions"], session["rekindle"]["policy"]) == ("", "refuse")
    assert len(client.conversation()) == 2


def test_instructions_that_do_not_fit_change_nothing(clients: Any) -> None:
    client = clients()
    client.ask(QUESTION)
    before = client.created["session"]["rekindle"]["window"]
    client.send("session.update", session={"instructions": "word " * 2000, "max_output_tokens": 3})
    assert "tokens" in client.error()["message"]
    client.send("session.update", session={"truncation": "auto"})
    session = client.last("session.updated")["session"]
    assert (session["instructions"], session["rekindle"]["window"], session["max_output_tokens"]) == ("", before, "inf")


def test_the_window_forgets_whole_turns_and_says_which(clients: Any) -> None:
    client = clients()
    ratio = {"type": "retention_ratio", "retention_ratio": 0.6, "token_limits": {"post_instructions": 150}}
    client.send("session.update", session={"instructions": "Be kind.", "truncation": ratio})
    client.until("session.updated")
    for number in range(12):
        client.ask(f"This is message number {number}, about nothing.")
    forgotten = [event for event in client.heard if event["type"] == "rekindle.conversation.forgotten"]
    assert forgotten and all(event["tokens"] > 0 for event in forgotten)
    costs = [event["tokens"]["dropped"] for event in client.heard if event["type"] == "rekindle.kv"]
    assert sum(costs) <= sum(event["tokens"] for event in forgotten)
    kept = client.conversation()
    assert 2 < len(kept) < 24 and kept[-2][1].startswith("This is message number 11")
    client.send("session.update", session={"truncation": "disabled"})
    client.until("session.updated")
    item = {"type": "message", "role": "user", "content": [_text("word " * 500)]}
    client.send("conversation.item.create", item=item)
    assert "window" in client.error()["message"]
    assert client.conversation() == kept


def test_answers_beside_the_conversation(clients: Any, steps: Steps) -> None:
    client = clients()
    client.ask(QUESTION)
    before = client.conversation()
    client.until_read()
    steps.hold()
    number = len(steps.generations)
    client.send("response.create", response={"conversation": "none", "max_output_tokens": 400, "temperature": 0})
    aside = client.last("response.created")["response"]
    assert aside["conversation_id"] is None
    steps.let(200)  # more than the other needs, and less than this one
    client.ask("And meanwhile?")
    client.send("response.cancel", response_id=aside["id"])
    steps.wait(lambda: steps.generations[number].cancelled)
    steps.let_all()
    while client.last("response.done")["response"]["id"] != aside["id"]:
        pass
    reference = {"type": "item_reference", "id": client.heard[1]["item"]["id"]}
    said = {"type": "message", "role": "user", "content": [_text("Again?")]}
    given = {"conversation": "none", "instructions": "Be brief.", "input": [reference, said]}
    assert client.respond(**given)["status"] in ("completed", "incomplete")
    assert client.conversation()[: len(before)] == before and len(client.conversation()) == 4
    client.send("response.create", response={"conversation": "none", "input": [], "instructions": ""}, event_id="none")
    assert client.error()["event_id"] == "none"


def test_instructions_for_one_answer_that_stays_in_the_conversation(clients: Any) -> None:
    client = clients()
    client.item(QUESTION)
    client.send("response.create", response={"instructions": "Be brief.", "max_output_tokens": 5, "temperature": 0})
    client.send("conversation.item.create", item={"type": "message", "role": "user", "content": [_text("Next.")]})
    answer = text_of(client.last("response.done")["response"])
    client.last("conversation.item.done")
    assert client.conversation() == [("user", QUESTION), ("assistant", answer), ("user", "Next.")]
    client.respond()
    client.send("session.update", session={})
    assert client.last("session.updated")["session"]["instructions"] == ""


def test_an_answer_to_other_instructions_does_not_end_in_another_context(clients: Any, steps: Steps) -> None:
    client = clients()
    client.item(QUESTION)
    steps.hold()
    client.send("response.create", response={"instructions": "Be brief.", "max_output_tokens": 5, "temperature": 0})
    item = client.last("response.output_item.added")["item"]
    client.send("rekindle.context.swap", context="guide", instructions="You are a guide.")
    client.until("rekindle.context.swapped")
    steps.let_all()
    assert "swapped" in client.error()["message"]
    assert client.last("conversation.item.deleted")["item_id"] == item["id"]
    done = client.until("response.done")
    assert done[-1]["response"]["conversation_id"] is None
    assert "conversation.item.done" not in [event["type"] for event in done]
    assert client.conversation() == []


def test_an_answer_to_other_instructions_does_not_end_in_a_conversation_that_went_back(
    clients: Any, url: str, steps: Steps
) -> None:
    client, speaker = clients("session=went-back"), Client(url, "/ws/input?session=went-back")
    client.item(QUESTION)
    steps.hold()
    client.send("response.create", response={"instructions": "Be brief.", "max_output_tokens": 5, "temperature": 0})
    item = client.last("response.output_item.added")["item"]
    speaker.send({"type": "reset"})
    client.until("conversation.item.deleted")
    steps.let_all()
    assert "went back" in client.error()["message"]
    assert client.last("conversation.item.deleted")["item_id"] == item["id"]
    assert client.last("response.done")["response"]["conversation_id"] is None
    assert client.conversation() == []
    client.ask(QUESTION)
    assert len(client.conversation()) == 2
    speaker.close()


def test_contexts_have_conversations_of_their_own(clients: Any) -> None:
    client = clients()
    client.ask(QUESTION)
    client.send("rekindle.context.create", context="guide", instructions="You are a guide.")
    assert client.last("rekindle.context.created")["contexts"] == ["main", "guide"]
    client.send("rekindle.context.swap", context="guide")
    swapped = client.last("rekindle.context.swapped")
    assert (swapped["context"], swapped["items"]) == ("guide", [])
    client.ask("Where?")
    client.send("rekindle.context.swap", context="main")
    back = client.last("rekindle.context.swapped")
    assert len(back["items"]) == 2 and back["conversation_id"] != swapped["conversation_id"]
    client.send("rekindle.context.swap", context="cook", instructions="You are a cook.")
    assert client.last("rekindle.context.swapped")["items"] == []
    client.send("rekindle.context.swap", context="nowhere", event_id="x")
    assert client.error()["event_id"] == "x"


def test_a_fork_goes_on_by_itself_and_a_pin_is_told(clients: Any) -> None:
    client = clients("session=forked")
    client.ask(QUESTION)
    client.send("rekindle.session.fork", session="fork")
    assert client.last("rekindle.session.forked")["session"] == "fork"
    fork = clients("session=fork")
    resumed = fork.last("rekindle.session.resumed")
    assert [item["content"][0]["text"] for item in resumed["items"]] == [text for _, text in client.conversation()]
    fork.ask("And there?")
    assert fork.kv()["tokens"]["computed"] < 20
    assert len(client.conversation()) == 2
    client.send("rekindle.session.pin", ttl="10m")
    assert client.last("rekindle.session.pinned")["expires_in_seconds"] == 600
    client.send("rekindle.session.fork", session="fork", event_id="twice")
    assert client.error()["event_id"] == "twice"


def test_who_comes_back_has_lost_nothing(clients: Any, steps: Steps) -> None:
    first = clients()
    first.begin(steps)
    last = first.heard[-1]["event_id"]
    first.drop()
    second = clients(f"session={first.name}&last_event={last}")
    resumed = second.last("rekindle.session.resumed")
    assert resumed["is_complete"] is True
    second.send("response.cancel")
    done = second.last("response.done")["response"]
    deltas = [event["delta"] for event in first.heard + second.heard if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(done)
    third = clients(f"session={first.name}&last_event={last}")
    third.until("response.done")
    missed = [event for event in third.heard if event["event_id"] in {each["event_id"] for each in second.heard}]
    assert "response.done" in [event["type"] for event in missed]
    strange = clients(f"session={first.name}&last_event=event_0_1")
    resumed = strange.last("rekindle.session.resumed")
    assert resumed["is_complete"] is False and resumed["items"][-1]["content"][0]["text"] == text_of(done)


def test_what_happens_while_nobody_is_there_is_told_later(clients: Any, url: str) -> None:
    client = clients("session=away")
    client.ask(QUESTION)
    last = client.heard[-1]["event_id"]
    client.close()
    simple = Client(url, "/ws?session=away")
    simple.ask({"type": "message", "data": "Meanwhile?", "max_tokens": 5, "temperature": 0})
    simple.close()
    other = clients("session=another")
    other.send("rekindle.session.resume", session="away", last_event_id=last)
    assert other.last("session.created")["session"]["rekindle"]["session"] == "away"
    assert other.last("rekindle.session.resumed")["is_complete"] is True
    client.heard += other.until("response.done")
    assert [text for role, text in client.conversation() if role == "user"] == [QUESTION, "Meanwhile?"]
    other.send("rekindle.session.resume", handle="nothing", event_id="no")
    assert other.error()["event_id"] == "no"
    assert other.ask("Still here?")["status"] in ("completed", "incomplete")


def test_what_was_forgotten_and_cut_while_nobody_was_there_is_told_later(clients: Any, url: str) -> None:
    client = clients("session=gone")
    ratio = {"type": "retention_ratio", "retention_ratio": 0.5, "token_limits": {"post_instructions": 120}}
    client.send("session.update", session={"truncation": ratio})
    client.ask("This is the first message.")
    last = client.heard[-1]["event_id"]
    client.close()
    while _num_listeners(url, "gone"):
        pass
    simple = Client(url, "/ws?session=gone")
    for number in range(6):
        simple.ask({"type": "message", "data": f"This is message {number}.", "max_tokens": 5, "temperature": 0})
    simple.send({"type": "interrupt", "characters": 1})
    simple.until("system")
    back = clients(f"session=gone&last_event={last}")
    assert back.last("rekindle.session.resumed")["is_complete"] is True
    client.heard += back.until("conversation.item.truncated")
    assert any(event["type"] == "rekindle.conversation.forgotten" for event in client.heard)
    other = clients("session=gone")
    known = other.last("rekindle.session.resumed")
    other.close()
    assert client.item_ids() == [item["id"] for item in known["items"]]
    simple.send({"type": "context", "context": "main", "instructions": "Begin anew."})
    simple.send({"type": "reset"})
    assert back.last("rekindle.context.swapped")["items"] == []
    back.close()
    while _num_listeners(url, "gone") > 1:
        pass
    simple.ask()
    simple.send({"type": "swap", "context": "main"})
    simple.until("system")
    simple.close()
    again = clients(f"session=gone&last_event={back.heard[-1]['event_id']}")
    resumed = again.last("rekindle.session.resumed")
    assert resumed["is_complete"] is False and len(resumed["items"]) == 2


def test_simple_sockets_and_realtime_clients_share_a_session(clients: Any, url: str) -> None:
    client = clients("session=shared")
    simple = Client(url, "/ws?session=shared")
    simple.ask({"type": "message", "data": QUESTION, "max_tokens": 5, "temperature": 0})
    response = client.last("response.done")["response"]
    assert client.conversation() == [("user", QUESTION), ("assistant", text_of(response))]
    client.ask("And now?")
    assert (
        "".join(each["data"] for each in simple.until("end") if each["type"] == "token") == client.conversation()[-1][1]
    )
    simple.send({"type": "rewind", "turn": 1})
    client.until("conversation.item.deleted")
    client.until("conversation.item.deleted")
    assert len(client.conversation()) == 2
    simple.send({"type": "reset"})
    client.until("conversation.item.deleted")
    client.until("conversation.item.deleted")
    assert client.conversation() == []
    simple.close()


@pytest.mark.parametrize("moves", [{"type": "reset"}, {"type": "rewind", "turn": 0}], ids=["reset", "rewind"])
def test_an_answer_that_somebody_goes_back_behind_ends_for_all(
    clients: Any, url: str, steps: Steps, moves: dict[str, Any]
) -> None:
    name = f"session={moves['type']}"
    client, simple = clients(name), Client(url, f"/ws/output?{name}")
    response = client.begin(steps)
    speaker = Client(url, f"/ws/input?{name}")
    speaker.send(moves)
    done = client.last("response.done")["response"]
    assert (done["id"], done["status"]) == (response["id"], "cancelled")
    *_, end, gone = simple.until("end") + simple.until("system")
    assert (end["reason"], end["data"]) == ("interrupted", text_of(done)) and gone["kind"] in ("reset", "rewound")
    steps.let_all()
    spent = client.last("rekindle.kv")
    assert spent["response_id"] == response["id"] and simple.until("spent")[-1]["turn"] == end["turn"]
    client.ask("And now?")
    assert len(client.conversation()) == 2 and simple.until("end")[-1]["turn"] == 1
    simple.close()
    speaker.close()


@pytest.mark.parametrize(
    ("sent", "says", "code"),
    [
        ("no json", "JSON", "invalid_json"),
        ("[" * 100_000, "JSON", "invalid_json"),
        ("[]", "JSON object", "invalid_type"),
        ('{"event_id": "e"}', "no type", "missing_field"),
        ('{"type": "response.creat", "event_id": "e"}', "did you mean 'response.create'", "invalid_value"),
        ('{"type": "input_audio_buffer.append", "audio": "AA", "event_id": "e"}', "text only", "unsupported"),
        ('{"type": "output_audio_buffer.clear", "event_id": "e"}', "text only", "unsupported"),
        ('{"type": "response.create", "response": 5, "event_id": "e"}', "response", "invalid_type"),
        ('{"type": "response.create", "response": {"max_output_tokens": 0}}', '"inf"', "invalid_value"),
        ('{"type": "response.create", "response": {"tools": [{}]}}', "tools", "unsupported"),
        (
            '{"type": "response.create", "response": {"chat_template_kwargs": {"enable_thinking": false}}}',
            "a live session is written without",
            "unsupported",
        ),
        ('{"type": "response.create", "response": {"output_modalities": ["audio"]}}', "text only", "unsupported"),
        (
            '{"type": "response.create", "response": {"input": [{"type": "mesage"}]}}',
            "response.input[0]: expected 'item_reference', 'message' as 'type', got 'mesage'",
            "invalid_value",
        ),
        ('{"type": "response.create", "response": {"input": [{}]}}', "the field 'type', got none", "invalid_value"),
        ('{"type": "response.create"}', "no user message", "session_error"),
        ('{"type": "session.update", "session": {"voice": "alloy"}}', "voice", "unsupported"),
        ('{"type": "session.update", "session": {"audio": {"output": {"voice": "a"}}}}', "audio", "unsupported"),
        pytest.param(
            '{"type": "session.update", "session": {"audio": ' + '{"a": ' * 800 + "1" + "}" * 802,
            "audio is not supported",
            "unsupported",
            id="deep",
        ),
        ('{"type": "session.update", "session": {"model": "gpt-realtime"}}', "no model", "model_not_found"),
        ('{"type": "session.update", "session": {"truncation": "x"}}', '"auto"', "invalid_value"),
        ('{"type": "session.update", "session": {"temperature": NaN}}', "finite", "invalid_value"),
        ('{"type": "session.update"}', "required", "missing_field"),
        ('{"type": "conversation.item.create", "item": {"type": "function_call_output"}}', "items of", "unsupported"),
        (
            '{"type": "conversation.item.create", "item": {"type": "message", "role": "user"}}',
            "content",
            "missing_field",
        ),
        ('{"type": "conversation.item.truncate", "item_id": "a", "audio_end_ms": 9}', "no audio", "unsupported"),
        ('{"type": "conversation.item.delete", "item_id": "a"}', "no item 'a'", "item_not_found"),
        ('{"type": "input_text_buffer.append", "text": "\\ud800", "event_id": "e"}', "surrogate", "invalid_value"),
        ('{"type": "input_text_buffer.append", "txet": "a"}', "did you mean 'text'", "unknown_field"),
        ('{"type": "input_text_buffer.commit"}', "empty", "invalid_request"),
        ('{"type": "rekindle.session.pin", "ttl": "soon"}', "a time such as", "invalid_value"),
        (json.dumps({"type": "input_text_buffer.append", "text": "x" * (1 << 18)}), "at most", "body_too_large"),
        (b"bytes", "binary", "invalid_json"),
    ],
)
def test_what_makes_no_sense_is_answered_with_an_error(clients: Any, sent: Any, says: str, code: str) -> None:
    client = clients()
    client.socket.send(sent)
    error = client.error()
    assert says in error["message"] and error["code"] == code and error["type"] == "invalid_request_error"
    assert error["event_id"] == ("e" if '"event_id"' in str(sent) else None)
    assert client.ask(QUESTION)["output"]


@pytest.mark.parametrize(
    ("query", "status"),
    [("session=", 400), (f"session={'x' * 65}", 400), ("resume=nothing", 400), ("model=gpt-realtime", 404)],
)
def test_what_can_not_be_opened_is_refused_before_the_handshake(url: str, query: str, status: int) -> None:
    with pytest.raises(InvalidStatus) as refused:
        Realtime(url, query)
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body)["error"]["message"]


def test_who_does_not_read_is_hung_up_on(clients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = clients("session=slow")
    speaker.ask(QUESTION)
    monkeypatch.setattr(module, "OUTBOX", 2)
    tell_at_once(monkeypatch)
    with pytest.raises(ConnectionClosed) as closed:
        slow = clients(f"session=slow&last_event={speaker.heard[0]['event_id']}")
        while True:
            slow.next()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
    assert "last_event" in closed.value.rcvd.reason
    assert speaker.ask("Still here?")["output"]


def test_who_stops_reading_is_hung_up_on_when_the_pipes_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.3)
    with Service.open(Settings(engine="toy", store="none", context=8192)) as service, running(service) as url:
        lazy, other = Realtime(url, "session=lazy", compression=None, ping_interval=None), Realtime(url)
        lazy.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)  # else a system may take all of it
        lazy.item("word " * 1700, item={"id": "long"})
        while _num_listeners(url, "lazy"):
            for _ in range(20):  # each is answered with 8 kB, and no answer is read
                lazy.send("conversation.item.retrieve", item_id="long")
            assert other.ask("Still here?")["output"]
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                lazy.next()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        assert "nothing was read" in closed.value.rcvd.reason and "last_event" in closed.value.rcvd.reason
        lazy.close()
        other.close()


def _num_listeners(url: str, session: str) -> int:
    listed = httpx.get(f"{url}/status").json()["sessions"]
    return next(each["listeners"] for each in listed if each["session"] == session)


def _names(url: str) -> list[str]:
    return [each["session"] for each in httpx.get(f"{url}/status").json()["sessions"]]


def test_who_says_nothing_is_hung_up_on(clients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.1)
    with pytest.raises(ConnectionClosed) as closed:
        clients().next()  # or before anything was said
    assert (
        closed.value.rcvd is not None
        and closed.value.rcvd.code == 1000
        and "nothing was said" in closed.value.rcvd.reason
    )


def test_a_session_in_which_nothing_was_said_goes_with_its_client(clients: Any, url: str) -> None:
    silent, spoken = clients(), clients()
    spoken.ask(QUESTION)
    for client in (silent, spoken):
        client.close()
    eventually(lambda: silent.name not in _names(url))
    eventually(lambda: _num_listeners(url, spoken.name) == 0)
    clients()  # whoever comes next
    assert spoken.name in _names(url)


def test_sessions_that_nobody_comes_back_to_are_given_up(
    clients: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, named = clients(), clients("session=named")
    for client in (left, named):
        client.ask(QUESTION)
        client.close()
        eventually(lambda client=client: _num_listeners(url, client.name) == 0)  # type: ignore[misc]
    monkeypatch.setattr(module, "ABANDONED_SECONDS", -1.0)
    clients()
    names = _names(url)
    assert named.name in names and left.name not in names


def test_an_answer_that_ends_after_its_session_brings_nothing_of_it_back(clients: Any, tmp_path: Path) -> None:
    settings = Settings(engine="toy", context=1024, store=str(tmp_path))
    with Service.open(settings) as service, running(service) as url:
        client, steps = clients(url=url), Steps(service)
        said = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
        client.send("response.create", response={"input": [said]})
        client.last("response.created")
        client.send("conversation.item.create", item=said)  # waits for the end of the answer
        steps.wait_until_begun(1)
        client.close()
        steps.wait(lambda: steps.generations[0].cancelled)
        steps.let_all()
        steps.wait(lambda: steps.generations[0].end is not None)
        for _ in range(2):  # behind the answer's end, and behind what waited for it
            assert httpx.get(f"{url}/status").json()["sessions"] == []
        assert [path.name for path in (tmp_path / "sessions").rglob("*.json")] == []
        assert len(steps.generations) == 1, "nothing is read for it any more"


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    settings = Settings(engine="toy", store="none", api_key=("first", "second"), cors_origin=("https://ok.example",))
    with Service.open(settings) as service, running(service) as url:
        yield url


def test_keys_open_it_and_keep_sessions_apart(locked: str, clients: Any) -> None:
    with pytest.raises(InvalidStatus) as refused:
        Realtime(locked)
    assert refused.value.response.status_code == 401
    first = clients("session=a", url=locked, additional_headers={"Authorization": "Bearer first"})
    protocols = ["realtime", "openai-insecure-api-key.second"]
    second = clients("session=a", url=locked, subprotocols=protocols)
    assert second.socket.subprotocol == "realtime"
    first.ask(QUESTION)
    assert second.ask("Who else?")["usage"]["input_tokens"] > 0
    assert len(first.conversation()) == len(second.conversation()) == 2


def test_a_key_has_no_more_answers_at_a_time_than_it_may(clients: Any) -> None:
    settings = Settings(engine="toy", store="none", api_key=("first", "second"), max_per_key=1)
    with Service.open(settings) as service, running(service) as url:
        first, again = (clients(url=url, additional_headers={"x-api-key": "first"}) for _ in range(2))
        steps = Steps(service)
        first.begin(steps)
        again.item(QUESTION)
        for options in ({}, {"conversation": "none"}):
            again.send("response.create", response=options, event_id="more")
            error = again.error()
            assert (error["code"], error["event_id"]) == ("overloaded", "more")
        steps.let_all()
        first.send("response.cancel")
        first.until("response.done")
        for options in ({}, {"conversation": "none"}):  # each gives back what it has taken
            again.respond(**options)
        again.ask("Once more?")


@pytest.mark.parametrize(("origin", "is_let_in"), [("https://ok.example", True), ("https://evil.example", False)])
def test_pages_of_other_origins_are_refused(locked: str, clients: Any, origin: str, is_let_in: bool) -> None:
    headers = {"x-api-key": "first", "Origin": origin}
    if is_let_in:
        assert clients(url=locked, additional_headers=headers).created
        return
    with pytest.raises(InvalidStatus) as refused:
        Realtime(locked, additional_headers=headers)
    assert refused.value.response.status_code == 403


def test_sockets_are_told_when_the_server_stops() -> None:
    with Service.open(Settings(engine="toy", store="none")) as service:
        with running(service) as url:
            client = Realtime(url)
            client.ask(QUESTION)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                client.next()
        client.close()
        assert closed.value.rcvd is not None and closed.value.rcvd.code in (1001, 1012)


def _text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}
