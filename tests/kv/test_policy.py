"""Every eviction policy keeps the rule of the interface: chains die from the tail, pins hold, nothing is miscounted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest
from rekindle.kv.policies import DEFAULT, POLICIES, make_policy

Chain = tuple[tuple[int, ...], ...]


def chain_of(path: Sequence[int]) -> Chain:
    """Keys of a chain: each is all that leads to it, as prefix keys are."""
    return tuple(tuple(path[: length + 1]) for length in range(len(path)))


def size_of(key: tuple[int, ...]) -> int:
    return 1 + sum(key) % 7


def cost_of(key: tuple[int, ...]) -> float:
    return size_of(key) * (1 + len(key) / 10)


class Tier:
    """A tier that keeps sizes and no payloads, and knows what a policy must never do."""

    def __init__(self, name: str, capacity: int) -> None:
        self.policy = make_policy(name, capacity)
        self.capacity = capacity
        self.stored: set[tuple[int, ...]] = set()
        self.pinned: set[tuple[int, ...]] = set()

    @property
    def num_bytes(self) -> int:
        return sum(map(size_of, self.stored))

    def request(self, path: Sequence[int]) -> int:
        """Use and store a chain; returns how many of its blocks were there."""
        chain = chain_of(path)
        found = next((i for i, key in enumerate(chain) if key not in self.stored), len(chain))
        if found:
            self.policy.hit(chain[:found])
        if found < len(chain):
            self.policy.insert(chain, [size_of(key) for key in chain], [cost_of(key) for key in chain])
            self.stored.update(chain)
        while self.num_bytes > self.capacity:
            victim = self.policy.evict(self.pinned)
            if victim is None:
                break
            self.remove(victim)
        return found

    def remove(self, key: tuple[int, ...]) -> None:
        assert key in self.stored and key not in self.pinned
        self.stored.remove(key)
        assert not any(each[: len(key)] == key for each in self.stored), "a block lost its predecessor"

    def lose(self, path: Sequence[int]) -> None:
        """A chain loses what it shares with no other."""
        chain = [key for key in chain_of(path) if key in self.stored]
        while chain and not any(key[: len(chain)] == chain[-1] != key for key in self.stored):
            self.policy.remove(chain)
            self.pinned.discard(chain[-1])
            self.remove(chain.pop())

    def check(self) -> None:
        self.policy.check_integrity()
        assert len(self.policy) == len(self.stored)
        if self.num_bytes > self.capacity:  # nothing could go: each stored block is pinned or leads to a pinned one
            heads = {key[: length + 1] for key in self.pinned for length in range(len(key))}
            assert self.stored <= heads


paths = st.lists(st.integers(0, 2), min_size=1, max_size=8)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("request"), paths),
        st.tuples(st.just("request"), paths),
        st.tuples(st.just("pin"), paths),
        st.tuples(st.just("unpin"), st.just([0])),
        st.tuples(st.just("lose"), paths),
    ),
    max_size=120,
)


@pytest.mark.parametrize("name", POLICIES)
class TestEveryPolicy:
    @settings(max_examples=150, deadline=None)
    @given(steps=steps, capacity=st.integers(1, 120))
    def test_chains_die_from_the_tail_and_pins_hold(self, name: str, steps: list, capacity: int) -> None:
        tier = Tier(name, capacity)
        for action, path in steps:
            if action == "request":
                tier.request(path)
                tier.check()
            elif action == "pin" and tuple(path) in tier.stored:
                tier.pinned.add(tuple(path))
            elif action == "unpin":
                tier.pinned.clear()
            elif action == "lose":
                tier.lose(path)
                tier.check()

    def test_nothing_to_evict(self, name: str) -> None:
        assert make_policy(name, 10).evict() is None

    def test_all_pinned(self, name: str) -> None:
        policy = make_policy(name, 2)
        policy.insert("abc", [1, 1, 1], [1.0, 1.0, 1.0])
        assert policy.evict({"c"}) is None, "a and b lead to c"
        assert policy.evict({"b"}) == "c"
        assert policy.evict({"b"}) is None
        assert policy.evict() == "b"
        policy.check_integrity()

    def test_what_was_pinned_can_go_later(self, name: str) -> None:
        policy = make_policy(name, 10)
        for number in range(20):
            policy.insert([number], [1], [1.0])
        assert policy.evict(set(range(20))) is None
        assert {policy.evict() for _ in range(20)} == set(range(20))

    def test_everything_evicted_comes_back(self, name: str) -> None:
        """Ghosts that are stored again are blocks like others."""
        policy = make_policy(name, 3)
        for _ in range(50):
            policy.insert("abc", [1] * 3, [1.0] * 3)
            assert [policy.evict() for _ in range(4)] == ["c", "b", "a", None]
        policy.check_integrity()


@settings(max_examples=200, deadline=None)
@given(requests=st.lists(paths, max_size=100), capacity=st.integers(1, 100))
def test_lru_is_the_naive_one(requests: list[list[int]], capacity: int) -> None:
    tier = Tier("lru", capacity)
    naive: OrderedDict[tuple[int, ...], None] = OrderedDict()
    for path in requests:
        tier.request(path)
        for key in reversed(chain_of(path)):
            naive.pop(key, None)
            naive[key] = None
        while sum(map(size_of, naive)) > capacity:
            naive.popitem(last=False)
        assert tier.stored == set(naive)


def test_gdsf_counts_uses() -> None:
    policy = make_policy("gdsf", 3)
    for key in "aabc":
        policy.insert([key], [1], [1.0])
        policy.hit([key])
    policy.hit("a")
    assert policy.evict() == "b"
    assert policy.evict() == "c"


def test_unknown_policy() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'prospect'"):
        make_policy("prospct", 10)
    assert DEFAULT in POLICIES
