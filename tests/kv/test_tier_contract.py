"""What every tier behind the memory promises, over disk and network.

The memory itself is no `Tier`: the store speaks to it by key, under its lock, and it keeps no block without its
predecessors; it has tests of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.redis_server import PROGRAM, RedisServer
from tests.kv.samples import FINGERPRINT, SIZE, Clock, all_facts, facts, make_chain, make_tail, other_kind

from rekindle.kv.block import Block
from rekindle.kv.disk import DiskTier
from rekindle.kv.keys import Key, block_key, root_key
from rekindle.kv.network import NetworkTier
from rekindle.kv.tier import Place, Tier, place_of

NETWORK = pytest.param("network", marks=pytest.mark.skipif(PROGRAM is None, reason="redis-server is not installed"))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["disk", NETWORK])
def shared_tier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tier]:
    tier: Tier
    if request.param == "disk":
        folder = tmp_path_factory.mktemp("store")
        tier = DiskTier(folder, fingerprint=FINGERPRINT, max_bytes=1 << 24, clock=Clock())
    else:
        server = request.getfixturevalue("redis_server")
        tier = NetworkTier(server.url, fingerprint=FINGERPRINT, ttl_seconds=600, timeout_seconds=30)
    yield tier
    tier.close()


@pytest.fixture
def tier(shared_tier: Tier) -> Iterator[Tier]:
    shared_tier.clear()
    yield shared_tier
    shared_tier.check_integrity()


class TestTier:
    def test_what_is_put_comes_back(self, tier: Tier) -> None:
        chain = make_chain(1, 5, tail=2)
        tier.put(chain)
        assert all_facts(tier.get([place_of(block) for block in chain])) == all_facts(chain)
        assert tier.stats().blocks == 6
        assert tier.stats().state == "ok"

    def test_what_is_not_there_is_none_in_its_place(self, tier: Tier) -> None:
        here, there = make_chain(1, 3), make_chain(2, 3)
        tier.put(here)
        mixed = [here[0], there[0], here[1], there[1], here[2]]
        places = [place_of(block) for block in mixed]
        assert all_facts(tier.get(places)) == [facts(block) if block in here else None for block in mixed]
        assert tier.contains(places) == [True, False, True, False, True]

    def test_it_counts_hits_and_misses_of_reading_only(self, tier: Tier) -> None:
        here, there = make_chain(1, 2), make_chain(2, 1)
        tier.put(here)
        before = tier.stats()
        places = [place_of(block) for block in here + there]
        tier.contains(places)
        tier.touch(places)
        list(tier.get(places))
        after = tier.stats()
        assert (after.hits - before.hits, after.misses - before.misses) == (2, 1)

    def test_it_counts_bytes_that_are_written_and_read(self, tier: Tier) -> None:
        before, chain = tier.stats(), make_chain(1, 4)
        tier.put(chain)
        tier.put(chain)  # what is there is not written again
        written = tier.stats().written_bytes - before.written_bytes
        assert written >= sum(len(block.payload) for block in chain)
        for _ in range(2):
            list(tier.get([place_of(block) for block in chain]))
        list(tier.get([place_of(block) for block in make_chain(2, 4)]))
        assert tier.stats().read_bytes - before.read_bytes == 2 * written

    def test_blocks_come_one_by_one(self, tier: Tier) -> None:
        """A reader that has had enough stops, and the tier is as before."""
        chain = make_chain(1, 40)
        tier.put(chain)
        places = [place_of(block) for block in chain]
        for count in (0, 1, 7):
            blocks = tier.get(places)
            assert all_facts([next(blocks) for _ in range(count)]) == all_facts(chain[:count])
            del blocks
        assert all_facts(tier.get(places)) == all_facts(chain)

    def test_two_readers_at_once_do_not_mix(self, tier: Tier) -> None:
        one, other = make_chain(1, 9), make_chain(2, 9)
        tier.put(one)
        tier.put(other)
        read = [
            facts(block)
            for pair in zip(tier.get([place_of(b) for b in one]), tier.get([place_of(b) for b in other]), strict=True)
            for block in pair
        ]
        assert read == [facts(block) for pair in zip(one, other, strict=True) for block in pair]

    def test_to_probe_changes_nothing(self, tier: Tier) -> None:
        chain = make_chain(1, 2)
        tier.put(chain)
        before = tier.stats()
        for writing in (False, True):
            tier.probe(writing=writing)
        assert tier.stats() == before
        assert all_facts(tier.get([place_of(block) for block in chain])) == all_facts(chain)

    def test_nothing_is_nothing(self, tier: Tier) -> None:
        tier.put([])
        tier.touch([])
        tier.remove([])
        assert list(tier.get([])) == tier.contains([]) == []
        assert (tier.stats().blocks, tier.stats().bytes) == (0, 0)

    def test_a_wrong_key_parent_or_kind_is_a_miss(self, tier: Tier) -> None:
        block, tail = make_chain(1, 1, tail=3)
        tier.put([block, tail])
        wrong = [
            Place(key=b"k" * 16, parent=block.parent),
            Place(key=b"k" * 16, parent=tail.parent, tail=True),
            other_kind(block),
        ]
        assert list(tier.get(wrong)) == [None] * 3
        tier.put([block, tail])
        assert all_facts(tier.get([place_of(block), place_of(tail)])) == all_facts([block, tail])

    def test_what_is_there_is_not_counted_twice(self, tier: Tier) -> None:
        chain = make_chain(1, 3, tail=1)
        tier.put(chain)
        before = tier.stats()
        tier.put(chain[:2])
        tier.put(chain)
        assert (tier.stats().blocks, tier.stats().bytes) == (before.blocks, before.bytes)
        assert all_facts(tier.get([place_of(block) for block in chain])) == all_facts(chain)

    def test_an_empty_tail_is_kept(self, tier: Tier) -> None:
        """A prompt that ends at a block's end has no tokens left, but logits."""
        chain = make_chain(1, 1, tail=0)
        tier.put(chain)
        assert all_facts(tier.get([place_of(chain[1])])) == [facts(chain[1])]

    def test_tails_of_one_parent_do_not_mix(self, tier: Tier) -> None:
        (block,) = make_chain(1, 1)
        texts = ([1, 2, 3], [1, 2], [1, 9, 9], [])
        tails = [make_tail(block.key, np.array(tokens, dtype=np.int32), SIZE) for tokens in texts]
        for tail in tails[::2]:
            tier.put([block, tail])
        places = [place_of(tail) for tail in tails]
        assert tier.contains(places) == [True, False, True, False]
        assert all_facts(tier.get(places)) == [facts(tails[0]), None, facts(tails[2]), None]

    def test_what_is_removed_is_gone(self, tier: Tier) -> None:
        chain = make_chain(1, 4, tail=2)
        tier.put(chain)
        gone = [chain[1], chain[4]]
        tier.remove([place_of(block) for block in gone])
        tier.remove([place_of(block) for block in gone])
        left = [None if block in gone else facts(block) for block in chain]
        assert all_facts(tier.get([place_of(block) for block in chain])) == left
        assert tier.stats().blocks == 3

    def test_clear_forgets_everything(self, tier: Tier) -> None:
        chain = make_chain(1, 4, tail=2)
        tier.put(chain)
        tier.clear()
        assert list(tier.get([place_of(block) for block in chain])) == [None] * 5
        assert (tier.stats().blocks, tier.stats().bytes) == (0, 0)
        tier.put(chain)
        assert all_facts(tier.get([place_of(block) for block in chain])) == all_facts(chain)

    def test_clearing_the_model_takes_blocks_of_any_number_of_tokens(self, tier: Tier) -> None:
        """Of which a file's first page would not have all."""
        root, tokens = root_key(FINGERPRINT, b""), np.arange(5000, dtype=np.int32)
        large = Block(block_key(root, tokens), root, tokens, 0, memoryview(b"kv"))
        chain = [large, make_tail(large.key, tokens[:4000], 5000)]
        tier.put(chain)
        tier.clear_model()
        assert list(tier.get([place_of(block) for block in chain])) == [None, None]
        assert (tier.stats().blocks, tier.stats().bytes) == (0, 0)

    def test_two_salts_share_nothing(self, tier: Tier) -> None:
        """The same tokens for two tenants: not one key in common, so neither can see what the other has asked."""
        ours, theirs = (make_chain(1, 6, tail=2, salt=salt) for salt in (b"ours", b"theirs"))
        assert not {block.key for block in ours} & {block.key for block in theirs}
        tier.put(ours)
        assert tier.contains([place_of(block) for block in theirs]) == [False] * 7
        tier.put(theirs)
        assert all_facts(tier.get([place_of(block) for block in theirs])) == all_facts(theirs)
        tier.remove([place_of(block) for block in theirs])
        assert all_facts(tier.get([place_of(block) for block in ours])) == all_facts(ours)

    def test_large_payloads_come_back_whole(self, tier: Tier) -> None:
        chain = make_chain(1, 5, payload_bytes=1_000_003)
        tier.put(chain)
        assert all_facts(tier.get([place_of(block) for block in chain])) == all_facts(chain)

    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_any_series_of_operations_ends_as_over_a_dict(self, shared_tier: Tier, data: st.DataObject) -> None:
        """Both are large enough here, so nothing may get lost."""
        chains = [make_chain(seed, 4, tail=seed) for seed in range(3)] + [make_chain(0, 2, tail=1, salt=b"other")]
        expected: dict[Key, object] = {}
        shared_tier.clear()
        for _ in range(data.draw(st.integers(1, 12))):
            chain = data.draw(st.sampled_from(chains))
            part = chain[: data.draw(st.integers(0, len(chain)))]
            places = [place_of(block) for block in part]
            match data.draw(st.sampled_from(["put", "put", "get", "remove", "touch", "clear"])):
                case "put":
                    shared_tier.put(part)
                    expected |= {block.key: facts(block) for block in part}
                case "get":
                    assert all_facts(shared_tier.get(places)) == [expected.get(place.key) for place in places]
                    assert shared_tier.contains(places) == [place.key in expected for place in places]
                case "remove":
                    shared_tier.remove(places)
                    expected = {key: value for key, value in expected.items() if key not in {p.key for p in places}}
                case "touch":
                    shared_tier.touch(places)
                case "clear":
                    shared_tier.clear()
                    expected = {}
            assert shared_tier.stats().blocks == len(expected)
            shared_tier.check_integrity()
