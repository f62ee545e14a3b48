"""Chains as a tree of segments: runs of blocks that have always been used together.

    chain A   |a0 a1 a2 a3 a4 a5|          after A:   [a0 a1 a2 a3 a4 a5]
    chain B   |a0 a1 a2 b3 b4|             after B:   [a0 a1 a2] ── [a3 a4 a5]
                                                           └──── [b3 b4]

So whatever is kept per segment (uses, age, traits) is kept once for many blocks, and a chain is found by comparing lists.
Blocks that were evicted stay in the tree for a while as ghosts, so that their next use can be learned from. Of each segment
the first `stored` blocks are stored and the rest are ghosts; as chains die from the tail, nothing stored follows a ghost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from rekindle.kv.policy import K


class Segment(Generic[K]):
    """A run of blocks. The fields of the second group belong to the policy."""

    __slots__ = (
        "bucket",
        "density",
        "followers",
        "following",
        "is_last",
        "keys",
        "kind",
        "parent",
        "placed",
        "queued",
        "row",
        "size",
        "stored",
        "uses",
    )

    def __init__(self, parent: Segment[K] | None, keys: list[K], stored: int, size: float, density: int) -> None:
        self.parent = parent
        self.keys = keys
        self.following: dict[K, Segment[K]] = {}  # by first key
        self.stored = stored  # blocks, from the first on
        self.followers = 0  # segments in `following` of which something is stored
        self.size = size  # of one block, on average
        self.density = density  # cost over size, in half octaves

        self.uses = 1
        self.is_last = False  # a request ended with this, and nothing followed it since
        self.kind = 0  # index of its traits
        self.row = 0  # index of its kind and density
        self.placed = 0.0  # time of the last use
        self.bucket = 0  # of its age
        self.queued = False  # still moves from bucket to bucket

    @property
    def is_tail(self) -> bool:
        """Whether its last stored block may be evicted."""
        return self.stored > 0 and not self.followers


def split(segment: Segment[K], length: int) -> Segment[K]:
    """Cut a segment in two and return the new head of `length` blocks; the segment itself is what is left."""
    assert segment.parent is not None
    keys = segment.keys
    head = Segment(segment.parent, keys[:length], min(segment.stored, length), segment.size, segment.density)
    head.uses = segment.uses
    segment.parent.following[keys[0]] = head
    segment.keys = keys[length:]
    segment.stored = max(0, segment.stored - length)
    segment.parent = head
    head.following[keys[length]] = segment
    head.followers = int(segment.stored > 0)
    return head


def common_length(keys: Sequence[K], chain: Sequence[K], start: int) -> int:
    """How many keys equal those of the chain from `start` on."""
    stop = min(len(keys), len(chain) - start)
    if keys[:stop] == chain[start : start + stop]:
        return stop
    length = 0
    while keys[length] == chain[start + length]:
        length += 1
    return length
