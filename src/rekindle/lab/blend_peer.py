"""The same prompts over HTTP: `rekindle serve` blending, and llama-server with `--cache-reuse`.

llama-server shifts KV of its own last prompt: after the common beginning it looks for the next run of at least 256 equal
tokens further on in the prompt that its slot holds, moves it, and goes on behind it. It computes nothing anew, what it has
skipped is lost, and it never looks back, so of a permutation it finds an ascending part only. What it reused is told by
its own `timings.cache_n`.

Both get the same text, chunks with a separator between them, and are asked for one token; the clock is the client's. Each
server runs alone. `full` is each server's own reading of the whole prompt with reuse switched off; llama-server does that
in a slot of its own, so that the other slot keeps the prompt of the round before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from rekindle.lab.blend_speed import SEPARATOR, Asked, SpeedArm, Tell, Texts, arms_of
from rekindle.lab.load.client import ServerError
from rekindle.lab.load.servers import PEER, Server, Setup, peer_starter, rekindle_server

REUSE_TOKENS = 256  # shortest run that llama-server moves
_TIMEOUT = 3600.0


def measure_peer(
    model: Path,
    texts: Texts,
    *,
    peer: str,
    threads: int,
    context: int,
    ratio: float,
    rounds: int,
    seed: int = 0,
    tell: Tell = lambda what: None,
) -> tuple[tuple[SpeedArm, ...], str]:
    """Arms of both servers, and what the second one reused, in words. Raises ServerError, InvalidRequest."""
    setup = Setup(model=model, threads=threads, context=context, parallel=2)
    name = "n_cache_reuse" if peer == PEER else "cache_reuse"
    start_peer = peer_starter(peer, replace(setup, options={name: REUSE_TOKENS}))
    with rekindle_server(setup, REKINDLE_CHUNK_SEPARATOR=SEPARATOR) as server:
        ours = _rounds(_Ours(server, texts, ratio), texts, rounds, seed, tell)
    with start_peer() as server:
        theirs = _rounds(_Theirs(server, texts), texts, rounds, seed, tell)
    arms = arms_of(ours, (_Ours.full, 1.0)) + arms_of(theirs, (_Theirs.full, 1.0))
    reused = ", ".join(
        f"{each.prompt_tokens - each.computed:,} of {each.prompt_tokens:,}" for each in theirs[_Theirs.reuse]
    )
    return arms, f"llama-server ({server.build}) with --cache-reuse {REUSE_TOKENS} reused {reused} tokens"


Read = Callable[[str], Asked]


class _Ours:
    """rekindle's server, chunks warmed."""

    full = "rekindle, full"

    def __init__(self, server: Server, texts: Texts, ratio: float) -> None:
        self._url, self._texts, self._ratio = server.url, texts, ratio

    @property
    def arms(self) -> dict[tuple[str, float], Read]:
        return {(self.full, 1.0): self._full, ("rekindle, first", self._ratio): self._blended}

    def prepare(self, tell: Tell) -> None:
        tell("rekindle: chunks on their own")
        _post(self._url, "/cache/warm", {"chunks": list(self._texts.chunks), "chat": False})

    def _full(self, prompt: str) -> Asked:
        return self._ask(prompt, {"use_prefix_cache": False})

    def _blended(self, prompt: str) -> Asked:
        return self._ask(prompt, {"rekindle": {"blend": {"select": "first", "ratio": self._ratio}}})

    def _ask(self, prompt: str, fields: dict[str, Any]) -> Asked:
        seconds, body = _timed(self._url, "/generate", {"prompt": prompt, "max_new_tokens": 1} | fields)
        timings = body["timings"]
        return Asked(seconds, timings["total_prompt_tokens"], timings["suffix_tokens_processed"])


class _Theirs:
    """llama-server, asked about the chunks in another order before."""

    full = "llama-server, full"
    reuse = (f"llama-server, --cache-reuse {REUSE_TOKENS}", 0.0)

    def __init__(self, server: Server, texts: Texts) -> None:
        self._url, self._texts = server.url, texts

    @property
    def arms(self) -> dict[tuple[str, float], Read]:
        return {(self.full, 1.0): self._full, self.reuse: self._reusing}

    def prepare(self, tell: Tell) -> None:
        tell("llama-server: the chunks in their first order")
        self._reusing(self._texts.prompt(range(len(self._texts.chunks))))

    def _full(self, prompt: str) -> Asked:
        return self._ask(prompt, {"cache_prompt": False, "id_slot": 1})

    def _reusing(self, prompt: str) -> Asked:
        return self._ask(prompt, {"cache_prompt": True, "id_slot": 0})

    def _ask(self, prompt: str, fields: dict[str, Any]) -> Asked:
        seconds, body = _timed(self._url, "/completion", {"prompt": prompt, "n_predict": 1} | fields)
        timings = body["timings"]
        return Asked(seconds, timings["prompt_n"] + timings["cache_n"], timings["prompt_n"])


def _rounds(
    server: _Ours | _Theirs, texts: Texts, rounds: int, seed: int, tell: Tell
) -> dict[tuple[str, float], list[Asked]]:
    server.prepare(tell)
    asked: dict[tuple[str, float], list[Asked]] = {}
    for number, order in enumerate(texts.orders(rounds, seed)):
        prompt = texts.prompt(order)
        for arm, read in server.arms.items():
            tell(f"round {number + 1} of {rounds}: {arm[0]}")
            asked.setdefault(arm, []).append(read(prompt))
    return asked


def _timed(url: str, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    began = time.perf_counter()  # clock on: the request is ready
    answer = _post(url, path, body)
    return time.perf_counter() - began, answer  # clock off: the first token is there


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = httpx.post(f"{url}{path}", json=body, timeout=_TIMEOUT, trust_env=False)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"{url}{path}: {error}") from None
    return found
