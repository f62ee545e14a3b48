"""The memory tier, under every policy: its budget, whole chains, what stays, and who pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.kv.samples import chain

from rekindle.errors import InvalidRequest
from rekindle.kv.block import Block
from rekindle.kv.keys import Key, digest
from rekindle.kv.memory import MemoryTier
from rekindle.kv.pins import Held, Pins
from rekindle.kv.policies import POLICIES
from rekindle.kv.tier import place_of
from rekindle.tokens import as_tokens

SIZE = 4
ROOT = digest(b"root")
OTHER = digest(b"other root")
PAYLOAD = memoryview(bytes(1000))


def chain_of(ids: Sequence[int], root: Key = ROOT) -> list[Block]:
    """One whole block for each id; chains share blocks as far as their ids are equal."""
    links = chain(root, as_tokens([each for each in ids for _ in range(SIZE)]), SIZE)
    return [Block(key, parent, part, SIZE * at, PAYLOAD) for at, (parent, key, part) in enumerate(links)]


def same(name: int, length: int, root: Key = ROOT) -> list[Block]:
    return chain_of([name] * length, root)


def keys_of(blocks: Sequence[Block]) -> list[Key]:
    return [block.key for block in blocks]


def held(blocks: Sequence[Block], name: str = "pin", ends: float = 1e9) -> Held:
    places = tuple(place_of(block) for block in blocks)
    return Held(id=name, name=name, owner=blocks[0].parent, places=places, num_tokens=1, expires_at=ends)


def pin(pins: Pins, tier: MemoryTier, blocks: Sequence[Block], name: str = "pin") -> None:
    stored = {block.key: block.num_bytes for block in blocks if tier.get(block.key) is not None}
    pins.add(held(blocks, name), {block.key: block.num_bytes for block in blocks}, stored)


CHAIN = same(1, 3)
ONE = CHAIN[0].num_bytes


def tier_of(num_bytes: int, **options: Any) -> MemoryTier:
    return MemoryTier(num_bytes, block_tokens=SIZE, **options)


def found(tier: MemoryTier, blocks: Sequence[Block]) -> int:
    """Blocks at the beginning of a chain that are there."""
    keys, here = tier.longest(blocks[0].parent, b"".join(block.tokens.tobytes() for block in blocks))
    assert keys == keys_of(here) == keys_of(blocks[: len(here)])
    assert len(here) == sum(block.key in tier for block in blocks)
    assert all(tier.get(key) is block for key, block in zip(keys, here, strict=True))
    return len(here)


def put(tier: MemoryTier, blocks: Sequence[Block], *, fetched: bool = False, now: float = 0.0) -> None:
    known = found(tier, blocks)
    here = [tier.get(block.key) or block for block in blocks[:known]]
    tier.put(blocks[0].parent, here, blocks[known:], fetched=fetched, now=now)


def request(tier: MemoryTier, blocks: Sequence[Block]) -> int:
    """Use what is there of a chain and store it all; returns how many blocks were there."""
    known = found(tier, blocks)
    tier.hit(blocks[0].parent, keys_of(blocks[:known]))
    put(tier, blocks)
    tier.check_integrity()
    return known


def stored(tier: MemoryTier, blocks: Sequence[Block]) -> int:
    return sum(tier.get(block.key) is not None for block in blocks)


@pytest.mark.parametrize("policy", POLICIES)
class TestUnderEveryPolicy:
    def test_it_keeps_what_fits(self, policy: str) -> None:
        tier = tier_of(6 * ONE, policy=policy)
        for name in (1, 2):
            request(tier, same(name, 3))
        assert (len(tier), tier.num_bytes, tier.evictions) == (6, 6 * ONE, 0)
        assert [tier.get(block.key) for block in CHAIN] == [tier.get(key) for key in keys_of(CHAIN)]

    def test_it_keeps_its_budget_and_whole_chains(self, policy: str) -> None:
        tier = tier_of(5 * ONE, policy=policy)
        for name in range(20):
            request(tier, same(name, 3))
        assert len(tier) == 5
        assert tier.evictions == 55

    def test_what_is_too_large_for_it_goes_from_the_tail(self, policy: str) -> None:
        tier = tier_of(5 * ONE, policy=policy)
        put(tier, same(1, 20))
        tier.check_integrity()
        assert stored(tier, same(1, 5)) == 5
        assert tier.state == "ok"

    def test_a_block_too_large_for_it_is_said(self, policy: str) -> None:
        tier = tier_of(ONE - 1, policy=policy)
        put(tier, CHAIN)
        assert len(tier) == tier.num_bytes == 0
        assert tier.state == f"too small: it has {ONE - 1:,} bytes, and a block takes up to {ONE:,}"

    def test_what_is_used_often_outlives_a_scan(self, policy: str) -> None:
        """Prompts that come once, one of which comes between any two of the scan."""
        tier = tier_of(8 * ONE, policy=policy)
        for name in range(2, 40):
            request(tier, CHAIN)
            request(tier, same(name, 2))
        assert request(tier, CHAIN) == 3

    def test_clear_forgets_everything(self, policy: str) -> None:
        tier = tier_of(9 * ONE, policy=policy)
        pins = tier._pins
        for name in range(5):
            request(tier, same(name, 3))
        tier.clear()
        tier.check_integrity()
        assert len(tier) == tier.num_bytes == pins.num_bytes == 0
        assert request(tier, CHAIN) == 0
        assert request(tier, CHAIN) == 3

    def test_what_is_pinned_stays_with_what_it_follows(self, policy: str) -> None:
        pins = Pins(4 * ONE)
        tier = tier_of(4 * ONE, policy=policy, pins=pins)
        put(tier, CHAIN)
        pin(pins, tier, CHAIN)
        for name in range(2, 20):
            request(tier, same(name, 2))
            assert stored(tier, CHAIN) == 3
        pins.remove("pin")
        for name in range(2, 40):
            request(tier, same(name, 2))
            request(tier, same(name, 2))
        assert stored(tier, CHAIN) < 3

    def test_what_is_pinned_before_it_comes_stays(self, policy: str) -> None:
        pins = Pins(4 * ONE)
        tier = tier_of(4 * ONE, policy=policy, pins=pins)
        pin(pins, tier, CHAIN)
        for name in range(2, 20):
            request(tier, same(name, 2))
        put(tier, CHAIN)
        for name in range(2, 20):
            request(tier, same(name, 2))
            assert stored(tier, CHAIN) == 3

    def test_a_block_that_follows_a_pinned_one_may_go(self, policy: str) -> None:
        pins = Pins(4 * ONE)
        tier = tier_of(4 * ONE, policy=policy, pins=pins)
        put(tier, CHAIN)
        pin(pins, tier, CHAIN[:1])
        for name in range(2, 20):
            request(tier, same(name, 4))
            request(tier, same(name, 4))
        assert stored(tier, CHAIN) == 1

    def test_what_was_fetched_stays_until_it_is_used(self, policy: str) -> None:
        tier = tier_of(12 * ONE, policy=policy)
        chain = same(1, 5)
        request(tier, chain[:2])
        put(tier, chain, fetched=True)
        for name in range(2, 20):
            request(tier, same(name, 5))
            assert stored(tier, chain) == 5
        tier.hit(ROOT, keys_of(chain))
        for name in range(20, 60):
            request(tier, same(name, 5))
            request(tier, same(name, 5))
        assert stored(tier, chain) < 5

    def test_what_was_fetched_and_never_used_goes_after_a_minute(self, policy: str) -> None:
        tier = tier_of(12 * ONE, policy=policy)
        put(tier, same(1, 5), fetched=True, now=1000.0)
        for name in range(2, 60):
            put(tier, same(name, 5), now=1000.0 + name)
            tier.hit(ROOT, keys_of(same(name, 5)))
            tier.check_integrity()
            assert stored(tier, same(1, 5)) == 5
        for name in range(60, 200):
            put(tier, same(name, 5), now=1000.0 + name)
            tier.hit(ROOT, keys_of(same(name, 5)))
        assert stored(tier, same(1, 5)) < 5

    def test_a_request_that_waited_for_its_blocks_uses_them_once(self, policy: str) -> None:
        """What was there before is hit; what was fetched for it is stored, and that is its use."""
        tier = tier_of(100 * ONE, policy=policy)
        hits: list[int] = []
        share = tier._shares.of(ROOT)
        hit = share.policy.hit
        share.policy.hit = lambda chain: (hits.append(len(chain)), hit(chain))[1]  # type: ignore[method-assign]
        chain = same(1, 5)
        put(tier, chain[:2])
        put(tier, chain, fetched=True)
        tier.hit(ROOT, keys_of(chain))
        tier.hit(ROOT, keys_of(chain))
        assert hits == [2, 5]

    def test_with_quotas_one_tenant_cannot_flush_another(self, policy: str) -> None:
        tier = tier_of(20 * ONE, policy=policy, quota=0.75)
        mine = [same(name, 3, OTHER) for name in range(3)]
        for blocks in mine:
            request(tier, blocks)
        for name in range(50):
            request(tier, same(name, 4))
            request(tier, same(name, 4))
        assert [stored(tier, blocks) for blocks in mine] == [3, 3, 3]
        assert len(tier) == 20

    def test_what_is_lost_takes_what_follows_it_and_nothing_else(self, policy: str) -> None:
        for quota in (0.75, 1.0):
            tier = tier_of(30 * ONE, policy=policy, quota=quota)
            others = [same(1, 3, OTHER), same(2, 3), chain_of([1, 1, 3])]
            for blocks in (*others, same(1, 4), chain_of([1, 1, 1, 2, 2])):
                request(tier, blocks)
            logits = np.zeros(1, np.float32)
            tail = Block(digest(b"tail"), same(1, 3)[-1].key, as_tokens([5]), 3 * SIZE, PAYLOAD, logits)
            tier.put(ROOT, same(1, 3), [tail])
            tier.remove(ROOT, keys_of(same(1, 3)))
            tier.check_integrity()
            assert [stored(tier, blocks) for blocks in (same(1, 4), *others)] == [2, 3, 3, 3]
            assert len(tier) == 3 + 3 + 3 and tier.evictions == 0
            tier.remove(ROOT, keys_of(same(1, 3)))
            assert len(tier) == 9, "it is gone already"
            assert request(tier, same(1, 4)) == 2
            assert request(tier, same(1, 4)) == 4

    def test_a_quota_holds_though_there_is_room(self, policy: str) -> None:
        tier = tier_of(20 * ONE, policy=policy, quota=0.5)
        for name in range(10):
            request(tier, same(name, 4))
        assert len(tier) == 10

    def test_without_quotas_one_may_have_it_all(self, policy: str) -> None:
        tier = tier_of(20 * ONE, policy=policy)
        request(tier, same(1, 3, OTHER))
        for name in range(50):
            request(tier, same(name, 4))
            request(tier, same(name, 4))
        assert stored(tier, same(1, 3, OTHER)) < 3
        assert len(tier) == 20

    def test_all_who_want_more_end_up_with_equally_much(self, policy: str) -> None:
        tier = tier_of(30 * ONE, policy=policy, quota=0.9)
        roots = [digest(b"root", bytes([number])) for number in range(3)]
        for name in range(40):
            for number, root in enumerate(roots):
                for _ in range(1 + 3 * number):
                    request(tier, same(100 * number + name, 2, root))
                    name += 1000
        owners = [tier._root(block) for block in tier._tree]
        counts = [owners.count(root) for root in roots]
        assert max(counts) - min(counts) <= 2, counts

    def test_many_owners_cost_little_each(self, policy: str) -> None:
        """Beyond a few hundred, shares are under LRU, and a share that has lost its last block is gone."""
        tier = tier_of(400 * ONE, policy=policy, quota=0.5)
        for number in range(1000):
            root = digest(b"root", number.to_bytes(4, "little"))
            put(tier, same(1, 1, root))
        tier.check_integrity()
        assert len(list(tier._shares)) == len(tier) == 400
        assert policy == "lru" or 255 <= sum(share.policy.name == policy for share in tier._shares) <= 256
        newest = [digest(b"root", number.to_bytes(4, "little")) for number in range(600, 1000)]
        assert all(stored(tier, same(1, 1, root)) for root in newest)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'prospect'"):
        tier_of(100, policy="prospekt")


class Histories(RuleBasedStateMachine):
    """Any history under any policy and quota: the budget holds, chains are whole, pins hold, nothing is miscounted."""

    paths = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    roots = st.sampled_from([ROOT, OTHER, digest(b"third root")])

    @initialize(
        num_fitting=st.integers(0, 16),
        policy=st.sampled_from(list(POLICIES)),
        quota=st.sampled_from([1.0, 0.75, 0.5, 0.1]),
        pinned=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def start(self, num_fitting: int, policy: str, quota: float, pinned: float) -> None:
        self.pins = Pins(int(num_fitting * ONE * pinned))
        self.tier = tier_of(num_fitting * ONE, policy=policy, quota=quota, pins=self.pins)
        self.now = 0.0
        self.pinned: dict[str, list[Block]] = {}

    @rule(path=paths, root=roots, fetched=st.booleans())
    def put(self, path: list[int], root: Key, fetched: bool) -> None:
        blocks = chain_of(path, root)
        before = self.staying()
        put(self.tier, blocks, now=self.now, fetched=fetched)
        assert before <= self.staying()

    @rule(path=paths, root=roots)
    def hit(self, path: list[int], root: Key) -> None:
        """Of a chain that may have lost some blocks since it was looked up."""
        self.tier.hit(root, keys_of(chain_of(path, root)))

    @rule(path=paths, root=roots, name=st.sampled_from("abc"))
    def pin(self, path: list[int], root: Key, name: str) -> None:
        blocks = chain_of(path, root)
        if name not in self.pinned:
            try:
                pin(self.pins, self.tier, blocks, name)
            except InvalidRequest:
                return
            self.pinned[name] = blocks

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        name, _ = self.pinned.popitem()
        assert self.pins.remove(name) is not None

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(path=paths, root=roots)
    def remove(self, path: list[int], root: Key) -> None:
        blocks = chain_of(path, root)
        self.tier.remove(root, keys_of(blocks))
        assert blocks[-1].key not in self.tier

    @rule()
    def clear(self) -> None:
        self.tier.clear()
        assert len(self.tier) == self.tier.num_bytes == 0

    @invariant()
    def is_whole(self) -> None:
        self.tier.check_integrity()

    def staying(self) -> set[Key]:
        """All that is there and pinned; sizes are as expected here, so each pin holds all that it names."""
        named = {block.key for blocks in self.pinned.values() for block in blocks}
        return {key for key in named if key in self.tier}


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.integers(0, 8), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=25))
def test_lru_is_the_naive_one(num_fitting: int, requests: list[list[int]]) -> None:
    tier = tier_of(num_fitting * ONE, policy="lru")
    naive: list[Key] = []  # oldest first
    for path in requests:
        blocks = chain_of(path)
        request(tier, blocks)
        for key in reversed(keys_of(blocks)):
            naive = [each for each in naive if each != key] + [key]
        naive = naive[max(0, len(naive) - num_fitting) :]
        assert set(naive) == set(keys_of(list(tier._tree)))


def test_the_recount_sees_a_wrong_sum_and_a_hole() -> None:
    tier = tier_of(10 * ONE)
    put(tier, CHAIN)
    tier.num_bytes += 1
    with pytest.raises(AssertionError):
        tier.check_integrity()
    tier.num_bytes -= 1
    tier.check_integrity()
    run = tier._tree._runs[CHAIN[0].key]
    del run.keys[1], run.blocks[1], tier._tree._runs[CHAIN[1].key]
    with pytest.raises(AssertionError):
        tier.check_integrity()
