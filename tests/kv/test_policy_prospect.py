"""Prospect learns what a load is like, whatever it is like, and remembers no more than it says."""

from __future__ import annotations

from random import Random

import pytest

from rekindle.kv.policies import make_policy
from rekindle.kv.policies.forecast import Forecast, uses_group
from rekindle.kv.policies.prospect import Prospect
from rekindle.lab.trace import replay
from rekindle.lab.workloads import WORKLOADS, make_workload

# Blocks that prospect may find fewer than LRU, of 100 that LRU finds: where LRU is the best there is, learning that costs.
_MAY_LOSE = 2.0
_GAINS = {"documents": 1.12, "system_prompts": 1.3, "scans": 1.2, "news": 1.05}  # at least so many times LRU's


@pytest.mark.parametrize("capacity", [300, 1_000, 3_000])
@pytest.mark.parametrize("name", WORKLOADS)
def test_never_much_below_lru(name: str, capacity: int) -> None:
    trace = make_workload(name, 1_500, seed=7)
    lru, prospect = (sum(replay(trace, capacity, make_policy(each, capacity))) for each in ("lru", "prospect"))
    assert prospect >= lru * (1 - _MAY_LOSE / 100)
    if capacity == 1_000:
        assert prospect >= lru * _GAINS.get(name, 0)


def test_a_loop_larger_than_the_store() -> None:
    trace = make_workload("loop", 3_000)
    hits = sum(replay(trace, 3_000, Prospect(3_000)))
    assert hits > 0.55 * trace.num_accesses, "of at most 0.6: LRU finds nothing"


def test_cost_decides_between_equal_promises() -> None:
    """Blocks that cost more per byte stay; sizes differ too."""
    random = Random(3)
    policy: Prospect[tuple[int, int]] = Prospect(4_000)
    stored: set[tuple[int, int]] = set()
    found = {1: 0, 4: 0}
    for _ in range(6_000):
        cost = random.choice([1, 4])
        key = (cost, random.randrange(300))
        size = 10 * (1 + key[1] % 3)
        if key in stored:
            found[cost] += 1
            policy.hit([key])
        else:
            policy.insert([key], [size], [float(cost * size)])
            stored.add(key)
        while sum(10 * (1 + each[1] % 3) for each in stored) > 4_000:
            victim = policy.evict()
            assert victim is not None
            stored.remove(victim)
    policy.check_integrity()
    assert found[4] > 1.5 * found[1]


def test_ghosts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rekindle.kv.policies.prospect._MIN_GHOSTS", 500)
    trace = make_workload("unique", 2_000)
    policy: Prospect[int] = Prospect(100)
    replay(trace, 100, policy)
    policy.check_integrity()
    stored = 100 + 40  # with the longest chain, before victims go
    assert policy.num_remembered <= stored + 4 * stored + 500


def test_ghosts_expire_with_age() -> None:
    trace = make_workload("unique", 2_000)
    policy: Prospect[int] = Prospect(50)
    replay(trace, 50, policy)
    policy.check_integrity()
    assert policy.num_remembered < 20 * 50


def test_integrity_under_a_real_load() -> None:
    trace = make_workload("phases", 1_000)
    policy: Prospect[int] = Prospect(400)
    replay(trace, 400, policy, tick=lambda _: policy.check_integrity())
    policy.check_integrity()
    assert len(policy) == 400


def test_a_forecast_learns_when_blocks_are_used() -> None:
    """Used at one age only: worth rises until then, and falls to nearly nothing after."""
    forecast = Forecast(1_000)
    kind = forecast.kind((0, 0, 0))
    at = 15
    for bucket in range(at):
        forecast.passed[kind][bucket] = 10_000.0
    forecast.used[kind][at] = 5_000.0
    for bucket in range(at, len(forecast.starts)):
        forecast.passed[kind][bucket] = 5_000.0
    forecast.learn(1)
    worth = forecast.worth[kind]
    assert worth[0] < worth[8] < worth[at]
    assert worth[at + 8] < worth[0] / 5


def test_more_uses_promise_more_before_anything_is_known() -> None:
    forecast = Forecast(1_000)
    worth = [forecast.worth[forecast.kind((group, 0, 0))][10] for group in range(8)]
    assert worth == sorted(worth) and worth[0] < worth[-1]
    assert [uses_group(uses) for uses in (1, 2, 3, 4, 5, 6, 9, 10, 19, 20)] == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6]
