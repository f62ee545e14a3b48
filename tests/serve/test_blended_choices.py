"""Several answers to one blended request, on the toy engine: its prompt is read once, for them and for nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import TOY_SPEC
from tests.serve.blending import BLEND, A, B, C, D, blend_stage, chunks_of, fresh, prompt_of, study, toy_answer
from tests.serve.conftest import Answer, Stage, ids

from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Fork
from rekindle.reuse.prompt import Prompt
from rekindle.serve import pace
from rekindle.serve.metrics import sources_of

WAYS = ("none", "first", "remembered", "deviation", "query")


def warmed(num_cells: int = 2000, **options: object) -> Stage:
    """A stage that can look, with chunks at hand."""
    stage = blend_stage(num_cells, spec=replace(TOY_SPEC, can_look=True, num_layers=8), **options)
    for chunk in (A, B, C, D):
        stage.ask([1, *chunk], None, warm=True)
    stage.scheduler.residents.clear()
    return stage


def ask(stage: Stage, prompt: Prompt, count: int, blend: Blend | None, max_tokens: int = 5) -> list[Answer]:
    """As the API asks for `n` answers: one prompt, as many generations."""
    return [stage.submit(prompt, max_tokens, blend=blend) for _ in range(count)]


@pytest.mark.parametrize("select", WAYS)
def test_a_prompt_is_read_once_for_all_of_them(select: str) -> None:
    stage, prompt = warmed(), prompt_of([B, ids(41, 30), A])
    before = stage.engine.num_token_layers
    answers = ask(stage, prompt, 4, Blend(select, 0.2))  # type: ignore[arg-type]
    stage.run()
    plan = answers[0].done.plan
    looked = 0 if plan.looked is None else plan.looked.token_layers
    decoded = 4 * 4  # the first token of each comes from the prompt's logits
    assert stage.engine.num_token_layers - before == 8 * (plan.computed + decoded) + looked
    for answer in answers:
        assert list(answer.done.tokens) == toy_answer(prompt, plan, 5)
        assert answer.done.plan.exact == plan.exact < len(prompt)
        assert answer.done.usage.blended_tokens == plan.blended >= 80
        assert chunks_of(answer) == chunks_of(answers[0])
        assert sum(sources_of(answer.done.plan, answer.run.fetched).values()) == len(prompt)
        assert sources_of(answer.done.plan, answer.run.fetched)["blended"] == plan.blended
    for answer in answers[1:]:
        (step,) = answer.done.plan.steps
        assert isinstance(step, Fork) and "another answer" in step.reason
        assert answer.done.usage.computed_tokens == 0


@pytest.mark.parametrize("first_tokens", [1, 3, 40])
def test_nobody_else_sees_it_whoever_ends_first(first_tokens: int) -> None:
    """Not while they run, not from what they leave behind, and not in the store."""
    stage, prompt = warmed(), prompt_of([D, A, B])
    first = stage.submit(prompt, first_tokens, blend=Blend("none", 0))
    others = ask(stage, prompt, 2, Blend("none", 0), 20)
    stage.run(until=lambda: all(answer.num_tokens > 1 for answer in others))
    same = Prompt(prompt.tokens, chunks=prompt.chunks)  # another request that says the same
    beside = [stage.submit(prompt), stage.submit(same)]
    again = stage.submit(same, 5, blend=Blend("none", 0))
    stage.run()
    plan = first.done.plan
    for answer in (first, *others):
        assert list(answer.done.tokens) == toy_answer(prompt, plan, len(answer.done.tokens))
        assert answer.done.kept == 0
    assert not any(isinstance(step, Fork) and step.exact is not None for step in again.done.plan.steps)
    exact = fresh(prompt)
    assert list(first.done.tokens)[:5] != exact[:first_tokens] or first_tokens == 1  # or this test could not fail
    study(stage)
    for answer in (*beside, stage.ask(same)):
        assert list(answer.done.tokens) == exact
    stage.scheduler.residents.clear()
    assert list(stage.ask(same).done.tokens) == exact
    follow = Prompt(prompt.tokens, chunks=prompt.chunks)
    assert list(stage.ask(follow, 5).done.tokens) == exact
    stage.scheduler.clear_cache()
    assert stage.engine.num_free_cells == stage.engine.num_cells


def test_other_ways_and_other_requests_read_for_themselves() -> None:
    stage, prompt = warmed(), prompt_of([B, A])
    ways = [BLEND, Blend("first", 0.3), None]
    answers = [stage.submit(prompt, blend=blend) for blend in ways]
    answers.append(stage.submit(Prompt(prompt.tokens, chunks=prompt.chunks), blend=BLEND))
    stage.run()
    for answer in answers:
        assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5)
        assert answer.done.usage.computed_tokens > 0
    assert list(answers[2].done.tokens) == fresh(prompt)


def test_where_nothing_is_placed_they_share_what_is_exact() -> None:
    stage, prompt = warmed(), prompt_of([ids(42, 60), ids(43, 40)])
    before = stage.engine.num_computed
    answers = ask(stage, prompt, 3, BLEND)
    stage.run()
    assert stage.engine.num_computed - before == len(prompt) + 3 * 4
    assert all(list(answer.done.tokens) == fresh(prompt) for answer in answers)


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_when_the_one_who_reads_leaves_another_goes_on(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LONE_TOKENS", (16, 16))
    stage, prompt = warmed(prefill_budget=16), prompt_of([D, A, C])
    answers = ask(stage, prompt, 3, Blend("first", 0.4), 20)
    for _ in range(steps):
        stage.scheduler.step()
    assert answers[0].run.reading == (steps < 8) and (steps < 20 or answers[2].num_tokens > 3)
    answers[0].run.cancel()
    stage.run()
    assert answers[0].done.reason == "cancelled"
    readers = [answer for answer in answers[1:] if answer.done.plan.computed]
    assert len(readers) == (steps < 8), "the next reads it, if nobody else has"
    plan = (readers or answers)[0].done.plan
    for answer in answers[1:]:
        assert list(answer.done.tokens) == toy_answer(prompt, plan, 20)


def test_who_is_swapped_out_goes_on_where_it_was() -> None:
    stage = warmed(420)
    prompts = [prompt_of([ids(70 + number, 30), D, A]) for number in range(2)]
    answers = [each for prompt in prompts for each in ask(stage, prompt, 3, BLEND, 60)]
    stage.run()
    assert stage.scheduler.counts.swaps > 0
    for prompt, three in zip(prompts, (answers[:3], answers[3:]), strict=True):
        plans = [answer.done.plan for answer in three if answer.done.plan.computed]
        expected = [toy_answer(prompt, plan, 60) for plan in plans]
        assert all(list(answer.done.tokens) in expected for answer in three)


groups = st.tuples(
    st.lists(st.sampled_from([A, B, C, D, ids(44, 20)]), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(WAYS),
    st.integers(0, 12),
    st.sampled_from([None, 0, 1]),
)


@given(st.lists(groups, min_size=1, max_size=3), st.sampled_from([600, 2000]), st.sampled_from([2, 8]))
@settings(max_examples=40)
def test_any_mix(
    requests: list[tuple[list[list[int]], int, str, int, int | None]], num_cells: int, max_running: int
) -> None:
    """Each answer is what one of its request's plans gives, and afterwards everything is exact."""
    stage = warmed(num_cells, max_running=max_running)
    asked: list[tuple[Prompt, list[Answer]]] = []
    for chunks, count, select, steps, leaver in requests:
        prompt = prompt_of(chunks)
        asked.append((prompt, ask(stage, prompt, count, Blend(select, 0.2))))  # type: ignore[arg-type]
        for _ in range(steps):
            stage.scheduler.step()
        if leaver is not None and leaver < count:
            asked[-1][1][leaver].run.cancel()
    stage.run()
    for prompt, answers in asked:
        whole = [answer for answer in answers if answer.done.reason != "cancelled" and not answer.run.parked]
        plans = [
            answer.done.plan
            for answer in answers
            if not any(isinstance(s, Fork) and s.exact is not None for s in answer.done.plan.steps)
        ]
        expected = [toy_answer(prompt, plan, 5) for plan in plans if plan.total]
        if not any(answer.run.parked for answer in answers):
            assert all(list(answer.done.tokens) in expected for answer in whole)
        assert list(stage.ask(Prompt(prompt.tokens, chunks=prompt.chunks)).done.tokens) == fresh(prompt)
    study(stage)
    stage.scheduler.clear_cache()
    assert stage.engine.num_free_cells == stage.engine.num_cells
