"""Live clients for a soak: they type, ask, cut answers off, vanish in the middle of one, and come back.

On `/ws` and on `/v1/realtime` in turn. A client keeps a session over many connections: each time it comes back by the
session's name or by its handle, mostly with the number of the last event it got, as after a failing network. Now and then
it leaves a session for good and begins another, so that there are soon as many as the server may have.

What may come of a message is its answer, or 429 where the queue is full; of a handle an error where the folder with the
session has had bad luck. Whatever else is a fault; an answer that has not ended after `PATIENCE_SECONDS` is stuck.
"""

from __future__ import annotations

import asyncio
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from rekindle.lab.soak.load import BACK_OFF_SECONDS, BUSY, PATIENCE_SECONDS, Kind, Tally

TALKERS = 4
_BUSY = ("overloaded", "conversation_already_has_active_response")  # one that a lost connection has left
_MOST_MESSAGES = 6  # of a connection
_FOR_GOOD = 0.1  # of connections after which another session is begun
_KNOWN_HANDLE = 0.5  # of those that come back, which do so by the handle

Event = dict[str, Any]
Way = Literal["wait", "cut off", "drop"]


class Refused(Exception):
    """The server has said no, with this code."""


class _Talker(ABC):
    """One client, with one session at a time."""

    path = ""

    def __init__(self, number: int, seed: int, url: str, tally: Tally) -> None:
        self._random = random.Random(f"{seed} {number}")
        self._name = f"talker-{number}"
        self._url = url.replace("http", "ws", 1)
        self._tally = tally
        self._begun = self._said = 0  # sessions and messages
        self._handle: str | None = None
        self._last: str | None = None  # event of this session
        self._socket: ClientConnection

    async def run(self, enough: Callable[[Tally], bool]) -> None:
        """Connection after connection."""
        while not enough(self._tally):
            query = self._query()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._connect(query)
            except TimeoutError:
                self._tally.add("stuck", f"{self.path}: an answer has not ended")
            except InvalidStatus as refusal:
                await self._turned_away(query, refusal.response.status_code)
            except (ConnectionClosed, OSError, Refused) as error:
                self._tally.add("faulty", f"{self.path}: {type(error).__name__} {error}")

    def _query(self) -> dict[str, str]:
        if self._random.random() < _FOR_GOOD:
            self._begun += 1
            self._handle = self._last = None
        if self._handle is not None and self._random.random() < _KNOWN_HANDLE:
            query = {"resume": self._handle}
        else:
            query = {"session": f"{self._name}-{self._begun}"}
        return query | ({"last_event": self._last} if self._last is not None and self._random.random() < 0.8 else {})

    async def _turned_away(self, query: dict[str, str], status: int) -> None:
        """At the door."""
        if status == BUSY:
            self._tally.add("busy")
            await asyncio.sleep(BACK_OFF_SECONDS)
        elif "resume" in query and 400 <= status < 500:
            self._tally.add("refused")
            self._handle = self._last = None
            self._begun += 1
        else:
            self._tally.add("faulty", f"{self.path} got {status} for {query}")

    async def _connect(self, query: dict[str, str]) -> None:
        async with connect(f"{self._url}{self.path}?{urlencode(query)}", proxy=None, open_timeout=None) as self._socket:
            self._handle = self._welcomed(await self._next())
            if "resume" in query or self._last is not None:
                self._tally.add("resumed")
            await self._begin()
            for _ in range(self._random.randrange(1, _MOST_MESSAGES + 1)):
                way: Way = self._random.choices(("wait", "cut off", "drop"), (5, 3, 1))[0]
                if not await self._exchange(way):
                    break
            if self._random.random() < 0.3:
                self._socket.transport.abort()

    async def _exchange(self, way: Way) -> bool:
        """Say something and hear the answer, in this way; False if that was the end of the connection."""
        self._said += 1
        text = f"{self._said}. " + " ".join(self._random.choices(("Vodris", "paints", "in", "orange.", "Who?"), k=12))
        await self._say(text, [text[: len(text) // 3], text[: len(text) // 2]][: self._random.randrange(3)])
        await self._ask(text)
        if way == "drop" and self._random.random() < 0.5:
            return self._drop()
        while (came := await self._hear(way)) == "busy":
            self._tally.add("busy")
            await asyncio.sleep(BACK_OFF_SECONDS)
            await self._ask(text)
        if came == "left":
            return self._drop()
        self._tally.add(came)
        return True

    async def _hear(self, way: Way) -> Kind:
        """What comes of a question. Raises Refused for what may not."""
        is_cut = False
        while not self._is_over(event := await self._next()):
            if (code := self._error(event)) in _BUSY:
                return "busy"
            if code and not self._is_late(code, is_cut):
                raise Refused(json.dumps(event))
            if self._is_token(event) and way == "drop":
                return "left"
            if self._is_token(event) and way == "cut off" and not is_cut:
                is_cut = True
                await self._cut_off()
        if (code := self._failed(event)) in _BUSY:
            return "busy"
        if code:
            raise Refused(json.dumps(event))
        return "cut off" if is_cut else "talked"

    def _drop(self) -> bool:
        """As when the network fails: no goodbye."""
        self._tally.add("left")
        self._socket.transport.abort()
        return False

    async def _next(self) -> Event:
        event: Event = json.loads(await self._socket.recv())
        self._last = self._number(event) or self._last
        return event

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": kind} | fields))

    def _error(self, event: Event) -> str:
        return str(event["error"].get("code") or event["error"]) if event["type"] == "error" else ""

    @abstractmethod
    def _welcomed(self, event: Event) -> str | None:
        """The session's handle, from the first event."""

    @abstractmethod
    async def _begin(self) -> None:
        """Put in order what the last connection may have left."""

    @abstractmethod
    def _number(self, event: Event) -> str | None:
        """By which it is asked for what follows."""

    @abstractmethod
    async def _say(self, text: str, drafts: list[str]) -> None:
        """Have it read while it grows."""

    @abstractmethod
    async def _ask(self, text: str) -> None:
        """For an answer to what was said; once more if it was refused."""

    @abstractmethod
    async def _cut_off(self) -> None:
        """The answer."""

    @abstractmethod
    def _is_late(self, code: str, is_cut: bool) -> bool:
        """Whether this error only says that what was to be cut off has ended meanwhile."""

    @abstractmethod
    def _is_token(self, event: Event) -> bool:
        """Whether it is some of the answer."""

    @abstractmethod
    def _is_over(self, event: Event) -> bool:
        """Whether it is the answer's end."""

    def _failed(self, event: Event) -> str:
        """The code of what an answer has ended with, if it failed."""
        return ""


class Simple(_Talker):
    """On the simple socket."""

    path = "/ws"
    _turn = -1  # of the message that is answered

    def _welcomed(self, event: Event) -> str | None:
        handle: str | None = event["detail"]["handle"]
        return handle

    async def _begin(self) -> None:
        """A message puts an end to an answer, and takes the draft's place."""

    def _number(self, event: Event) -> str | None:
        return str(event["event"]) if "event" in event else None

    async def _say(self, text: str, drafts: list[str]) -> None:
        draw = self._random.random()
        if draw < 0.05:
            await self._send("reset")
        elif draw < 0.1:
            await self._send("context", context="aside", instructions="Be brief.")
        elif draw < 0.2:
            await self._send("swap", context="main")
        for draft in drafts:
            await self._send("partial", data=draft)

    async def _ask(self, text: str) -> None:
        self._turn = -1
        await self._send("message", data=text, max_tokens=self._random.choice((1, 8, 24)), temperature=0)

    async def _cut_off(self) -> None:
        await self._send("interrupt", characters=self._random.randrange(4))

    def _is_late(self, code: str, is_cut: bool) -> bool:
        return is_cut and code == "session_error"

    def _is_token(self, event: Event) -> bool:
        # what was not answered before is part of the same turn
        if event["type"] == "user_input" and event["data"].rpartition("\n")[2].startswith(f"{self._said}."):
            self._turn = event["turn"]
        return (event["type"], event.get("turn")) == ("token", self._turn)

    def _is_over(self, event: Event) -> bool:
        return (event["type"], event.get("turn")) == ("end", self._turn)


class Realtime(_Talker):
    """On OpenAI's."""

    path = "/v1/realtime"
    _response = ""  # id of the one that is waited for

    def _welcomed(self, event: Event) -> str | None:
        handle: str | None = event["session"]["rekindle"].get("handle")
        return handle

    def _number(self, event: Event) -> str | None:
        return str(event["event_id"])

    async def _begin(self) -> None:
        """An answer that was left is cut off, a message that was left unfinished is forgotten."""
        await self._send("response.cancel")
        await self._send("input_text_buffer.clear")
        while (event := await self._next())["type"] != "input_text_buffer.cleared":
            if (code := self._error(event)) and not self._is_late(code, True):
                raise Refused(json.dumps(event))

    async def _say(self, text: str, drafts: list[str]) -> None:
        for draft in drafts:
            await self._send("input_text_buffer.replace", text=draft)
        await self._send("input_text_buffer.replace", text=text)
        await self._send("input_text_buffer.commit")

    async def _ask(self, text: str) -> None:
        wish = {"max_output_tokens": self._random.choice((1, 8, 24)), "temperature": 0}
        await self._send("response.create", response=wish | {"metadata": {"said": str(self._said)}})

    async def _cut_off(self) -> None:
        await self._send("response.cancel")

    def _is_late(self, code: str, is_cut: bool) -> bool:
        return code == "response_cancel_not_active"  # which may be told once more to who comes back

    def _is_token(self, event: Event) -> bool:
        if event["type"] == "response.created" and event["response"]["metadata"] == {"said": str(self._said)}:
            self._response = event["response"]["id"]
        return (event["type"], event.get("response_id")) == ("response.output_text.delta", self._response)

    def _is_over(self, event: Event) -> bool:
        return event["type"] == "response.done" and str(event["response"]["id"]) == self._response

    def _failed(self, event: Event) -> str:
        response = event.get("response", {})
        is_failed = event["type"] == "response.done" and response["status"] == "failed"
        return str((response["status_details"].get("error") or {}).get("code", "failed")) if is_failed else ""


async def talk(url: str, seed: int, *, talkers: int, enough: Callable[[Tally], bool], tally: Tally) -> None:
    """So many clients talk until it is enough."""
    kinds = (Simple, Realtime)
    clients = [kinds[number % len(kinds)](number, seed, url, tally) for number in range(talkers)]
    await asyncio.gather(*(client.run(enough) for client in clients))
