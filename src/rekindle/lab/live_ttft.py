"""The time to the first token of a message in a long conversation, by what was known of the message before it was sent.

    increments   typed word by word into a live session, then sent
    revised      shown to a live session, its second half revised a moment later, then sent
    commit       sent to a live session that knew nothing of it
    chat         sent with the whole conversation to /v1/chat/completions, here
    peer         the same to llama-server

Each message is new, has the same number of characters, and meets the same conversation: live sessions go back to where
they were, and chats are asked with the same messages before. So what has to be computed after the message was sent is
nothing, nothing, the message, the message, and the message. The arms take turns, message by message, both servers running
all the time, one of them idle.

TTFT runs in the client, from before the message is written to a socket until its first piece of text was read. The limit is
the time of one decode step, which no answer that needs a model call can be faster than; a first token whose logits are
known already needs none. A decode step is the median time between two pieces of text of the same arm's answers; it can't
be faster than reading all weights from memory, which is printed beside it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from rekindle.errors import RekindleError
from rekindle.lab.decode import weight_bytes_per_token
from rekindle.lab.load.client import ServerError, Target, reason_of
from rekindle.lab.load.servers import Setup, find_model, peer_starter, rekindle_server
from rekindle.lab.load.texts import Texts, words
from rekindle.lab.machine import read_bandwidth, usable_cores

LIVE = ("increments", "revised", "commit")
_ROOM = 1024  # cells beside the conversation's
_WAIT_SECONDS = 300.0
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, and how."""

    model: Path
    threads: int
    samples: int = 20  # messages of each arm
    conversation_tokens: int = 3000
    characters: int = 60  # of a message
    answer_tokens: int = 16
    gap_seconds: float = 0.4  # between two words, between a draft and its revision, and before the message is sent
    peer: str | None = None


@dataclass
class Arm:
    """One way to send a message, and what came of it."""

    name: str
    ttft_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # between pieces of text
    computed: list[int] = field(default_factory=list)  # prompt tokens that the answer had computed for it
    calls: list[int] = field(default_factory=list)  # of the model before the first token, where that is told

    @property
    def step_ms(self) -> float:
        """Of decoding, in the median."""
        return float(np.median(self.gaps_ms)) if self.gaps_ms else float("nan")

    def percentile(self, share: float) -> float:
        """Of TTFT, in milliseconds."""
        return float(np.percentile(self.ttft_ms, share))

    @property
    def steps(self) -> float:
        """TTFT in decode steps, both in the median."""
        return self.percentile(50) / self.step_ms

    @property
    def as_dict(self) -> dict[str, Any]:
        return {
            "arm": self.name,
            "messages": len(self.ttft_ms),
            "ttft_p50_ms": round(self.percentile(50), 2),
            "ttft_p95_ms": round(self.percentile(95), 2),
            "ttft_max_ms": round(max(self.ttft_ms), 2),
            "decode_step_ms": round(self.step_ms, 2),
            "ttft_in_steps": round(self.steps, 2),
            "computed_tokens": None if not self.computed else float(np.median(self.computed)),
            "prefill_calls": None if not self.calls else float(np.median(self.calls)),
        }


@dataclass(frozen=True)
class Ttft:
    """All arms, and the limit."""

    plan: Plan
    arms: tuple[Arm, ...]
    conversation_tokens: int  # as the server counted
    least_step_ms: float  # weights of a decode step over the memory's bandwidth


def make_plan(model: str, *, threads: int | None = None, **sizes: Any) -> Plan:
    """Raises ModelError for a model that is not there."""
    return Plan(model=find_model(model), threads=threads or usable_cores(), **sizes)


def measure_ttft(plan: Plan, progress: Progress = lambda arm, done, total: None) -> Ttft:
    """Start the servers and ask. Raises ServerError, InvalidRequest."""
    setup = Setup(model=plan.model, threads=plan.threads, context=plan.conversation_tokens + _ROOM, parallel=2)
    bandwidth = read_bandwidth(plan.threads)
    with ExitStack() as servers:
        here = servers.enter_context(rekindle_server(setup)).url
        peer = None if plan.peer is None else servers.enter_context(peer_starter(plan.peer, setup)()).url
        return asyncio.run(_Measurement(plan, here, peer, progress).run(bandwidth))


class _Measurement:
    """Asks two servers in turn."""

    def __init__(self, plan: Plan, here: str, peer: str | None, progress: Progress) -> None:
        self._plan, self._here, self._peer, self._progress = plan, here, peer, progress
        self._number = 0

    async def run(self, bandwidth: float) -> Ttft:
        plan, here = self._plan, Target(self._here)
        peer = None if self._peer is None else Target(self._peer)
        await asyncio.gather(*(each.connect() for each in (here, peer) if each is not None))
        texts = Texts(seed=0, tokens_per_word=await here.tokens_per_word())
        head = texts.text("conversation", plan.conversation_tokens)
        arms = [Arm(name) for name in (*LIVE, "chat", *(["peer"] if peer else []))]
        chats = {"chat": here, "peer": peer}
        async with _Live(self._here) as live:
            await live.begin(head)
            for number in range(-1, plan.samples):  # the first is not counted: all begin as warm
                for arm in arms:
                    self._progress(arm.name, max(0, number), plan.samples)
                    target = chats.get(arm.name)
                    counted = arm if number >= 0 else Arm(arm.name)
                    if target is None:
                        await self._live(live, counted)
                    else:
                        await self._chat(target, head, counted)
            tokens = await live.num_tokens()
        for each in (here, peer):
            if each is not None:
                await each.__aexit__(None, None, None)
        least = 1e3 * weight_bytes_per_token(plan.model) / bandwidth
        return Ttft(plan, tuple(arms), tokens, least)

    def _message(self) -> str:
        """A new one, of so many characters, that ends with a word."""
        self._number += 1
        size = self._plan.characters
        text = words(f"message {self._number}", size)[:size]
        return text if text[-1] != " " else f"{text[:-1]}s"

    async def _live(self, live: _Live, arm: Arm) -> None:
        plan, message = self._plan, self._message()
        for draft in _drafts(arm.name, message):
            await live.send({"type": "partial", "data": draft})
            await asyncio.sleep(plan.gap_seconds)
        await live.ask(message, plan.answer_tokens, arm)
        await live.go_back()

    async def _chat(self, target: Target, head: str, arm: Arm) -> None:
        messages = [{"role": "system", "content": head}, {"role": "user", "content": self._message()}]
        answer = await target.ask(messages, self._plan.answer_tokens)
        if answer.error is not None or answer.ttft is None:
            raise ServerError(f"{target.url}: {answer.error or 'no text came'}")
        arm.ttft_ms.append(1e3 * answer.ttft)
        arm.gaps_ms += [1e3 * gap for gap in answer.gaps]
        if answer.computed_tokens is not None:
            arm.computed.append(answer.computed_tokens)


def _drafts(arm: str, message: str) -> Sequence[str]:
    """What a session is shown of a message before it is sent."""
    if arm == "increments":
        parts = message.split(" ")
        return [" ".join(parts[: count + 1]) for count in range(len(parts))]
    half = message.rfind(" ", 0, len(message) // 2)
    misheard = message[:half] + words(f"misheard {message}", len(message))[: len(message) - half]
    return [misheard, message] if arm == "revised" else []


class _Live:
    """A live session on a simple socket."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._context = "conversation"

    async def __aenter__(self) -> _Live:
        address = self._url.replace("http", "ws", 1) + "/ws?session=lab"
        self._socket: ClientConnection = await connect(address, proxy=None, max_size=None)
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._socket.close()

    async def send(self, message: dict[str, Any]) -> None:
        await self._socket.send(json.dumps(message))

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await asyncio.wait_for(self._socket.recv(), _WAIT_SECONDS))
        if message["type"] == "error":
            raise RekindleError(f"the session said: {reason_of(message)}")
        return message

    async def _until(self, kind: str) -> dict[str, Any]:
        while True:
            message = await self._next()
            if kind in (message["type"], message.get("kind")):
                return message

    async def begin(self, head: str) -> None:
        """Have the conversation read."""
        await self.send({"type": "context", "context": self._context, "instructions": head})
        await self.send({"type": "swap", "context": self._context})
        await self._until("swapped")

    async def ask(self, message: str, max_tokens: int, arm: Arm) -> None:
        """Send it, and hear the whole answer."""
        text = json.dumps({"type": "message", "data": message, "max_tokens": max_tokens, "temperature": 0})
        began, arrivals = time.perf_counter(), []  # clock on
        await self._socket.send(text)
        while (heard := await self._next())["type"] != "end":
            if heard["type"] == "token" and heard["data"]:
                arrivals.append(time.perf_counter())  # clock off, for the first, and for each
        if not arrivals:
            raise RekindleError("the session answered nothing")
        arm.ttft_ms.append(1e3 * (arrivals[0] - began))
        arm.gaps_ms += [1e3 * (after - before) for before, after in pairwise(arrivals)]
        arm.computed.append(heard["usage"]["computed_tokens"])
        arm.calls.append(heard["timings"]["prefill_calls"])

    async def go_back(self) -> None:
        """To where the conversation was, and wait until nothing is read any more."""
        await self.send({"type": "rewind", "turn": 0})
        await self._until("rewound")
        while (await self._status())["reading"]:
            await asyncio.sleep(0.01)

    async def num_tokens(self) -> int:
        return int((await self._status())["tokens"])

    async def _status(self) -> dict[str, Any]:
        async with httpx.AsyncClient(trust_env=False) as http:
            listed = (await http.get(f"{self._url}/status")).json()["sessions"]
        return next(each for each in listed if each["session"] == "lab")
