"""Who goes first, and that nobody waits for ever: all in counts of admissions and steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.conftest import Answer, Stage, ids

import rekindle
from rekindle.errors import InvalidRequest
from rekindle.serve.policies import AGE_AFTER, MAX_PASSED, POLICIES, CacheAware, Policy, Priority, Request, policy_named
from rekindle.serve.service import Service
from rekindle.settings import Settings

STREAM = 200  # later requests in the starvation tests: more than any bound


def one_at_a_time(policy: Policy, **options: int) -> Stage:
    return Stage(**({"max_running": 1, "policy": policy} | options))


def order(stage: Stage, answers: list[Answer]) -> list[int]:
    """Indices of the answers in the order of their first tokens."""
    first: list[int] = []
    while len(first) < len(answers):
        stage.scheduler.step()
        first += [i for i, answer in enumerate(answers) if i not in first and answer.num_tokens]
    stage.run()
    return first


def test_fifo_keeps_the_order_of_arrival() -> None:
    stage = one_at_a_time(Policy())
    assert order(stage, [stage.submit(ids(seed, 30), 3, priority=-seed) for seed in range(6)]) == list(range(6))


def test_the_most_urgent_goes_first_and_equals_in_the_order_of_arrival() -> None:
    stage = one_at_a_time(Priority())
    priorities = [0, 3, -2, 3, -2, 1]
    answers = [stage.submit(ids(seed, 30), 3, priority=priority) for seed, priority in enumerate(priorities)]
    assert order(stage, answers) == [2, 4, 0, 5, 1, 3]


def test_the_longest_reuse_goes_first() -> None:
    stage = one_at_a_time(CacheAware())
    known = ids(1, 200)
    stage.ask(known, 1)
    prompts = [ids(2, 40), known[:60] + ids(3, 10), known[:150] + ids(4, 10), known[:100] + ids(5, 10)]
    assert order(stage, [stage.submit(prompt, 2) for prompt in prompts]) == [2, 3, 1, 0]


def test_reuse_counts_what_the_store_holds_and_what_is_just_being_read() -> None:
    stage = one_at_a_time(CacheAware())
    stored = ids(1, 200)
    stage.ask(stored, 1)
    while stage.scheduler.residents.evict():
        pass
    reading = ids(2, 300)
    stage.submit(reading, 5)
    stage.scheduler.step()
    prompts = [ids(3, 40), stored[:120] + ids(4, 10), reading[:250] + ids(5, 10)]
    assert order(stage, [stage.submit(prompt, 2) for prompt in prompts]) == [2, 1, 0]


STEPS_EACH = 3  # of a rival: its prompt, its second token, and one in which nothing is left of it


def starve(policy: Policy, known: list[int], rivals: int, own: int) -> int:
    """One request against a stream of better ones, of which one always waits; how many of them were started before it."""
    stage = one_at_a_time(policy)
    if known:
        stage.ask(known, 1)
    poor = stage.submit(ids(1, 30), 2, priority=own)
    stream: list[Answer] = []
    steps = 0
    while not poor.num_tokens:
        while len([rival for rival in stream if not rival.num_tokens]) < 2:
            stream.append(stage.submit(known + ids(100 + len(stream), 22), 2, priority=rivals))
        stage.scheduler.step()
        steps += 1
        assert len(stream) < STREAM, "starved"
    started = sum(rival.num_tokens > 0 for rival in stream)
    assert steps <= STEPS_EACH * started + 1
    return started


@pytest.mark.parametrize(("priority", "bound"), [(1, AGE_AFTER), (3, 3 * AGE_AFTER), (10**6, MAX_PASSED)])
def test_priority_lets_nobody_starve(priority: int, bound: int) -> None:
    assert starve(Priority(), [], rivals=0, own=priority) == bound


def test_cache_aware_lets_nobody_starve() -> None:
    assert starve(CacheAware(), ids(5, 100), rivals=0, own=0) == MAX_PASSED
    assert starve(CacheAware(max_passed=7), ids(5, 100), rivals=0, own=0) == 7


def test_fifo_lets_nobody_starve() -> None:
    assert starve(Policy(), ids(5, 100), rivals=-5, own=5) == 0


arrivals = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-3, 3), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=40
)


@settings(max_examples=30)
@given(st.sampled_from(list(POLICIES)), arrivals, st.integers(1, 3), st.sampled_from([130, 400]))
def test_nobody_is_passed_more_often_than_the_bound(
    name: str, mix: list[tuple[int, int, int, int]], running: int, cells: int
) -> None:
    """In any mix of beginnings, priorities and lengths, also where cells run out and requests are swapped."""
    stage = Stage(cells, policy=POLICIES[name](), max_running=running)
    answers = []
    for number, (base, priority, length, steps) in enumerate(mix):
        prompt = ids(base, 40) + ids(50 + number, 5)
        answers.append((prompt, length, stage.submit(prompt, length, priority=priority)))
        for _ in range(steps):
            stage.scheduler.step()
    stage.run()
    for prompt, length, answer in answers:
        assert answer.text == Stage().ask(prompt, length).text
        assert answer.run.passed <= MAX_PASSED


def test_an_urgent_request_takes_the_place_of_a_less_urgent_one_and_nothing_is_computed_twice() -> None:
    stage = one_at_a_time(Priority())
    slow = stage.submit(ids(1, 100), 40, priority=5)
    stage.run(until=lambda: slow.num_tokens == 10)
    urgent = stage.submit(ids(2, 50), 5, priority=1)
    stage.run(until=lambda: urgent.num_tokens == 5)
    assert slow.num_tokens == 10 and stage.scheduler.counts.swaps == 1
    stage.run()
    assert stage.engine.num_computed == 100 + 39 + 50 + 4
    assert slow.text == Stage().ask(ids(1, 100), 40).text


def test_an_urgent_request_takes_cells_from_less_urgent_ones_but_not_from_its_equals() -> None:
    stage = Stage(num_cells=300, policy=Priority())
    low = [stage.submit(ids(seed, 80), 60, priority=2) for seed in (1, 2)]
    equal = stage.submit(ids(3, 60), 60, priority=1)
    stage.run(until=lambda: all(answer.num_tokens > 3 for answer in (*low, equal)))
    urgent = stage.submit(ids(4, 130), 3, priority=1)
    stage.scheduler.step()
    assert urgent.run.seq is not None and equal.run.seq is not None
    assert [answer.run.seq is None for answer in low] == [False, True]  # the last of the least urgent is enough
    stage.run()
    assert stage.engine.num_computed == 2 * (80 + 59) + 60 + 59 + 130 + 2


def test_what_is_not_enough_is_not_taken() -> None:
    stage = Stage(num_cells=300, policy=Priority())
    low = stage.submit(ids(1, 50), 30, priority=2)
    equal = stage.submit(ids(2, 150), 30, priority=1)
    stage.run(until=lambda: low.num_tokens > 0 and equal.num_tokens > 0)
    urgent = stage.submit(ids(3, 200), 3, priority=1)
    stage.scheduler.step()
    assert urgent.run.seq is None and low.run.seq is not None and stage.scheduler.counts.swaps == 0
    stage.run()
    assert urgent.done


def test_who_has_aged_is_not_preempted_by_who_comes_fresh() -> None:
    """Else a request that waited its turn would lose it at once."""
    stage = one_at_a_time(Priority())
    poor = stage.submit(ids(1, 30), 50, priority=1)
    poor.run.passed = AGE_AFTER
    stage.run(until=lambda: poor.num_tokens > 0)
    fresh = stage.submit(ids(2, 30), 3, priority=0)
    stage.run(until=lambda: fresh.num_tokens > 0)
    assert poor.num_tokens == 50


def test_a_reader_for_whom_an_urgent_request_waits_is_read_first() -> None:
    stage = Stage(prefill_budget=16, max_running=4, policy=Priority())
    stream = stage.submit(ids(9, 20), 200)
    stage.run(until=lambda: stream.num_tokens > 0)
    shared = ids(1, 200)
    slow = stage.submit(shared + ids(2, 10), 1, priority=5)
    stage.scheduler.step()
    other = stage.submit(ids(3, 200), 1, priority=1)
    urgent = stage.submit(shared + ids(4, 10), 1, priority=0)
    stage.run(until=lambda: bool(urgent.events))
    assert not other.events
    assert urgent.done.usage.cached_tokens == 200
    stage.run()
    assert slow.done and other.done


class Shortest(Policy):
    """The shortest prompt first: what a user might write."""

    name = "shortest"

    def rank(self, request: Request) -> tuple[float, ...]:
        return (request.prompt_tokens,)


def test_a_policy_of_ones_own() -> None:
    stage = one_at_a_time(Shortest())
    answers = [stage.submit(ids(seed, count), 2) for seed, count in enumerate((70, 30, 50))]
    assert order(stage, answers) == [1, 2, 0]
    with rekindle.load(engine="toy", policy=Shortest()) as llm:
        assert llm.generate("Good morning!", max_tokens=3, priority=1)
    with Service.open(Settings(engine="toy"), policy=Shortest()) as service:
        service.check_integrity()


class Greedy(Policy):
    """Whoever waits may swap out whoever runs: two requests always prefer themselves to each other."""

    name = "greedy"
    may_preempt = True

    def preempts(self, waiting: Request, running: Request) -> bool:
        return True


@pytest.mark.parametrize("cells", [150, 1000])
def test_requests_that_preempt_each_other_all_end_with_nothing_computed_twice(cells: int) -> None:
    stage = Stage(cells, policy=Greedy(), max_running=2)
    lengths = (50, 20, 10, 100, 5)
    answers = [stage.submit(ids(length, length), 10) for length in lengths]
    stage.run()
    assert [answer.text for answer in answers] == [Stage().ask(ids(length, length), 10).text for length in lengths]
    assert stage.engine.num_computed == sum(lengths) + len(lengths) * 9


def test_the_named_policies_can_be_set() -> None:
    for name, kind in POLICIES.items():
        assert type(policy_named(name)) is kind
        with rekindle.load(engine="toy", policy=name) as llm:
            assert llm.generate("Good morning!", max_tokens=3)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"'lifo'; known: fifo, priority, cache-aware"):
        policy_named("lifo")
    with pytest.raises(InvalidRequest, match=r"'fifo', 'priority' or 'cache-aware', got 'lifo'"):
        rekindle.load(engine="toy", policy="lifo")


@pytest.mark.parametrize("given", [Shortest, object(), 3])
def test_what_is_neither_a_name_nor_a_policy_is_refused(given: object) -> None:
    with pytest.raises(InvalidRequest, match="expected a name or an object of a Policy, got"):
        rekindle.load(engine="toy", policy=given)


@dataclass(frozen=True)
class Wish:
    """A request as a policy sees it."""

    priority: int = 0
    passed: int = 0
    reusable: int = 0
    prompt_tokens: int = 10
    is_running: bool = False


def test_ages_count_as_stated() -> None:
    priority = Priority()
    assert priority.rank(Wish(2, passed=AGE_AFTER)) == priority.rank(Wish(1))
    assert priority.rank(Wish(2, passed=MAX_PASSED)) < priority.rank(Wish(-(10**9)))
    assert not priority.preempts(Wish(1, passed=10 * AGE_AFTER), Wish(0))
    assert CacheAware().rank(Wish(passed=MAX_PASSED)) < CacheAware().rank(Wish(reusable=10**9))
