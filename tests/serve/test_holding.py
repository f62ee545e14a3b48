"""Sequences that somebody holds: fed without an answer, replaced by the next, cut under a new salt, last to leave."""

from __future__ import annotations

import pytest
from tests.serve.conftest import Answer, Stage, ids

from rekindle.errors import ContextFull, InvalidRequest
from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Cut, Generation, Hold
from rekindle.tokens import as_tokens

TALK = ids(1, 90)


def feed(stage: Stage, prompt: list[int], name: str = "one", *, salt: bytes = b"", cut: Cut | None = None) -> Answer:
    answer = stage.submit(prompt, None, feed=True, hold=Hold(name, passing=True, cut=cut), salt=salt)
    stage.run()
    return answer


def test_feeding_samples_nothing_and_is_no_request() -> None:
    stage = Stage()
    fed = feed(stage, TALK[:5])  # fewer tokens than are kept of others
    assert (fed.num_tokens, fed.done.reason, fed.done.usage.computed_tokens) == (0, "length", 5)
    assert stage.scheduler.counts.requests == 0
    assert stage.ask(TALK[:5], hold=Hold("one")).done.usage.computed_tokens == 0  # the logits are there too


def test_each_holder_has_one_sequence_and_what_changed_is_computed() -> None:
    stage = Stage()
    feed(stage, TALK[:60])
    again = feed(stage, TALK[:50] + ids(2, 10))
    assert again.done.usage.computed_tokens == 10
    assert len(stage.scheduler.residents) == 1
    feed(stage, TALK[:50], "two")
    assert len(stage.scheduler.residents) == 2
    stage.ask(TALK)  # begins like both, and ends neither
    assert len(stage.scheduler.residents) == 3


def test_what_is_held_leaves_last_and_comes_back_from_the_store() -> None:
    stage = Stage(num_cells=200, max_residents=8)
    feed(stage, TALK)
    stage.ask(ids(3, 80))
    stage.ask(ids(4, 80))  # needs the cells of somebody
    assert feed(stage, TALK).done.plan.steps[0].reason.startswith("sequence")
    stage.ask(ids(5, 150))  # needs all
    back = feed(stage, TALK).done
    assert back.usage.computed_tokens <= 1, back.plan
    assert "stored" in back.plan.steps[0].reason


def test_what_passes_is_saved_only_when_it_is_let_go() -> None:
    stage = Stage()
    feed(stage, TALK)
    assert not stage.scheduler.residents.save_one()
    stage.scheduler.residents.let_go("one")
    while stage.scheduler.residents.save_one():
        pass
    assert stage.store.match(as_tokens(TALK), b"").length == len(TALK)


def test_a_cut_slides_what_follows_and_computes_only_what_is_new() -> None:
    stage = Stage()
    feed(stage, TALK)
    kept = TALK[:20] + TALK[50:]
    cut = Cut(b"", 20, 50)
    assert feed(stage, [*kept, 7, 8], salt=b"private", cut=cut).done.usage.computed_tokens == 2
    assert feed(stage, [*kept, 7, 8], salt=b"private", cut=cut).done.usage.computed_tokens == 0  # not cut twice
    other = stage.ask(kept)  # what others read is exact: the block before the cut, saved when the cut was made
    assert other.done.usage.cached_tokens == 16
    assert other.text == Stage().ask(kept).text


def test_a_cut_of_what_is_not_here_is_computed() -> None:
    stage = Stage()
    fed = feed(stage, TALK, salt=b"private", cut=Cut(b"", 20, 50))
    assert fed.done.usage.computed_tokens == len(TALK)


def refuse(seq: int, start: int, stop: int) -> None:
    raise ContextFull("no cells")


def test_the_engine_may_refuse_a_cut() -> None:
    """As one does that has no cells for copies of what others see too."""
    stage = Stage(num_cells=100)
    stage.engine.drop = refuse  # type: ignore[method-assign]
    feed(stage, TALK[:60])
    fed = feed(stage, TALK[:10] + TALK[30:60], salt=b"private", cut=Cut(b"", 10, 30))
    assert fed.done.usage.computed_tokens == 40


def test_holders_go_before_others_until_these_have_been_passed_often() -> None:
    stage = Stage(max_running=1)
    others = [stage.submit(ids(10 + n, 30), 3) for n in range(3)]
    held = stage.submit(TALK, 3, hold=Hold("one"))
    stage.run(until=lambda: bool(held.events))
    assert sum(bool(other.events) for other in others) <= 1
    stage.run()
    assert all(other.done.reason == "length" for other in others)


def test_what_is_not_kept_can_not_be_held() -> None:
    with pytest.raises(InvalidRequest, match="held"):
        Generation(prompt=Prompt(as_tokens([1])), use_prefix_cache=False, hold=Hold("one"))
