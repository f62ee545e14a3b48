"""Requests over time, on the toy engine: what is computed, what is shared, and that nobody is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.conftest import Answer, Stage, ids

from rekindle.errors import EngineError
from rekindle.serve.request import Done, Failed, Sampling


def test_an_exact_repeat_makes_no_model_call_before_its_first_token(stage: Stage) -> None:
    prompt = ids(1, 100)
    cold = stage.ask(prompt)
    calls = stage.engine.num_calls
    warm = stage.submit(prompt)
    stage.run(until=lambda: bool(warm.events))
    assert stage.engine.num_calls - calls <= 1  # the step that sampled the first token may have gone on to the second
    stage.run()
    assert warm.text == cold.text
    assert (warm.done.usage.cached_tokens, warm.done.timings.prefill_calls) == (100, 0)
    assert (cold.done.usage.cached_tokens, cold.done.timings.prefill_calls) == (0, 1)


def test_a_second_turn_computes_only_what_follows_the_first_answer(stage: Stage) -> None:
    prompt = ids(2, 50)
    first = stage.ask(prompt, 8)
    computed = stage.engine.num_computed
    second = stage.ask([*prompt, *first.done.tokens, *ids(3, 10)], 1)
    assert second.done.usage.computed_tokens == 11  # the answer's last token was sampled, never computed
    assert stage.engine.num_computed - computed == 11


def test_a_shared_beginning_is_shared_at_the_token(stage: Stage) -> None:
    prompt = ids(4, 77)
    stage.ask(prompt)
    assert stage.ask([*prompt[:53], *ids(5, 20)]).done.usage.cached_tokens == 53


@pytest.mark.parametrize("evicted", [False, True])
def test_reused_answers_are_those_of_fresh_ones(evicted: bool) -> None:
    stage = Stage()
    prompts = [ids(6, 40) + ids(seed, 10 + seed) for seed in range(6)]
    prompts += prompts[:3]
    for prompt in prompts:
        answer = stage.ask(prompt)
        assert answer.text == Stage().ask(prompt).text
        while evicted and stage.scheduler.residents.evict():
            pass


def test_what_leaves_the_engine_comes_back_from_the_store(stage: Stage) -> None:
    prompt = ids(7, 100)
    first = stage.ask(prompt, 8)
    while stage.scheduler.residents.evict():
        pass
    assert stage.engine.num_free_cells == stage.engine.num_cells
    again = stage.ask(prompt, 8)
    assert (again.done.usage.cached_tokens, again.done.timings.prefill_calls) == (100, 0)
    assert again.text == first.text
    while stage.scheduler.residents.evict():
        pass
    follow = stage.ask([*prompt, *first.done.tokens, *ids(8, 10)], 1)
    assert follow.done.usage.computed_tokens == 11


def test_idle_time_saves_residents_once(stage: Stage) -> None:
    stage.ask(ids(9, 100))
    assert [stage.scheduler.residents.save_one() for _ in range(3)] == [True, True, False]  # in pieces of four blocks
    assert stage.store.stats().blocks == 8  # 104 tokens: six blocks of 16, a tail at 100 and one at 104
    stage.scheduler.clear_cache()
    assert (len(stage.scheduler.residents), stage.store.stats().blocks) == (0, 0)


def test_two_salts_share_nothing(stage: Stage) -> None:
    prompt = ids(10, 100)
    stage.ask(prompt, salt=b"one")
    stage.scheduler.residents.save_one()
    other = stage.ask(prompt, salt=b"two")
    assert other.done.usage.cached_tokens == 0
    assert stage.ask(prompt, salt=b"one").done.usage.cached_tokens == 100


def test_prompts_below_the_minimum_are_not_kept(stage: Stage) -> None:
    stage.ask(ids(11, 10), 2)
    assert len(stage.scheduler.residents) == 0
    assert stage.engine.num_free_cells == stage.engine.num_cells


def test_without_prefix_cache_nothing_is_read_or_written(stage: Stage) -> None:
    prompt = ids(12, 60)
    kept = stage.ask(prompt)
    for _ in range(2):
        answer = stage.ask(prompt, use_prefix_cache=False)
        assert (answer.done.usage.cached_tokens, answer.text) == (0, kept.text)
    assert len(stage.scheduler.residents) == 1
    assert stage.scheduler.counts.requests == 1


def test_without_kv_cache_every_token_reads_everything(stage: Stage) -> None:
    prompt = ids(13, 30)
    computed = stage.engine.num_computed
    answer = stage.ask(prompt, 4, use_kv_cache=False, use_prefix_cache=False)
    assert stage.engine.num_computed - computed == 30 + 31 + 32 + 33
    assert answer.text == Stage().ask(prompt, 4).text


def test_one_prefill_many_readers(stage: Stage) -> None:
    shared = ids(14, 500)
    answers = [stage.submit(shared + ids(seed, 10)) for seed in range(8)]
    computed = stage.engine.num_computed
    stage.run()
    assert stage.engine.num_computed - computed == 500 + 8 * (10 + 4)
    for seed, answer in enumerate(answers):
        assert answer.text == Stage().ask(shared + ids(seed, 10)).text


def test_a_long_prompt_does_not_stall_a_running_answer() -> None:
    stage = Stage(prefill_budget=16)
    stream = stage.submit(ids(15, 20), 50)
    stage.run(until=lambda: stream.num_tokens >= 1)
    long = stage.submit(ids(16, 400), 1)
    tokens = stream.num_tokens
    steps = stage.run(until=lambda: bool(long.events))
    assert steps == 25
    assert stream.num_tokens - tokens == steps


def test_a_swapped_request_is_resumed_with_nothing_recomputed() -> None:
    prompts = [ids(seed, 60) for seed in (17, 18, 19)]
    alone = [Stage().ask(prompt, 60).text for prompt in prompts]
    stage = Stage(num_cells=260)
    answers = [stage.submit(prompt, 60) for prompt in prompts]
    stage.run()
    assert stage.scheduler.counts.swaps > 0
    assert stage.engine.num_computed == 3 * (60 + 59)
    assert [answer.text for answer in answers] == alone


def test_an_answer_ends_at_the_context_end() -> None:
    stage = Stage(num_cells=100)
    answer = stage.ask(ids(20, 60), None)
    assert (answer.done.reason, answer.num_tokens) == ("length", 40)


def test_the_end_of_turn_is_not_part_of_the_answer(stage: Stage) -> None:
    wanted = Sampling(temperature=0, logit_bias={3: 100.0})
    answer = stage.ask(ids(21, 30), 10, sampling=wanted, ignore_eos=False)
    assert (answer.done.reason, answer.text, answer.done.tokens) == ("stop", "", ())


def test_a_stop_string_ends_the_answer_before_it(stage: Stage) -> None:
    whole = stage.ask(ids(22, 30), 10).text
    answer = stage.ask(ids(22, 30), 10, stop=(whole[4:6],))
    assert (answer.text, answer.done.reason) == (whole[:4], "stop")


def test_a_seed_reproduces_whatever_else_runs(stage: Stage) -> None:
    wanted = Sampling(temperature=1.0, seed=5)
    alone = stage.ask(ids(23, 30), 20, sampling=wanted)
    others = [stage.submit(ids(seed, 30), 30, sampling=Sampling(seed=seed)) for seed in range(4)]
    again = stage.submit(ids(23, 30), 20, sampling=wanted)
    stage.run()
    assert again.text == alone.text != others[0].text


@pytest.mark.parametrize("tokens_before", [None, 0, 1, 3])
def test_a_cancelled_request_frees_everything_within_a_step(stage: Stage, tokens_before: int | None) -> None:
    blocker = stage.submit(ids(24, 30), 100)
    answer = stage.submit(ids(25, 300), 100)
    if tokens_before is not None:
        stage.run(until=lambda: answer.run.seq is not None and answer.num_tokens >= tokens_before)
    answer.run.cancel()
    stage.scheduler.step()
    assert answer.done.reason == "cancelled"
    blocker.run.cancel()
    stage.scheduler.step()
    stage.scheduler.clear_cache()
    assert stage.engine.num_free_cells == stage.engine.num_cells


def test_a_sink_that_fails_ends_its_request_only(stage: Stage) -> None:
    def sink(event: object) -> None:
        raise RuntimeError("the reader is gone")

    lost = stage.submit(ids(26, 30), 1000)
    lost.run.sink = sink
    other = stage.submit(ids(27, 30), 5)
    stage.run()
    assert other.done.reason == "length"


def test_an_engine_failure_is_told_to_the_requests_in_the_batch(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: object) -> object:
        raise EngineError("no more")

    answer = stage.submit(ids(28, 30))
    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "forward", fail)
        stage.scheduler.step()
    assert isinstance(answer.events[-1], Failed) and str(answer.events[-1].error) == "no more"
    assert stage.ask(ids(28, 30)).done.reason == "length"


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # which beginning
        st.integers(1, 70),  # how much of it
        st.integers(0, 30),  # own tokens
        st.integers(1, 12),  # answer
        st.integers(0, 6),  # steps before the next request
        st.booleans(),  # cancelled at once
    ),
    min_size=1,
    max_size=14,
)


@settings(deadline=None, max_examples=60)
@given(requests, st.integers(130, 400), st.integers(0, 3), st.integers(1, 6), st.sampled_from([0, 3000, 1 << 30]))
def test_any_mix_is_answered_as_if_alone(
    mix: list[tuple[int, int, int, int, int, bool]], cells: int, residents: int, running: int, store_bytes: int
) -> None:
    stage = Stage(cells, max_residents=residents, max_running=running, store_bytes=store_bytes)
    asked: list[tuple[list[int], int, Answer, bool]] = []
    for number, (base, shared, own, length, steps, cancelled) in enumerate(mix):
        prompt = ids(base, 70)[:shared] + ids(100 + number, own)
        answer = stage.submit(prompt, length)
        asked.append((prompt, length, answer, cancelled))
        if cancelled:
            answer.run.cancel()
        for _ in range(steps):
            stage.scheduler.step()
            stage.scheduler.check_integrity()
    stage.run()
    for prompt, length, answer, cancelled in asked:
        assert isinstance(answer.events[-1], Done)
        if not cancelled:
            assert answer.text == Stage().ask(prompt, length).text
    stage.scheduler.clear_cache()
    assert stage.engine.num_free_cells == stage.engine.num_cells


def test_a_resident_whose_blocks_the_store_has_lost_is_saved_again(stage: Stage) -> None:
    prompt = ids(29, 100)
    stage.ask(prompt)
    stage.scheduler.residents.save_one()
    stage.store.clear()
    assert stage.scheduler.residents.evict()
    assert stage.ask(prompt).done.usage.cached_tokens == 100


def test_prompts_that_do_not_fit_together_are_read_one_after_the_other() -> None:
    stage = Stage(100)
    answers = [stage.submit(ids(30, 50), 1), stage.submit(ids(31, 80), 1)]
    stage.run()
    assert [answer.done.usage.prompt_tokens for answer in answers] == [50, 80]


def test_a_request_without_kv_cache_does_not_fail_its_neighbours() -> None:
    stage = Stage(100)
    answers = [stage.submit(ids(32, 60), 3), stage.submit(ids(33, 60), 3, use_kv_cache=False)]
    stage.run()
    assert [answer.num_tokens for answer in answers] == [3, 3]


def test_a_request_without_kv_cache_reuses_nothing(stage: Stage) -> None:
    stage.ask(ids(34, 60))
    answer = stage.ask(ids(34, 60), use_kv_cache=False)
    assert (answer.done.usage.cached_tokens, stage.scheduler.counts.hits) == (0, 0)


def test_a_stored_block_that_the_engine_refuses_is_computed_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage.ask(ids(35, 100))
    while stage.scheduler.residents.evict():
        pass
    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "place", refuse)
        answer = stage.ask(ids(35, 100))
    assert (answer.text, answer.done.usage.computed_tokens) == (first.text, 100)


def test_a_long_stored_tail_needs_room_for_all_of_it() -> None:
    stage = Stage(100)
    prompt = ids(36, 95)
    stage.ask(prompt, 1)
    while stage.scheduler.residents.evict():
        pass
    blocker = stage.submit(ids(37, 5), 8)
    stage.scheduler.step()
    answer = stage.submit(prompt[:82], 1)
    stage.run()
    assert answer.done.usage.cached_tokens >= 80 and blocker.done


def test_a_resident_that_cannot_be_saved_leaves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(100)
    stage.ask(ids(38, 50), 1)
    monkeypatch.setattr(stage.engine, "export", refuse)
    assert stage.ask(ids(39, 80), 1).done.reason == "length"


def test_for_a_request_that_cannot_be_swapped_out_no_other_has_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sequence is a resident at once, and its cells are enough."""
    stage = Stage(300)
    answers = [stage.submit(ids(seed, 95), 40) for seed in (43, 44, 45)]
    monkeypatch.setattr(stage.engine, "export", refuse)
    stage.run()
    assert [type(answer.events[-1]) for answer in answers] == [Done, Done, Failed]
    assert stage.scheduler.counts.swaps == 0
    computed = [answer.done.usage.computed_tokens for answer in answers[:2]]
    assert computed == [95, 95] and all(answer.num_tokens == 40 for answer in answers[:2])


def test_a_request_that_must_wait_drives_no_resident_out() -> None:
    stage = Stage(300)
    stage.ask(ids(40, 40), 1)
    busy = stage.submit(ids(41, 100), 60)
    stage.run(until=lambda: busy.num_tokens > 0)
    stage.submit(ids(42, 250), 1)
    stage.scheduler.step()
    assert len(stage.scheduler.residents) == 1
    stage.run()


def refuse(*_: object, **__: object) -> None:
    raise EngineError("made to fail")


loads = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 20), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=80)
@given(loads, st.integers(0, 5))
def test_no_load_gets_stuck(load: list[tuple[int, int, bool]], steps: int) -> None:
    stage = Stage(120, max_length=120)
    answers = []
    for number, (length, max_tokens, cached) in enumerate(load):
        answers.append(stage.submit(ids(number, length), max_tokens, use_kv_cache=cached))
        for _ in range(steps):
            stage.scheduler.step()
    stage.run()
    assert all(isinstance(answer.events[-1], Done) for answer in answers)


def test_a_request_whose_sequence_cannot_be_cut_back_ends_all_the_same(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its KV is kept for nobody; others go on."""
    other, answer = stage.submit(ids(91, 40), 30), stage.submit(ids(90, 100), 3)

    def fail(*_: object) -> None:
        raise EngineError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "truncate", fail)
        stage.run(until=lambda: any(isinstance(event, Done) for event in answer.events))
    assert answer.done.reason == "length" and not len(stage.scheduler.residents)
    stage.run()
    assert other.done.usage.completion_tokens == 30
