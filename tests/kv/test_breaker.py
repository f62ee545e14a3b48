"""The circuit breaker: what is broken is left alone, and found to be whole again."""

from __future__ import annotations

import pytest
from tests.kv.samples import Clock

from rekindle.errors import TierUnavailable
from rekindle.kv.breaker import Breaker


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.breaker = Breaker(self.clock, max_faults=3, first_backoff_seconds=1.0, max_backoff_seconds=4.0)
        self.num_tried = 0

    def use(self, *, fails: bool) -> None:
        with self.breaker.attempt():
            self.num_tried += 1
            if fails:
                raise TierUnavailable("it is down")

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(TierUnavailable):
                self.use(fails=True)


def test_it_opens_after_faults_in_a_row_only() -> None:
    bench = Bench()
    bench.fail(2)
    bench.use(fails=False)
    bench.fail(2)
    assert bench.num_tried == 5
    bench.fail(5)
    assert bench.num_tried == 6, "the third fault in a row is the last that is tried"
    assert bench.breaker.faults == 5


def test_after_a_back_off_one_may_try_and_success_closes_it() -> None:
    bench = Bench()
    bench.fail(3)
    bench.clock.now += 0.9
    bench.fail()
    assert bench.num_tried == 3
    bench.clock.now += 0.2
    bench.use(fails=False)
    bench.use(fails=False)
    assert bench.num_tried == 5
    assert bench.breaker.state == "ok"


def test_while_one_tries_others_are_refused() -> None:
    bench = Bench()
    bench.fail(3)
    bench.clock.now += 1.1
    with bench.breaker.attempt():
        bench.fail()
    assert bench.num_tried == 3
    bench.use(fails=False)


def test_the_back_off_doubles_up_to_a_bound() -> None:
    bench = Bench()
    bench.fail(3)
    waits = []
    for _ in range(5):
        tried, waited = bench.num_tried, 0.0
        while bench.num_tried == tried:
            bench.clock.now += 0.25
            waited += 0.25
            bench.fail()
        waits.append(waited)
    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_what_is_no_fault_of_the_medium_decides_nothing() -> None:
    bench = Bench()
    bench.fail(3)
    bench.clock.now += 1.1
    with pytest.raises(ZeroDivisionError), bench.breaker.attempt():
        raise ZeroDivisionError
    bench.use(fails=False)
    assert bench.num_tried == 4


def test_it_says_what_is_wrong_and_for_how_long() -> None:
    bench = Bench()
    bench.fail(3)
    assert bench.breaker.state == "it is down"
    with pytest.raises(TierUnavailable, match=r"it is down; not asked again for 1\.0 s"):
        bench.use(fails=False)


def test_uses_that_were_under_way_when_it_opened_do_not_prolong_it() -> None:
    bench = Bench()
    with pytest.raises(TierUnavailable), bench.breaker.attempt():
        bench.fail(3)
        raise TierUnavailable("it is down")
    bench.clock.now += 1.1
    bench.use(fails=False)


def test_what_is_asked_for_explicitly_is_tried_at_once() -> None:
    bench = Bench()
    bench.fail(3)
    bench.breaker.try_now()
    bench.fail(2)
    assert bench.num_tried == 4, "one try, and then the back-off holds again"
    bench.breaker.try_now()
    bench.use(fails=False)
    bench.breaker.try_now()
    bench.fail(3)
    assert bench.num_tried == 8, "a closed breaker stays closed"
