"""What is measured side by side: ours, and what no program of any kind could do much better on the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from rekindle.kv.block import Block
from rekindle.kv.keys import block_key, root_key
from rekindle.kv.tier import Place, place_of
from rekindle.tokens import Tokens, as_tokens

FINGERPRINT = b"lab store, no model"
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Arm:
    """One way of moving the same bytes. `prepare` runs before the clock, and what `run` returns dies after it."""

    name: str
    run: Callable[[], object]
    ours: bool = False
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What an arm took."""

    name: str
    ours: bool
    seconds: tuple[float, ...]  # of each round


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms that move the same bytes, in turns. The first is the limit: what the machine does without us."""

    what: str  # tier and operation: "disk get, warm"
    num_bytes: int  # that each arm moves in a round
    timings: tuple[Timing, ...]
    note: str = ""

    def rate(self, timing: Timing) -> float:
        """Bytes per second, median over the rounds."""
        return self.num_bytes / median(timing.seconds)

    def share(self, timing: Timing, of: int = 0) -> float:
        """Speed beside another arm's, the limit's by default: the median over rounds, whose arms ran one after another."""
        pairs = zip(self.timings[of].seconds, timing.seconds, strict=True)
        return median(limit / own for limit, own in pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        arms = [
            {
                "name": timing.name,
                "ours": timing.ours,
                "gb_per_second": round(self.rate(timing) / 1e9, 3),
                "shares": [round(self.share(timing, index), 3) for index in range(len(self.timings))],
            }
            for timing in self.timings
        ]
        return {"what": self.what, "bytes": self.num_bytes, "note": self.note, "arms": arms}


def compare(what: str, num_bytes: int, arms: Sequence[Arm], *, rounds: int, note: str = "") -> Comparison:
    """All arms in turns (A B C A B C …), so that what else the machine does falls on all; one round more warms up."""
    seconds: list[list[float]] = [[] for _ in arms]
    for _ in range(1 + rounds):
        for arm, own in zip(arms, seconds, strict=True):
            arm.prepare()
            began = time.perf_counter()  # clock on
            result = arm.run()
            own.append(time.perf_counter() - began)  # clock off
            del result
    timings = [
        Timing(name=arm.name, ours=arm.ours, seconds=tuple(own[1:])) for arm, own in zip(arms, seconds, strict=True)
    ]
    return Comparison(what=what, num_bytes=num_bytes, timings=tuple(timings), note=note)


@dataclass(frozen=True)
class Prompt:
    """A prompt of whole blocks and the KV of it, which is noise."""

    tokens: Tokens
    data: memoryview  # all payloads, one after another
    blocks: list[Block]

    @property
    def places(self) -> list[Place]:
        return [place_of(block) for block in self.blocks]


def make_prompt(num_blocks: int, payload_bytes: int, seed: int = 0) -> Prompt:
    """The same seed makes the same tokens and payloads."""
    generator = np.random.default_rng(seed)
    tokens = as_tokens(generator.integers(0, 1 << 17, num_blocks * BLOCK_TOKENS))
    data = memoryview(generator.bytes(num_blocks * payload_bytes))
    blocks, parent = [], root_key(FINGERPRINT, b"")
    for index in range(num_blocks):
        part = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        key = block_key(parent, part)
        payload = data[index * payload_bytes : (index + 1) * payload_bytes]
        blocks.append(Block(key, parent, part, index * BLOCK_TOKENS, payload))
        parent = key
    return Prompt(tokens, data, blocks)
