"""Nonsense and events out of order on the realtime API, in any number: the session goes on, and nobody else hears of it."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import httpx
import pytest
from tests.api.realtime_client import Realtime

from rekindle.api.realtime_aside import messages_of
from rekindle.api.realtime_do import Commands
from rekindle.api.realtime_items import Item, _role
from rekindle.api.realtime_wire import TYPES, decode
from rekindle.errors import RekindleError
from rekindle.model.chunks import plain
from rekindle.serve.service import Service
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions

SEED = 11
BATCH = 50
VALUES: list[Any] = ["", "x", "😀" * 50, "\x00", 0, -1, 7, 10**30, 1.5, None, True, [], {}, "root", "inf", "main", [{}]]
NAMES = [
    "session",
    "response",
    "item",
    "item_id",
    "text",
    "previous_item_id",
    "response_id",
    "characters",
    "tokens",
    "audio_end_ms",
    "content_index",
    "context",
    "instructions",
    "ttl",
    "handle",
    "event_id",
]
ITEM_IDS = [f"wild {number}" for number in range(12)]


class Wild:
    """Makes events, from quite right to quite wrong."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)

    def message(self) -> str | bytes:
        kind = self.pick.random()
        if kind < 0.45:
            return json.dumps(self.sensible())
        if kind < 0.75:
            return json.dumps(self.mutilated(self.sensible()))
        if kind < 0.9:
            names = self.pick.sample(NAMES, 4)
            return json.dumps({"type": self.pick.choice(TYPES)} | {name: self.pick.choice(VALUES) for name in names})
        text = json.dumps(self.sensible())
        torn = text[: self.pick.randrange(len(text))]
        return self.pick.choice([torn, torn.encode(), "[" * 2000, '"\\ud800"', json.dumps(self.pick.choice(VALUES))])

    def sensible(self) -> dict[str, Any]:
        """An event that is right, at a time when it may be wrong."""
        pick = self.pick
        item = {
            "id": pick.choice(ITEM_IDS),
            "type": "message",
            "role": pick.choice(["user", "user", "assistant", "system"]),
            "content": [{"type": "input_text", "text": pick.choice(["Who?", "Where is it?", " ", "a " * 40])}],
        }
        if pick.random() < 0.3:
            item["content"].append({"type": "input_text", "text": "Vodris paints. " * 20, "cache": "chunk"})  # type: ignore[attr-defined]
        response = pick.choice([{}, {"conversation": "none"}, {"instructions": "Be brief."}, {"input": [item]}])
        blend = pick.choice([None, True, False, {"select": "none"}, {"select": "first", "ratio": 0.5}])
        response |= pick.choice([{}, {"rekindle": {"plan": True, "blend": blend}}])
        ratio = {"type": "retention_ratio", "retention_ratio": 0.5, "token_limits": {"post_instructions": 200}}
        session = pick.choice(
            [{"instructions": "Be kind."}, {"truncation": ratio}, {"truncation": "auto"}, {"seed": 1}]
        )
        events: list[dict[str, Any]] = [
            {
                "type": "conversation.item.create",
                "item": item,
                "previous_item_id": pick.choice([None, "root", *ITEM_IDS]),
            },
            {"type": "conversation.item.create", "item": item},
            {"type": "conversation.item.delete", "item_id": pick.choice(ITEM_IDS)},
            {"type": "conversation.item.retrieve", "item_id": pick.choice(ITEM_IDS)},
            {"type": "conversation.item.truncate", "item_id": pick.choice(ITEM_IDS), "characters": pick.randrange(9)},
            {"type": "response.create", "response": {"max_output_tokens": pick.randrange(1, 20)} | response},
            {"type": "response.cancel"},
            {"type": "session.update", "session": session},
            {"type": "input_text_buffer.append", "text": "Who "},
            {"type": "input_text_buffer.replace", "text": "Where is"},
            {"type": "input_text_buffer.commit"},
            {"type": "input_text_buffer.clear"},
            {"type": "rekindle.context.swap", "context": pick.choice(["main", "other"]), "instructions": "Be other."},
            {"type": "rekindle.context.create", "context": "other", "instructions": "Be other."},
            {"type": "rekindle.session.pin", "ttl": "1s"},
        ]
        return pick.choice(events)

    def mutilated(self, event: dict[str, Any]) -> dict[str, Any]:
        """Something of it is missing, or another."""
        part = event
        while True:
            inner = [value for value in part.values() if isinstance(value, dict) and value]
            if not inner or self.pick.random() < 0.4:
                break
            part = self.pick.choice(inner)
        name = self.pick.choice(list(part))
        if self.pick.random() < 0.3:
            del part[name]
        else:
            part[name] = self.pick.choice(VALUES)
        return event


@pytest.mark.parametrize("count", [500, pytest.param(4_000, marks=pytest.mark.slow)])
def test_nonsense_in_any_number_disturbs_nobody(url: str, http: httpx.Client, service: Service, count: int) -> None:
    make = Wild(SEED)
    quiet, wild = (Realtime(url, f"session={name}-realtime-{count}") for name in ("quiet", "wild"))
    before = quiet.ask("Who paints in orange?")["output"][0]["content"]
    num_heard = len(quiet.heard)
    for number in range(count // BATCH):
        for _ in range(BATCH):
            wild.socket.send(make.message())
        wild.send("conversation.item.retrieve", item_id="over", event_id=f"over {number}")
        while (event := wild.next())["type"] != "error" or event["error"]["event_id"] != f"over {number}":
            assert event.get("error", {}).get("code") != "internal_error", f"seed {SEED}, batch {number}"
    quiet.send("conversation.item.retrieve", item_id="nothing")
    assert quiet.error() and len(quiet.heard) == num_heard + 1
    assert http.get("/health").json()["status"] == "ok"
    for item in [event["item"]["id"] for event in quiet.heard if event["type"] == "conversation.item.done"]:
        quiet.send("conversation.item.delete", item_id=item)
        quiet.until("conversation.item.deleted")
    assert quiet.ask("Who paints in orange?")["output"][0]["content"] == before, f"seed {SEED}"
    told = num_told(wild, "all over")
    while True:
        last = Realtime(url, f"session=wild-realtime-{count}")
        resumed = last.last("rekindle.session.resumed")
        last.close()
        before, told = told, num_told(wild, "all over")
        if (
            told == before + 1 and resumed["response"] is None
        ):  # nothing has happened meanwhile, and no answer is coming
            break
    assert [item["id"] for item in resumed["items"]] == wild.item_ids(), f"seed {SEED}"
    for client in (quiet, wild):
        client.close()
    service.check_integrity()


def num_told(client: Realtime, event_id: str) -> int:
    """All that there is to be told it by now."""
    client.send("conversation.item.retrieve", item_id="over", event_id=event_id)
    while (event := client.next())["type"] != "error" or event["error"]["event_id"] != event_id:
        pass
    return len(client.heard)


@pytest.mark.parametrize("seed", range(3))
def test_items_and_turns_agree_whatever_comes(service: Service, seed: int) -> None:
    make = Wild(seed)
    with Sessions(service) as sessions:
        session = sessions.call(lambda: sessions.open("wild")).result()
        commands = Commands(service, sessions, session, is_private=False)
        sessions.call(commands.conversation.wake).result()
        sessions.call(lambda: commands.conversation.attach(lambda told: None)).result()
        for number in range(600):
            with contextlib.suppress(RekindleError):
                event = decode(make.mutilated(make.sensible()) if make.pick.random() < 0.2 else make.sensible())
                sessions.call(lambda event=event: commands.obey(event, lambda told: None)).result()  # type: ignore[misc]
            said, known = sessions.call(lambda: (said_in(commands), known_to(session))).result()
            assert said == known, f"seed {seed}, event {number}"
        sessions.call(commands.close).result()


def said_in(commands: Commands) -> list[dict[str, str]]:
    """Instructions and items as messages, but for an answer under way; marked or not."""
    items = [item for item in commands.conversation.items if item.status != "in_progress"]
    messages = messages_of(commands.conversation.instructions, items)
    return [message | {"content": plain(message["content"])} for message in messages]


def known_to(session: Session) -> list[dict[str, str]]:
    """Head and turns as messages."""
    said = [*session.context.head, *session.context.messages]
    items = [Item(_role(message["role"]), message["content"]) for message in said]
    return messages_of("", items)
