"""Blended requests on the toy engine: what is placed, what is computed, and that nobody else ever sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import TOY_SPEC
from tests.kv.doubles import DictTier
from tests.serve.blending import (
    BLEND,
    A,
    B,
    C,
    D,
    blend_stage,
    chunks_of,
    fresh,
    learned,
    prompt_of,
    study,
    toy_answer,
)
from tests.serve.conftest import Answer, Stage, ids

from rekindle.engine.protocol import Payload
from rekindle.errors import BadRange, ContextFull, InvalidRequest
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Place, Plan
from rekindle.reuse.prompt import Prompt, join
from rekindle.serve import pace
from rekindle.serve.blending import check_blend
from rekindle.serve.metrics import sources_of
from rekindle.serve.request import Generation
from rekindle.tokens import as_tokens, common_length


def common(one: list[int], other: list[int]) -> list[int]:
    return one[: common_length(as_tokens(one), as_tokens(other))]


def test_a_chunk_is_computed_when_it_is_met_first_and_placed_from_then_on() -> None:
    stage = blend_stage()
    prompt = prompt_of([A, B])
    first = stage.ask(prompt, blend=BLEND)
    assert chunks_of(first) == [(0, 0), (0, 0)]
    assert list(first.done.tokens) == fresh(prompt)
    study(stage)
    turned = prompt_of([B, D, A])
    computed = stage.engine.num_computed
    second = stage.ask(turned, 1, blend=BLEND)
    assert chunks_of(second) == [(0, 0), (0, 0), (80, 20)]  # D is missing; B stands where it would on its own
    assert stage.engine.num_computed - computed == second.done.plan.computed == 2 + 150 + 2 + 20 + 2 + 3
    assert second.done.usage.blended_tokens == 80
    assert second.done.usage.cached_tokens == 80 + 65
    assert sources_of(second.done.plan, second.run.fetched)["blended"] == 80
    assert list(second.done.tokens) == toy_answer(turned, second.done.plan, 1)


def test_blended_answers_are_what_the_plan_gives_and_not_what_reading_gives() -> None:
    stage = learned(A, B, C, D)
    prompt = prompt_of([D, B, C, A])
    answer = stage.ask(prompt, blend=Blend("none", 0))
    assert chunks_of(answer) == [(0, 0), (64, 0), (45, 0), (100, 0)]
    assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5) != fresh(prompt)


def test_without_being_asked_for_nothing_is_blended() -> None:
    stage = learned(A, B)
    prompt = prompt_of([D, A, B])
    answer = stage.ask(prompt)
    assert not answer.done.plan.blended and not answer.done.plan.chunks
    assert list(answer.done.tokens) == fresh(prompt)
    assert not any(isinstance(step, Place) for step in answer.done.plan.steps)


@pytest.mark.parametrize("select", ["none", "first", "remembered", "auto"])
def test_a_blended_tail_reaches_nobody_else(select: str) -> None:
    """Not the resident, not the store, not one who reads at the same time, not a pin; the exact beginning does."""
    prompt = prompt_of([D, A, B])
    stage = learned(A, B)
    blended = stage.submit(prompt, 50, blend=Blend(select, 0.1))  # type: ignore[arg-type]
    stage.run(until=lambda: blended.num_tokens > 3)
    beside = stage.submit(prompt)  # while the other is being answered
    stage.run()
    exact = blended.done.plan.exact
    assert blended.done.usage.blended_tokens > 100 and blended.done.kept == 0
    if select == "none":
        assert blended.done.tokens[:5] != beside.done.tokens  # or this test could not fail
    for read in ("running", "resident", "stored"):
        answer = beside if read == "running" else stage.ask(prompt)
        assert list(answer.done.tokens) == fresh(prompt)
        assert answer.done.usage.cached_tokens == (exact if read == "running" else len(prompt))
        study(stage)
        stage.scheduler.residents.clear()
    alone = learned(A, B)
    again = alone.ask(prompt, blend=Blend(select, 0.1))  # type: ignore[arg-type]
    while alone.scheduler.residents.evict():
        pass
    assert alone.store.match(prompt.tokens).length == exact // 16 * 16
    assert list(alone.ask(prompt).done.tokens) == fresh(prompt)
    follow = Prompt(as_tokens([*prompt.tokens, *again.done.tokens, 9]))
    assert list(alone.ask(follow).done.tokens) == fresh(follow)


def test_two_salts_share_no_chunk() -> None:
    stage = learned(A, B)
    answer = stage.ask(prompt_of([D, A, B], salt=b"other"), blend=BLEND)
    assert chunks_of(answer) == [(0, 0)] * 3
    study(stage)
    own = stage.ask(prompt_of([C, A, B], salt=b"other"), blend=BLEND)
    assert [placed > 0 for placed, _ in chunks_of(own)] == [False, True, True]


def test_chunks_that_begin_alike_are_told_apart() -> None:
    stage = learned(A)
    for alike in (A[:50], A[:70] + ids(31, 20), A + ids(32, 10), A[:98] + ids(33, 30)):
        prompt = prompt_of([D, alike])
        stage.scheduler.residents.clear()
        answer = stage.ask(prompt, blend=Blend("none", 0))
        shared = len(common(A, alike))
        assert shared - 16 < chunks_of(answer)[1][0] <= shared
        assert answer.run.tokens.tolist()[: len(prompt)] == prompt.tokens.tolist()
        assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5)


def test_edges() -> None:
    stage = learned(A, B, C)
    for chunks in ([], [[]], [[], A, []], [A], [A, A], [[], [], C], [C, B, A, C, B, A]):
        for blend in (Blend("none", 0), BLEND, Blend("auto", 0.5), Blend("remembered", 1.0)):
            prompt = prompt_of(chunks)
            stage.scheduler.residents.clear()
            answer = stage.ask(prompt, blend=blend)
            assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5)
            if blend.ratio == 1 or not answer.done.plan.blended:
                assert list(answer.done.tokens) == fresh(prompt)
            assert answer.done.usage.computed_tokens + answer.done.usage.cached_tokens == len(prompt)


def test_chunks_side_by_side_and_nothing_but_chunks() -> None:
    stage = learned(A, B, C)
    prompt = prompt_of([C, A, B], gap=[])
    answer = stage.ask(prompt, blend=Blend("none", 0))
    assert chunks_of(answer) == [(0, 0), (100, 0), (64, 0)]
    assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5)
    bare = Prompt(as_tokens(B + A), chunks=prompt_of([B, A], gap=[]).chunks[:0])
    bare = Prompt(bare.tokens, chunks=(type(prompt.chunks[0])(0, 64), type(prompt.chunks[0])(64, 164)))
    answer = stage.ask(bare, blend=Blend("none", 0))  # the first stands before where it was: its head has no room there
    assert chunks_of(answer) == [(64, 0), (99, 0)]
    assert list(answer.done.tokens) == toy_answer(bare, answer.done.plan, 5)


def test_what_does_not_fit_in_the_context_is_computed_or_refused() -> None:
    stage = learned(D, A, num_cells=300)
    prompt = prompt_of([ids(30, 20), D, A])  # 282 of 300 cells
    answer = stage.ask(prompt, 10, blend=Blend("none", 0))
    assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 10)
    assert answer.done.usage.cached_tokens >= 240


def test_a_head_too_long_to_be_cut_off_beside_the_prompts_is_reused_exactly_and_costs_nobody_anything() -> None:
    head = ids(90, 310)  # behind it chunks begin in the midst of a block, and twice it does not fit in
    stage = blend_stage(560, head=head)
    for chunk in (C, B):
        stage.ask(prompt_of([ids(9, 30), chunk]), 1, blend=BLEND)
        study(stage)
    stored = stage.store.stats().blocks
    parts = [(as_tokens(head), False), (as_tokens(B), True), (as_tokens(C), True), (as_tokens([5, 6, 7]), False)]
    answer = stage.ask(join(parts), 3, blend=Blend("none", 0))
    assert answer.done.usage.cached_tokens >= len(head) and not answer.done.usage.blended_tokens
    assert list(answer.done.tokens) == fresh(join(parts), 3)
    assert stage.store.stats().blocks >= stored, "nobody's blocks were lost for it"


@pytest.mark.parametrize("head", [[], [1], ids(40, 15), ids(41, 16), ids(42, 37)])
@pytest.mark.parametrize("turns_all_cells", [True, False])
def test_heads_of_any_length(head: list[int], turns_all_cells: bool) -> None:
    stage = Stage(head=head)
    stage.engine.turns_all_cells = turns_all_cells
    stage.ask(prompt_of([ids(9, 30), A, C]), 1, blend=BLEND)
    study(stage)
    for select, ratio in (("none", 0.0), ("remembered", 0.2)):
        prompt = prompt_of([D, C, A])
        answer = stage.ask(prompt, blend=Blend(select, ratio))  # type: ignore[arg-type]
        assert answer.done.usage.blended_tokens >= 145 * (1 - ratio) - 1
        assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5, head)
        stage.scheduler.residents.clear()


def test_remembered_scores_choose_what_is_computed() -> None:
    """The toy's states differ wherever anything stands before a token, so all scores are 1."""
    stage = learned(A)
    own = stage.blending.own_prompts(prompt_of([A]))[0]
    scores = stage.scores.get(stage.blending.key(own))
    assert scores is not None and scores.tolist() == [1.0] * 100
    answer = stage.ask(prompt_of([D, A]), blend=Blend("auto", 0.1))
    assert answer.done.plan.chunks[1].why == "their KV differed most between in place and on its own"
    assert chunks_of(answer)[1] == (90, 10)


def test_swapped_requests_go_on_where_they_were() -> None:
    stage = learned(A, B, C, D, num_cells=760)
    prompts = [prompt_of([[*ids(60 + number, 30)], D, A, B]) for number in range(3)]
    answers = [stage.submit(prompt, 60, blend=Blend("first", 0.15)) for prompt in prompts]
    stage.run()
    assert stage.scheduler.counts.swaps > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.done.usage.blended_tokens > 200
        assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 60)


@pytest.mark.parametrize("budget", [7, 40, 200, 512])
@pytest.mark.parametrize("select", ["none", "first", "remembered"])
def test_what_is_placed_at_once_is_what_is_placed_in_turn(
    select: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of any size, which end before, between and behind parts of chunks."""
    monkeypatch.setattr(pace, "LONE_TOKENS", (budget, budget))
    stage, in_turn = learned(A, B, C, D, prefill_budget=budget), learned(A, B, C, D, prefill_budget=budget)
    in_turn.engine.places_between = False
    prompt = prompt_of([D, ids(9, 30), B, C, A, B])
    blend = Blend(select, 0.0 if select == "none" else 0.2)  # type: ignore[arg-type]
    answers, calls = [], []
    for each in (stage, in_turn):
        before = each.engine.num_calls
        answers.append(each.ask(prompt, 5, blend=blend))
        calls.append(each.engine.num_calls - before)
    one, other = (answer.done for answer in answers)
    assert list(one.tokens) == list(other.tokens) == toy_answer(prompt, one.plan, 5) != fresh(prompt)
    assert one.usage == other.usage and one.plan.chunks == other.plan.chunks
    assert calls[0] < calls[1]
    assert calls[0] == 4 + -(-one.plan.computed // budget)


def test_nothing_is_placed_between_while_somebody_is_answered() -> None:
    """Who is would have to wait for all of it; so a step places what is due and computes up to what comes next."""
    stage = learned(A, B, C)
    other = stage.submit(Prompt(as_tokens(ids(91, 20))), 200)
    stage.run(until=lambda: bool(other.run.generated))
    answer = stage.submit(prompt_of([C, A, B]), 1, blend=Blend("none", 0))
    left = []
    while not answer.events:
        stage.scheduler.step()
        left.append(sum(map(len, answer.run.parts)))
    assert left == [len(A) + len(B), len(B), 0]
    stage.run()
    assert list(answer.done.tokens) == toy_answer(prompt_of([C, A, B]), answer.done.plan, 1)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_whose_chunk_is_refused_does_not_hold_up_others(bad: int) -> None:
    """Two are read in one call; the engine refuses a block of one of them, which then goes part by part."""
    stage = learned(A, B, C)
    stage.engine.turns_all_cells = False  # or else it would be seen at admission
    good, torn = prompt_of([C, B]), prompt_of([D, A])
    own = stage.blending.own_prompts(prompt_of([A]))[0]
    for block in stage.store.match(own.tokens).blocks[:1]:
        object.__setattr__(block, "payload", block.payload.cast("Q"))
    prompts = [torn, good] if bad == 0 else [good, torn]
    answers = [stage.submit(prompt, 3, blend=Blend("none", 0)) for prompt in prompts]
    stage.run()
    broken, whole = answers if bad == 0 else answers[::-1]
    assert list(broken.done.tokens) == fresh(torn, 3) and broken.done.usage.blended_tokens == 0
    assert whole.done.usage.blended_tokens == len(B)
    assert list(whole.done.tokens) == toy_answer(good, whole.done.plan, 3)
    assert stage.store.match(own.tokens).length == 0


def test_a_swap_in_the_midst_of_placing() -> None:
    stage = learned(A, B, D)
    stage.engine.places_between = False
    prompt = prompt_of([ids(9, 30), D, A, B])
    answer = stage.submit(prompt, 5, blend=Blend("first", 0.15))
    stage.run(until=lambda: 0 < len(answer.run.parts) < 20 and answer.run.read > 200)
    stage.scheduler._room.swap_out(answer.run)
    assert answer.run.parts and not stage.engine.num_held([answer.run.seq] if answer.run.seq else [])
    stage.run()
    assert list(answer.done.tokens) == toy_answer(prompt, answer.done.plan, 5)


def test_what_cannot_be_placed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = learned(A, B)
    stage.engine.places_between = False
    prompt = prompt_of([D, A, B])
    answer = stage.submit(prompt, 5, blend=Blend("none", 0))
    stage.run(until=lambda: bool(answer.run.parts))

    def fail(seq: int, payload: Payload, position: int, **part: object) -> None:
        raise BadRange("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "place", fail)
        stage.run()
    assert list(answer.done.tokens) == fresh(prompt)
    assert answer.done.usage.blended_tokens == 0
    assert answer.done.usage.computed_tokens == len(prompt) - answer.done.plan.begin


def test_torn_blocks_of_a_chunk_are_computed_and_found_by_nobody_again() -> None:
    stage = learned(A, B)
    own, other = stage.blending.own_prompts(prompt_of([A, B]))
    for block in stage.store.match(own.tokens).blocks[:1]:
        object.__setattr__(block, "payload", block.payload.cast("Q"))  # as many bytes, but not as the engine wants them
    prompt = prompt_of([D, A, B])
    answer = stage.ask(prompt, blend=Blend("none", 0))
    assert list(answer.done.tokens) == fresh(prompt)
    assert stage.store.match(own.tokens).length == 0
    assert stage.store.match(other.tokens).length == len(other), "which there is nothing wrong with"
    study(stage)
    answer = stage.ask(prompt_of([ids(81, 30), A, B]), 1, blend=Blend("none", 0))
    assert chunks_of(answer)[1:] == [(100, 0), (64, 0)], "one was learned of anew, from the request that failed with it"


@pytest.mark.parametrize("select", ["none", "auto"])
@pytest.mark.parametrize("torn", [0, 2])
def test_a_chunk_that_is_refused_when_its_turn_comes_is_forgotten_and_learned_anew(select: str, torn: int) -> None:
    """Admission has put the exact beginning back by then, and does not look at what is placed later."""
    stage = learned(A, B)
    stage.engine.turns_all_cells = False
    own, other = stage.blending.own_prompts(prompt_of([A, B]))
    block = stage.store.match(own.tokens).blocks[torn]
    object.__setattr__(block, "payload", block.payload.cast("Q"))  # as many bytes, but not as the engine wants them
    prompt, blend = prompt_of([D, A, B]), Blend(select, 0)  # type: ignore[arg-type]
    answer = stage.ask(prompt, blend=blend)
    assert answer.done.plan.blended == 164 and answer.done.usage.blended_tokens == 16 * torn - bool(torn)
    assert stage.store.match(own.tokens).length == 16 * torn, "what comes before it is good"
    assert stage.store.match(other.tokens).length == len(other)
    study(stage)
    answer = stage.ask(prompt_of([ids(81, 30), A, B]), 1, blend=blend)
    assert chunks_of(answer)[1:] == [(100, 0), (64, 0)]
    stage.scheduler.check_integrity()


def test_a_chunk_that_finds_no_room_when_its_turn_comes_stays_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = learned(A)
    stage.engine.places_between = False
    own = stage.blending.own_prompts(prompt_of([A]))[0]
    answer = stage.submit(prompt_of([D, A]), 1, blend=Blend("none", 0))
    stage.run(until=lambda: bool(answer.run.parts))

    def fail(*_: object, **__: object) -> None:
        raise ContextFull("full on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "place", fail)
        stage.run()
    assert answer.done.usage.blended_tokens == 0
    assert stage.store.match(own.tokens).length == len(own)


def test_chunks_come_from_slower_tiers_before_the_request_starts() -> None:
    tier = DictTier()
    first = blend_stage(tiers=[tier])
    first.submit(prompt_of([A, D]), 1, blend=BLEND)
    for _ in range(20):  # steps that fetch, and steps that study
        while not first.scheduler.step().idle:
            pass
        first.end_fetches()
        first.scheduler.use_idle_time()
    assert not first.scheduler.use_idle_time()
    first.store.behind.drain()
    second = blend_stage(tiers=[tier])
    answer = second.submit(prompt_of([C, A, D]), 5, blend=Blend("none", 0))
    second.run(until=lambda: bool(second.fetches))
    second.end_fetches()
    second.run()
    assert chunks_of(answer)[1:] == [(100, 0), (150, 0)]
    reasons = [step.reason for step in answer.done.plan.steps if isinstance(step, Place)]
    assert "tokens fetched from disk" in reasons[0], reasons


def test_what_is_refused() -> None:
    prompt = prompt_of([A])
    for options in ({"warm": True}, {"feed": True}, {"pin_seconds": 9.0}):
        with pytest.raises(InvalidRequest, match="what is blended is not kept"):
            Generation(prompt=prompt, blend=BLEND, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="between 0 and 1, got 2"):
        Blend("first", 2)
    with pytest.raises(InvalidRequest, match=r"one of none, first, .* got 'best'"):
        Blend("best")  # type: ignore[arg-type]


def test_models_whose_kv_cannot_be_moved_refuse() -> None:
    wish = Generation(prompt=prompt_of([A]), blend=BLEND)
    check_blend(wish, TOY_SPEC)
    with pytest.raises(InvalidRequest, match="its KV can't be moved to other positions; leave blend out"):
        check_blend(wish, replace(TOY_SPEC, can_shift=False))


POOL = [[], ids(70, 1), ids(71, 19), ids(72, 20), ids(73, 47), ids(74, 64), ids(75, 95), ids(76, 130)]
POOL += [ids(75, 95)[:60], ids(75, 95)[:93] + ids(77, 50), ids(73, 47)[:30] + ids(78, 12)]  # that begin alike
chunk_lists = st.lists(st.sampled_from(POOL), max_size=5)
asked = st.tuples(
    chunk_lists,
    st.sampled_from(["none", "first", "remembered", "auto", None]),
    st.sampled_from([0.0, 0.05, 0.15, 0.5, 1.0]),
    st.sampled_from([b"", b"salt"]),
    st.sampled_from(["", "study", "evict", "clear", "cancel"]),
)


@given(st.lists(asked, min_size=1, max_size=8), st.sampled_from([560, 2000]), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_any_mix_of_requests(
    requests: list[tuple[list[list[int]], str | None, float, bytes, str]],
    num_cells: int,
    one_by_one: bool,
    turns_all_cells: bool,
) -> None:
    """Blended answers are what their plans give, exact ones what reading gives, whatever came before or runs beside."""
    stage = blend_stage(num_cells)
    stage.engine.turns_all_cells = turns_all_cells
    answers: list[tuple[Prompt, str | None, Answer]] = []
    for chunks, select, ratio, salt, then in requests:
        prompt = prompt_of(chunks, salt=salt)
        if len(prompt) >= num_cells - 6:
            continue
        blend = None if select is None else Blend(select, ratio)  # type: ignore[arg-type]
        answers.append((prompt, select, stage.submit(prompt, 5, blend=blend)))
        if then == "cancel":
            for _ in range(3):
                stage.scheduler.step()
            answers[-1][2].run.cancel()
        if one_by_one or then:
            stage.run()
        if then == "study":
            study(stage)
        while then == "evict" and stage.scheduler.residents.evict():
            pass
        if then == "clear":
            stage.scheduler.residents.clear()
        stage.scheduler.check_integrity()
    stage.run()
    for prompt, select, answer in answers:
        plan: Plan = answer.done.plan
        if answer.done.reason == "cancelled":
            continue
        if answer.run.parked:
            assert num_cells == 560
            continue
        assert list(answer.done.tokens) == toy_answer(prompt, plan, 5)
        if select is None or not plan.blended:
            assert list(answer.done.tokens) == fresh(prompt)
    study(stage)
    stage.scheduler.clear_cache()
    assert stage.engine.num_free_cells == stage.engine.num_cells
