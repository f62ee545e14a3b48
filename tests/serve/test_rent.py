"""Idle residents leave when they have cost more than their way back: counts of tokens, blocks and steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.serve.conftest import Stage, ids

from rekindle.serve.rent import BUSY_TOKENS, IDLE_TOKENS, UNSAVED_TOKENS
from rekindle.serve.request import Hold
from rekindle.serve.residents import PIECE_BLOCKS


@pytest.fixture
def scanning() -> Stage:
    stage = Stage()
    stage.engine.reads_idle_cells = True
    return stage


def save_all(stage: Stage) -> None:
    while stage.scheduler.residents.save_one():
        pass


def test_a_prompt_is_not_read_beside_saved_residents_that_it_would_drive_out(scanning: Stage) -> None:
    scanning.ask(ids(1, 200))
    save_all(scanning)
    other = scanning.submit(ids(2, IDLE_TOKENS + 20))
    scanning.scheduler.step()
    assert [list(resident.tokens[:5]) for resident in scanning.scheduler.residents.idle()] == []
    assert other.run.seq is not None
    assert scanning.engine.num_cells - scanning.engine.num_free_cells == scanning.engine.length(other.run.seq)


def test_what_left_is_reused_from_the_store_as_if_it_had_stayed(scanning: Stage) -> None:
    first = scanning.ask(ids(1, 203), 8)
    save_all(scanning)
    scanning.ask(ids(2, 300))
    again = scanning.ask(ids(1, 203), 8)
    assert (again.done.usage.cached_tokens, again.text) == (203, first.text)


def test_short_requests_pass_a_resident_until_they_add_up(scanning: Stage) -> None:
    scanning.ask(ids(1, 200))
    save_all(scanning)
    num_asked = 0
    while any(len(each.tokens) > 200 for each in scanning.scheduler.residents.idle()):
        scanning.ask(ids(10 + num_asked, 10), 7)
        num_asked += 1
    per_request = 10 + 6  # the last token of an answer is not computed
    assert IDLE_TOKENS // per_request - 1 <= num_asked <= IDLE_TOKENS // per_request + 2


def test_a_resident_that_is_used_again_starts_anew(scanning: Stage) -> None:
    scanning.ask(ids(1, 200))
    save_all(scanning)
    for number in range(3 * IDLE_TOKENS // 16):
        scanning.ask(ids(10 + number, 10), 7)
        assert scanning.ask(ids(1, 200), 1).done.plan.reused == 200
        save_all(scanning)
    assert scanning.engine.num_computed < 205 + 3 * IDLE_TOKENS + 7 * (3 * IDLE_TOKENS // 16)
    assert max(len(each.tokens) for each in scanning.scheduler.residents.idle()) >= 200


def test_one_that_is_not_saved_yet_stays_longer_and_then_is_saved(scanning: Stage) -> None:
    scanning.ask(ids(1, 200))
    scanning.ask(ids(2, UNSAVED_TOKENS - 60))
    assert scanning.store.stats().blocks == 0
    assert len(scanning.scheduler.residents) == 2
    scanning.ask(ids(3, UNSAVED_TOKENS))
    assert scanning.store.missing(scanning.scheduler.residents.idle()[0].tokens)  # the one that was read last
    assert len(scanning.scheduler.residents) == 1
    assert scanning.ask(ids(1, 200)).done.usage.cached_tokens == 200


def test_beside_answers_one_piece_is_saved_in_a_step(scanning: Stage) -> None:
    scanning.ask(ids(1, 400))
    stream = scanning.submit(ids(2, 30), 900)
    kept: list[int] = []
    while not kept or not scanning.scheduler.residents.idle()[0].saved:
        scanning.scheduler.step()
        kept.append(scanning.store.stats().blocks)
    assert max(after - before for before, after in pairwise(kept)) <= PIECE_BLOCKS + 3  # and tails
    assert stream.num_tokens > UNSAVED_TOKENS - 40
    assert len(scanning.scheduler.residents) == 1, "nobody leaves in the middle of an answer"
    scanning.run(until=lambda: stream.num_tokens >= BUSY_TOKENS)
    scanning.submit(ids(3, 20), 50)
    scanning.scheduler.step()
    assert len(scanning.scheduler.residents) == 0, "it has cost enough, although somebody else runs"
    stream.run.cancel()
    scanning.run()


def test_answers_that_are_expected_count_too(scanning: Stage) -> None:
    scanning.ask(ids(1, 200))
    save_all(scanning)
    scanning.submit(ids(2, 20), None, ignore_eos=False)
    scanning.scheduler.step()
    assert not scanning.scheduler.residents.idle()


def test_beside_others_a_resident_stays_longer(scanning: Stage) -> None:
    scanning.ask(ids(1, 200))
    save_all(scanning)
    scanning.submit(ids(2, 20), 30)
    scanning.scheduler.step()
    other = scanning.submit(ids(3, 20), 60)
    scanning.scheduler.step()
    assert other.run.is_running and len(scanning.scheduler.residents) == 1
    scanning.run()
    scanning.submit(ids(4, 20), 60)
    scanning.scheduler.step()
    assert not [each for each in scanning.scheduler.residents.idle() if len(each.tokens) > 200]


def test_what_the_store_cannot_keep_stays() -> None:
    stage = Stage(store_bytes=0)
    stage.engine.reads_idle_cells = True
    stage.ask(ids(1, 200))
    save_all(stage)
    stage.ask(ids(2, 600))
    assert stage.ask(ids(1, 200)).done.usage.cached_tokens == 200


def test_what_is_held_stays(scanning: Stage) -> None:
    scanning.ask(ids(1, 200), hold=Hold("caller"))
    save_all(scanning)
    scanning.ask(ids(2, 600))
    assert {each.holder for each in scanning.scheduler.residents._all} == {"caller", None}


def test_an_engine_that_does_not_look_at_idle_cells_keeps_them(stage: Stage) -> None:
    stage.ask(ids(1, 200))
    save_all(stage)
    stage.ask(ids(2, 600))
    assert len(stage.scheduler.residents) == 2


def test_idle_time_is_spent_in_pieces_that_add_up(stage: Stage) -> None:
    stage.ask(ids(1, 16 * (2 * PIECE_BLOCKS + 1)), 1)
    pieces = 0
    while stage.scheduler.residents.save_one():
        pieces += 1
        assert stage.store.stats().blocks <= pieces * PIECE_BLOCKS + 2
    assert pieces == 3
    tokens = stage.scheduler.residents.idle()[0].tokens
    assert not stage.store.missing(tokens)
    assert stage.store.stats().blocks == 2 * PIECE_BLOCKS + 1 + 1  # and a tail without tokens, for its logits
