"""Memory that blocks have in common is counted until the last of them has gone, so a budget is one of real bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.kv.samples import FINGERPRINT

from rekindle.kv.block import Block
from rekindle.kv.common import CommonMemory
from rekindle.kv.keys import block_key, root_key
from rekindle.kv.memory import MemoryTier
from rekindle.tokens import as_tokens

ROOT = root_key(FINGERPRINT, b"")
SIZE = 100_000


def chain_in(memory: memoryview, count: int, seed: int = 0) -> list[Block]:
    """Blocks of four tokens whose payloads lie one after the other in this memory."""
    blocks, parent = [], ROOT
    for index in range(count):
        tokens = as_tokens(range(seed + 4 * index, seed + 4 * index + 4))
        key = block_key(parent, tokens)
        blocks.append(Block(key, parent, tokens, 4 * index, memory[index * SIZE : (index + 1) * SIZE].toreadonly()))
        parent = key
    return blocks


def slab(num_bytes: int) -> memoryview:
    return np.zeros(num_bytes, np.uint8).data


def test_what_lies_in_no_common_memory_counts_nothing() -> None:
    common = CommonMemory()
    alone = chain_in(slab(SIZE), 1)[0]
    python = Block(alone.key, ROOT, alone.tokens, 0, memoryview(bytes(SIZE)))
    for block in (alone, python):
        common.came(block)
        assert common.num_bytes == 0
        common.went(block)
    common.check_integrity([])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_rest_counts_until_the_last_has_gone(order: tuple[int, ...]) -> None:
    common = CommonMemory()
    blocks = chain_in(slab(4 * SIZE), 3)
    for block in blocks:
        common.came(block)
    assert common.num_bytes == SIZE
    left = list(blocks)
    for number, index in enumerate(order, start=1):
        common.went(blocks[index])
        left.remove(blocks[index])
        assert common.num_bytes == (SIZE * (1 + number) if left else 0)
        common.check_integrity(left)


def test_a_block_that_is_about_all_of_its_memory_counts_nothing_however_small_its_neighbour_is() -> None:
    common, memory = CommonMemory(), slab(SIZE + 100)
    large, small = chain_in(memory, 2)
    small = replace(small, payload=memory[SIZE:].toreadonly())
    for block in (large, small):
        common.came(block)
    assert common.num_bytes == SIZE, "what the small one keeps from being freed"
    common.went(large)
    common.check_integrity([small])
    common.went(small)
    common.check_integrity([])


def test_a_memory_tier_keeps_its_budget_in_bytes_that_are_really_held() -> None:
    """Of two chains, each in memory of its own, the one that is evicted is evicted until its memory is free."""
    tier = MemoryTier(22 * SIZE, block_tokens=4, policy="lru")
    first, second, third = (chain_in(slab(10 * SIZE), 8, seed) for seed in (0, 1000, 2000))
    tier.put(ROOT, [], first)
    tier.put(ROOT, [], second)
    assert (len(tier), tier.held_bytes) == (16, 20 * SIZE + tier.num_bytes - 16 * SIZE)
    tier.put(ROOT, [], third)
    tier.check_integrity()
    assert [block.key in tier for block in (*first, *second, *third)] == [False] * 8 + [True] * 16
    tier.clear()
    tier.check_integrity()
    assert tier.held_bytes == 0
