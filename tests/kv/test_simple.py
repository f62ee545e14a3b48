"""SimpleKVCache: what is cached comes back, within its bounds, and nothing else does."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rich.console import Console

import rekindle
from rekindle import InvalidRequest, SimpleKVCache

UNIT = 128  # bytes of K and V of `pair` together
MIB = 1 << 20


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pair(value: int = 0, units: int = 1) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """K and V that can be told apart, of `units` × UNIT bytes together."""
    k = np.full((16 * units,), value, np.float32)
    return k, k + 0.5


def cache_of(units: float, **options: Any) -> SimpleKVCache:
    return SimpleKVCache(units * UNIT / (1 << 30), **options)


def num_units(cache: SimpleKVCache) -> float:
    return cache.get_stats()["size_mb"] * MIB / UNIT


def same(found: Any, value: int, units: int = 1) -> bool:
    return found is not None and all(np.array_equal(a, b) for a, b in zip(found, pair(value, units), strict=True))


# A naive model


@dataclass
class Kept:
    value: int
    units: int
    ttl: float
    due: float
    used: int
    cost: float


@dataclass
class Naive:
    """The same rules without any index: everything is looked for."""

    max_units: int
    idle: bool
    entries: dict[tuple[Any, int], Kept] = field(default_factory=dict)
    renewed: dict[Any, int] = field(default_factory=dict)  # prefix -> when it was last renewed
    lost: set[tuple[Any, int]] = field(default_factory=set)
    ticks: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    saved: float = 0.0

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    @property
    def units(self) -> int:
        return sum(kept.units for kept in self.entries.values())

    def layers(self, prefix: Any) -> list[int]:
        return sorted(layer for name, layer in self.entries if name == prefix)

    def remove(self, prefix: Any, layer: int) -> None:
        del self.entries[prefix, layer]
        self.lost.add((prefix, layer))
        if not self.layers(prefix):
            self.lost = {each for each in self.lost if each[0] != prefix}

    def expire(self, now: float) -> None:
        for prefix, layer in [key for key, kept in self.entries.items() if kept.due <= now]:
            self.remove(prefix, layer)

    def put(self, prefix: Any, kv: dict[int, tuple[int, int]], ttl: float, cost: float, now: float) -> bool:
        if sum(units for _, units in kv.values()) > self.max_units:
            return False
        for layer, (value, units) in kv.items():
            self.entries[prefix, layer] = Kept(value, units, ttl, now + ttl, self.tick(), cost / len(kv))
            self.lost.discard((prefix, layer))
        self.renewed[prefix] = self.tick()
        while self.units > self.max_units:
            oldest = min({name for name, _ in self.entries}, key=lambda name: self.renewed[name])
            self.remove(oldest, min(self.layers(oldest), key=lambda layer: self.entries[oldest, layer].used))
            self.evictions += 1
        return True

    def get(self, prefix: Any, layers: range, now: float) -> list[Kept] | None:
        if any((prefix, layer) not in self.entries for layer in layers):
            self.misses += 1
            return None
        self.hits += 1
        for layer in layers:
            kept = self.entries[prefix, layer]
            kept.used = self.tick()
            kept.due = now + kept.ttl if self.idle else kept.due
            self.saved += kept.cost
        if not any(name == prefix for name, _ in self.lost):
            self.renewed[prefix] = self.tick()
        return [self.entries[prefix, layer] for layer in layers]


PREFIXES: list[Any] = ["1", "12", "1 2", (1,), (2,), (12,), (1, 2), (1, 2, 3), (1, 2, 3, 4, 5)]
prefixes = st.sampled_from(PREFIXES)
layers = st.integers(0, 3)
ttls = st.sampled_from([None, None, 3.0, 20.0, math.inf])
costs = st.sampled_from([None, 0.0, 1.0, 6.0])


class AgainstTheModel(RuleBasedStateMachine):
    """Random calls give what the naive model gives: values, order of eviction, expiry, bytes and every count."""

    @initialize(max_units=st.integers(1, 12), idle=st.booleans())
    def start(self, max_units: int, idle: bool) -> None:
        self.clock = Clock()
        kind: Any = "idle" if idle else "absolute"
        self.cache = cache_of(max_units, ttl_seconds=10, ttl_kind=kind, clock=self.clock)
        self.model = Naive(max_units, idle)
        self.values = 0

    def _new(self, units: int) -> tuple[int, int]:
        self.values += 1
        return self.values, units

    @rule(prefix=prefixes, layer=layers, units=st.integers(0, 4), ttl=ttls, cost=costs)
    def put_one(self, prefix: Any, layer: int, units: int, ttl: float | None, cost: float | None) -> None:
        self.model.expire(self.clock.now)
        value, units = self._new(units)
        did = self.cache.cache_kv(prefix, layer, *pair(value, units), ttl, compute_seconds=cost)
        assert did is self.model.put(prefix, {layer: (value, units)}, ttl or 10, cost or 0, self.clock.now)

    @rule(prefix=prefixes, units=st.dictionaries(layers, st.integers(1, 3), min_size=1), ttl=ttls, cost=costs)
    def put_all(self, prefix: Any, units: dict[int, int], ttl: float | None, cost: float | None) -> None:
        self.model.expire(self.clock.now)
        kv = {layer: self._new(count) for layer, count in units.items()}
        arrays = {layer: pair(*each) for layer, each in kv.items()}
        did = self.cache.cache_all_layers(prefix, arrays, ttl, compute_seconds=cost)
        assert did is self.model.put(prefix, kv, ttl or 10, cost or 0, self.clock.now)

    @rule(prefix=prefixes, layer=layers)
    def get_one(self, prefix: Any, layer: int) -> None:
        self.model.expire(self.clock.now)
        found = self.cache.get_cached_kv(prefix, layer)
        expected = self.model.get(prefix, range(layer, layer + 1), self.clock.now)
        assert found is None if expected is None else same(found, expected[0].value, expected[0].units)

    @rule(prefix=prefixes, num_layers=st.integers(1, 4))
    def get_all(self, prefix: Any, num_layers: int) -> None:
        self.model.expire(self.clock.now)
        found = self.cache.get_all_layers(prefix, num_layers)
        expected = self.model.get(prefix, range(num_layers), self.clock.now)
        if expected is None:
            assert found is None
        else:
            assert found is not None and list(found) == list(range(num_layers))
            assert all(same(found[layer], kept.value, kept.units) for layer, kept in enumerate(expected))

    @rule(
        tokens=st.sampled_from([(1,), (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (3,)]),
        least=st.sampled_from([None, 1, 2, 4]),
    )
    def find_longest(self, tokens: tuple[int, ...], least: int | None) -> None:
        self.model.expire(self.clock.now)
        expected: list[int] = []
        for length in range(1, len(tokens) + 1):
            known = self.model.layers(tokens[:length])
            broken = any(name == tokens[:length] for name, _ in self.model.lost)
            if known and not broken if least is None else set(range(least)) <= set(known):
                expected = list(tokens[:length])
        assert self.cache.longest_prefix(tokens, num_layers=least) == expected

    @rule(prefix=prefixes, layer=st.none() | layers)
    def evict(self, prefix: Any, layer: int | None) -> None:
        self.model.expire(self.clock.now)
        there = [each for each in self.model.layers(prefix) if layer is None or each == layer]
        assert self.cache.evict(prefix, layer) is bool(there)
        for each in there:
            self.model.remove(prefix, each)

    @precondition(lambda self: self.values % 7 == 6)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.entries.clear()
        self.model.lost.clear()

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.model.expire(self.clock.now)
        stats, model = self.cache.get_stats(), self.model
        assert (stats["hits"], stats["misses"], stats["evictions"]) == (model.hits, model.misses, model.evictions)
        assert stats["size_mb"] * MIB == model.units * UNIT
        assert stats["time_saved_seconds"] == pytest.approx(model.saved)
        for prefix in PREFIXES:
            assert self.cache.cached_layers(prefix) == model.layers(prefix), prefix
        self.cache.check_integrity()


TestAgainstTheModel = AgainstTheModel.TestCase
TestAgainstTheModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# Keys


def test_a_string_and_token_ids_never_meet() -> None:
    cache = SimpleKVCache()
    names: list[Any] = [
        "12",
        "1",
        "[1, 2]",
        "\x01",
        "\x01" + "\0" * 7,
        [1, 2],
        [12],
        [1],
        [2, 1],
        [1, 2, 0],
        [1 << 32],
        [1, 0],
    ]
    for value, name in enumerate(names):
        assert cache.cache_kv(name, 0, *pair(value))
    assert all(same(cache.get_cached_kv(name, 0), value) for value, name in enumerate(names))


def test_all_forms_of_the_same_ids_are_the_same_prefix() -> None:
    cache = SimpleKVCache()
    cache.cache_kv([1, 2, 3], 0, *pair(7))
    forms: list[Any] = [
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], np.int32),
        np.array([[1, 2, 3]], np.uint8),
        np.array([1, 9, 2, 9, 3])[::2],
    ]
    assert all(same(cache.get_cached_kv(form, 0), 7) for form in forms)
    assert all(cache.longest_prefix(form) == [1, 2, 3] for form in forms)


def test_torch_ids_as_a_tokenizer_gives_them() -> None:
    torch = pytest.importorskip("torch")
    cache = SimpleKVCache()
    cache.cache_kv([1, 2, 3], 0, *pair(7))
    assert same(cache.get_cached_kv(torch.tensor([[1, 2, 3]]), 0), 7)
    assert cache.longest_prefix(torch.tensor([[1, 2, 3, 4]])) == [1, 2, 3]
    with pytest.raises(InvalidRequest, match="expected token ids"):
        cache.get_cached_kv(torch.tensor([1.0], dtype=torch.bfloat16), 0)


def test_any_text_is_a_prefix() -> None:
    cache = SimpleKVCache()
    for value, text in enumerate(["é", "\ud800", " ", "text:", "tokens:", "e" * 100_000]):
        cache.cache_kv(text, 0, *pair(value))
        assert same(cache.get_cached_kv(text, 0), value)


def test_the_longest_of_several_beginnings() -> None:
    cache = SimpleKVCache()
    tokens = list(range(100, 200))
    for length in (10, 50, 90):
        cache.cache_all_layers(tokens[:length], {0: pair(length), 1: pair(length)})
    cache.cache_kv([*tokens[:60], 7], 0, *pair())  # goes another way
    cache.cache_kv("100", 0, *pair())
    assert len(cache.longest_prefix(tokens)) == 90
    assert len(cache.longest_prefix(tokens[:90])) == 90
    assert len(cache.longest_prefix(tokens[:89])) == 50
    assert cache.longest_prefix([*tokens[:60], 7, 8], num_layers=1) == [*tokens[:60], 7]
    assert len(cache.longest_prefix([*tokens[:60], 7, 8], num_layers=2)) == 50
    assert cache.longest_prefix(tokens[:9]) == []
    assert cache.longest_prefix(tokens, num_layers=3) == []
    cache.evict(tokens[:90], 1)  # its layer 0 is no use any more
    assert len(cache.longest_prefix(tokens)) == 50
    assert cache.get_stats()["total_requests"] == 0


# Tensors


def test_nothing_is_shared_with_the_caller() -> None:
    cache = SimpleKVCache()
    k, v = pair(3)
    cache.cache_kv("p", 0, k, v)
    k[:] = -1
    first = cache.get_cached_kv("p", 0)
    assert same(first, 3)
    assert first is not None
    first[0][:] = -1
    first[1][:] = -1
    assert same(cache.get_cached_kv("p", 0), 3)


def test_torch_tensors_are_not_shared_either() -> None:
    torch = pytest.importorskip("torch")
    cache = SimpleKVCache()
    k, v = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
    cache.cache_all_layers("p", {0: (k, v)})
    with torch.no_grad():
        k.zero_()
    found = cache.get_all_layers("p", 1)
    assert found is not None
    assert found[0][0].sum() == 6 and not found[0][0].requires_grad
    found[0][0].zero_()
    again = cache.get_all_layers("p", 1)
    assert again is not None and again[0][0].sum() == 6


def test_what_was_made_in_inference_mode_can_be_used_outside() -> None:
    torch = pytest.importorskip("torch")
    cache = SimpleKVCache()
    with torch.inference_mode():
        cache.cache_kv("p", 0, torch.ones(2), torch.ones(2))
    found = cache.get_cached_kv("p", 0)
    assert found is not None
    found[0].add_(1)
    assert not found[0].is_inference()


def test_each_tensor_comes_back_as_it_went_in() -> None:
    torch = pytest.importorskip("torch")
    cache = SimpleKVCache()
    shaped = np.arange(6, dtype=np.float16).reshape(1, 2, 3)
    cases: list[Any] = [
        shaped,
        np.array(2.5),
        np.zeros((0, 4), np.int8),
        np.ones(3, ">f4"),
        *(
            torch.arange(6).reshape(2, 3).to(dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn)
        ),
        torch.zeros(0),
        torch.tensor(1.5),
        torch.nn.Parameter(torch.ones(2)),
    ]
    for number, one in enumerate(cases):
        other = cases[number - 1]
        assert cache.cache_kv("p", number, one, other)
        found = cache.get_cached_kv("p", number)
        assert found is not None
        for got, given in zip(found, (one, other), strict=True):
            assert isinstance(got, torch.Tensor) is isinstance(given, torch.Tensor)
            assert (got.dtype, tuple(got.shape)) == (given.dtype, tuple(given.shape))
            as_bytes = [
                t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                if isinstance(t, torch.Tensor)
                else t.tobytes()
                for t in (got, given)
            ]
            assert as_bytes[0] == as_bytes[1]
    cache.check_integrity()


def test_a_view_is_kept_without_its_base() -> None:
    torch = pytest.importorskip("torch")
    cache = SimpleKVCache()
    big = torch.arange(1_000_000.0).reshape(1000, 1000)
    large = np.arange(1_000_000.0).reshape(1000, 1000)
    storage = weakref.ref(large)
    views = (big[::500, 3:5], large.T[3:5, ::500])
    expected = [views[0].clone(), views[1].copy()]
    cache.cache_kv("p", 0, *views)
    wide = torch.ones(1, 4).expand(100, 4)  # 16 bytes that look like 1,600
    cache.cache_kv("p", 1, wide, np.broadcast_to(np.float32(2), (10, 10)))
    assert cache.get_stats()["size_mb"] * MIB == 4 * 4 + 4 * 8 + 1600 + 400
    del large, views
    assert storage() is None
    found = cache.get_cached_kv("p", 0)
    assert found is not None
    assert torch.equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert found[0].untyped_storage().nbytes() == 16 and found[1].base is None
    cache.cache_kv("p", 2, big[:4, :4].T, big.T)
    found = cache.get_cached_kv("p", 2)
    assert found is not None and torch.equal(found[1], big.T) and found[0].is_contiguous() and found[1].is_contiguous()
    found = cache.get_cached_kv("p", 1)
    assert found is not None and torch.equal(found[0], wide) and found[0].untyped_storage().nbytes() == 1600


def test_shapes_of_k_and_v_may_differ() -> None:
    cache = SimpleKVCache()
    cache.cache_kv("p", 0, np.ones((1, 2, 3)), np.ones((4,), np.float16))
    found = cache.get_cached_kv("p", 0)
    assert found is not None
    assert (found[0].shape, found[1].shape) == ((1, 2, 3), (4,))


@pytest.mark.gpu
def test_cuda_tensors_are_kept_on_the_cpu_and_given_on_the_device() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cache = SimpleKVCache(device="cuda")
    k = torch.arange(8.0, device="cuda")
    before = torch.cuda.memory_allocated()
    cache.cache_kv("p", 0, k[::2], np.ones(2))
    assert torch.cuda.memory_allocated() == before
    found = cache.get_cached_kv("p", 0)
    assert found is not None
    assert found[0].is_cuda and found[0].tolist() == [0, 2, 4, 6]
    assert isinstance(found[1], np.ndarray)


def test_torch_is_not_imported_for_arrays() -> None:
    program = (
        "import sys; from rekindle import SimpleKVCache; import numpy as np; c = SimpleKVCache()\n"
        "c.cache_kv([1], 0, np.ones(2), np.ones(2)); c.get_all_layers([1], 1); c.longest_prefix([1, 2]); c.get_stats()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_the_name_is_public() -> None:
    assert "SimpleKVCache" in rekindle.__all__
    assert rekindle.SimpleKVCache is SimpleKVCache


# Size


def test_what_is_larger_than_the_cache_is_refused_and_changes_nothing() -> None:
    cache = cache_of(4)
    assert cache.cache_all_layers("p", {0: pair(1), 1: pair(2)})
    assert not cache.cache_kv("p", 0, *pair(3, units=5))
    assert not cache.cache_all_layers("q", {layer: pair(4) for layer in range(5)})
    assert same(cache.get_cached_kv("p", 0), 1) and same(cache.get_cached_kv("p", 1), 2)
    assert num_units(cache) == 2 and cache.get_stats()["evictions"] == 0
    assert cache.cache_kv("q", 0, *pair(5, units=4))  # exactly as large: it may have all the room
    assert cache.cached_layers("p") == [] and cache.get_stats()["size_percent"] == 100


def test_overwriting_counts_the_difference() -> None:
    cache = cache_of(10)
    for units, expected in ((1, 1), (4, 4), (2, 2), (10, 10), (3, 3)):
        assert cache.cache_kv("p", 0, *pair(units, units))
        assert num_units(cache) == expected
        assert same(cache.get_cached_kv("p", 0), units, units)
    assert cache.get_stats()["evictions"] == 0
    cache.check_integrity()


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = cache_of(3)
    for name in "abc":
        cache.cache_kv(name, 0, *pair())
    cache.get_cached_kv("a", 0)
    cache.cache_kv("d", 0, *pair())
    assert [bool(cache.cached_layers(name)) for name in "abcd"] == [True, False, True, True]
    assert cache.get_stats()["evictions"] == 1


def test_of_one_prefix_the_least_recently_used_layer_goes_first() -> None:
    cache = cache_of(3)
    for layer in range(3):
        cache.cache_kv("p", layer, *pair(layer))
    cache.get_cached_kv("p", 0)
    cache.cache_kv("p", 3, *pair(3))
    assert cache.cached_layers("p") == [0, 2, 3]


def test_a_broken_prefix_is_used_up_before_another_is_broken() -> None:
    """Reading what is left of it does not save it: no forward pass can go on from some of the layers."""
    cache = cache_of(8)
    whole = {layer: pair(layer) for layer in range(4)}
    cache.cache_all_layers("a", whole)
    cache.cache_all_layers("b", whole)
    cache.cache_kv("c", 0, *pair())
    assert cache.cached_layers("a") == [1, 2, 3]
    assert cache.get_all_layers("a", 4) is None  # a part is a miss
    assert cache.get_cached_kv("a", 3) is not None
    for layer in range(1, 4):
        cache.cache_kv("c", layer, *pair())
    assert cache.cached_layers("a") == []
    assert cache.get_all_layers("b", 4) is not None and cache.get_all_layers("c", 4) is not None


def test_a_prefix_that_was_made_whole_again_is_as_good_as_any() -> None:
    cache = cache_of(5)
    cache.cache_all_layers("a", {0: pair(), 1: pair()})
    cache.cache_all_layers("b", {0: pair(), 1: pair()})
    cache.cache_kv("c", 0, *pair())
    cache.cache_kv("d", 0, *pair())  # a loses layer 0
    assert cache.cached_layers("a") == [1]
    cache.evict("d")
    cache.cache_kv("a", 0, *pair())
    cache.cache_kv("d", 0, *pair())  # b is the oldest now
    assert (cache.cached_layers("a"), cache.cached_layers("b")) == ([0, 1], [1])
    assert cache.get_all_layers("a", 2) is not None


def test_a_layer_is_added_beside_what_is_there() -> None:
    cache = SimpleKVCache()
    cache.cache_all_layers("p", {0: pair(1), 1: pair(2)})
    cache.cache_all_layers("p", {1: pair(3), 2: pair(4)})
    found = cache.get_all_layers("p", 3)
    assert found is not None
    assert [same(found[layer], value) for layer, value in enumerate((1, 3, 4))] == [True] * 3
    assert cache.get_all_layers("p") is None  # 32 unless told otherwise


def test_evict_tells_whether_something_was_there() -> None:
    cache = SimpleKVCache()
    cache.cache_all_layers([1, 2], {0: pair(), 1: pair()})
    assert cache.evict([1, 2], 1) and not cache.evict([1, 2], 1)
    assert cache.evict([1, 2]) and not cache.evict([1, 2]) and not cache.evict("1")
    stats = cache.get_stats()
    assert (stats["size_mb"], stats["evictions"]) == (0, 0)
    assert cache.longest_prefix([1, 2]) == []


def test_clear_empties_and_goes_on_counting() -> None:
    cache = SimpleKVCache()
    cache.cache_kv("p", 0, *pair())
    cache.get_cached_kv("p", 0)
    cache.clear()
    assert cache.get_cached_kv("p", 0) is None
    stats = cache.get_stats()
    assert (stats["size_mb"], stats["hits"], stats["misses"]) == (0, 1, 1)
    cache.check_integrity()


# Time


def test_idle_time_counts_from_the_last_use() -> None:
    clock = Clock()
    cache = SimpleKVCache(ttl_seconds=10, clock=clock)
    cache.cache_all_layers("p", {0: pair(), 1: pair()})
    for _ in range(5):
        clock.now += 9.5
        assert cache.get_all_layers("p", 2) is not None
    clock.now += 9.5
    assert cache.cached_layers("p") == [0, 1]  # to ask is not to use
    assert cache.get_cached_kv("p", 0) is not None
    clock.now += 0.5
    assert cache.cached_layers("p") == [0]  # layer 1 was not used
    clock.now += 9.5
    assert cache.get_cached_kv("p", 0) is None
    assert cache.get_stats()["size_mb"] == 0 and cache.get_stats()["evictions"] == 0


def test_absolute_time_counts_from_storing() -> None:
    clock = Clock()
    cache = SimpleKVCache(ttl_seconds=10, ttl_kind="absolute", clock=clock)
    cache.cache_kv("p", 0, *pair())
    clock.now = 9.9
    assert cache.get_cached_kv("p", 0) is not None
    clock.now = 10
    assert cache.get_cached_kv("p", 0) is None
    cache.cache_kv("p", 0, *pair())
    clock.now = 15
    cache.cache_kv("p", 0, *pair())  # stored anew
    clock.now = 24.9
    assert cache.get_cached_kv("p", 0) is not None


def test_an_entry_may_have_a_life_of_its_own() -> None:
    clock = Clock()
    cache = SimpleKVCache(ttl_seconds=10, clock=clock)
    cache.cache_kv("short", 0, *pair(), 1)
    cache.cache_kv("usual", 0, *pair())
    cache.cache_kv("long", 0, *pair(), ttl_seconds=1e6)
    cache.cache_kv("ever", 0, *pair(), math.inf)
    for now, there in ((0.9, 4), (1, 3), (10, 2), (1e6, 1), (1e12, 1)):
        clock.now = now
        assert sum(bool(cache.cached_layers(name)) for name in ("short", "usual", "long", "ever")) == there


def test_without_a_time_to_live_nothing_expires() -> None:
    clock = Clock()
    cache = SimpleKVCache(ttl_seconds=None, clock=clock)
    cache.cache_kv("p", 0, *pair())
    clock.now = 1e15
    assert cache.get_cached_kv("p", 0) is not None


def test_the_expired_make_room_before_the_living() -> None:
    clock = Clock()
    cache = cache_of(2, clock=clock)
    cache.cache_kv("old", 0, *pair())
    cache.cache_kv("short", 0, *pair(), 1)
    clock.now = 1
    cache.cache_kv("new", 0, *pair())
    assert cache.cached_layers("old") == [0] and cache.get_stats()["evictions"] == 0


def test_much_overwriting_leaves_nothing_behind() -> None:
    """Alarms of replaced entries are dropped long before they are due (check_integrity counts them)."""
    cache = cache_of(4)
    for value in range(2000):
        cache.cache_kv(str(value % 7), value % 3, *pair(value))
        cache.check_integrity()


# Counting


def test_get_all_layers_is_one_request() -> None:
    cache = SimpleKVCache()
    cache.cache_all_layers("p", {layer: pair() for layer in range(8)})
    assert cache.get_all_layers("p", 8) is not None
    assert cache.get_all_layers("p", 9) is None
    assert cache.get_all_layers("q", 8) is None
    assert cache.get_cached_kv("p", 7) is not None
    stats = cache.get_stats()
    assert (stats["hits"], stats["misses"], stats["total_requests"], stats["hit_rate_percent"]) == (2, 2, 4, 50)


def test_the_stats_have_just_these_keys() -> None:
    stats = SimpleKVCache(max_size_gb=2).get_stats()
    assert list(stats) == [
        "hits", "misses", "evictions", "hit_rate_percent", "total_requests", "size_mb", "max_size_mb", "size_percent",
        "time_saved_seconds",
    ]  # fmt: skip
    assert stats["max_size_mb"] == 2048
    assert all(value == 0 for key, value in stats.items() if key != "max_size_mb")


def test_time_saved_by_argument() -> None:
    cache = SimpleKVCache()
    cache.cache_all_layers("all", {0: pair(), 1: pair()}, compute_seconds=3)
    cache.cache_kv("one", 0, *pair(), compute_seconds=0.25)
    cache.cache_kv("unknown", 0, *pair())
    saved = []
    for find in (
        lambda: cache.get_all_layers("all", 2),
        lambda: cache.get_cached_kv("all", 1),
        lambda: cache.get_cached_kv("one", 0),
        lambda: cache.get_cached_kv("unknown", 0),
        lambda: cache.get_cached_kv("missing", 0),
    ):
        find()
        saved.append(cache.get_stats()["time_saved_seconds"])
    assert saved == [3, 4.5, 4.75, 4.75, 4.75]


def saved_by(cache: SimpleKVCache, prefix: str) -> float:
    before = cache.get_stats()["time_saved_seconds"]
    assert cache.get_cached_kv(prefix, 0) is not None
    return cache.get_stats()["time_saved_seconds"] - before


def test_time_saved_by_measuring() -> None:
    clock = Clock()
    cache = SimpleKVCache(clock=clock)
    with cache.timed_miss():
        clock.now += 4
        cache.cache_kv("inside", 0, *pair())
        cache.cache_kv("inside too", 0, *pair())
        cache.cache_kv("told", 0, *pair(), compute_seconds=9)
    with cache.timed_miss():
        clock.now += 3
    cache.cache_kv("after", 0, *pair())
    cache.cache_kv("unknown", 0, *pair())
    names = ("inside", "inside too", "told", "after", "unknown")
    assert [saved_by(cache, name) for name in names] == [2, 2, 9, 3, 0]
    assert cache.get_stats()["time_saved_seconds"] == 16


def test_nested_and_failed_measurements() -> None:
    clock = Clock()
    cache, other = SimpleKVCache(clock=clock), SimpleKVCache(clock=clock)
    with cache.timed_miss():
        with cache.timed_miss():
            clock.now += 1
            cache.cache_kv("inner", 0, *pair())
        with cache.timed_miss():
            clock.now += 2
        cache.cache_kv("second", 0, *pair())
        other.cache_kv("p", 0, *pair())
        cache.cache_kv("outer", 0, *pair())
    with pytest.raises(ValueError, match="no"), cache.timed_miss():
        clock.now += 50
        raise ValueError("no")
    cache.cache_kv("unknown", 0, *pair())
    assert [saved_by(cache, name) for name in ("inner", "second", "outer", "unknown")] == [1, 2, 3, 0]
    assert saved_by(other, "p") == 0


def test_a_measurement_without_storing_is_forgotten_at_the_next() -> None:
    clock = Clock()
    cache = SimpleKVCache(clock=clock)
    for _ in range(3):
        with cache.timed_miss():
            clock.now += 100
    with cache.timed_miss():
        clock.now += 1
        cache.cache_kv("inside", 0, *pair())
    cache.cache_kv("later", 0, *pair())
    assert (saved_by(cache, "inside"), saved_by(cache, "later")) == (1, 0)


def test_stats_are_written_where_one_asks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clock = Clock()
    cache = SimpleKVCache(max_size_gb=1, clock=clock)
    cache.cache_kv("p", 0, *pair(units=8192), compute_seconds=1.5)
    cache.get_cached_kv("p", 0)
    cache.get_cached_kv("q", 0)
    text = io.StringIO()
    cache.print_stats(text)
    cache.print_stats(Console(file=text))
    assert capsys.readouterr().out == ""
    for words in ("1 (50.0 %)", "1.0 of 1,024.0 MB (0.1 %)", "1.50 s"):
        assert text.getvalue().count(words) == 2
    cache.print_stats()
    assert "time saved" in capsys.readouterr().out


# Bad arguments

BAD: list[tuple[str, Callable[[SimpleKVCache], object]]] = [
    ("empty string", lambda cache: cache.cache_kv("", 0, *pair())),
    ("at least one token", lambda cache: cache.cache_kv([], 0, *pair())),
    ("at least one token", lambda cache: cache.longest_prefix(np.zeros(0, np.int64))),
    ("token ids", lambda cache: cache.cache_kv([0.5], 0, *pair())),  # type: ignore[list-item]
    ("token ids", lambda cache: cache.cache_kv(["a"], 0, *pair())),  # type: ignore[list-item]
    ("token ids", lambda cache: cache.cache_kv(b"abc", 0, *pair())),
    ("token ids", lambda cache: cache.cache_kv(None, 0, *pair())),  # type: ignore[arg-type]
    ("token ids", lambda cache: cache.cache_kv(5, 0, *pair())),  # type: ignore[arg-type]
    ("token ids", lambda cache: cache.cache_kv({1, 2}, 0, *pair())),  # type: ignore[arg-type]
    ("token ids", lambda cache: cache.cache_kv([1, None], 0, *pair())),  # type: ignore[list-item]
    ("token ids", lambda cache: cache.cache_kv([[1], [2]], 0, *pair())),  # type: ignore[list-item]
    ("token ids", lambda cache: cache.cache_kv([[1], [2, 3]], 0, *pair())),  # type: ignore[list-item]
    ("token ids", lambda cache: cache.cache_kv([1 << 63], 0, *pair())),
    ("token ids", lambda cache: cache.cache_kv([1 << 70], 0, *pair())),
    ("token ids", lambda cache: cache.longest_prefix("abc")),  # type: ignore[arg-type]
    ("layer", lambda cache: cache.cache_kv("p", -1, *pair())),
    ("layer", lambda cache: cache.get_cached_kv("p", 1.0)),  # type: ignore[arg-type]
    ("layer", lambda cache: cache.get_cached_kv("p", True)),
    ("layer", lambda cache: cache.evict("p", -2)),
    ("num_layers", lambda cache: cache.get_all_layers("p", 0)),
    ("num_layers", lambda cache: cache.longest_prefix([1], num_layers=0)),
    ("k_tensor", lambda cache: cache.cache_kv("p", 0, [1.0], np.ones(1))),  # type: ignore[arg-type]
    ("v_tensor", lambda cache: cache.cache_kv("p", 0, np.ones(1), None)),  # type: ignore[arg-type]
    ("Python objects", lambda cache: cache.cache_kv("p", 0, np.array([None]), np.ones(1))),
    (r"\{layer", lambda cache: cache.cache_all_layers("p", {})),
    (r"\{layer", lambda cache: cache.cache_all_layers("p", [pair()])),  # type: ignore[arg-type]
    (r"\(k, v\)", lambda cache: cache.cache_all_layers("p", {0: np.ones((2, 3))})),  # type: ignore[dict-item]
    (r"\(k, v\)", lambda cache: cache.cache_all_layers("p", {0: (*pair(), 1)})),  # type: ignore[dict-item]
    ("layer", lambda cache: cache.cache_all_layers("p", {"0": pair()})),  # type: ignore[dict-item]
    *(
        ("ttl_seconds", lambda cache, ttl=ttl: cache.cache_kv("p", 0, *pair(), ttl))
        for ttl in (math.nan, 0, -1, "1", True, 10**400)
    ),
    *(
        ("compute_seconds", lambda cache, cost=cost: cache.cache_kv("p", 0, *pair(), compute_seconds=cost))
        for cost in (math.nan, -1, math.inf, "1")
    ),
    *(("max_size_gb", lambda cache, size=size: SimpleKVCache(size)) for size in (0, -1, math.nan, math.inf, "1", None)),
    *(("ttl_seconds", lambda cache, ttl=ttl: SimpleKVCache(ttl_seconds=ttl)) for ttl in (math.nan, 0, -5, "x")),
    ("ttl_kind", lambda cache: SimpleKVCache(ttl_kind="sliding")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("words", "call"), BAD, ids=range(len(BAD)))
def test_what_has_no_meaning_is_refused_with_words(words: str, call: Callable[[SimpleKVCache], object]) -> None:
    cache = SimpleKVCache()
    with pytest.raises(InvalidRequest, match=rf"expected.*{words}"):
        call(cache)
    assert cache.get_stats()["size_mb"] == 0 and cache.get_stats()["total_requests"] == 0


def test_torch_tensors_without_values_are_refused() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(InvalidRequest, match="expected k_tensor to be a dense tensor with values"):
            SimpleKVCache().cache_kv("p", 0, tensor, np.ones(1))


def test_a_device_that_is_not_there_is_refused() -> None:
    torch = pytest.importorskip("torch")
    assert SimpleKVCache(device=torch.device("cpu")).device == "cpu"
    devices: list[Any] = ["nonsense", "meta", 3, None, "cuda:99"]
    for device in devices:
        with pytest.raises(InvalidRequest, match="device"):
            SimpleKVCache(device=device)


def test_a_device_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'rekindle\[torch\]'"):
        SimpleKVCache(device="cuda")
    assert SimpleKVCache().cache_kv("p", 0, *pair())


# Threads


def test_many_threads_see_only_whole_entries() -> None:
    """Eight threads store, find and evict on a small cache: every K belongs to its V, and the counts add up at the end."""
    cache = cache_of(20)
    rounds, num_threads = 300, 8
    failures: list[BaseException] = []
    found = [0] * num_threads
    barrier = threading.Barrier(num_threads)

    def work(number: int) -> None:
        try:
            barrier.wait(timeout=30)
            for step in range(rounds):
                prefix = [1, 2, (number + step) % 5]
                value = number * rounds + step
                cache.cache_all_layers(prefix, {layer: pair(value, 1 + step % 2) for layer in range(3)})
                one = cache.get_cached_kv(prefix, step % 3)
                found[number] += one is not None
                assert one is None or np.array_equal(one[0] + 0.5, one[1])
                every = cache.get_all_layers(prefix, 3)
                found[number] += every is not None
                assert every is None or len({len(k) for k, _ in every.values()}) == 1
                assert len(cache.longest_prefix([*prefix, 9])) in (0, 3)
                if step % 10 == number:
                    cache.evict(prefix, step % 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures
    stats = cache.get_stats()
    assert stats["total_requests"] == 2 * rounds * num_threads
    assert stats["hits"] == sum(found)
    assert stats["size_percent"] <= 100
    cache.check_integrity()


def test_a_measurement_belongs_to_its_thread() -> None:
    clock = Clock()
    cache = SimpleKVCache(clock=clock)
    with cache.timed_miss():
        clock.now += 2
        thread = threading.Thread(target=lambda: cache.cache_kv("other", 0, *pair()))
        thread.start()
        thread.join(timeout=30)
        cache.cache_kv("mine", 0, *pair())
    assert (saved_by(cache, "mine"), saved_by(cache, "other")) == (2, 0)
