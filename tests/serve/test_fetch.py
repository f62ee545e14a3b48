"""Requests that wait for KV from slower tiers, on the toy engine."""

from __future__ import annotations

from threading import Thread

from tests.kv.doubles import DictTier
from tests.serve.conftest import Answer, Stage, ids

from rekindle.errors import StoreError
from rekindle.serve.run import Clock


def settled(stage: Stage) -> Stage:
    """The stage with everything it knows written to its tiers."""
    while stage.scheduler.residents.save_one():
        pass
    thread = Thread(target=stage.store.behind.run)
    thread.start()
    stage.store.behind.close(60)
    thread.join()
    return stage


def ask(stage: Stage, prompt: list[int], max_tokens: int = 5) -> Answer:
    answer = stage.submit(prompt, max_tokens)
    stage.scheduler.step()
    stage.end_fetches()
    stage.run()
    return answer


def test_after_a_restart_nothing_is_computed_again() -> None:
    disk, prompt = DictTier(), ids(40, 100)
    first = ask(settled_after(disk, prompt), prompt)
    stage = Stage(tiers=[disk])
    answer = stage.submit(prompt)
    stage.scheduler.step()
    assert not answer.events and len(stage.fetches) == 1
    stage.end_fetches()
    stage.run()
    assert (answer.done.usage.cached_tokens, answer.done.timings.prefill_calls) == (100, 0)
    assert answer.text == first.text
    assert "100 tokens fetched from disk" in answer.done.plan.steps[0].reason


def test_what_the_engine_refuses_is_computed_once_more_and_good_from_then_on() -> None:
    """In memory and on disk, where it would be found again after every restart."""
    disk, prompt, other = DictTier(), ids(40, 100), ids(41, 100)
    settled_after(disk, other)
    good = ask(settled_after(disk, prompt), prompt)
    torn = next(block for block in disk.blocks.values() if block.position == 48 and block.tokens[0] == prompt[48])
    object.__setattr__(torn, "payload", torn.payload.cast("Q"))  # as many bytes, but not as the engine wants them
    for cached in (0, 100):
        stage = Stage(tiers=[disk])
        answer = ask(stage, prompt)
        assert answer.done.usage.cached_tokens == cached and answer.text == good.text
        settled(stage)
    stage = Stage(tiers=[disk])
    assert ask(stage, other).done.usage.cached_tokens == 100


def settled_after(disk: DictTier, prompt: list[int]) -> Stage:
    stage = Stage(tiers=[disk])
    ask(stage, prompt)
    return settled(stage)


def test_a_request_that_waits_for_a_tier_holds_up_nobody() -> None:
    stage = Stage(tiers=[DictTier()], max_running=1)
    waiting = stage.submit(ids(41, 100))
    stage.scheduler.step()
    short = stage.submit(ids(42, 10))  # too short to look for
    stage.run(until=lambda: len(short.events) > 5)
    assert short.done.reason == "length" and not waiting.events
    stage.end_fetches()
    stage.run()
    assert waiting.done.usage.cached_tokens == 0


def test_what_is_resident_is_not_looked_for() -> None:
    stage = Stage(tiers=[DictTier()])
    ask(stage, ids(43, 100))
    stage.ask(ids(43, 100))
    assert not stage.fetches


def test_a_fetch_that_fails_is_a_miss() -> None:
    stage = Stage(tiers=[DictTier()])
    answer = stage.submit(ids(44, 100))
    stage.scheduler.step()
    stage.fetches.pop()[1].set_exception(StoreError("made to fail"))
    stage.run()
    assert answer.done.usage.computed_tokens == 100


def test_a_request_cancelled_while_it_fetches_ends_at_once() -> None:
    stage = Stage(tiers=[DictTier()])
    answer = stage.submit(ids(45, 100))
    stage.scheduler.step()
    answer.run.cancel()
    stage.scheduler.step()
    assert answer.done.reason == "cancelled"
    stage.end_fetches()
    stage.run()


def test_a_fetch_ends_when_the_first_who_knows_says_so() -> None:
    """The worker is woken by what also notes the end, and may be the faster: no request has waited less than nothing."""
    clock = Clock(arrived=1.0, submitted=1.0, fetch_started=2.0)
    for now in (5.0, 4.5, 6.0):
        clock.fetched(now)
    assert clock.fetch_ended == 4.5
