"""The memory tier's own promises: pins, and what they protect."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.kv.block import Block
from rekindle.kv.keys import chain, digest
from rekindle.kv.memory import MemoryTier
from rekindle.tokens import as_tokens

SIZE = 4


def chain_of(name: int, length: int) -> list[Block]:
    """A chain of whole blocks, head first, which no other name shares."""
    links = chain(digest(b"root"), as_tokens([name] * (SIZE * length)), SIZE)
    payload = memoryview(bytes(1000))
    return [Block(key, parent, part, SIZE * at, payload) for at, (parent, key, part) in enumerate(links)]


CHAIN = chain_of(1, 3)
ONE = CHAIN[0].num_bytes


def test_a_pinned_chain_survives_while_it_is_pinned() -> None:
    tier = MemoryTier(3 * ONE)
    tier.put(CHAIN)
    with tier.pinned([block.key for block in CHAIN]):
        tier.put(chain_of(2, 3))
        tier.check_integrity()
        assert [tier.get(block.key) for block in CHAIN] == CHAIN
        assert len(tier) == 3
    tier.put(chain_of(2, 3))
    tier.check_integrity()
    assert tier.get(CHAIN[0].key) is None


def test_a_pinned_block_keeps_what_it_follows() -> None:
    """Without its predecessors a block is worth nothing: a pin on the last protects the chain."""
    tier = MemoryTier(4 * ONE)
    tier.put(CHAIN)
    with tier.pinned([CHAIN[-1].key]):
        for name in range(2, 6):
            tier.put(chain_of(name, 2))
            tier.check_integrity()
        assert all(tier.get(block.key) is block for block in CHAIN)


def test_a_block_that_follows_a_pinned_one_may_go() -> None:
    tier = MemoryTier(3 * ONE)
    tier.put(CHAIN)
    with tier.pinned([CHAIN[0].key]):
        tier.put(chain_of(2, 2))
        tier.check_integrity()
        assert tier.get(CHAIN[0].key) is CHAIN[0]
        assert tier.get(CHAIN[2].key) is None


def test_the_budget_holds_again_when_the_last_pin_is_gone() -> None:
    tier = MemoryTier(3 * ONE)
    tier.put(CHAIN)
    tier.max_bytes = ONE
    with tier.pinned([CHAIN[1].key]), tier.pinned([CHAIN[1].key]):
        tier.put([])
        tier.check_integrity()
        assert len(tier) == 2
    tier.check_integrity()
    assert len(tier) == 1


def test_a_pin_ends_with_an_error_too() -> None:
    tier = MemoryTier(3 * ONE)
    tier.put(CHAIN)
    with pytest.raises(ZeroDivisionError), tier.pinned([CHAIN[0].key]):
        raise ZeroDivisionError
    tier.put(chain_of(2, 3))
    assert tier.get(CHAIN[0].key) is None


def test_a_key_that_is_not_stored_may_be_pinned() -> None:
    tier = MemoryTier(3 * ONE)
    with tier.pinned([CHAIN[0].key]):
        tier.put(CHAIN)
        tier.put(chain_of(2, 3))
        assert tier.get(CHAIN[0].key) is CHAIN[0]
    tier.check_integrity()


@given(
    st.integers(0, 8),
    st.lists(
        st.tuples(st.sampled_from(["put", "touch", "pin", "clear"]), st.integers(0, 3), st.integers(0, 4)), max_size=25
    ),
)
def test_any_history_keeps_chains_whole(num_fitting: int, history: list[tuple[str, int, int]]) -> None:
    tier = MemoryTier(num_fitting * ONE)
    for verb, name, length in history:
        blocks = chain_of(name, length)
        if verb == "put":
            tier.put(blocks)
        elif verb == "touch":
            tier.touch([block.key for block in blocks])
        elif verb == "clear":
            tier.clear()
        else:
            before = [tier.get(block.key) for block in blocks]
            with tier.pinned([block.key for block in blocks]):
                tier.put(chain_of(name + 10, 3))
                tier.check_integrity()
                assert [tier.get(block.key) for block in blocks] == before
        tier.check_integrity()
        assert tier.num_bytes <= tier.max_bytes


def test_the_recount_sees_a_wrong_sum_and_a_hole() -> None:
    tier = MemoryTier(10 * ONE)
    tier.put(CHAIN)
    tier.num_bytes += 1
    with pytest.raises(AssertionError):
        tier.check_integrity()
    tier.num_bytes -= 1
    tier.check_integrity()
    tier._change(CHAIN[1].key, None)
    with pytest.raises(AssertionError, match="hole"):
        tier.check_integrity()
