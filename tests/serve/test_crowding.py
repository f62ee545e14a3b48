"""Whether other programs want the cores: what is done about it, by waits that a test makes up, and on real threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle import openmp
from rekindle.serve.crowding import (
    CALM_SECONDS,
    LONGEST_CALM_SECONDS,
    WINDOW_SECONDS,
    Crowding,
    hold_team,
    waited_seconds,
    watch_crowding,
)
from rekindle.serve.scheduler import Step
from rekindle.serve.service import Service
from rekindle.settings import Settings

STEP = 0.05
adaptable = pytest.mark.skipif(not openmp.can_adapt(), reason="here threads wait as somebody else chose")


class Machine:
    """Threads of which some wait for a core for a share of the time."""

    def __init__(self) -> None:
        self.held = 0
        self.waits = {"1": 0.0, "2": 0.0}
        self.now = 0.0
        self.crowding = Crowding(self._hold, lambda: dict(self.waits), lambda: self.now)

    def _hold(self) -> Callable[[], None]:
        self.held += 1

        def release() -> None:
            self.held -= 1

        return release

    def compute(self, seconds: float, share: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.waits["2"] += share * STEP
            self.now += STEP
            self.crowding.stepped(Step(computed=1, seconds=STEP))


def test_it_is_crowded_until_one_window_was_calm() -> None:
    machine = Machine()
    assert machine.crowding.crowded and machine.held == 1
    machine.compute(2 * WINDOW_SECONDS, 0.6)
    assert machine.crowding.crowded and machine.held == 1
    machine.compute(2 * WINDOW_SECONDS, 0.2)
    assert not machine.crowding.crowded and not machine.held


def test_short_requests_with_pauses_between_them_are_counted_together() -> None:
    machine = Machine()
    for share in (0.0, 0.6, 0.0):
        for _ in range(10):  # the first step of each is of no account
            machine.now += 2.0
            machine.waits["1"] += 0.2
            machine.compute(3 * STEP, share)
            machine.crowding.stepped(Step(seconds=0.0))  # nothing is left to be done
        assert machine.crowding.crowded == (share > 0)
        machine.compute(CALM_SECONDS, 0.0)


def test_once_disturbed_it_is_crowded_until_it_was_calm_for_a_while() -> None:
    machine = Machine()
    machine.compute(2 * WINDOW_SECONDS, 0.0)
    machine.compute(2 * WINDOW_SECONDS, 0.6)
    machine.compute(CALM_SECONDS - 2 * WINDOW_SECONDS, 0.2)
    assert machine.crowding.crowded
    machine.compute(4 * WINDOW_SECONDS, 0.2)
    assert not machine.crowding.crowded and not machine.held


def test_one_window_without_cores_is_enough_to_make_threads_sleep() -> None:
    machine = Machine()
    machine.compute(2 * CALM_SECONDS, 0.0)
    machine.compute(2 * WINDOW_SECONDS, 0.6)
    assert machine.crowding.crowded and machine.held == 1


def test_a_calm_time_that_is_broken_begins_anew() -> None:
    machine = Machine()
    machine.compute(CALM_SECONDS, 0.0)
    machine.compute(2 * WINDOW_SECONDS, 0.6)
    for _ in range(5):
        machine.compute(CALM_SECONDS - 2 * WINDOW_SECONDS, 0.0)  # a window of it may be of both kinds
        machine.compute(2 * WINDOW_SECONDS, 0.35)
    assert machine.crowding.crowded and machine.held == 1


def test_what_lies_between_the_two_limits_changes_nothing() -> None:
    machine = Machine()
    machine.compute(2 * CALM_SECONDS, 0.3)
    assert machine.crowding.crowded
    machine.compute(2 * CALM_SECONDS, 0.0)
    machine.compute(2 * CALM_SECONDS, 0.3)
    assert not machine.crowding.crowded


def test_who_is_often_disturbed_waits_longer_until_it_is_calm() -> None:
    machine, needed = Machine(), []
    for _ in range(7):
        start = machine.waits["1"] = 0.0
        while machine.crowding.crowded:
            machine.compute(WINDOW_SECONDS, 0.0)
            start += WINDOW_SECONDS
        needed.append(start)
        machine.compute(2 * WINDOW_SECONDS, 0.9)
    assert needed == pytest.approx([WINDOW_SECONDS, 1, 2, 4, 8, 16, 16], abs=2 * WINDOW_SECONDS)
    machine.compute(3 * LONGEST_CALM_SECONDS, 0.0)
    machine.compute(2 * WINDOW_SECONDS, 0.9)
    machine.compute(2 * CALM_SECONDS + 2 * WINDOW_SECONDS, 0.0)
    assert not machine.crowding.crowded, "after a long calm it is forgotten"


def test_idle_time_says_nothing_and_threads_come_and_go() -> None:
    machine = Machine()
    machine.compute(2 * CALM_SECONDS, 0.0)
    for _ in range(1000):
        machine.crowding.stepped(Step(seconds=0.0))
    machine.waits["3"] = 100.0  # has waited before it was seen first
    machine.compute(2 * WINDOW_SECONDS, 0.0)
    del machine.waits["3"]
    machine.compute(2 * WINDOW_SECONDS, 0.0)
    assert not machine.crowding.crowded


def test_what_was_waited_for_in_a_pause_says_nothing() -> None:
    machine = Machine()
    machine.compute(2 * CALM_SECONDS, 0.0)
    for _ in range(20):
        machine.now += 2.0
        machine.waits["1"] += 0.2  # another server was asked meanwhile
        machine.compute(2 * WINDOW_SECONDS, 0.0)
    assert not machine.crowding.crowded
    machine.compute(2 * WINDOW_SECONDS, 0.6)
    assert machine.crowding.crowded


def test_closing_lets_go_once() -> None:
    machine = Machine()
    machine.crowding.close()
    machine.crowding.close()
    assert machine.held == 0


@adaptable
def test_one_thread_has_nobody_to_wait_for() -> None:
    assert watch_crowding(1, 2) is None


@adaptable
def test_a_held_team_is_made_of_threads_that_end() -> None:
    before = waited_seconds().keys()
    release = hold_team(3)
    team = waited_seconds().keys() - before
    assert len(team) == 3
    release()
    for task in team:
        while Path(f"/proc/self/task/{task}").exists():  # the system takes a moment to forget it
            pass


@adaptable
@pytest.mark.parametrize(("threads", "expected"), [(1, 0), (2, 1)])
def test_a_service_watches_if_it_computes_with_several_threads(threads: int, expected: int) -> None:
    def watching() -> int:
        return sum(thread.name == "rekindle-crowding" for thread in threading.enumerate())

    before = watching()
    with Service.open(Settings.load(threads=threads, store="none")):
        assert watching() - before == expected
    assert watching() == before
