"""Choices that look first, on the toy engine: what is computed to choose and after it, beside others and when it fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import TOY_SPEC
from tests.serve.blending import HEAD, prompt_of, toy_answer
from tests.serve.conftest import Answer, Stage, ids

from rekindle.errors import ContextFull, EngineError
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Place, Stored, make_plan
from rekindle.reuse.prompt import Prompt, join
from rekindle.serve.metrics import Metrics, sources_of
from rekindle.serve.observe import Observer, Observers
from rekindle.serve.run import Run
from rekindle.tokens import as_tokens, common_length

LAYERS = 8
A, B, C, D = (ids(seed, count) for seed, count in ((21, 100), (22, 64), (23, 45), (24, 150)))
WAYS = ("deviation", "query")
QUESTION = 2 + 3  # tokens behind the last chunk of `prompt_of`


def looking_stage(*chunks: list[int], **options: object) -> Stage:
    """A stage that can look, with these chunks at hand."""
    spec = replace(TOY_SPEC, can_look=True, num_layers=LAYERS)
    stage = Stage(**({"num_cells": 2000, "head": HEAD, "spec": spec} | options))  # type: ignore[arg-type]
    for chunk in chunks:
        stage.ask([*HEAD, *chunk], None, warm=True)
    stage.scheduler.residents.clear()
    return stage


def fresh(prompt: Prompt, count: int = 5) -> list[int]:
    return toy_answer(prompt, make_plan(prompt, [], Stored()), count)


@pytest.mark.parametrize("select", WAYS)
def test_all_work_is_counted_in_token_layers(select: str) -> None:
    stage = looking_stage(A, B, C)
    prompt = prompt_of([D, A, C, B])
    before, computed = stage.engine.num_token_layers, stage.engine.num_computed
    done = stage.ask(prompt, 1, blend=Blend(select, 0.2)).done  # type: ignore[arg-type]
    plan = done.plan
    gaps = 1 + 150 + 2 + 2 + 2  # the head, a chunk that is missing, what stands between
    assert plan.looked is not None
    if select == "deviation":
        assert (plan.looked.tokens, plan.looked.layers) == (gaps + 100 + 45 + 64, 2)
        assert plan.looked.reason == "their V at layer 2 differs most from that on its own"
        assert stage.engine.num_computed - computed == plan.computed
    else:
        assert (plan.looked.tokens, plan.looked.layers) == (gaps + QUESTION, LAYERS)
        assert stage.engine.num_computed - computed == plan.computed + plan.looked.tokens
    assert stage.engine.num_token_layers - before == plan.computed * LAYERS + plan.looked.token_layers
    assert plan.budget == (plan.computed * LAYERS + plan.looked.token_layers) / (plan.total * LAYERS)
    assert sum(chunk.recomputed for chunk in plan.chunks) >= round(0.2 * (100 + 45 + 64))
    assert done.usage.blended_tokens == plan.blended == sum(chunk.placed for chunk in plan.chunks) > 150
    assert done.usage.computed_tokens == plan.computed
    assert all(plan.looked.reason in (chunk.why or plan.looked.reason) for chunk in plan.chunks[1:])
    told = plan.as_dict()
    assert told["looked"]["token_layers"] == plan.looked.token_layers and told["budget"] == round(plan.budget, 4)
    stage.scheduler.residents.clear()
    assert stage.engine.num_free_cells == stage.engine.num_cells


def test_what_the_question_names_is_computed() -> None:
    """The toy attends to equal tokens."""
    stage = looking_stage(A, B)
    prompt = join(
        [
            (as_tokens([*HEAD, 2]), False),
            *((as_tokens(chunk), True) for chunk in (A, B)),
            (as_tokens([5, A[40], 6]), False),
        ]
    )
    plan = stage.ask(prompt, 1, blend=Blend("query", 0.01)).done.plan
    assert plan.chunks[0].recomputed + plan.chunks[1].recomputed == 2
    assert not any(isinstance(step, Place) and step.start <= 2 + 40 < step.stop for step in plan.steps)


@pytest.mark.parametrize("select", WAYS)
@pytest.mark.parametrize(
    ("chunks", "blend", "looks"),
    [
        ([A], Blend("deviation", 0.2), False),  # it stands where it would on its own
        ([[], [9] * 30, A], Blend("deviation", 0.2), True),
        ([D, A, A], Blend("deviation", 0.2), True),
        ([[], A, []], Blend("deviation", 0.2), True),
        ([A, B], Blend("deviation", 0.0), False),
        ([A, B], Blend("deviation", 1.0), False),
        ([D, C], Blend("deviation", 0.2), False),  # nothing at hand
        ([A, B], Blend("deviation", 0.2, layer=7, judge="K"), True),
    ],
    ids=["one", "one that moved", "twice", "empty", "0 %", "100 %", "missing", "a late layer"],
)
def test_edges(select: str, chunks: list[list[int]], blend: Blend, looks: bool) -> None:
    stage = looking_stage(A, B)
    prompt = prompt_of(chunks)
    done = stage.ask(prompt, blend=replace(blend, select=select)).done  # type: ignore[arg-type]
    assert (done.plan.looked is not None) is looks
    assert list(done.tokens) == toy_answer(prompt, done.plan, 5)
    if blend.ratio == 1 or not done.plan.blended:
        assert list(done.tokens) == fresh(prompt)
    stage.scheduler.check_integrity()


@pytest.mark.parametrize("select", WAYS)
def test_nothing_but_chunks(select: str) -> None:
    """All is at hand; the last token is the question."""
    stage = looking_stage(A, B)
    prompt = join([(as_tokens(HEAD), False), (as_tokens(B), True), (as_tokens(A), True)])
    done = stage.ask(prompt, blend=Blend(select, 0.1)).done  # type: ignore[arg-type]
    assert done.plan.looked is not None and done.plan.blended == 99 - 10
    assert list(done.tokens) == toy_answer(prompt, done.plan, 5)


@pytest.mark.parametrize("select", WAYS)
def test_an_exact_beginning_is_not_looked_at(select: str) -> None:
    stage = looking_stage(A, B)
    begin = prompt_of([D])
    stage.ask(begin, 1)
    prompt = prompt_of([D, A, B])
    done = stage.ask(prompt, 1, blend=Blend(select, 0.2)).done  # type: ignore[arg-type]
    shared = common_length(begin.tokens, prompt.tokens)
    assert done.plan.looked is not None and done.plan.begin == shared > 150
    assert done.plan.looked.tokens == (2 + QUESTION if select == "query" else 100 + 2 + 64)


def test_others_go_on_while_one_looks() -> None:
    """Each step gives everybody a token, and computes no more to look than the pace allows beside answers."""
    stage = looking_stage(A, B, C, prefill_budget=16)
    beside = stage.submit(ids(5, 30), 400)
    stage.run(until=lambda: beside.num_tokens > 2)
    run = stage.submit(prompt_of([D, A, C, B]), 3, blend=Blend("deviation", 0.2)).run
    looked = 0
    while run.looking is not None or run.plan is None:
        said, work = beside.num_tokens, stage.engine.num_token_layers
        stage.scheduler.step()
        stage.scheduler.check_integrity()
        assert beside.num_tokens == said + 1
        assert stage.engine.num_token_layers - work <= (1 + 16) * LAYERS
        looked += run.looking is not None
    assert looked >= 361 * 2 // (16 * LAYERS)
    stage.run()


@pytest.mark.parametrize("select", WAYS)
def test_what_is_half_computed_reaches_nobody(select: str) -> None:
    """Neither one who begins alike while it looks, nor anybody when it is cancelled."""
    stage = looking_stage(A, B, prefill_budget=8)
    prompt = prompt_of([D, A, B])
    running = stage.submit(ids(5, 30), 500)  # else it would look in one step
    stage.run(until=lambda: running.num_tokens > 1)
    looking = stage.submit(prompt, 5, blend=Blend(select, 0.1))  # type: ignore[arg-type]
    stage.run(until=lambda: looking.run.looking is not None and looking.run.held > 60)
    beside = stage.submit(prompt)
    stage.run(until=lambda: bool(beside.run.plan))
    looking.run.cancel()
    after = stage.submit(prompt)
    stage.run()
    assert looking.done.reason == "cancelled" and looking.done.usage.blended_tokens == 0
    for answer in (beside, after, stage.submit(prompt)):
        stage.run()
        assert list(answer.done.tokens) == fresh(prompt)


@pytest.mark.parametrize("select", WAYS)
def test_who_is_swapped_out_while_it_looks_looks_again(select: str) -> None:
    stage = looking_stage(A, B, prefill_budget=8)
    prompt = prompt_of([D, A, B])
    blend = Blend(select, 0.1)  # type: ignore[arg-type]
    alone = stage.ask(prompt, blend=blend).done
    stage.scheduler.residents.clear()
    running = stage.submit(ids(5, 30), 300)
    stage.run(until=lambda: running.num_tokens > 1)
    looking = stage.submit(prompt, blend=blend)
    stage.run(until=lambda: looking.run.looking is not None and looking.run.held > 60)
    stage.scheduler._room.swap_out(looking.run)
    assert looking.run.swapped == []
    stage.run()
    assert looking.done.tokens == alone.tokens
    assert looking.done.plan.looked is not None and alone.plan.looked is not None
    assert looking.done.plan.looked.tokens > alone.plan.looked.tokens  # what was looked at twice was computed twice


@pytest.mark.parametrize("select", WAYS)
@pytest.mark.parametrize("error", [EngineError("broken"), ContextFull("full")])
def test_a_look_that_fails_is_read_exactly(select: str, error: EngineError, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = looking_stage(A, B)
    prompt = prompt_of([D, A, B])

    def fail(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(stage.engine, {"deviation": "refreshed", "query": "attention"}[select], fail)
    done = stage.ask(prompt, blend=Blend(select, 0.1)).done  # type: ignore[arg-type]
    assert done.plan.looked is None and not done.plan.blended
    assert list(done.tokens) == fresh(prompt)
    is_refused = select == "deviation" and not isinstance(error, ContextFull)
    assert stored(stage, A) == (0 if is_refused else 101), "what the engine refuses is forgotten"
    assert stored(stage, B) == 65


def stored(stage: Stage, chunk: list[int]) -> int:
    """Tokens that the store's memory has of a chunk on its own, the head included."""
    return stage.store.match(as_tokens([*HEAD, *chunk])).length


def test_what_is_refused_in_a_look_is_learned_anew() -> None:
    stage = looking_stage(A, B)
    block = stage.store.match(as_tokens([*HEAD, *A])).blocks[2]
    object.__setattr__(block, "payload", block.payload.cast("Q"))  # as many bytes, but not as the engine wants them
    prompt = prompt_of([D, A, B])
    stage.engine.turns_all_cells = False
    done = stage.ask(prompt, blend=Blend("query", 0.1)).done
    assert not done.plan.blended and list(done.tokens) == fresh(prompt)
    assert stored(stage, A) == 32
    while stage.scheduler.use_idle_time():
        stage.run()
    assert stored(stage, A) == 101
    assert stage.ask(prompt_of([C, A, B]), 1, blend=Blend("query", 0.1)).done.plan.blended > 100


class Diary(Observer):
    def __init__(self) -> None:
        self.words: list[str] = []

    def begun(self, run: Run) -> None:
        self.words.append("begun")

    def admitted(self, run: Run, plan: object) -> None:
        self.words.append("admitted")


def test_metrics_hear_of_the_plan_that_was_chosen() -> None:
    diary, metrics = Diary(), Metrics()
    stage = looking_stage(A, B, observer=Observers([diary, metrics]))
    answer = stage.ask(prompt_of([D, A, B]), 1, blend=Blend("deviation", 0.2))
    assert diary.words == ["begun", "admitted"]
    counted = metrics.prompt_tokens
    assert counted["blended"] == answer.done.usage.blended_tokens > 0
    assert {source: count for source, count in counted.items() if count} == sources_of(
        answer.done.plan, answer.run.fetched
    )
    assert stage.scheduler.counts.prompt_tokens == answer.done.plan.total


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([A, B, C, D, [7, 8, 9]]), min_size=1, max_size=4),
            st.sampled_from([*WAYS, "first", None]),
            st.sampled_from([0.0, 0.03, 0.2, 0.9, 1.0]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([700, 2000]),
    st.sampled_from([8, 64]),
)
def test_any_mix_of_requests(
    wishes: list[tuple[list[list[int]], str | None, float]], num_cells: int, prefill_budget: int
) -> None:
    """Together, in few cells or many: each says what its own plan gives, or what is exact."""
    stage = looking_stage(A, B, C, num_cells=num_cells, prefill_budget=prefill_budget)
    answers: list[tuple[Answer, Prompt, Blend | None]] = []
    for chunks, select, ratio in wishes:
        prompt = prompt_of(chunks)
        blend = None if select is None else Blend(select, ratio)  # type: ignore[arg-type]
        answers.append((stage.submit(prompt, 4, blend=blend), prompt, blend))
    stage.run()
    for answer, prompt, blend in answers:
        plan = answer.done.plan
        expected = fresh(prompt, 4) if blend is None or blend.ratio == 1 else toy_answer(prompt, plan, 4)
        assert list(answer.done.tokens) == expected
        assert np.array_equal(answer.run.prompt, prompt.tokens)
    stage.scheduler.check_integrity()
