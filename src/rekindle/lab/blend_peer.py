"""The same prompts over HTTP: `rekindle serve` blending, and llama-server with `--cache-reuse`.

llama-server shifts KV of its own last prompt: after the common beginning it looks for the next run of at least 256 equal
tokens further on in the prompt that its slot holds, moves it, and goes on behind it. It computes nothing anew, what it has
skipped is lost, and it never looks back, so of a permutation it finds an ascending part only. What it reused is told by
its own `timings.cache_n`.

Both get the same text, chunks with a separator between them, and are asked for one token; the clock is the client's. Each
server runs alone. `full` is each server's own reading of a whole prompt with reuse switched off; llama-server's is of the
order before, which is then what its one slot holds. It gets `--swa-full`, without which it moves nothing of models with a
sliding window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from rekindle.lab.blend_speed import SEPARATOR, Asked, SpeedArm, Tell, Texts, arms_of
from rekindle.lab.load.client import ServerError
from rekindle.lab.load.servers import PEER, Server, Setup, peer_starter, rekindle_server

REUSE_TOKENS = 256  # shortest run that llama-server moves
_TIMEOUT = 3600.0
Arm = tuple[str, float]  # name and ratio


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
    setup = Setup(model=model, threads=threads, context=context, parallel=1)
    name = "n_cache_reuse" if peer == PEER else "cache_reuse"
    start_peer = peer_starter(peer, replace(setup, options={name: REUSE_TOKENS, "swa_full": True}))
    with rekindle_server(setup, REKINDLE_CHUNK_SEPARATOR=SEPARATOR) as server:
        ours = _rounds(_Ours(server, texts, ratio), texts, rounds, seed, tell)
    with start_peer() as server:
        theirs = _rounds(_Theirs(server), texts, rounds, seed, tell)
    arms = arms_of(ours, _Ours.full) + arms_of(theirs, _Theirs.full)
    reused = ", ".join(
        f"{each.prompt_tokens - each.computed:,} of {each.prompt_tokens:,}" for each in theirs[_Theirs.reuse]
    )
    return arms, f"llama-server ({server.build}) with --cache-reuse {REUSE_TOKENS} reused {reused} tokens"


class _Ours:
    """rekindle's server, chunks warmed."""

    full = ("rekindle, full", 1.0)

    def __init__(self, server: Server, texts: Texts, ratio: float) -> None:
        self._server, self._texts, self._ratio = server, texts, ratio

    def prepare(self, tell: Tell) -> None:
        tell("rekindle: chunks on their own")
        _post(f"{self._server.url}/cache/warm", {"chunks": list(self._texts.chunks), "chat": False})

    def arms(self, prompt: str, before: str) -> dict[Arm, Callable[[], Asked]]:
        blend = {"blend": {"select": "first", "ratio": self._ratio}}
        return {
            self.full: lambda: self._ask(prompt, {"use_prefix_cache": False}),
            ("rekindle, first", self._ratio): lambda: self._ask(prompt, {"rekindle": blend}),
        }

    def _ask(self, prompt: str, fields: dict[str, Any]) -> Asked:
        seconds, cpu, body = _timed(self._server, "/generate", {"prompt": prompt, "max_new_tokens": 1} | fields)
        timings = body["timings"]
        return Asked(seconds, timings["total_prompt_tokens"], timings["suffix_tokens_processed"], cpu)


class _Theirs:
    """llama-server, asked about the chunks in another order just before."""

    full = ("llama-server, full", 1.0)
    reuse = (f"llama-server, --cache-reuse {REUSE_TOKENS}", 0.0)

    def __init__(self, server: Server) -> None:
        self._server = server

    def prepare(self, tell: Tell) -> None:
        """Nothing is known ahead of time."""

    def arms(self, prompt: str, before: str) -> dict[Arm, Callable[[], Asked]]:
        return {
            self.full: lambda: self._ask(before, {"cache_prompt": False}),
            self.reuse: lambda: self._ask(prompt, {"cache_prompt": True}),
        }

    def _ask(self, prompt: str, fields: dict[str, Any]) -> Asked:
        seconds, cpu, body = _timed(self._server, "/completion", {"prompt": prompt, "n_predict": 1} | fields)
        timings = body["timings"]
        return Asked(seconds, timings["prompt_n"] + timings["cache_n"], timings["prompt_n"], cpu)


def _rounds(server: _Ours | _Theirs, texts: Texts, rounds: int, seed: int, tell: Tell) -> dict[Arm, list[Asked]]:
    server.prepare(tell)
    asked: dict[Arm, list[Asked]] = {}
    orders = [list(range(len(texts.chunks))), *texts.orders(rounds, seed)]
    for number, (before, order) in enumerate(pairwise(orders)):
        for arm, ask in server.arms(texts.prompt(order), texts.prompt(before)).items():
            tell(f"round {number + 1} of {rounds}: {arm[0]}")
            asked.setdefault(arm, []).append(ask())
    return asked


def _timed(server: Server, path: str, body: dict[str, Any]) -> tuple[float, float | None, dict[str, Any]]:
    """Seconds, processor seconds, and the answer."""
    processor = server.cpu_seconds()
    began = time.perf_counter()  # clock on: the request is ready
    answer = _post(f"{server.url}{path}", body)
    seconds = time.perf_counter() - began  # clock off: the first token is there
    after = server.cpu_seconds()
    return seconds, None if processor is None or after is None else after - processor, answer


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = httpx.post(url, json=body, timeout=_TIMEOUT, trust_env=False)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"{url}: {error}") from None
    return found
