"""Belady's optimum for chains of blocks: the most that any policy can reach which doesn't fetch ahead.

It knows the future and evicts the block whose next use is farthest. A block's predecessor is used whenever the block is,
so its next use is never later, and with ties broken by depth the victim is always a tail: that chains die from the tail
costs the optimum nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_NEVER = 1 << 62


def belady(chains: Sequence[Sequence[int]], num_blocks: int, capacity: int) -> list[int]:
    """Blocks hit by each request, for a store of `capacity` blocks; blocks are numbered from 0 to `num_blocks` - 1."""
    following = _next_uses(chains, num_blocks)
    next_use = [0] * num_blocks  # of stored blocks; 0: not stored
    successors = [0] * num_blocks  # how many stored blocks follow
    parent = [-1] * num_blocks
    heap: list[tuple[int, int, int]] = []  # (-next use, -depth, block) of tails; others and outdated ones are skipped
    num_stored = 0
    hits = []
    for chain, uses in zip(chains, following, strict=True):
        found = 0
        for block in chain:
            if not next_use[block]:
                break
            found += 1
        hits.append(found)
        for depth in range(found, len(chain)):
            parent[chain[depth]] = chain[depth - 1] if depth else -1
            if depth:
                successors[chain[depth - 1]] += 1
        num_stored += len(chain) - found
        for block, use in zip(chain, uses, strict=True):
            next_use[block] = use
        for depth in range(len(chain)):  # predecessors are offered when they become tails
            if not successors[chain[depth]]:
                heapq.heappush(heap, (-uses[depth], -depth, chain[depth]))
        while num_stored > capacity:
            use, depth, block = heapq.heappop(heap)
            if next_use[block] != -use or successors[block]:
                continue
            next_use[block] = 0
            num_stored -= 1
            before = parent[block]
            if before >= 0:
                successors[before] -= 1
                if not successors[before]:
                    heapq.heappush(heap, (-next_use[before], depth + 1, before))
    return hits


def _next_uses(chains: Sequence[Sequence[int]], num_blocks: int) -> list[list[int]]:
    """For each request and block, the number (from 1) of the next request that uses the block."""
    upcoming = [_NEVER] * num_blocks
    result = []
    for index in range(len(chains) - 1, -1, -1):
        result.append([upcoming[block] for block in chains[index]])
        for block in chains[index]:
            upcoming[block] = index + 1
    return result[::-1]
