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
    assert pace.chunk(answers, prompts) == 20 * times


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
    assert [chunk for chunk, _ in steps[:9]] == [0, 4, 8, 16, 32, 64, 128, 256, 512]


def test_a_prompt_gets_on_where_any_chunk_is_too_long() -> None:
    steps = read(Pace(limit=512, slowdown=2.5), lambda answers, chunk, position: 0.01 + chunk, 400)
    assert {chunk for chunk, _ in steps} == {0, MIN_CHUNK}


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
    assert pace.chunk(0) == LONE_TOKENS[1]
    assert pace.chunk(0, hurried=True) == 64
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
