"""What the store answers: what a look-up has found, what a fetch has brought, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rekindle.kv.block import Block
from rekindle.kv.keys import Key
from rekindle.kv.policies import DEFAULT
from rekindle.kv.tier import TierStats


@dataclass(frozen=True, eq=False)
class Match:
    """The longest stored beginning of a prompt."""

    blocks: tuple[Block, ...]  # in order; the last may be a tail of which only some tokens are shared
    length: int  # tokens of the prompt that these blocks cover
    logits: npt.NDArray[np.float32] | None  # after the prompt's last token, if the whole prompt is stored
    root: Key = b""
    keys: tuple[Key, ...] = ()  # of all that a use of this uses


@dataclass(frozen=True)
class Fetched:
    """What came of a fetch."""

    tokens: dict[str, int] = field(default_factory=dict)  # tier -> tokens brought into memory
    refused: str | None = None  # why more was there and was not fetched


@dataclass(frozen=True)
class StoreStats:
    """The memory tier's totals, and each slower tier's."""

    blocks: int
    bytes: int
    max_bytes: int
    evictions: int
    tiers: tuple[TierStats, ...] = ()
    dropped: int = 0  # blocks that were never written to slower tiers, because their queue was full
    pins: int = 0
    pinned_bytes: int = 0  # in memory, kept by pins
    max_pinned_bytes: int = 0
    policy: str = DEFAULT  # that names the memory's victims
    state: str = "ok"  # of the memory; "ok", or what is wrong, in words

    @property
    def states(self) -> dict[str, str]:
        """Of every tier, by name."""
        return {"memory": self.state} | {tier.name: tier.state for tier in self.tiers}
