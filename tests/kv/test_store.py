"""The store against a naive one: a plain list of everything that was ever put.

A payload here says what it is: it is made of the salt and of all tokens up to the end of its block, so KV that is served
after other tokens than its own is seen at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.kv import keys
from rekindle.kv.block import Block
from rekindle.kv.store import Match, Store
from rekindle.tokens import Tokens, as_tokens, common_length

SIZE = 4  # tokens per block
PLENTY = 1 << 30
WEIGHT = len(bytes(600))  # bytes of one test payload
SALTS = [b"", b"one", b"two"]
IDS = st.lists(st.integers(0, 2), max_size=15)


def payload_of(salt: bytes, tokens: Sequence[int]) -> memoryview:
    """The KV of the block that ends these tokens."""
    state = hashlib.blake2b(repr((salt, [int(token) for token in tokens])).encode())
    return memoryview((state.digest() * 10)[:WEIGHT])


def logits_of(salt: bytes, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    return np.frombuffer(payload_of(salt + b" logits", tokens), dtype=np.uint8)[:64].astype(np.float32)


@dataclass(frozen=True)
class Put:
    """A sequence and at which lengths its logits are known."""

    salt: bytes
    ids: list[int]
    tails: list[int]

    def into(self, store: Store, *, only_missing: bool = True) -> None:
        tokens = as_tokens(self.ids)
        starts = store.missing(tokens, self.salt) if only_missing else range(0, len(tokens) - SIZE + 1, SIZE)
        payloads = {start: payload_of(self.salt, self.ids[: start + SIZE]) for start in starts}
        store.put(tokens, payloads, salt=self.salt, tails=[self.tail(length) for length in self.tails])

    def tail(self, length: int) -> tuple[int, memoryview, npt.NDArray[np.float32]]:
        """A tail as `Store.put` takes it."""
        before = self.ids[:length]
        payload = payload_of(self.salt, before) if length % SIZE else memoryview(b"")
        return length, payload, logits_of(self.salt, before)


@dataclass
class Naive:
    """Everything ever put, searched from end to end."""

    blocks: set[tuple[bytes, tuple[int, ...]]] = field(default_factory=set)  # salt, all tokens to the block's end
    tails: set[tuple[bytes, tuple[int, ...]]] = field(default_factory=set)

    def put(self, put: Put) -> None:
        self.blocks |= {(put.salt, tuple(put.ids[:stop])) for stop in range(SIZE, len(put.ids) + 1, SIZE)}
        self.tails |= {(put.salt, tuple(put.ids[:length])) for length in put.tails}

    def length(self, salt: bytes, ids: list[int]) -> int:
        whole = 0
        while whole + SIZE <= len(ids) and (salt, tuple(ids[: whole + SIZE])) in self.blocks:
            whole += SIZE
        after = [
            common_length(as_tokens(tail), as_tokens(ids))
            for tail_salt, tail in self.tails
            if tail_salt == salt and len(tail) // SIZE == whole // SIZE and list(tail[:whole]) == ids[:whole]
        ]
        return max([whole, *after])


@st.composite
def puts(draw: st.DrawFn) -> Put:
    ids = draw(IDS)
    tails = draw(st.lists(st.integers(0, len(ids)), max_size=2, unique=True))
    return Put(draw(st.sampled_from(SALTS)), ids, tails)


def check(match: Match, salt: bytes, ids: list[int]) -> None:
    """Whatever is served was computed for just these tokens after just those before them."""
    covered = 0
    for block in match.blocks:
        assert block.position == covered
        before = ids[:covered]
        shared = common_length(block.tokens, as_tokens(ids[covered:]))
        assert shared == len(block.tokens) or block is match.blocks[-1]
        assert block.payload == payload_of(salt, [*before, *block.tokens.tolist()])
        covered += shared
    assert match.length == covered <= len(ids)
    if match.logits is not None:
        assert match.length == len(ids)
        assert np.array_equal(match.logits, logits_of(salt, ids))


def new_store(max_bytes: int = PLENTY, fingerprint: bytes = b"model", **options: Any) -> Store:
    return Store(fingerprint, max_bytes=max_bytes, block_tokens=SIZE, **options)


@given(st.lists(puts(), max_size=8), st.lists(st.tuples(st.sampled_from(SALTS), IDS), min_size=1, max_size=6))
def test_a_store_with_room_finds_what_a_plain_list_finds(
    written: list[Put], asked: list[tuple[bytes, list[int]]]
) -> None:
    store, naive = new_store(), Naive()
    for put in written:
        put.into(store)
        naive.put(put)
        store.check_integrity()
    for salt, ids in [*asked, *((put.salt, put.ids) for put in written)]:
        match = store.match(as_tokens(ids), salt)
        check(match, salt, ids)
        assert match.length == naive.length(salt, ids)
        assert (match.logits is not None) == ((salt, tuple(ids)) in naive.tails)
        missing = [
            at for at in range(0, len(ids) - SIZE + 1, SIZE) if (salt, tuple(ids[: at + SIZE])) not in naive.blocks
        ]
        assert store.missing(as_tokens(ids), salt) == missing


STEPS = st.one_of(
    st.tuples(st.just("put"), puts()),
    st.tuples(st.just("put all"), puts()),
    st.tuples(st.just("match"), puts()),
    st.tuples(st.just("clear"), puts()),
)


@given(st.integers(0, 12 * WEIGHT), st.lists(STEPS, max_size=20))
def test_a_tight_store_keeps_its_budget_and_its_chains(max_bytes: int, steps: list[tuple[str, Put]]) -> None:
    """After every step: the budget holds, no block is without its predecessors, and what is found is right."""
    store, naive = new_store(max_bytes), Naive()
    for verb, put in steps:
        if verb == "clear":
            store.clear()
            assert store.stats().blocks == store.stats().bytes == 0
        elif verb == "match":
            match = store.match(as_tokens(put.ids), put.salt)
            store.used(match)
            check(match, put.salt, put.ids)
            assert match.length <= naive.length(put.salt, put.ids)
        else:
            put.into(store, only_missing=verb == "put")
            naive.put(put)
        store.check_integrity()
        assert store.stats().bytes <= max_bytes


@given(st.lists(STEPS, max_size=20), st.integers(1, 6))
def test_a_collision_serves_nothing_false(steps: list[tuple[str, Put]], num_keys: int) -> None:
    """With a digest of a handful of values nearly everything collides. (Roots carry no tokens: they stay apart.)"""

    def poor(data: bytes) -> bytes:
        value = honest(data)
        return value if b"root" in data else bytes([value[0] % num_keys])

    honest = keys._hash
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_hash", poor)
        store = new_store(9 * WEIGHT)
        for verb, put in steps:
            if verb == "match":
                check(store.match(as_tokens(put.ids), put.salt), put.salt, put.ids)
            else:
                put.into(store, only_missing=verb == "put")
            store.check_integrity()


def use(store: Store, ids: list[int]) -> int:
    """Look a prompt up and use what there is of it; returns how many tokens."""
    match = store.match(as_tokens(ids))
    store.used(match)
    return match.length


def test_under_lru_the_oldest_chain_goes_first_and_from_its_tail() -> None:
    old, new = Put(b"", [1] * 12, []), Put(b"", [2] * 12, [])
    sizer = new_store()
    old.into(sizer)
    one_chain = sizer.stats().bytes
    store = new_store(one_chain * 5 // 3, policy="lru")  # five blocks of the six
    old.into(store)
    new.into(store)
    assert use(store, new.ids) == 12
    assert use(store, old.ids) == 8
    assert store.stats().evictions == 1
    assert store.match(as_tokens(new.ids)).length == 12  # a look-up is no use
    Put(b"", [3] * 4, []).into(store)  # `old` was used last: the next victim is the end of `new`
    assert store.match(as_tokens(new.ids)).length == 8
    assert store.match(as_tokens(old.ids)).length == 8


def test_a_chain_with_a_hole_is_not_stored() -> None:
    """A block may be evicted between `missing` and `put`: what follows it is worth nothing without it."""
    store, put = new_store(), Put(b"", list(range(12)), [12])
    tokens = as_tokens(put.ids)
    payloads = {start: payload_of(b"", put.ids[: start + SIZE]) for start in (0, 8)}
    store.put(tokens, payloads, tails=[put.tail(12)])
    store.check_integrity()
    assert store.stats().blocks == 1
    match = store.match(tokens)
    check(match, b"", put.ids)
    assert match.length == 4
    assert store.missing(tokens) == [4, 8]


def test_a_tail_is_kept_though_a_later_block_is_missing() -> None:
    store, put = new_store(), Put(b"", list(range(12)), [5])
    store.put(as_tokens(put.ids), {0: payload_of(b"", put.ids[:SIZE])}, tails=[put.tail(5)])
    match = store.match(as_tokens(put.ids[:5]))
    check(match, b"", put.ids[:5])
    assert match.length == 5 and match.logits is not None


def test_what_is_there_is_not_written_again() -> None:
    store, tokens = new_store(), as_tokens(range(6))
    for size in (100, 5000, 40):
        store.put(tokens, {0: memoryview(bytes(size))}, tails=[(6, memoryview(bytes(size)), logits_of(b"", range(6)))])
        store.check_integrity()
        assert [block.payload.nbytes for block in store.match(tokens).blocks] == [100, 100]
    assert store.stats().blocks == 2


def test_what_does_not_fit_at_all_is_not_kept() -> None:
    store = new_store(100)
    Put(b"", list(range(12)), [12]).into(store)
    assert store.stats().blocks == store.stats().bytes == 0
    assert store.match(as_tokens(range(12))).length == 0


def test_other_salts_and_other_models_find_nothing() -> None:
    store = new_store()
    put = Put(b"mine", list(range(10)), [10])
    put.into(store)
    for salt in (b"", b"theirs", b"mine "):
        assert store.match(as_tokens(put.ids), salt).length == 0
    assert new_store(fingerprint=b"other").match(as_tokens(put.ids), b"mine").length == 0
    assert store.match(as_tokens(put.ids), b"mine").length == 10


def test_what_is_served_stays_whole_when_it_is_evicted_or_cleared() -> None:
    store, put = new_store(), Put(b"", list(range(10)), [10])
    put.into(store)
    match = store.match(as_tokens(put.ids))
    store.clear()
    check(match, b"", put.ids)


def test_the_callers_array_may_change_after_a_put() -> None:
    store, tokens = new_store(), as_tokens(range(6))
    store.put(tokens, {0: payload_of(b"", range(4))}, tails=[(6, payload_of(b"", range(6)), logits_of(b"", range(6)))])
    tokens[:] = 99
    match = store.match(as_tokens(range(6)))
    check(match, b"", list(range(6)))
    assert match.length == 6


def test_threads_may_put_and_match_at_once() -> None:
    """Eight threads with their own prompts over a common beginning, in a store too small for all of them."""
    store, start = new_store(40 * WEIGHT), Barrier(8)

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        start.wait()
        for _ in range(60):
            ids = [0] * 8 + random.integers(0, 2, int(random.integers(0, 12))).tolist()
            put = Put(SALTS[number % 2], ids, [len(ids)])
            put.into(store)
            check(store.match(as_tokens(ids), put.salt), put.salt, ids)
            store.check_integrity()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result()
    assert store.stats().bytes <= 40 * WEIGHT


def test_a_block_tells_what_it_holds() -> None:
    block = Block(b"key", b"parent", as_tokens([1, 2]), 4, memoryview(b"kv"))
    assert block.holds(b"parent", 4, as_tokens([1, 2]))
    assert not block.holds(b"other", 4, as_tokens([1, 2]))
    assert not block.holds(b"parent", 0, as_tokens([1, 2]))
    tokens: Tokens = as_tokens([1, 3])
    assert not block.holds(b"parent", 4, tokens)
    assert not block.holds(b"parent", 4, as_tokens([1]))
