"""What the store asks of a place where blocks are kept.

A tier is a small class with its sizes (and its clock, if it has one) injected. It may lose a block at any time; it must
never give a wrong one. One contract test class runs over every tier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rekindle.kv.block import Block
from rekindle.kv.keys import Key, chain_keys


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block is looked for. A tail may be filed under its parent, to be found beside the others."""

    key: Key
    parent: Key
    tail: bool = False


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """Totals of one tier since it was opened."""

    name: str  # "disk", "network"; where tiers are shown, "memory" too
    blocks: int  # kept now; for a shared tier as far as it is known
    bytes: int
    max_bytes: int | None  # None: no limit of ours
    hits: int = 0  # blocks found
    misses: int = 0
    evictions: int = 0
    read_bytes: int = 0  # of blocks found
    written_bytes: int = 0  # of blocks
    faults: int = 0  # operations that failed
    corrupt: int = 0  # blocks set aside because they were not what was written
    state: str = "ok"  # "ok", or what is wrong at present, in words


class Tier(Protocol):
    """Thread-safe. Faults of the medium are raised as TierUnavailable, at once; corrupt blocks are counted misses."""

    name: str

    def get(self, places: Sequence[Place]) -> Iterator[Block | None]:
        """The blocks, in this order, each as soon as it has come; None for one that is missing. Counts as a use."""

    def probe(self, *, writing: bool) -> None:
        """Find out now, rather than with the first request, whether it can be read, or written. Raises TierUnavailable."""

    def prepare(self) -> None:
        """Get ready for the next reading, while nobody waits."""

    def contains(self, places: Sequence[Place]) -> list[bool]:
        """Which are there, without reading them or counting a use."""

    def put(self, chain: Sequence[Block]) -> None:
        """Keep the blocks of one chain, given head first. What is there already is not written again."""

    def touch(self, places: Sequence[Place]) -> None:
        """Count a use of this chain, given head first, which a faster tier served."""

    def keep(self, places: Sequence[Place], until: float) -> None:
        """Let what is there of this chain, given head first, stay at least until a Unix time, within the tier's bounds."""

    def release(self, places: Sequence[Place]) -> None:
        """Let what is there of this chain, given head first, stay no longer than if it were used now."""

    def remove(self, places: Sequence[Place]) -> None:
        """Forget these, if they are there."""

    def clear(self) -> None:
        """Forget everything, of all models. It is tried even if the tier was out of reach a moment ago."""

    def clear_model(self) -> None:
        """Forget everything of the model that this tier was opened for; tried like `clear`."""

    def stats(self) -> TierStats: ...

    def check_integrity(self) -> None:
        """Recount from scratch. Raises AssertionError."""

    def close(self) -> None:
        """Free what is held; nothing may be called afterwards."""


def place_of(block: Block) -> Place:
    """Where a block is looked for. Tails are what has logits."""
    return Place(key=block.key, parent=block.parent, tail=block.logits is not None)


def places_along(root: Key, written: bytes, block_tokens: int) -> list[Place]:
    """Of all whole blocks of a prompt, given as `token_bytes`, head first."""
    keys = list(chain_keys(root, written, block_tokens))
    return [Place(key=key, parent=parent) for key, parent in zip(keys, [root, *keys], strict=False)]
