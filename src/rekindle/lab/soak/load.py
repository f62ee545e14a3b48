"""Clients of every kind at once: patient ones, ones that leave, ones that ask for what can't be.

Everything is drawn from one seed, so that a failure can be played again as far as the timing allows. Prompts begin with one
of a few beginnings, as they do in life, so that all kinds of reuse happen; answers are short, so that much happens.

What may come of a request is decided when it is made: an answer, a refusal with a 4xx, nothing because the client left, or
429 because the queue is full. Anything else is a fault, and one that has not ended after `PATIENCE_SECONDS` is stuck.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

PATIENCE_SECONDS = 120.0
BUSY, UNAVAILABLE = 429, 503
BACK_OFF_SECONDS = 0.05  # less than the server asks for, so that the queue stays full
_KEPT_FAULTS = 20
_BEGINNINGS = 6
_LOWEST_ID, _IDS = 300, 1500  # token ids that the built-in model's vocabulary has

Json = dict[str, Any]
Kind = Literal["answered", "left", "refused", "busy", "talked", "cut off", "resumed", "faulty", "stuck"]


@dataclass(frozen=True)
class Wish:
    """One request, and what should come of it."""

    path: str
    body: Json | bytes
    stream: bool = False
    leaves_after: float | None = None  # seconds until the client goes; None: it stays
    refused: bool = False  # the server must say no
    refusable: bool = False  # it may: no more can be pinned
    known: tuple[int, ...] | None = None  # the prompt of a greedy answer, which must always be the same


@dataclass
class Tally:
    """What came of all requests."""

    kinds: Counter[Kind] = field(default_factory=Counter)
    faults: list[tuple[Kind, str]] = field(default_factory=list)  # the first few, in words
    answers: dict[tuple[int, ...], str] = field(default_factory=dict)  # greedy ones, by prompt

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def add(self, kind: Kind, why: str = "") -> None:
        self.kinds[kind] += 1
        if kind in ("faulty", "stuck") and len(self.faults) < _KEPT_FAULTS:
            self.faults.append((kind, why))

    def of(self, kind: Kind) -> list[str]:
        """What went wrong in this way, in words."""
        return [why for each, why in self.faults if each == kind]


class Wishes:
    """Draws requests for a server whose context has so many cells."""

    def __init__(self, seed: int, cells: int) -> None:
        self._random = random.Random(seed)
        self._cells = cells
        self._beginnings = [self._ids(cells // 3) for _ in range(_BEGINNINGS)]

    def next(self) -> Wish:
        draw = self._random.random()
        if draw < 0.08:
            return self._bad()
        if draw < 0.12:
            return self._aside()
        wish = self._chat() if draw < 0.4 else self._completion()
        if self._random.random() < 0.25:
            return replace(wish, leaves_after=self._random.choice((0.0, 0.01, 0.1, 0.5)))
        return wish

    def _ids(self, count: int) -> list[int]:
        return [_LOWEST_ID + self._random.randrange(_IDS) for _ in range(count)]

    def _prompt(self) -> list[int]:
        beginning = self._random.choice(self._beginnings)
        shared = self._random.choice((len(beginning), self._random.randrange(1, len(beginning))))
        return beginning[:shared] + self._ids(self._random.choice((0, 0, 1, 5, 40)))

    def _sampling(self) -> Json:
        wish: Json = {"max_tokens": self._random.choice((1, 2, 8, 24)), "priority": self._random.randrange(-2, 3)}
        style = self._random.randrange(5)
        if style == 0:
            wish |= {"temperature": 1.0, "top_p": 0.9, "seed": self._random.randrange(100)}
        elif style == 1:
            wish |= {"temperature": 0.7, "top_k": 40, "frequency_penalty": 0.5, "ignore_eos": True}
        else:
            wish |= {"temperature": 0.0, "ignore_eos": True}
        if self._random.random() < 0.1:
            wish["cache_salt"] = self._random.choice(("a", "b"))
        return wish

    def _completion(self) -> Wish:
        prompt, wish = self._prompt(), self._sampling()
        known = None
        if wish["temperature"] == 0.0:
            known = (wish["max_tokens"], *prompt)
        if self._random.random() < 0.1:
            wish |= {"n": 3}
        if self._random.random() < 0.1:
            wish |= {"logprobs": 3}
        stream = self._random.random() < 0.5
        return Wish("/v1/completions", wish | {"prompt": prompt, "stream": stream}, stream, known=known)

    def _chat(self) -> Wish:
        text = " ".join(self._random.choice(("Vodris", "paints", "in", "orange.")) for _ in range(self._cells // 40))
        messages = [{"role": "user", "content": text}]
        if self._random.random() < 0.4:
            messages += [{"role": "assistant", "content": "In orange."}, {"role": "user", "content": "Who?"}]
        wish: Json = {"messages": messages}
        if self._random.random() < 0.1:
            wish["response_format"] = {"type": "json_object"}
        if self._random.random() < 0.1:
            wish["rekindle"] = {"pin": "1s", "plan": True, "timings": True}
        stream = self._random.random() < 0.5
        body = self._sampling() | wish | {"stream": stream}
        return Wish("/v1/chat/completions", body, stream, refusable="rekindle" in wish)

    def _bad(self) -> Wish:
        path = "/v1/completions"
        bodies: Iterable[Json | bytes] = (
            b'{"prompt": ',
            {"prompt": self._ids(self._cells + 1)},
            {"prompt": [-1]},
            {"prompt": ""},
            {"prompt": "Hello", "temperature": "warm"},
            {"prompt": "Hello", "priority": 1.5},
            {"prompt": "Hello", "max_tokens": 0},
            {"prompt": "Hello", "logit_bias": {"99999999": 1.0}},
        )
        return Wish(path, self._random.choice(list(bodies)), refused=True)

    def _aside(self) -> Wish:
        """What else happens on a server: somebody looks, somebody clears."""
        path = self._random.choice(("/health", "/metrics", "/cache/stats", "/v1/models", "/cache/clear"))
        return Wish(path, {})


async def drive(
    url: str,
    wishes: Wishes,
    *,
    clients: int,
    enough: Callable[[Tally], bool],
    tally: Tally,
    exact: bool,
) -> None:
    """So many clients ask one after the other until it is enough. With `exact`, a greedy answer may never change."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(PATIENCE_SECONDS), limits=limits) as client:

        async def one() -> None:
            while not enough(tally):
                await _fulfil(client, wishes.next(), tally, exact)

        await asyncio.gather(*(one() for _ in range(clients)))


async def _fulfil(client: httpx.AsyncClient, wish: Wish, tally: Tally, exact: bool) -> None:
    try:
        if wish.leaves_after is None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                status, text = await _ask(client, wish)
        else:
            status, text = await _ask_and_leave(client.base_url, wish)
    except TimeoutError:
        tally.add("stuck" if wish.leaves_after is None else "left", f"{wish.path} has not ended")
        return
    except httpx.HTTPError as error:
        tally.add("faulty", f"{wish.path}: {type(error).__name__} {error}")
        return
    _judge(wish, status, text, tally, exact)
    if status == BUSY:
        await asyncio.sleep(BACK_OFF_SECONDS)


async def _ask_and_leave(url: httpx.URL, wish: Wish) -> tuple[int, str]:
    """On a connection of its own, which is closed for certain: a pool keeps some whose request was broken off."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, verify=False) as client:
        async with asyncio.timeout(wish.leaves_after):
            return await _ask(client, wish)


async def _ask(client: httpx.AsyncClient, wish: Wish) -> tuple[int, str]:
    if wish.path in ("/health", "/metrics", "/cache/stats", "/v1/models"):
        response = await client.get(wish.path)
        return response.status_code, response.text
    content = {"content": wish.body} if isinstance(wish.body, bytes) else {"json": wish.body}
    headers = {"content-type": "application/json"}
    async with client.stream("POST", wish.path, headers=headers, **content) as response:
        pieces = [piece async for piece in response.aiter_text()]
    return response.status_code, "".join(pieces)


def _judge(wish: Wish, status: int, text: str, tally: Tally, exact: bool) -> None:
    if status == BUSY:
        tally.add("busy")
    elif wish.path == "/cache/clear" and status == UNAVAILABLE:  # its folder has just had bad luck
        tally.add("refused")
    elif wish.refused or (wish.refusable and status == 400):
        tally.add("refused" if 400 <= status < 500 else "faulty", f"{wish.path} got {status} for a bad request: {text}")
    elif status != 200 or (wish.stream and '"error"' in text):
        tally.add("faulty", f"{wish.path} got {status}: {text[-300:]}")
    elif exact and wish.known is not None and not wish.stream and not _is_the_same(wish.known, text, tally):
        tally.add("faulty", f"{wish.path}: another answer than before to the same prompt")
    else:
        tally.add("answered")


def _is_the_same(known: tuple[int, ...], text: str, tally: Tally) -> bool:
    answer = str(httpx.Response(200, text=text).json()["choices"][0]["text"])
    return tally.answers.setdefault(known, answer) == answer
