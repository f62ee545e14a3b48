"""The store over slower tiers: what is written behind comes back, and no fault of a tier reaches a request."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import numpy as np
import pytest
from tests.kv.doubles import DictTier

from rekindle.errors import TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.speed import Speed
from rekindle.kv.store import Store
from rekindle.tokens import Tokens, as_tokens

SIZE = 4
LOGITS = np.arange(7, dtype=np.float32)


class Bench:
    """Stores over the same tiers, one after the other, as after restarts; a counter as their clock."""

    def __init__(self, *tiers: DictTier, max_behind_bytes: int = 1 << 20) -> None:
        self.tiers = tiers
        self.max_behind_bytes = max_behind_bytes
        self.now = 0.0
        self.store = self.fresh()

    def fresh(self, *, writing: bool = True, max_bytes: int = 1 << 20) -> Store:
        self.store = Store(
            b"f" * 16,
            max_bytes=max_bytes,
            block_tokens=SIZE,
            tiers=self.tiers,
            max_behind_bytes=self.max_behind_bytes,
            clock=self.clock,
        )
        if writing:
            Thread(target=self.store.behind.run, daemon=True).start()
        return self.store

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def put(self, tokens: Tokens, salt: bytes = b"", *, store: Store | None = None) -> None:
        """A prompt's blocks and its tail; a payload is the block's tokens."""
        end = len(tokens) - len(tokens) % SIZE
        payloads = {start: memoryview(tokens[start : start + SIZE].tobytes()) for start in range(0, end, SIZE)}
        tails = [(len(tokens), memoryview(tokens[end:].tobytes()), LOGITS)]
        (store or self.store).put(tokens, payloads, salt=salt, tails=tails)

    def restart(self) -> Store:
        assert self.store.close(60)
        return self.fresh()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(DictTier("disk"), DictTier("network"))
    yield bench
    bench.store.close()
    bench.store.check_integrity()


PROMPT = as_tokens(range(14))


def test_a_prompt_survives_a_restart(bench: Bench) -> None:
    bench.put(PROMPT)
    store = bench.restart()
    assert store.match(PROMPT).length == 0
    assert store.fetch(PROMPT).tokens == {"disk": 14}
    match = store.match(PROMPT)
    assert (match.length, b"".join(block.payload for block in match.blocks)) == (14, PROMPT.tobytes())
    assert match.logits is not None and (match.logits == LOGITS).all()
    assert store.fetch(PROMPT).tokens == {}


def test_a_longer_prompt_gets_the_tail_of_a_shorter_one(bench: Bench) -> None:
    bench.put(PROMPT)
    store = bench.restart()
    longer = np.concatenate([PROMPT, as_tokens(range(50, 70))])
    assert store.fetch(longer).tokens == {"disk": 14}
    assert store.match(longer).length == 14


def test_a_prompt_of_whole_blocks_gets_its_logits(bench: Bench) -> None:
    bench.put(PROMPT[:12])
    store = bench.restart()
    store.fetch(PROMPT[:12])
    assert store.match(PROMPT[:12]).logits is not None


def test_what_cannot_be_used_is_forgotten_in_every_tier_and_stored_again(bench: Bench) -> None:
    other = as_tokens([0, 1, 2, 3, 9, 9, 9, 9])
    bench.put(PROMPT)
    bench.put(other)
    bench.store.discard(bench.store.match(PROMPT), 1)
    assert bench.store.match(PROMPT).length == 4
    bench.store.behind.flush()
    assert bench.store.match(other).length == 8, "what shares its beginning stays"
    for tier in bench.tiers:
        assert len(tier.blocks) == 1 + 2
    bench.put(PROMPT)
    bench.restart().fetch(PROMPT)
    assert bench.store.match(PROMPT).length == 14


def test_salts_stay_apart_in_every_tier(bench: Bench) -> None:
    bench.put(PROMPT, salt=b"one")
    store = bench.restart()
    assert store.fetch(PROMPT, b"two").tokens == {}
    assert store.match(PROMPT, b"two").length == 0


def test_what_a_fast_tier_lacks_comes_from_the_slow_one_and_is_kept_in_the_fast_one(bench: Bench) -> None:
    bench.put(PROMPT)
    store = bench.restart()
    disk, network = bench.tiers
    missing = [key for key, block in disk.blocks.items() if block.position >= 8]
    for key in missing:
        del disk.blocks[key]
    assert store.fetch(PROMPT).tokens == {"disk": 8, "network": 6}
    assert store.behind.flush(60)
    assert disk.blocks.keys() == network.blocks.keys()


def test_reading_stops_at_the_first_missing_block(bench: Bench) -> None:
    bench.put(PROMPT)
    store = bench.restart()
    for tier in bench.tiers:
        del tier.blocks[next(key for key, block in tier.blocks.items() if block.position == 4)]
    assert store.fetch(PROMPT).tokens == {"disk": 4}
    assert bench.tiers[0].num_read == 2


def test_another_blocks_content_under_a_key_is_not_taken(bench: Bench) -> None:
    bench.put(PROMPT)
    store = bench.restart()
    for tier in bench.tiers:
        for key, block in tier.blocks.items():
            if block.position == 4:
                tier.blocks[key] = Block(key, block.parent, block.tokens + 1, 4, block.payload)
    assert sum(store.fetch(PROMPT).tokens.values()) == 4
    assert store.match(PROMPT).length == 4


def test_a_failing_tier_is_a_miss_and_is_logged_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.tiers[0].failing = True
    for number in range(3):
        bench.put(PROMPT + number)
    assert bench.store.behind.flush(60)
    assert len([record for record in caplog.records if "cannot be written to" in record.message]) == 1
    store = bench.restart()
    assert store.fetch(PROMPT).tokens == {"network": 14}
    bench.tiers[1].failing = True
    assert store.fetch(PROMPT + 1).tokens == {}
    with pytest.raises(TierUnavailable, match=r"(?s)not everything is cleared; the disk tier .* the network tier"):
        store.clear()
    assert store.stats().blocks == 0
    bench.tiers[0].failing = bench.tiers[1].failing = False


def test_a_tier_that_cannot_be_cleared_keeps_no_other_from_it(bench: Bench) -> None:
    bench.put(PROMPT)
    assert bench.store.behind.flush(60)
    bench.tiers[0].failing = True
    with pytest.raises(TierUnavailable, match="the disk tier keeps what it has") as told:
        bench.store.clear()
    assert "network" not in str(told.value)
    assert bench.tiers[0].blocks and not bench.tiers[1].blocks
    bench.tiers[0].failing = False
    bench.store.clear()
    assert not bench.tiers[0].blocks


def test_a_full_queue_drops_and_counts_and_does_not_wait() -> None:
    tier = DictTier()
    bench = Bench(tier, max_behind_bytes=3000)
    store = bench.fresh(writing=False)  # nobody empties the queue
    for number in range(5):
        bench.put(PROMPT + number, store=store)
    assert 3 * 4 < store.stats().dropped < 4 * 4  # the first prompt and the head of the second were taken
    assert not store.close(0)
    assert store.stats().dropped == 5 * 4
    assert tier.closed and not tier.blocks


@pytest.mark.parametrize(("room", "fits"), [(600_000, True), (150_000, False)])
def test_a_chain_that_grows_takes_the_queues_room_once(room: int, fits: bool) -> None:
    """As prompts do that are saved in pieces: each piece is offered with all that it follows."""
    tier = DictTier()
    store = Bench(tier, max_behind_bytes=room).fresh(writing=False)
    tokens = as_tokens(range(80))
    for start in range(0, 80, SIZE):
        store.put(tokens, {start: memoryview(bytes(20_000))})
    assert 400_000 < store.stats().bytes < 420_000
    assert (store.stats().dropped == 0) == fits
    store.behind.drain()
    assert store.behind.flush(0)
    assert len(tier.blocks) == 20 if fits else 5 < len(tier.blocks) < 10
    store.put(tokens, {})
    assert store.stats().dropped == 0 or not fits
    store.behind.drain()
    assert len(tier.blocks) == 20, "the room is free again"


def test_a_tier_slower_than_computing_is_passed_over_and_tried_again(bench: Bench) -> None:
    bench.put(PROMPT)
    assert bench.store.behind.flush(60)
    compute = Speed()
    compute.add(1000, 1.0)
    refusals = 0
    for _ in range(20):
        store = bench.store
        with store._lock:
            store._memory.clear()
        fetched = store.fetch(PROMPT, compute=compute)  # the clock makes every fetch take a second
        refusals += fetched.refused is not None and "computing 1000 us" in fetched.refused
    assert store.speeds["disk"].seconds_per_token == pytest.approx(1 / 14)
    assert 15 <= refusals <= 19


def test_a_fetch_that_failed_on_the_way_says_nothing_of_the_tiers_speed(bench: Bench) -> None:
    bench.put(PROMPT)
    assert bench.store.behind.flush(60)
    store = bench.restart()
    disk = bench.tiers[0]
    disk.num_good = disk.num_read + 2
    assert sum(store.fetch(PROMPT).tokens.values()) > 0
    assert store.speeds["disk"].seconds_per_token is None


def test_slower_tiers_hear_of_what_memory_serves_once_a_minute(bench: Bench) -> None:
    bench.put(PROMPT)
    disk, network = bench.tiers
    for _ in range(3):
        match = bench.store.match(PROMPT)
        bench.store.used(match)
    assert bench.store.behind.flush(60)
    assert disk.touched == network.touched == [[block.key for block in match.blocks]]
    bench.store.used(bench.store.match(PROMPT[:8]))
    assert bench.store.behind.flush(60)
    assert disk.touched[1:] == [[block.key for block in match.blocks[:2]]]
    bench.now += 60
    disk.failing = True
    bench.store.used(bench.store.match(PROMPT))
    assert bench.store.behind.flush(60)
    assert (len(disk.touched), len(network.touched)) == (2, 3)
    disk.failing = False


def test_a_use_that_finds_the_queue_full_is_no_lost_block() -> None:
    bench = Bench(DictTier(), max_behind_bytes=300)
    store = bench.fresh(writing=False)
    bench.put(as_tokens(range(8)))
    dropped = store.behind.dropped
    for length in (4, 8):
        store.used(store.match(as_tokens(range(length))))
    assert store.behind.dropped == dropped
    assert not store.behind.flush(0), "there was room for one"


def test_an_empty_queue_takes_a_chain_of_any_size() -> None:
    bench = Bench(DictTier(), max_behind_bytes=10)
    bench.put(PROMPT)
    assert bench.store.behind.flush(60)
    assert (len(bench.tiers[0].blocks), bench.store.stats().dropped) == (4, 0)
    bench.store.close()


def test_a_full_queue_still_takes_the_head_of_a_chain() -> None:
    bench = Bench(DictTier(), max_behind_bytes=3000)
    store = bench.fresh(writing=False)
    for number in (0, 100):
        bench.put(PROMPT + number, store=store)
    assert 0 < store.stats().dropped < 4
    store.close(0)


@pytest.mark.parametrize("failing", ["put", "touch"])
def test_a_writer_outlives_what_a_tier_may_raise(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def fail(chain: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bench.tiers[0], failing, fail)
        bench.put(PROMPT)
        bench.store.used(bench.store.match(PROMPT))
        assert bench.store.behind.flush(60)
    assert len([record for record in caplog.records if record.exc_info]) == 1
    there = len(bench.tiers[0].blocks)
    bench.put(PROMPT + 100)
    assert bench.store.behind.flush(60)
    assert len(bench.tiers[0].blocks) == there + 4


def test_a_chain_longer_than_memory_is_useful_from_its_head(bench: Bench) -> None:
    prompt = as_tokens(range(400))
    bench.put(prompt)
    assert bench.store.close(60)
    bench.fresh(max_bytes=5000).fetch(prompt)
    assert 20 <= bench.store.match(prompt).length < 400
    bench.store.check_integrity()


def test_what_is_being_written_at_the_end_is_told_of_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, may_end = Event(), Event()

    def put(chain: object) -> None:
        begun.set()
        may_end.wait(60)

    monkeypatch.setattr(bench.tiers[0], "put", put)
    bench.put(PROMPT)
    assert begun.wait(60)
    assert not bench.store.close(0)
    may_end.set()
    assert "stopped with up to 4 blocks not written" in caplog.text
    assert bench.store.stats().dropped == 0, "it may have come to its end"
