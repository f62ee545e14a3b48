"""Pins in slower tiers: on disk they outlive eviction and restarts, on the network they prolong a block's time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from tests.kv.doubles import DictTier
from tests.kv.redis_server import RedisServer, needs_redis
from tests.kv.samples import FINGERPRINT, Clock, make_chain

from rekindle.kv.block import Block
from rekindle.kv.disk import DiskTier
from rekindle.kv.network import NetworkTier
from rekindle.kv.store import Store
from rekindle.kv.tier import place_of
from rekindle.tokens import as_tokens

FILE_BYTES = 4096
HOUR = 3600.0
CHAIN = make_chain(1, 3, tail=2)
PLACES = [place_of(block) for block in CHAIN]


class Disk:
    """Tiers of several processes over one folder of ten files, with one clock."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.folder = folder

    def tier(self, files: int = 10) -> DiskTier:
        return DiskTier(self.folder, fingerprint=FINGERPRINT, max_bytes=files * FILE_BYTES, clock=self.clock)

    def put(self, tier: DiskTier, *chains: list[Block]) -> None:
        for chain in chains:
            self.clock.now += 60
            tier.put(chain)
            tier.check_integrity()

    def flood(self, tier: DiskTier, first: int = 100) -> None:
        self.put(tier, *(make_chain(seed, 4) for seed in range(first, first + 8)))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "store")


def kept(tier: DiskTier, chain: list[Block] = CHAIN) -> int:
    return sum(tier.contains([place_of(block) for block in chain]))


class TestOnDisk:
    def test_what_is_kept_survives_other_writers_and_restarts(self, disk: Disk) -> None:
        one = disk.tier()
        disk.put(one, CHAIN)
        one.keep(PLACES, disk.clock.now + 2 * HOUR)
        disk.flood(one)
        assert kept(one) == 4
        disk.flood(disk.tier(), 200)
        assert kept(one) == 4

    def test_it_ages_like_others_when_its_time_is_over(self, disk: Disk) -> None:
        tier = disk.tier()
        disk.put(tier, CHAIN)
        tier.keep(PLACES, disk.clock.now + HOUR)
        disk.clock.now += HOUR
        disk.flood(tier)
        assert kept(tier) == 0

    def test_what_is_released_goes_like_others(self, disk: Disk) -> None:
        tier = disk.tier()
        disk.put(tier, CHAIN)
        tier.keep(PLACES, disk.clock.now + HOUR)
        tier.release(PLACES)
        disk.flood(tier)
        assert kept(tier) == 0

    def test_uses_do_not_shorten_it(self, disk: Disk) -> None:
        tier = disk.tier()
        disk.put(tier, CHAIN)
        tier.keep(PLACES, disk.clock.now + 2 * HOUR)
        tier.touch(PLACES)
        list(tier.get(PLACES))
        tier.keep(PLACES, disk.clock.now + 1)
        disk.flood(tier)
        assert kept(tier) == 4

    def test_what_is_not_there_is_passed_over(self, disk: Disk) -> None:
        tier = disk.tier()
        disk.put(tier, CHAIN[:2])
        tier.keep(PLACES, disk.clock.now + 2 * HOUR)
        tier.release([place_of(block) for block in make_chain(7, 2)])
        disk.flood(tier)
        assert kept(tier) == 2

    def test_where_more_than_half_of_a_folder_is_pinned_pins_pay_for_new_blocks(self, disk: Disk) -> None:
        """As after a clock that was wrong: of too many blocks marked far ahead those go that would end first."""
        tier = disk.tier()
        chains = [make_chain(seed, 3) for seed in range(3)]
        for hours, chain in enumerate(chains, start=2):
            disk.put(tier, chain)
            tier.keep([place_of(block) for block in chain], disk.clock.now + hours * HOUR)
        tier = disk.tier()
        disk.flood(tier)
        assert [kept(tier, chain) for chain in chains] == [0, 3, 3]
        assert tier.stats().blocks == 10

    def test_a_pin_of_more_than_the_folder_leaves_room_for_others(self, disk: Disk) -> None:
        tier = disk.tier(files=4)
        disk.put(tier, CHAIN)
        tier.keep(PLACES, disk.clock.now + 2 * HOUR)
        tier = disk.tier(files=4)
        other = make_chain(5, 2)
        disk.put(tier, other)
        assert (kept(tier), kept(tier, other)) == (2, 2)
        disk.put(tier, make_chain(6, 2))
        assert (kept(tier), kept(tier, other)) == (2, 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@needs_redis
class TestOnTheNetwork:
    @pytest.fixture
    def tier(self, server: RedisServer) -> Iterator[NetworkTier]:
        server.ask(b"FLUSHALL")
        tier = self.another(server)
        yield tier
        tier.check_integrity()
        tier.close()

    def another(self, server: RedisServer) -> NetworkTier:
        return NetworkTier(server.url, fingerprint=FINGERPRINT, ttl_seconds=1000, timeout_seconds=30)

    def seconds(self, server: RedisServer) -> tuple[float, float]:
        """That all blocks live at least and at most."""
        names = server.ask(b"KEYS", b"*")
        assert isinstance(names, list) and len(names) == len(CHAIN)
        left = [int(server.ask(b"PTTL", name)) / 1000 for name in names]  # type: ignore[call-overload]
        return min(left), max(left)

    def test_its_time_is_the_pins_and_a_use_by_anybody_only_prolongs_it(
        self, server: RedisServer, tier: NetworkTier
    ) -> None:
        tier.put(CHAIN)
        assert self.seconds(server)[1] <= 1000
        end = float(server.ask(b"TIME")[0]) + 10_000  # type: ignore[index]
        tier.keep(PLACES, end)
        assert self.seconds(server)[0] > 9_500
        other = self.another(server)
        list(other.get(PLACES))
        other.touch(PLACES)
        other.put(CHAIN)
        other.keep(PLACES, end - 5_000)
        other.close()
        low, high = self.seconds(server)
        assert 9_500 < low <= high <= 10_001

    def test_when_released_it_is_the_usual_one(self, server: RedisServer, tier: NetworkTier) -> None:
        tier.put(CHAIN)
        tier.keep(PLACES, float(server.ask(b"TIME")[0]) + 10_000)  # type: ignore[index]
        tier.release(PLACES)
        low, high = self.seconds(server)
        assert 900 < low <= high <= 1000


class TestThroughTheStore:
    PROMPT = as_tokens(range(14))
    LOGITS = np.arange(4, dtype=np.float32)

    @pytest.fixture
    def tier(self) -> DictTier:
        return DictTier()

    @pytest.fixture
    def store(self, tier: DictTier) -> Iterator[Store]:
        store = Store(FINGERPRINT, max_bytes=1 << 20, block_tokens=4, tiers=[tier], wall_clock=Clock(1000.0))
        Thread(target=store.behind.run, daemon=True).start()
        yield store
        store.close(60)
        store.check_integrity()

    def put(self, store: Store, length: int = 14) -> None:
        end = length - length % 4
        tail = (length, memoryview(bytes(length - end)), self.LOGITS)
        store.put(self.PROMPT[:length], {start: memoryview(b"kv") for start in range(0, end, 4)}, tails=[tail])
        assert store.behind.flush(60)

    def test_what_is_there_is_kept(self, store: Store, tier: DictTier) -> None:
        self.put(store)
        store.pin(self.PROMPT, ttl_seconds=60)
        assert store.behind.flush(60)
        assert tier.kept == dict.fromkeys(tier.blocks, 1060.0)

    def test_what_comes_later_is_kept(self, store: Store, tier: DictTier) -> None:
        store.pin(self.PROMPT, ttl_seconds=60)
        self.put(store)
        assert tier.kept == dict.fromkeys(tier.blocks, 1060.0)

    def test_what_other_pins_name_stays_kept_when_one_ends(self, store: Store, tier: DictTier) -> None:
        self.put(store)
        long = store.pin(self.PROMPT, ttl_seconds=60)
        store.pin(self.PROMPT[:8], ttl_seconds=30)
        assert store.unpin(long.id)
        assert store.behind.flush(60)
        assert tier.kept == dict.fromkeys([block.key for block in store.match(self.PROMPT[:8]).blocks], 1030.0)

    def test_a_tier_that_fails_loses_no_pin_in_memory(self, store: Store, tier: DictTier) -> None:
        self.put(store)
        tier.failing = True
        pin = store.pin(self.PROMPT, ttl_seconds=60)
        assert store.behind.flush(60)
        assert pin.num_bytes == store.stats().pinned_bytes > 0
        assert store.unpin(pin.id)
        assert store.behind.flush(60)
        tier.failing = False


def test_a_pinned_prompt_is_there_after_a_restart_through_a_flood(disk: Disk) -> None:
    """Memory, its pin and its process are gone; the files are there, though others filled the folder many times."""

    def opened() -> Store:
        store = Store(
            FINGERPRINT, max_bytes=1 << 20, block_tokens=4, tiers=[disk.tier(20)], wall_clock=disk.clock, policy="lru"
        )
        Thread(target=store.behind.run, daemon=True).start()
        return store

    def put(store: Store, first: int) -> None:
        disk.clock.now += 60
        store.put(as_tokens(range(first, first + 12)), {start: memoryview(b"kv") for start in (0, 4, 8)})
        assert store.behind.flush(60)

    store = opened()
    put(store, 0)
    store.pin(as_tokens(range(12)), ttl_seconds=1e6)
    assert store.close(60)
    store = opened()
    for number in range(1, 30):
        put(store, 100 * number)
    assert store.close(60)
    store = opened()
    assert store.fetch(as_tokens(range(12))).tokens == {"disk": 12}
    assert store.close(60)
