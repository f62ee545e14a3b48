"""How much of a prompt is read beside running answers, on engines whose steps take a computed time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tests.serve.conftest import Stage, ids

from rekindle.serve.pace import LONE_TOKENS, MIN_CHUNK, PROBE_STEPS, Pace

Cost = Callable[[int, int, int], float]  # (answers, prompt tokens, position) -> seconds


def small_model(answers: int, chunk: int, position: int) -> float:
    """As measured on one core: a 270M-parameter model, whose attention costs more than its weights at 2,000 tokens."""
    decode = 0.02 + 0.007 * answers
    return decode + (0.3 * decode if chunk else 0) + chunk * (0.0015 + position * 0.000002)


def fast_prefill(answers: int, chunk: int, position: int) -> float:
    """As on an accelerator: prompt tokens are nearly free."""
    return 0.02 + chunk * 1e-6


def read(pace: Pace, cost: Cost, length: int, answers: int = 1) -> list[tuple[int, float]]:
    """Read a prompt beside answers; (chunk, seconds) of each step."""
    steps, position = [], 0
    while position < length:
        chunk = min(pace.chunk(answers), length - position)
        seconds = cost(answers, chunk, position)
        pace.learn(answers, chunk, seconds)
        steps.append((chunk, seconds))
        position += chunk
    return steps


@pytest.mark.parametrize("answers", [1, 4, 16])
def test_no_step_takes_longer_than_allowed_and_most_is_made_of_it(answers: int) -> None:
    pace = Pace(limit=512, slowdown=2.5)
    steps = read(pace, small_model, 4000, answers)
    alone = small_model(answers, 0, 0)
    assert max(seconds for _, seconds in steps) <= 3 * alone
    assert np.median([seconds for _, seconds in steps]) >= 2 * alone
    assert steps[0][0] == 0, "before anything is known, a step is measured without a chunk"


@pytest.mark.parametrize(("answers", "prompts", "times"), [(1, 1, 1), (4, 1, 1), (4, 4, 1), (1, 7, 7), (2, 6, 3)])
def test_where_more_are_read_than_answered_a_step_may_take_longer(answers: int, prompts: int, times: int) -> None:
    pace = Pace(limit=4096, slowdown=2.0)
    for _ in range(20):
        pace.learn(answers, 0, 0.020)
        chunk = pace.chunk(answers, prompts)
        pace.learn(answers, chunk, 0.020 + 0.001 * chunk)
    assert 20 * times / 1.6 < pace.chunk(answers, prompts) <= 20 * times, "as much as the sizes of batches allow"


def test_short_prompts_for_which_more_wait_than_are_stalled_are_read_at_once() -> None:
    pace = Pace(limit=512, slowdown=2.0)
    for _ in range(20):
        pace.learn(1, 0, 0.020)
        pace.learn(1, 4, 0.040)
    assert pace.chunk(1, 7, 900) == 512
    assert pace.chunk(1, 7, 1100) < 64, "too long to be read at once"
    assert pace.chunk(7, 7, 900) < 64, "as many are stalled as wait"


def test_the_setting_is_an_upper_bound() -> None:
    assert max(chunk for chunk, _ in read(Pace(limit=100, slowdown=2.5), fast_prefill, 4000)) == 100
    assert max(chunk for chunk, _ in read(Pace(limit=2, slowdown=2.5), small_model, 100)) == 2


def test_where_prompts_are_cheap_the_chunk_soon_reaches_the_limit() -> None:
    steps = read(Pace(limit=512, slowdown=2.5), fast_prefill, 20_000)
    assert [chunk for chunk, _ in steps[:6]] == [0, 3, 15, 63, 255, 512]


def test_a_prompt_gets_on_where_any_chunk_is_too_long() -> None:
    steps = read(Pace(limit=512, slowdown=2.5), lambda answers, chunk, position: 0.01 + chunk, 100)
    assert [chunk for chunk, _ in steps[:3]] == [0, MIN_CHUNK, 1]
    assert {chunk for chunk, _ in steps[3:]} == {0, 1}


def dear_rows(answers: int, chunk: int, position: int) -> float:
    """As measured: llama.cpp, one core, gemma3-270m in q8_0, by the rows of the batch."""
    rows = {1: 13.5, 2: 30.8, 4: 39.6, 6: 45.2, 8: 43.0, 12: 48.8, 16: 51.9, 24: 72.5, 32: 91.4, 64: 145.1, 128: 305.1}
    return 1e-3 * float(np.interp(answers + chunk, list(rows), list(rows.values())))


def tiled(answers: int, chunk: int, position: int) -> float:
    """As measured: ember after 1,000 tokens, with a kernel for 64 rows or more that is far faster."""
    rows = answers + chunk
    return 0.002 + (0.0013 * chunk if rows < 64 else 0.0002 * chunk)


@pytest.mark.parametrize(
    ("cost", "slowdown", "chunk"),
    [
        (dear_rows, 2.0, 2),
        (dear_rows, 3.0, 3),
        (dear_rows, 4.5, 15),
        (dear_rows, 6.0, 23),
        (tiled, 4.0, 3),
        (tiled, 10.0, 63),
    ],
)
def test_the_size_is_taken_that_reads_fastest_within_the_bound(cost: Cost, slowdown: float, chunk: int) -> None:
    pace = Pace(limit=512, slowdown=slowdown)
    for _ in range(3):
        pace.learn(0, 512, cost(0, 512, 0) if cost is tiled else 512 * 0.0021)
    steps = [chunk for chunk, _ in read(pace, cost, 4000)]
    assert max(steps, key=steps.count) == chunk
    assert not {chunk for chunk in steps[:-1] if 24 <= chunk < 63} or cost is not tiled


def test_a_short_prompt_is_read_at_once_but_not_often() -> None:
    pace = Pace(limit=512, slowdown=2.0)
    pace.learn(0, 512, 1.0)
    gaps: list[float] = []
    waited: list[int] = []
    for _ in range(20):
        for _ in range(30):  # nobody else comes
            pace.learn(4, 0, 0.02)
            gaps.append(0.02)
        unread, steps = 90, 0
        while unread:
            chunk = min(unread, pace.chunk(4, 1, unread))
            seconds = 0.02 + 0.002 * chunk
            pace.learn(4, chunk, seconds)
            gaps.append(seconds)
            unread, steps = unread - chunk, steps + 1
        waited.append(steps)
    assert waited.count(1) >= 3
    assert np.percentile(gaps, 99) <= 3 * 0.02
    assert max(gaps) <= 0.25


def test_a_long_prompt_is_not_ended_at_once() -> None:
    pace = Pace(limit=512, slowdown=2.0)
    pace.learn(0, 512, 1.0)
    for _ in range(200):
        pace.learn(1, 0, 0.02)
    unread, chunks = 600, []
    while unread:
        chunks.append(min(unread, pace.chunk(1, 1, unread)))
        pace.learn(1, chunks[-1], 0.02 + 0.002 * chunks[-1])
        unread -= chunks[-1]
    assert max(chunks) < 64


def test_short_prompts_that_come_together_when_nobody_is_answered_are_read_to_their_end() -> None:
    pace = Pace(limit=512, slowdown=2.0)
    pace.learn(0, 512, 1.0)
    pace.learn(5, 0, 0.05)
    assert pace.chunk(0, 8, 8 * 87) == 512
    pace.learn(0, 512, 1.0)
    assert pace.chunk(5, 3, 8 * 87 - 512) == 512
    pace.learn(5, 8 * 87 - 512, 0.4)
    assert pace.chunk(8, 1, 300) < 64


def test_what_is_begun_at_once_is_ended_at_once() -> None:
    pace = Pace(limit=512, slowdown=2.0)
    pace.learn(1, 0, 0.020)
    assert pace.chunk(1, 7, 600) == 512
    pace.learn(1, 512, 1.0)
    assert pace.chunk(6, 2, 88) == 512, "six that began to answer meanwhile do not make the other two slow"
    pace.learn(6, 88, 0.2)
    pace.learn(8, 0, 0.06)
    assert pace.chunk(8, 1, 300) < 64, "who comes later is not of them"


def test_now_and_then_a_step_is_measured_without_a_chunk() -> None:
    steps = read(Pace(limit=512, slowdown=2.5), small_model, 4000)
    probes = [index for index, (chunk, _) in enumerate(steps) if chunk == 0]
    assert probes[0] == 0 and set(np.diff(probes)) == {PROBE_STEPS + 1}


def test_one_disturbed_step_changes_nothing() -> None:
    pace = Pace(limit=512, slowdown=2.5)
    read(pace, small_model, 1000)
    before = pace.chunk(1)
    pace.learn(1, 0, 5.0)
    assert pace.chunk(1) <= before + 4
    pace.learn(1, before, 5.0)
    assert pace.chunk(1) >= before - 4


def test_when_nobody_is_answered_the_chunk_is_large_but_takes_no_longer_than_it_must() -> None:
    pace = Pace(limit=64, slowdown=2.5)
    assert pace.chunk(0) == LONE_TOKENS[0], "the model may be slow, and somebody come or go meanwhile"
    assert pace.chunk(0, hurried=True) == 64
    pace.learn(0, 512, 0.01)
    assert pace.chunk(0) == LONE_TOKENS[1]
    for _ in range(10):
        pace.learn(0, 2000, 4.0)
    assert pace.chunk(0) == LONE_TOKENS[0]
    assert Pace(limit=4096, slowdown=2.5).chunk(0) == 4096


def test_without_a_bound_the_chunk_is_always_the_limit() -> None:
    pace = Pace(limit=64, slowdown=math.inf)
    assert [pace.chunk(answers) for answers in (1, 2, 3)] == [64] * 3


def test_a_stream_gets_a_token_in_every_step_of_a_long_prompt() -> None:
    stage = Stage(slowdown=2.5, prefill_budget=64)
    stream = stage.submit(ids(15, 20), 1000)
    stage.run(until=lambda: stream.num_tokens >= 5)
    long = stage.submit(ids(16, 400), 1)
    before = stream.num_tokens
    steps = stage.run(until=lambda: bool(long.events))
    assert stream.num_tokens - before == steps >= 400 // 64
