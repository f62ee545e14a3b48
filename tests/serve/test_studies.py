"""What is learned of chunks in idle time, on the toy engine: from what, in which order, and at nobody's cost."""

from __future__ import annotations

import pytest
from tests.serve.blending import BLEND, A, B, C, D, blend_stage, chunks_of, learned, prompt_of, study
from tests.serve.conftest import ids

from rekindle.errors import EngineError
from rekindle.reuse.blend import Blend
from rekindle.serve import studies
from rekindle.serve.studies import SLICE


def test_a_chunk_that_is_met_behind_a_placed_one_is_learned_too() -> None:
    stage = learned(A)
    stage.ask(prompt_of([D, A, C]), blend=BLEND)
    assert len(stage.scheduler.residents) == 1
    study(stage)
    own = stage.blending.own_prompts(prompt_of([C]))[0]
    assert stage.scores.get(stage.blending.key(own)) is not None
    assert len(stage.scheduler.residents.seqs) == len(stage.scheduler.residents)  # nothing is set aside any more


def test_a_chunk_that_was_warmed_ahead_of_time_is_learned_when_it_is_placed() -> None:
    stage = blend_stage()
    for own in stage.blending.own_prompts(prompt_of([D, A])):
        stage.submit(own, None, warm=True)
    stage.run()
    for seed, blend in ((8, Blend("first", 0.1)), (9, Blend("auto", 0.1))):
        stage.scheduler.residents.clear()
        computed = stage.engine.num_computed
        answer = stage.ask(prompt_of([ids(seed, 30), D, A]), 1, blend=blend)
        assert chunks_of(answer)[1:] == [(135, 15), (90, 10)]
        computed += answer.done.plan.computed
        if blend.select == "first":  # who asks for that needs no scores; of the new chunk all but a token is at hand
            study(stage)
            assert stage.engine.num_computed - computed == 1
    grown = []
    while stage.scheduler._studies._queue:
        before = stage.engine.num_computed
        stage.scheduler.use_idle_time()
        stage.run()
        grown.append(stage.engine.num_computed - before)
    assert sorted(filter(None, grown)) == [1, len(D) - SLICE, len(A), SLICE]
    for own in stage.blending.own_prompts(prompt_of([D, A])):
        assert stage.scores.get(stage.blending.key(own)) is not None
    stage.scheduler.residents.clear()
    again = stage.ask(prompt_of([ids(7, 30), D, A]), 1, blend=Blend("auto", 0.1))
    assert "their KV differed most between in place and on its own" in [each.why for each in again.done.plan.chunks]


def test_nobody_waits_for_a_study() -> None:
    stage = blend_stage()
    stage.ask(prompt_of([D, A]), 1, blend=BLEND)
    while stage.scheduler.residents.save_one():
        pass
    assert stage.scheduler.use_idle_time()  # a chunk is to be warmed
    request = stage.submit(ids(50, 40), 4)
    computed = stage.engine.num_computed
    stage.run(until=lambda: request.num_tokens == 4)
    assert stage.engine.num_computed - computed == 40 + 3
    stage.run()
    study(stage)
    assert chunks_of(stage.ask(prompt_of([C, A, D]), 1, blend=Blend("none", 0)))[1:] == [(100, 0), (150, 0)]


def test_what_is_set_aside_leaves_first_and_the_chunk_is_warmed_all_the_same() -> None:
    stage = blend_stage(num_cells=420)
    stage.ask(prompt_of([D, A]), 1, blend=BLEND)
    answer = stage.ask(ids(51, 400), 1)
    assert answer.done.usage.computed_tokens == 400
    study(stage)
    assert len(stage.scores._memory) == 0
    assert chunks_of(stage.ask(prompt_of([C, A]), 1, blend=Blend("none", 0)))[1:] == [(100, 0)]


def test_a_chunk_is_queued_once_and_a_cleared_cache_forgets_what_is_queued() -> None:
    stage = blend_stage()
    for _ in range(3):
        stage.ask(prompt_of([D, A, A]), 1, blend=BLEND)
    assert len(stage.scheduler._studies._queue) == 2
    stage.scheduler.clear_cache()
    computed = stage.engine.num_computed
    study(stage)
    assert stage.engine.num_computed == computed
    assert stage.engine.num_free_cells == stage.engine.num_cells


def test_the_queue_of_studies_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "MAX_QUEUE", 2)
    stage = blend_stage()
    stage.ask(prompt_of([A, B, C, D]), 1, blend=BLEND)
    study(stage)
    answer = stage.ask(prompt_of([ids(9, 30), D, C, B, A]), 1, blend=Blend("none", 0))
    assert [placed > 0 for placed, _ in chunks_of(answer)] == [False, False, False, True, True]


def test_where_no_sequence_can_be_set_aside_the_answer_is_complete_and_chunks_are_warmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = blend_stage()
    answer = stage.submit(prompt_of([D, A]), 1, blend=BLEND)

    def fail(*_: object) -> None:
        raise EngineError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "fork", fail)
        stage.run()
    assert answer.done.reason == "length"
    study(stage)
    own = stage.blending.own_prompts(prompt_of([A]))[0]
    assert stage.store.match(own.tokens).length == len(own) and stage.scores.get(stage.blending.key(own)) is None
