"""Pins: what is pinned stays in memory, comes to stay when it arrives later, and no more than may be pinned ever is."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kv.samples import Clock

from rekindle.errors import InvalidRequest
from rekindle.kv.pins import MAX_SECONDS
from rekindle.kv.store import Store
from rekindle.tokens import Tokens, as_tokens

SIZE = 4
PAYLOAD = 1000
LOGITS = np.arange(8, dtype=np.float32)
PROMPT = as_tokens(range(14))
ONE = 400 + PAYLOAD + 4 * SIZE  # bytes of a whole block


def put(store: Store, tokens: Tokens, salt: bytes = b"") -> None:
    """All blocks of a prompt and its tail."""
    end = len(tokens) - len(tokens) % SIZE
    payloads = {start: memoryview(bytes(PAYLOAD)) for start in range(0, end, SIZE)}
    tail = (len(tokens), memoryview(bytes(PAYLOAD // SIZE * (len(tokens) - end))), LOGITS)
    store.put(tokens, payloads, salt=salt, tails=[tail])


def flood(store: Store, salt: bytes = b"") -> None:
    """Prompts that would fill the store several times."""
    for number in range(30):
        put(store, as_tokens([1000 + number] * 3 * SIZE), salt)
        store.check_integrity()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Store:
    return Store(b"f" * 16, max_bytes=10 * ONE, block_tokens=SIZE, bytes_per_token=PAYLOAD // SIZE, wall_clock=clock)


def test_a_pinned_prompt_stays(store: Store) -> None:
    put(store, PROMPT)
    pin = store.pin(PROMPT, ttl_seconds=60)
    flood(store)
    match = store.match(PROMPT)
    assert match.length == 14 and match.logits is not None
    assert (pin.num_tokens, pin.num_bytes) == (14, store.stats().pinned_bytes)
    assert pin.num_bytes == sum(block.num_bytes for block in match.blocks)


def test_what_comes_after_the_pin_stays_too(store: Store) -> None:
    pin = store.pin(PROMPT, ttl_seconds=60)
    assert pin.num_bytes == 0
    flood(store)
    put(store, PROMPT)
    flood(store)
    assert store.match(PROMPT).logits is not None
    assert store.pins()[0].num_bytes > 3 * ONE


def test_a_pin_ends_by_itself(store: Store, clock: Clock) -> None:
    put(store, PROMPT)
    pin = store.pin(PROMPT, ttl_seconds=60)
    assert (pin.expires_at, pin.expires_in) == (clock.now + 60, 60)
    clock.now += 59
    flood(store)
    assert store.match(PROMPT).length == 14
    assert [(each.id, each.expires_in) for each in store.pins()] == [(pin.id, 1)]
    clock.now += 1
    assert store.pins() == []
    assert store.stats().pins == store.stats().pinned_bytes == 0
    flood(store)
    assert store.match(PROMPT).length == 0
    assert not store.unpin(pin.id)


def test_a_pin_is_ended_once(store: Store) -> None:
    put(store, PROMPT)
    pin = store.pin(PROMPT, ttl_seconds=60)
    assert store.unpin(pin.id)
    assert not store.unpin(pin.id)
    assert not store.unpin("0123")
    flood(store)
    assert store.match(PROMPT).length == 0


def test_pinning_again_renews(store: Store, clock: Clock) -> None:
    """The later end counts, so a short renewal takes nothing away."""
    first = store.pin(PROMPT, ttl_seconds=60, name="system prompt")
    clock.now += 30
    again = store.pin(PROMPT, ttl_seconds=60)
    assert (again.id, again.name, again.expires_in) == (first.id, "system prompt", 60)
    assert store.pin(PROMPT, ttl_seconds=1, name="new").expires_in == 60
    assert [pin.name for pin in store.pins()] == ["new"]
    assert store.stats().pins == 1
    store.check_integrity()


def test_pins_that_share_a_beginning_count_it_once_and_hold_it_until_the_last_ends(store: Store) -> None:
    put(store, PROMPT)
    one, other = store.pin(PROMPT, ttl_seconds=60), store.pin(PROMPT[:8], ttl_seconds=60)
    assert one.id != other.id
    assert store.stats().pinned_bytes == one.num_bytes
    store.unpin(one.id)
    flood(store)
    assert store.match(PROMPT).length == 8
    store.unpin(other.id)
    flood(store)
    assert store.match(PROMPT).length == 0


def test_too_much_is_refused_with_sizes(store: Store) -> None:
    """Half the store may be pinned: five blocks of ten; this prompt would have six."""
    with pytest.raises(InvalidRequest, match=r"needs [78],\d{3} bytes .* at most 7,0\d\d bytes may be pinned"):
        store.pin(as_tokens(range(24)), ttl_seconds=60)
    assert store.pins() == []
    store.pin(as_tokens(range(12)), ttl_seconds=60)
    with pytest.raises(InvalidRequest):
        store.pin(as_tokens(range(50, 62)), ttl_seconds=60)
    store.pin(as_tokens(range(16)), ttl_seconds=60)  # only what is new counts
    store.check_integrity()


def test_blocks_larger_than_expected_do_not_break_the_bound(clock: Clock) -> None:
    """Nothing is known of sizes when the pin is made; what comes beyond the bound is not kept."""
    store = Store(b"f" * 16, max_bytes=10 * ONE, block_tokens=SIZE, wall_clock=clock)
    long = as_tokens(range(9 * SIZE))
    store.pin(long, ttl_seconds=60)
    put(store, long)
    store.check_integrity()
    assert 4 * ONE < store.stats().pinned_bytes <= 5 * ONE
    flood(store)
    assert 5 * SIZE <= store.match(long).length < 9 * SIZE


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), MAX_SECONDS * 2])
def test_a_time_that_is_none_is_refused(store: Store, seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="more than 0"):
        store.pin(PROMPT, ttl_seconds=seconds)


def test_nothing_cannot_be_pinned(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="nothing to pin"):
        store.pin(as_tokens([]), ttl_seconds=60)


def test_a_salt_has_pins_of_its_own(store: Store) -> None:
    put(store, PROMPT, b"ours")
    put(store, PROMPT[:8], b"theirs")
    ours = store.pin(PROMPT, salt=b"ours", ttl_seconds=60)
    assert ours.id != store.pin(PROMPT[:4], salt=b"theirs", ttl_seconds=60).id
    flood(store)
    assert store.match(PROMPT, b"ours").length == 14
    assert store.match(PROMPT, b"theirs").length == 4


def test_clearing_forgets_blocks_and_not_pins(store: Store) -> None:
    put(store, PROMPT)
    store.pin(PROMPT, ttl_seconds=60)
    store.clear()
    store.check_integrity()
    assert store.stats().pinned_bytes == 0
    put(store, PROMPT)
    flood(store)
    assert store.match(PROMPT).length == 14


def test_a_salt_may_pin_no_more_than_its_quota_of_what_may_be_pinned(clock: Clock) -> None:
    """Half of twenty blocks may be pinned, and half of that by one salt."""
    store = Store(
        b"f" * 16, max_bytes=20 * ONE, block_tokens=SIZE, bytes_per_token=PAYLOAD // SIZE, quota=0.5, wall_clock=clock
    )
    store.pin(as_tokens(range(12)), salt=b"one", ttl_seconds=60)
    with pytest.raises(InvalidRequest, match="may be pinned"):
        store.pin(as_tokens(range(50, 62)), salt=b"one", ttl_seconds=60)
    store.pin(as_tokens(range(50, 62)), salt=b"two", ttl_seconds=60)
    store.check_integrity()


def test_the_store_says_how_its_tiers_are() -> None:
    store = Store(b"f" * 16, max_bytes=10, block_tokens=SIZE, policy="lru")
    assert store.stats().states == {"memory": "ok"}
    assert store.stats().policy == "lru"
    put(store, PROMPT)
    assert store.stats().states["memory"].startswith("too small: it has 10 bytes, and a block takes up to ")
