"""A client of the realtime API with short words, over a real connection."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import httpx
from tests.api.steps import Steps
from websockets.sync.client import ClientConnection, connect

WAIT_SECONDS = 60
GREEDY = {"temperature": 0, "max_output_tokens": 6}
Event = dict[str, Any]


class Realtime:
    """One socket and what came through it."""

    def __init__(self, url: str, query: str = "", **options: Any) -> None:
        self._url = url
        self._stack = ExitStack()
        address = f"{url.replace('http', 'ws', 1)}/v1/realtime?{query}"
        self.socket: ClientConnection = self._stack.enter_context(
            connect(address, open_timeout=WAIT_SECONDS, proxy=None, **options)
        )
        self.heard: list[Event] = []
        self.created = self.next()
        assert self.created["type"] == "session.created"

    def close(self) -> None:
        self._stack.close()

    def drop(self) -> None:
        """As when the network fails: no goodbye."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    @property
    def name(self) -> str:
        name: str = self.created["session"]["rekindle"]["session"]
        return name

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind} | fields))

    def next(self) -> Event:
        event: Event = json.loads(self.socket.recv(timeout=WAIT_SECONDS))
        self.heard.append(event)
        return event

    def until(self, kind: str) -> list[Event]:
        """All events up to the next of this type. An error that is not waited for fails."""
        events = [self.next()]
        while events[-1]["type"] != kind:
            assert events[-1]["type"] != "error", events[-1]
            events.append(self.next())
        return events

    def last(self, kind: str) -> Event:
        return self.until(kind)[-1]

    def error(self) -> Event:
        error: Event = self.last("error")["error"]
        return error

    def until_read(self) -> None:
        """Wait until all that was told has been read; what comes too soon for that computes the rest itself."""
        wait_until_read(self._url)

    # What is often said.

    def item(self, text: str, role: str = "user", **fields: Any) -> Event:
        """Put a message into the conversation; returns it."""
        kind = "output_text" if role == "assistant" else "input_text"
        item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]} | fields.pop("item", {})
        self.send("conversation.item.create", item=item, **fields)
        made: Event = self.last("conversation.item.done")["item"]
        return made

    def respond(self, **fields: Any) -> Event:
        """Have it answered, greedily and shortly unless asked otherwise; returns the response."""
        self.send("response.create", response=GREEDY | fields)
        response: Event = self.last("response.done")["response"]
        return response

    def ask(self, text: str, **fields: Any) -> Event:
        self.item(text)
        return self.respond(**fields)

    def begin(self, steps: Steps) -> Event:
        """A long answer, of which something has come, and more only when the steps are let."""
        steps.hold()
        self.item("Go on for long.")
        self.send("response.create", response={"temperature": 0, "max_output_tokens": 800})
        response: Event = self.last("response.created")["response"]
        while self.heard[-1]["type"] != "response.output_text.delta":
            steps.let(1)
            with suppress(TimeoutError):
                self.heard.append(json.loads(self.socket.recv(timeout=0.02)))
        return response

    def kv(self) -> Event:
        """What the latest answer has cost."""
        return next(event for event in reversed(self.heard) if event["type"] == "rekindle.kv")

    def conversation(self) -> list[tuple[str, str]]:
        """Who has said what, by what was heard."""
        items: dict[str, tuple[str, str]] = {}
        order: list[str] = []
        for event in self.heard:
            if event["type"] == "conversation.item.done":
                item, previous = event["item"], event["previous_item_id"]
                items[item["id"]] = _said(item)
                if item["id"] not in order:
                    order.insert(0 if previous is None else order.index(previous) + 1, item["id"])
            elif event["type"] == "conversation.item.deleted" and event["item_id"] in items:
                order.remove(event["item_id"])
            elif "items" in event:  # the whole, as it is
                items, order = (
                    {item["id"]: _said(item) for item in event["items"]},
                    [item["id"] for item in event["items"]],
                )
            elif event["type"] == "conversation.item.truncated":
                items[event["item_id"]] = ("assistant", event["text"])
            elif event["type"] == "rekindle.conversation.forgotten":
                order = [each for each in order if each not in event["item_ids"]]
        self._order = order
        return [items[each] for each in order]

    def item_ids(self) -> list[str]:
        """Of the conversation, in order."""
        self.conversation()
        return self._order


def wait_until_read(url: str) -> None:
    """Until everything that the server's sessions were told is in the engine."""
    while any(each["reading"] for each in httpx.get(f"{url}/status").raise_for_status().json()["sessions"]):
        pass


def eventually(happened: Callable[[], bool]) -> None:
    """Wait until the server has come so far, of which it tells nobody."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"


def _said(item: Event) -> tuple[str, str]:
    return item["role"], "".join(part["text"] for part in item["content"])


def text_of(response: Event) -> str:
    """Of a response that is done."""
    return "".join(part["text"] for item in response["output"] for part in item["content"])
