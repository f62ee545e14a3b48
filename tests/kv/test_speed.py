"""What computing costs by position is learned from calls as they happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.kv.speed import EQUAL_COST_POSITION, PrefillCost

USUAL = 1 / EQUAL_COST_POSITION


def taught(slope: float, calls: list[tuple[int, int]], *, first: float = 1e-3) -> PrefillCost:
    cost = PrefillCost()
    for start, count in calls:
        cost.add(start, count, sum(first * (1 + slope * position) for position in range(start, start + count)))
    return cost


def test_before_anything_was_measured_it_is_the_usual() -> None:
    cost = PrefillCost()
    assert cost.of(0, 1) == 1
    assert cost.of(EQUAL_COST_POSITION, 1) == 2
    assert cost.of(0, 64) < cost.of(640, 64)


@pytest.mark.parametrize("slope", [0.0, USUAL / 3, USUAL, 20 * USUAL])
@pytest.mark.parametrize("first", [1e-6, 1.0])
def test_it_learns_the_slope(slope: float, first: float) -> None:
    cost = taught(slope, [(start, 512) for start in range(0, 8192, 512)] * 3, first=first)
    assert cost.slope == pytest.approx(slope, rel=0.1, abs=0.02 * USUAL)


def test_calls_at_one_position_say_nothing_of_the_slope() -> None:
    assert taught(30 * USUAL, [(0, 256)] * 100).slope == pytest.approx(USUAL, rel=0.2)


def test_short_calls_are_left_out() -> None:
    cost = taught(0, [(0, 512), (8000, 512)] * 20)
    before = cost.slope
    for _ in range(100):
        cost.add(4000, 8, 1.0)
    assert cost.slope == before


def test_it_follows_the_load() -> None:
    """A slope from long ago is forgotten."""
    calls = [(start, 512) for start in range(0, 8192, 512)]
    cost = taught(0, calls * 10)
    for start, count in calls * 60:
        cost.add(start, count, sum(1e-3 * (1 + 10 * USUAL * position) for position in range(start, start + count)))
    assert cost.slope == pytest.approx(10 * USUAL, rel=0.15)


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 5000), st.floats(0, 1e3, allow_nan=False)), max_size=30)
)
def test_whatever_was_measured_a_later_token_costs_no_less(calls: list[tuple[int, int, float]]) -> None:
    cost = PrefillCost()
    for start, count, seconds in calls:
        cost.add(start, count, seconds)
    assert 0 <= cost.slope <= 1 / 256
    assert cost.of(0, 64) <= cost.of(6400, 64)
    assert cost.of(0, 0) == 0
