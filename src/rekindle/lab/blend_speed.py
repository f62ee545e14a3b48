"""What blending saves before the first token: 8 chunks of 512 tokens in another order, KV of chunks in memory.

Weights are random and their answers mean nothing: what is measured is time. A round is one full prefill and then each
blended arm, on the same prompt, in turn; the figure is the median over rounds of blended time / full time of that round,
so that what else the machine does falls on both. The floor is the work itself: of `ratio` of the chunks' tokens all must
be computed, and each of them attends to all before it.

**at once** turns all chunks by one `Engine.move`; **one by one** lets each `place` turn its own, which in llama.cpp rotates
the whole cache in the next decode, once for each chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from rekindle.engine.protocol import Engine, Work
from rekindle.lab.blend_run import ChunkKV, Reading, read_blended, read_fully
from rekindle.reuse.blend import Blend
from rekindle.reuse.prompt import Prompt, join
from rekindle.tokens import as_tokens

QUESTION = 24  # tokens behind the chunks


@dataclass(frozen=True, kw_only=True)
class SpeedArm:
    """One way to begin answering."""

    name: str
    ratio: float
    ttft_seconds: float  # median
    ttft_of_full: float  # median over rounds
    budget: float  # tokens computed, of all
    calls: int  # of the model


def measure_speed(
    engine: Engine,
    *,
    num_chunks: int = 8,
    chunk_tokens: int = 512,
    ratio: float = 0.15,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> list[SpeedArm]:
    """Full prefill, no recomputing, and `ratio` in both ways of turning. Needs cells for two prompts."""
    random = np.random.default_rng(seed)
    vocabulary = min(engine.spec.vocab_size, 30_000)
    chunks = [random.integers(10, vocabulary, chunk_tokens).astype(np.int32) for _ in range(num_chunks)]
    head = as_tokens([1])
    kv = ChunkKV(engine, head)
    for number, chunk in enumerate(chunks):
        progress(f"chunk {number + 1} of {num_chunks} on its own")
        kv.warm(chunk)
    parts = [(head, False)]
    for index in random.permutation(num_chunks):
        parts += [(chunks[index], True), (as_tokens([11]), False)]
    prompt = join([*parts, (random.integers(10, vocabulary, QUESTION).astype(np.int32), False)])
    arms: dict[tuple[str, float], Callable[[], Reading]] = {
        ("full", 1.0): lambda: read_fully(engine, prompt),
        ("none", 0.0): lambda: read_blended(engine, prompt, kv, Blend("none", 0.0)),
        ("first, at once", ratio): lambda: read_blended(engine, prompt, kv, Blend("first", ratio)),
        ("first, one by one", ratio): lambda: read_blended(engine, prompt, kv, Blend("first", ratio), at_once=False),
    }
    return _rounds(engine, prompt, arms, rounds, progress)


def _rounds(
    engine: Engine,
    prompt: Prompt,
    arms: dict[tuple[str, float], Callable[[], Reading]],
    rounds: int,
    progress: Callable[[str], None],
) -> list[SpeedArm]:
    seconds: dict[tuple[str, float], list[float]] = {arm: [] for arm in arms}
    readings: dict[tuple[str, float], Reading] = {}
    for number in range(rounds):
        for arm, read in arms.items():
            progress(f"round {number + 1} of {rounds}: {arm[0]}")
            _settle(engine)
            began, calls = time.perf_counter(), engine.num_calls  # clock on: prompt known, chunks in memory
            reading = read()
            seconds[arm].append(time.perf_counter() - began)  # clock off: the logits of the first token are there
            readings[arm] = Reading(reading.seq, 0.0, reading.computed, engine.num_calls - calls, reading.plan)
            engine.close(reading.seq)
    full = seconds["full", 1.0]
    return [
        SpeedArm(
            name=name,
            ratio=ratio,
            ttft_seconds=median(seconds[name, ratio]),
            ttft_of_full=median(mine / whole for mine, whole in zip(seconds[name, ratio], full, strict=True)),
            budget=readings[name, ratio].computed / len(prompt),
            calls=readings[name, ratio].calls,
        )
        for name, ratio in arms
    ]


def _settle(engine: Engine) -> None:
    """Nothing of the arm before is left to be done, such as a rotation that waits for the next decode."""
    seq = engine.open()
    engine.forward([Work(seq, as_tokens([11]), logits=False)])
    engine.close(seq)
