"""One prefill, many readers: what several requests have in common is computed once, whatever state they are in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from tests.kv.doubles import DictTier
from tests.serve.conftest import Stage, ids

from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sampling
from rekindle.serve.service import Service
from rekindle.settings import Settings

PREFIX = 1000
READERS = 16


@pytest.fixture(scope="module")
def real() -> Iterator[Service]:
    with Service.open(Settings(threads=1, store="none", max_running=READERS)) as service:
        yield service
        service.check_integrity()


class Crowd:
    """Requests that are submitted at the same moment, and their answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._left = threading.Semaphore(0)
        self.done: dict[int, Done] = {}

    def submit(self, number: int, prompt: Sequence[int], max_tokens: int, seed: int | None = None) -> None:
        sampling = Sampling(temperature=0.0 if seed is None else 1.0, seed=seed)
        generation = Generation(
            prompt=self._service.token_prompt(list(prompt)),
            max_tokens=max_tokens,
            sampling=sampling,
            ignore_eos=True,
        )

        def sink(event: Event) -> None:
            if isinstance(event, Done):
                self.done[number] = event
            if isinstance(event, Done | Failed):
                self._left.release()

        self._service.submit(generation, sink)

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self._left.acquire(timeout=300)


def test_sixteen_simultaneous_requests_compute_their_common_prefix_once(real: Service) -> None:
    """On the built-in model: tokens computed are the prefix, each one's own part, and their answers."""
    prefix = ids(1, PREFIX)
    real.clear_cache()  # of what other tests asked; and what they have given up has ended then
    before = real.num_computed
    crowd = Crowd(real)
    for number in range(READERS):
        crowd.submit(number, prefix + ids(100 + number, 10), 3)
    crowd.wait(READERS)
    assert real.num_computed - before == PREFIX + READERS * (10 + 2)
    cached = sorted(done.usage.cached_tokens for done in crowd.done.values())
    assert cached == [0] + [PREFIX] * (READERS - 1)


def test_a_prefix_that_a_running_answer_holds_is_shared_at_once(real: Service) -> None:
    prefix = ids(2, 300)
    busy = real.events(
        Generation(prompt=real.token_prompt(prefix), max_tokens=2000, sampling=Sampling(seed=1), ignore_eos=True)
    )
    assert isinstance(next(busy), Piece)
    crowd = Crowd(real)
    crowd.submit(0, prefix + ids(3, 10), 1)
    crowd.wait(1)
    assert isinstance(next(busy), Piece), "it still runs"
    usage = crowd.done[0].usage
    assert (usage.cached_tokens, usage.computed_tokens) == (300, 10)
    busy.close()  # type: ignore[attr-defined]


def test_a_seed_gives_the_same_answer_alone_and_in_company(real: Service) -> None:
    """Other requests change the shape of the batch, and so the rounding; the draws are the request's own."""
    crowd = Crowd(real)
    prompt = real.text_prompt("Vodris paints in orange. This one works as a farmer.").tokens.tolist()
    crowd.submit(0, prompt, 20, seed=5)
    crowd.wait(1)
    real.clear_cache()
    for number in range(1, 7):
        crowd.submit(number, ids(number, 30 + number), 20 + number, seed=number)
    crowd.submit(7, prompt, 20, seed=5)
    crowd.submit(8, prompt, 20, seed=6)
    crowd.wait(8)
    assert crowd.done[7].tokens == crowd.done[0].tokens != crowd.done[8].tokens


def test_sixty_four_requests_decode_side_by_side() -> None:
    with Service.open(Settings(threads=1, store="none", max_running=64, max_residents=60, context=8192)) as service:
        crowd = Crowd(service)

        def submit(_: object) -> None:
            for number in range(64):
                crowd.submit(number, ids(number, 10 + number % 5), 12)

        service.run_on_engine(submit)  # between two steps, so that none is over before the others have come
        crowd.wait(64)
        assert service.num_calls <= 64 * 12 // 4, "they shared their steps"
        alone = Crowd(service)
        service.clear_cache()
        alone.submit(0, ids(9, 14), 12)
        alone.wait(1)
        assert alone.done[0].tokens == crowd.done[9].tokens
        service.check_integrity()


def test_readers_wait_for_the_part_they_share_not_for_the_whole_prompt() -> None:
    stage = Stage(prefill_budget=20)
    stream = stage.submit(ids(1, 20), 300)
    stage.run(until=lambda: stream.num_tokens > 0)
    shared = ids(2, 100)
    long = stage.submit(shared + ids(3, 900), 1)
    short = stage.submit(shared + ids(4, 10), 1)
    stage.run(until=lambda: short.run.seq is not None)
    assert 100 <= long.run.read <= 100 + 2 * 20 and not long.events
    stage.run()
    assert short.done.usage.cached_tokens == 100


def test_a_reader_that_goes_away_leaves_its_part_to_those_who_waited() -> None:
    stage = Stage(prefill_budget=16)
    stream = stage.submit(ids(1, 20), 300)
    stage.run(until=lambda: stream.num_tokens > 0)
    shared = ids(2, 200)
    reader = stage.submit(shared + ids(3, 10), 1)
    others = [stage.submit(shared + ids(seed, 10), 1) for seed in (4, 5)]
    stage.run(until=lambda: reader.run.read >= 64)
    computed = stage.engine.num_computed - stream.num_tokens
    reader.run.cancel()
    stage.run(until=lambda: all(other.events for other in others))
    assert computed <= 20 + 64 + 16
    own = [other.done.usage.computed_tokens for other in others]
    assert sum(own) == 200 - reader.run.read + 2 * 10


def test_a_beginning_that_is_being_fetched_is_fetched_once() -> None:
    disk, shared = DictTier(), ids(1, 160)
    first = Stage(tiers=[disk])
    answer = first.submit(shared, 1)
    first.scheduler.step()
    first.end_fetches()
    first.run()
    while first.scheduler.residents.save_one():
        pass
    writer = threading.Thread(target=first.store.behind.run)
    writer.start()
    first.store.behind.close(60)
    writer.join()
    assert answer.done
    stage = Stage(tiers=[disk])
    answers = [stage.submit(shared + ids(seed, 4), 1) for seed in range(2, 6)]
    stage.scheduler.step()
    assert len(stage.fetches) == 1
    stage.end_fetches()
    stage.run()
    assert [each.done.usage.cached_tokens for each in answers] == [160] * 4
    assert stage.engine.num_computed == 4 * 4


def test_a_swapped_request_shares_again_what_others_hold() -> None:
    """Else it would come back with cells of its own for what they all have in common."""
    shared = ids(1, 256)
    stage = Stage(num_cells=400)
    answers = [stage.submit(shared + ids(seed, 20), 60) for seed in (2, 3, 4)]
    stage.run()
    assert stage.scheduler.counts.swaps > 0
    assert stage.engine.num_computed == 256 + 3 * (20 + 59)
    for seed, answer in zip((2, 3, 4), answers, strict=True):
        assert answer.text == Stage().ask(shared + ids(seed, 20), 60).text


def test_one_fetch_that_fails_holds_up_none_of_those_who_waited_for_it() -> None:
    stage = Stage(tiers=[DictTier()])
    shared = ids(1, 160)
    answers = [stage.submit(shared + ids(seed, 30), 1) for seed in (2, 3)]
    stage.scheduler.step()
    stage.fetches.pop()[1].set_exception(RuntimeError("made to fail"))
    stage.run(until=lambda: bool(answers[0].events and stage.fetches))
    stage.end_fetches()
    stage.run()
    assert sum(each.done.usage.computed_tokens for each in answers) == 160 + 60


def test_a_stored_prompt_has_its_own_logits_beside_a_resident_that_begins_alike_and_is_as_long(stage: Stage) -> None:
    """It forks the resident for their common blocks, and goes on with its own: in KV, and in what comes first."""
    beginning = ids(1, 64)
    one, other = ([*beginning, *ids(seed, 20)] for seed in (2, 3))
    answers = [list(stage.ask(prompt, 5).done.tokens) for prompt in (one, other)]
    assert answers[0] != answers[1]
    while stage.scheduler.residents.evict():
        pass
    stage.ask(one, 1)  # is a resident now, the other is in the store only
    again = stage.ask(other, 5).done
    assert again.usage.cached_tokens == len(other) and list(again.tokens) == answers[1]
