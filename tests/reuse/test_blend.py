"""Blended plans cover the prompt, spend no more than they may, and place nothing that is not at hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.reuse.blend import Blend, Memory, OnItsOwn, make_blend_plan
from rekindle.reuse.blend_select import RANGE_TOKENS, Span, choose, dearest
from rekindle.reuse.plan import Compute, Place, Plan, Resident, Stored, make_plan
from rekindle.reuse.prompt import Prompt, join
from rekindle.tokens import as_tokens

GAP, CHUNK = 2, 40


def prompt_of(*lengths: int) -> Prompt:
    """A gap, then chunks of these lengths with a gap behind each."""
    parts = [(as_tokens([1] * GAP), False)]
    for length in lengths:
        parts += [(as_tokens(range(10, 10 + length)), True), (as_tokens([1] * GAP), False)]
    return join(parts)


def blended(
    prompt: Prompt, known: list[OnItsOwn | None], select: str, ratio: float, stored: Stored | None = None
) -> Plan:
    exact = make_plan(prompt, [], stored or Stored())
    return make_blend_plan(prompt, exact, known, Blend(select, ratio))  # type: ignore[arg-type]


def spans(plan: Plan) -> list[tuple[str, int, int]]:
    return [(type(step).__name__, step.start, step.stop) for step in plan.steps]


def test_first_tokens_are_computed_with_the_gap_before_them() -> None:
    plan = blended(prompt_of(CHUNK, CHUNK), [OnItsOwn(1, CHUNK)] * 2, "first", 0.25)
    assert spans(plan) == [
        ("Compute", 0, 12),
        ("Place", 12, 42),
        ("Compute", 42, 54),
        ("Place", 54, 84),
        ("Compute", 84, 86),
    ]
    place = plan.steps[3]
    assert isinstance(place, Place) and (place.source, place.chunk) == (11, 1)
    assert [(c.placed, c.recomputed, c.moved) for c in plan.chunks] == [(30, 10, 1), (30, 10, 43)]
    assert (plan.ready, plan.exact, plan.reused) == (0, 12, 60)
    assert "10 tokens of chunks" in plan.steps[2].reason


def test_short_runs_grow_until_computing_more_would_take_longer() -> None:
    prompt = prompt_of(CHUNK, 2 * CHUNK, 4 * CHUNK)
    known: list[OnItsOwn | None] = [OnItsOwn(1, length) for length in (CHUNK, 2 * CHUNK, 4 * CHUNK)]
    plan = make_blend_plan(prompt, make_plan(prompt, [], Stored()), known, Blend("first", 0.25), slow_from=10)
    assert spans(plan) == [
        ("Compute", 0, 64),  # 12 tokens, and the rest of the first chunk, and with that what goes before the second's
        ("Place", 64, 124),
        ("Compute", 124, 188),
        ("Place", 188, 286),
        ("Compute", 286, 288),
    ]
    assert [chunk.recomputed for chunk in plan.chunks] == [CHUNK, 20, 62]
    assert "with them computing takes no longer" in (plan.chunks[0].why or "")
    last = make_blend_plan(prompt, make_plan(prompt, [], Stored()), known, Blend("none", 0), slow_from=2)
    assert spans(last)[-2:] == [("Place", 188, 224), ("Compute", 224, 288)]
    assert last.chunks[2].why == "with them computing takes no longer"
    unchanged = make_blend_plan(prompt, make_plan(prompt, [], Stored()), known, Blend("first", 0.25), slow_from=43)
    assert unchanged.steps == blended(prompt, known, "first", 0.25).steps


def test_long_runs_become_whole_tiles_and_the_budget_holds() -> None:
    prompt = prompt_of(*[512] * 8)
    known: list[OnItsOwn | None] = [OnItsOwn(1, 512)] * 8
    exact = make_plan(prompt, [], Stored())
    plan = make_blend_plan(prompt, exact, known, Blend("first", 0.15), slow_from=40)
    runs = [step.stop - step.start for step in plan.steps if isinstance(step, Compute)]
    assert set(runs[:-1]) == {64, 128} and len(runs) == 9
    asked = blended(prompt, known, "first", 0.15).computed
    assert 0 <= plan.computed - asked < 64
    for step in plan.steps:
        if isinstance(step, Compute) and step.start and step.stop < plan.total:
            assert step.reason.startswith("2 tokens that no chunk at hand has; ")
    scores = np.zeros(512, np.float32)
    scores[100:200] = 1
    remembered = make_blend_plan(prompt, exact, [OnItsOwn(1, 512, scores)] * 8, Blend("remembered", 0.2), slow_from=40)
    computed = np.zeros(len(prompt), bool)
    for step in remembered.steps:
        computed[step.start : step.stop] = isinstance(step, Compute)
    assert all(computed[chunk.start + 100 : chunk.start + 200].all() for chunk in prompt.chunks)


def test_remembered_scores_choose_a_range_in_the_middle() -> None:
    scores = np.zeros(CHUNK, np.float32)
    scores[20:26] = 1
    plan = blended(prompt_of(CHUNK), [OnItsOwn(1, CHUNK, scores)], "remembered", 0.15)
    assert spans(plan) == [
        ("Compute", 0, 2),
        ("Place", 2, 22),
        ("Compute", 22, 28),
        ("Place", 28, 42),
        ("Compute", 42, 44),
    ]
    assert plan.chunks[0].why == "their KV differed most between in place and on its own"


def test_the_budget_goes_to_the_chunk_that_needs_it() -> None:
    needy = np.full(CHUNK, 0.01, np.float32)
    needy[:12] = 1
    quiet = np.full(CHUNK, 0.01, np.float32)
    plan = blended(prompt_of(CHUNK, CHUNK), [OnItsOwn(1, CHUNK, quiet), OnItsOwn(1, CHUNK, needy)], "remembered", 0.15)
    assert [chunk.recomputed for chunk in plan.chunks] == [0, 12]


@pytest.mark.parametrize("select", ["none", "first", "remembered", "auto"])
def test_edges(select: str) -> None:
    own = OnItsOwn(1, CHUNK, np.ones(CHUNK, np.float32))
    nothing = blended(prompt_of(CHUNK), [own], select, 0.0)
    assert nothing.chunks[0].placed == CHUNK
    if select != "none":
        everything = blended(prompt_of(CHUNK, CHUNK), [own, own], select, 1.0)
        assert spans(everything) == [("Compute", 0, 86)]
        assert (everything.exact, everything.chunks[1].recomputed) == (86, CHUNK)
    missing = blended(prompt_of(CHUNK, CHUNK, CHUNK), [own, None, own], select, 0.15)
    assert missing.chunks[1].placed == missing.chunks[1].recomputed == 0 and missing.chunks[2].placed > 0
    empty = blended(prompt_of(0, CHUNK), [None, own], select, 0.15)
    assert empty.chunks[1].placed > 0
    alone = join([(as_tokens(range(CHUNK)), True)])  # nothing but a chunk: its last token is computed for its logits
    assert spans(blended(alone, [own], "none", 0.15)) == [("Place", 0, CHUNK - 1), ("Compute", CHUNK - 1, CHUNK)]
    half = blended(prompt_of(CHUNK), [OnItsOwn(1, CHUNK // 2)], "none", 0.15)
    assert spans(half) == [("Compute", 0, 2), ("Place", 2, 22), ("Compute", 22, 44)]


def test_the_exact_beginning_comes_first_and_may_end_within_a_chunk() -> None:
    prompt, own = prompt_of(CHUNK, CHUNK), OnItsOwn(1, CHUNK)
    plan = blended(prompt, [own, own], "none", 0.0, Stored(length=16, block_tokens=16))
    assert spans(plan)[:3] == [("Place", 0, 16), ("Place", 16, 42), ("Compute", 42, 44)]
    assert plan.chunks[0].exact == 14 and plan.exact == 16 and plan.ready == 42
    whole = make_plan(prompt, [Resident(3, prompt.tokens, frozenset({len(prompt)}))], Stored())
    assert make_blend_plan(prompt, whole, [own, own], Blend()).steps == whole.steps


def test_a_plan_for_the_wire_names_chunks() -> None:
    told = blended(prompt_of(CHUNK), [OnItsOwn(1, CHUNK)], "first", 0.15).as_dict()
    assert told["steps"][1] | {"reason": ""} == {
        "kind": "place",
        "start": 8,
        "stop": 42,
        "reason": "",
        "chunk": 0,
        "from": 7,
    }
    assert told["chunks"][0]["recomputed"] == 6


def test_memory_averages_meetings_and_forgets_the_oldest() -> None:
    memory = Memory(max_chunks=2)
    for value in (1.0, 3.0):
        memory.add(b"a", np.full(4, value, np.float32))
    memory.add(b"b", np.zeros(4, np.float32))
    found = memory.get(b"a")
    assert found is not None and found.tolist() == [2.0] * 4
    memory.add(b"c", np.zeros(4, np.float32))
    assert memory.get(b"a") is None and len(memory) == 2


lengths = st.lists(st.integers(0, 300), max_size=5)


@given(
    lengths, st.data(), st.sampled_from(["none", "first", "remembered", "auto"]), st.floats(0, 1), st.integers(0, 60)
)
def test_every_plan_covers_the_prompt_within_its_budget(
    sizes: list[int], data: st.DataObject, select: str, ratio: float, stored: int
) -> None:
    prompt = prompt_of(*sizes)
    known: list[OnItsOwn | None] = []
    for size in sizes:
        length = data.draw(st.integers(0, size))
        seed = data.draw(st.integers(0, 9))
        scores = np.random.default_rng(seed).random(size).astype(np.float32) if seed else None
        known.append(data.draw(st.sampled_from([None, OnItsOwn(3, length, scores)])))
    exact = min(stored, len(prompt))
    plan = blended(
        prompt, known, select, ratio, Stored(exact, block_tokens=4)
    )  # Plan checks that it has no gap or overlap
    for slow_from in (1, 10, 40):
        stored_plan = make_plan(prompt, [], Stored(exact, block_tokens=4))
        grown = make_blend_plan(prompt, stored_plan, known, Blend(select, ratio), slow_from=slow_from)  # type: ignore[arg-type]
        runs = [step for step in grown.steps if isinstance(step, Compute)]
        assert all(not slow_from <= run.stop - run.start < 64 for run in runs[:-1])
        assert grown.computed >= plan.computed
    assert plan.steps[-1].stop == len(prompt) and isinstance(plan.steps[-1], Compute)
    for step in plan.steps:
        if isinstance(step, Place) and step.chunk is not None:
            own, chunk = known[step.chunk], prompt.chunks[step.chunk]
            assert own is not None and step.source == own.head + step.start - chunk.start
            assert chunk.start <= step.start < step.stop <= min(chunk.stop, chunk.start + own.length)
    for chunk_plan, size in zip(plan.chunks, sizes, strict=True):
        assert chunk_plan.exact + chunk_plan.placed + chunk_plan.recomputed <= size
    if select == "none":
        assert all(chunk.recomputed == 0 for chunk in plan.chunks)


@given(lengths, st.floats(0, 1), st.sampled_from(["none", "first", "remembered"]))
def test_what_is_chosen_lies_within_spans_and_budget(sizes: list[int], ratio: float, select: str) -> None:
    starts = np.cumsum([5, *(size + 3 for size in sizes)]).tolist()
    given_spans = [
        Span(start, start + size, scores=np.linspace(1, 0, size, dtype=np.float32))
        for start, size in zip(starts, sizes, strict=False)
    ]
    chosen = choose(given_spans, select, ratio)  # type: ignore[arg-type]
    assert sum(c.stop - c.start for c in chosen) <= ratio * sum(sizes) + max(1, len(sizes)) / 2
    for one, other in pairwise(chosen):
        assert one.stop <= other.start
    assert all(any(s.start <= c.start < c.stop <= s.stop for s in given_spans) for c in chosen)


@given(st.lists(st.floats(0, 1, width=32), max_size=60), st.integers(0, 60), st.sets(st.integers(0, 59)))
def test_ranges_spend_the_whole_budget(gains: list[float], count: int, free: set[int]) -> None:
    ranges = dearest(np.array(gains, np.float32), count, free)
    assert sum(stop - start for start, stop in ranges) == min(count, len(gains))
    edges = [edge for pair in ranges for edge in pair]
    assert edges == sorted(set(edges))


def test_a_range_more_must_be_worth_it() -> None:
    gains = np.zeros(60, np.float32)
    gains[10:20] = 1.0
    gains[40] = 1.5
    gains[11] = 0.5
    ranges = dearest(gains, 10)
    assert ranges == [(10, 20)], "one token that gains half more is not worth a range that costs as much as " + str(
        RANGE_TOKENS
    )
    gains[40:46] = 3.0
    assert any(start <= 40 and stop >= 46 for start, stop in dearest(gains, 10))
