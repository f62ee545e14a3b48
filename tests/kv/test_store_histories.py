"""Any history of a store under any policy, with pins, quotas, tails and a slower tier: nothing false, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.kv.doubles import DictTier
from tests.kv.samples import Clock
from tests.kv.test_store import SALTS, SIZE, WEIGHT, Naive, Put, check

from rekindle.errors import InvalidRequest
from rekindle.kv.policies import POLICIES
from rekindle.kv.store import Match, Store
from rekindle.tokens import as_tokens


@st.composite
def prompts(draw: st.DrawFn) -> Put:
    """Of few different blocks, so that prompts begin alike and go on differently."""
    numbers = draw(st.lists(st.integers(0, 1), max_size=5))
    ids = [number for number in numbers for _ in range(SIZE)] + draw(st.lists(st.integers(0, 1), max_size=SIZE - 1))
    tails = draw(st.lists(st.integers(0, len(ids)), max_size=2, unique=True))
    return Put(draw(st.sampled_from(SALTS)), ids, tails)


class Histories(RuleBasedStateMachine):
    """The queue to the slower tier is worked off at once, in this thread."""

    @initialize(
        max_bytes=st.integers(0, 20) | st.just(1000),
        policy=st.sampled_from(list(POLICIES)),
        quota=st.sampled_from([1.0, 0.6, 0.3]),
        pinned=st.sampled_from([0.0, 0.5, 1.0]),
        tiered=st.booleans(),
    )
    def start(self, max_bytes: int, policy: str, quota: float, pinned: float, tiered: bool) -> None:
        self.max_bytes, self.quota = max_bytes * 1100, quota  # a block takes about so much
        self.clock = Clock(1000.0)
        self.tier = DictTier()
        self.store = Store(
            b"model",
            max_bytes=self.max_bytes,
            block_tokens=SIZE,
            tiers=[self.tier] if tiered else [],
            policy=policy,
            quota=quota,
            max_pinned_share=pinned,
            bytes_per_token=WEIGHT // SIZE,
            wall_clock=self.clock,
        )
        self.naive = Naive()
        self.matches: list[Match] = []
        self.latest = Put(SALTS[0], [1], [])

    def write_behind(self) -> None:
        self.store.behind.drain()

    def kept(self) -> dict[str, Sequence[bytes]]:
        """Of each pin what is in memory and kept."""
        pins = self.store._pins
        return {held.id: [each.key for each in held.places if each.key in pins] for held in pins.all()}

    @rule(put=prompts())
    def put(self, put: Put) -> None:
        before, self.latest = self.kept(), put
        put.into(self.store)
        self.naive.put(put)
        self.write_behind()
        after = self.kept()
        assert all(set(keys) <= set(after[pin]) for pin, keys in before.items()), "a pinned block has gone"

    @rule(put=prompts())
    def request(self, put: Put) -> None:
        """As it comes from a scheduler: look up, fetch, look up again, use, store."""
        self.fetch(put)
        self.match(put)
        self.use(latest=True)
        self.put(put)

    @rule(put=prompts())
    def match(self, put: Put) -> None:
        match = self.store.match(as_tokens(put.ids), put.salt)
        check(match, put.salt, put.ids)
        assert match.length <= self.naive.length(put.salt, put.ids)
        if self.max_bytes == 1000 * 1100 and self.quota == 1:
            assert match.length == self.naive.length(put.salt, put.ids), "there is room for everything"
        self.matches.append(match)

    @precondition(lambda self: self.matches)
    @rule(latest=st.booleans())
    def use(self, latest: bool) -> None:
        """Perhaps long after the look-up: some of it may have gone."""
        self.store.used(self.matches.pop(-1 if latest else 0))
        self.write_behind()

    @rule(put=prompts())
    def fetch(self, put: Put) -> None:
        fetched = self.store.fetch(as_tokens(put.ids), put.salt)
        match = self.store.match(as_tokens(put.ids), put.salt)
        check(match, put.salt, put.ids)
        assert sum(fetched.tokens.values()) <= len(put.ids)
        self.write_behind()

    @precondition(lambda self: self.store.tiers)
    @rule()
    def lose(self) -> None:
        """The slower tier may lose anything at any time; here the last that came."""
        if self.tier.blocks:
            self.tier.blocks.popitem()

    @rule(put=st.none() | prompts(), seconds=st.sampled_from([1.0, 50.0, 1000.0]))
    def pin(self, put: Put | None, seconds: float) -> None:
        put = put or self.latest
        before = {pin.id for pin in self.store.pins()}
        try:
            pin = self.store.pin(as_tokens(put.ids), salt=put.salt, ttl_seconds=seconds)
        except InvalidRequest:
            assert {pin.id for pin in self.store.pins()} == before
        else:
            assert {each.id for each in self.store.pins()} == before | {pin.id}
            assert pin.expires_in >= seconds and pin.num_tokens == len(put.ids)
        self.write_behind()

    @precondition(lambda self: self.store.pins())
    @rule(last=st.booleans())
    def unpin(self, last: bool) -> None:
        pin = self.store.pins()[-1 if last else 0]
        assert self.store.unpin(pin.id) and not self.store.unpin(pin.id)
        self.write_behind()

    @rule(seconds=st.sampled_from([1.0, 49.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(chance=st.integers(0, 9))
    def clear(self, chance: int) -> None:
        if chance == 0:
            self.store.clear()
            self.tier.kept.clear()
            self.naive = Naive()
            assert self.store.stats().blocks == 0

    @invariant()
    def is_whole(self) -> None:
        self.store.check_integrity()
        stats = self.store.stats()
        assert stats.bytes <= self.max_bytes
        assert all(pin.expires_in > 0 for pin in self.store.pins())
        assert stats.pinned_bytes == sum(pin.num_bytes for pin in self.store.pins()) or stats.pins > 1
        assert stats.pinned_bytes <= stats.max_pinned_bytes
        assert self.store._memory._awaited.num_bytes <= self.store._memory._awaited.max_bytes


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_quotas_are_per_salt() -> None:
    """One tenant with a thousand prompts, one with one: it is still there."""
    store = Store(b"model", max_bytes=40 * WEIGHT, block_tokens=SIZE, quota=0.7)
    mine = Put(SALTS[1], list(range(12)), [12])
    mine.into(store)
    for number in range(300):
        put = Put(SALTS[2], [number] * 12, [12])
        put.into(store)
        store.used(store.match(as_tokens(put.ids), put.salt))
    match = store.match(as_tokens(mine.ids), mine.salt)
    assert match.length == 12 and match.logits is not None
    store.check_integrity()
