"""Warming: prompts are read while nobody else has work, stored, and not answered."""

from __future__ import annotations

import pytest
from tests.serve.conftest import Answer, Stage

from rekindle.errors import InvalidRequest
from rekindle.reuse.prompt import Prompt
from rekindle.serve.observe import Observer
from rekindle.serve.request import Generation
from rekindle.serve.run import Run
from rekindle.tokens import as_tokens

LONG = list(range(10, 310))  # 300 tokens: five steps of 64, but read at once where nothing is small
OTHER = list(range(400, 500))


def warm(stage: Stage, prompt: list[int], **options: object) -> Answer:
    return stage.submit(prompt, None, warm=True, **options)


def usage(answer: Answer) -> tuple[int, int]:
    """(computed, generated) tokens."""
    return answer.done.usage.computed_tokens, answer.done.usage.completion_tokens


def test_a_warmed_prompt_is_stored_and_not_answered(stage: Stage) -> None:
    answer = warm(stage, LONG)
    stage.run()
    assert (usage(answer), answer.text, answer.num_tokens) == ((300, 0), "", 0)
    stored = stage.store.match(as_tokens(LONG))
    assert stored.length == 300 and stored.logits is not None
    assert stage.engine.num_computed == 300


def test_what_was_warmed_costs_no_model_call_before_the_first_token(stage: Stage) -> None:
    warm(stage, LONG)
    stage.run()
    for _ in range(2):  # from the engine, and from the store
        answer = stage.ask(LONG)
        assert (answer.done.usage.computed_tokens, answer.done.timings.prefill_calls) == (0, 0)
        while stage.scheduler.residents.evict():
            pass


def test_warming_again_computes_nothing(stage: Stage) -> None:
    for expected in (300, 0):
        answer = warm(stage, LONG)
        stage.run()
        assert usage(answer) == (expected, 0)
    stage.scheduler.residents.clear()
    answer = warm(stage, LONG)
    stage.run()
    assert usage(answer) == (0, 0)
    assert stage.engine.num_computed == 300


def test_small_steps_so_that_nobody_waits_long(stage: Stage) -> None:
    warm(stage, LONG)
    assert stage.scheduler.step().computed == 64


def test_a_request_goes_before(stage: Stage) -> None:
    """Whoever comes while a prompt is warmed is served as if it were not there; then warming goes on from where it was."""
    warming = warm(stage, LONG)
    stage.scheduler.step()
    stage.scheduler.step()
    request = stage.submit(OTHER, 5)
    stage.run(until=lambda: bool(request.events) and request.num_tokens == 5)
    assert stage.engine.num_computed <= 128 + 100 + 5
    assert not warming.events
    stage.run()
    assert usage(warming) == (300, 0)
    assert stage.engine.num_computed == 300 + 100 + 4  # nothing twice; the last sampled token is not computed


def test_a_request_that_came_first_ends_first(stage: Stage) -> None:
    warming = warm(stage, LONG)
    requests = [stage.submit([*OTHER, number], 20) for number in range(3)]
    stage.run(until=lambda: all(request.num_tokens == 20 for request in requests))
    assert not warming.events
    stage.run()
    assert usage(warming) == (300, 0)


def test_a_request_for_what_is_being_warmed_takes_what_is_there(stage: Stage) -> None:
    warming = warm(stage, LONG)
    stage.scheduler.step()
    request = stage.ask(LONG)
    assert (request.done.usage.cached_tokens, request.done.usage.computed_tokens) == (64, 236)
    assert stage.engine.num_computed == 300 + 4
    assert warming.done.usage.computed_tokens == 64


def test_warming_makes_room_for_requests() -> None:
    """It holds most cells when a request comes that needs them."""
    stage = Stage(num_cells=360)
    warming = warm(stage, LONG)
    for _ in range(4):
        stage.scheduler.step()
    request = stage.submit(list(range(600, 800)), 5)
    stage.run(until=lambda: request.num_tokens == 5)
    assert not warming.events
    stage.run()
    assert usage(warming) == (300, 0)
    assert stage.engine.num_computed == 300 + 204


def test_several_are_warmed_one_after_another(stage: Stage) -> None:
    answers = [warm(stage, [number, *LONG[:100]]) for number in range(1, 5)]
    stage.run(until=lambda: len(stage.scheduler.running) > 0)
    assert len(stage.scheduler.running) == 1
    stage.run()
    assert [usage(answer) for answer in answers] == [(101, 0)] * 4


def test_warmed_prompts_leave_the_engine_before_conversations() -> None:
    stage = Stage(max_residents=2)
    stage.ask(OTHER)
    for number in range(1, 4):
        warm(stage, [number, *LONG[:100]])
        stage.run()
    assert stage.ask(OTHER).done.plan.steps[0].reason.endswith("is resident and begins with these tokens")


def test_a_cancelled_one_ends_wherever_it_is(stage: Stage) -> None:
    waiting, running = warm(stage, OTHER), warm(stage, LONG)
    stage.scheduler.step()
    for answer in (waiting, running):
        answer.run.cancel()
    stage.run()
    assert [answer.done.reason for answer in (waiting, running)] == ["cancelled"] * 2


def test_what_was_asked_for_is_stored_however_short(stage: Stage) -> None:
    for expected in (10, 0):
        answer = warm(stage, LONG[:10])
        stage.run()
        assert usage(answer) == (expected, 0)
    assert stage.store.stats().blocks == 1


class Counting(Observer):
    def __init__(self) -> None:
        self.told = 0

    def queued(self, run: Run) -> None:
        self.told += 1

    def finished(self, run: Run, reason: object) -> None:
        self.told += 1


def test_warming_is_no_request_in_any_count() -> None:
    observer = Counting()
    stage = Stage(observer=observer)
    warm(stage, LONG)
    stage.run()
    assert (observer.told, stage.scheduler.counts.requests, stage.scheduler.counts.prompt_tokens) == (0, 0, 0)
    stage.ask(LONG)
    assert (observer.told, stage.scheduler.counts.requests) == (2, 1)


def test_what_is_not_kept_cannot_be_warmed_or_pinned() -> None:
    prompt = Prompt(as_tokens(LONG))
    for wish in ({"warm": True}, {"pin_seconds": 60.0}):
        with pytest.raises(InvalidRequest, match="cannot be pinned or warmed"):
            Generation(prompt=prompt, use_prefix_cache=False, **wish)  # type: ignore[arg-type]
