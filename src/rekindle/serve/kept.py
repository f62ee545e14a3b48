"""What is kept for requests to come, in figures: all of it, and what one prompt has added when it was warmed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rekindle.kv.store import StoreStats
from rekindle.kv.tier import TierStats
from rekindle.serve.levels import tiers_of
from rekindle.serve.worker import Snapshot


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Reuse so far, by request and by token, and what is kept. `vars()` of it is its wire form, with the two rates."""

    total_requests: int  # requests that looked for reuse
    hits: int  # of these, those that reused more than a beginning-of-text token
    misses: int
    prompt_tokens: int  # tokens of these requests
    cached_tokens: int  # of these, tokens whose KV was reused
    cache_size: int  # entries kept: residents and stored blocks and tails
    residents: int
    resident_tokens: int
    blocks: int
    bytes: int  # in the store
    max_bytes: int
    evictions: int
    pins: int = 0
    pinned_bytes: int = 0  # in memory, kept by pins
    max_pinned_bytes: int = 0
    dropped: int = 0  # blocks that were never written to slower tiers, because their queue was full
    tiers: tuple[TierStats, ...] = ()  # memory first

    @classmethod
    def of(cls, worker: Snapshot, store: StoreStats) -> CacheStats:
        """What the two have counted."""
        return cls(
            total_requests=worker.requests,
            hits=worker.hits,
            misses=worker.requests - worker.hits,
            prompt_tokens=worker.prompt_tokens,
            cached_tokens=worker.cached_tokens,
            cache_size=worker.residents + store.blocks,
            residents=worker.residents,
            resident_tokens=worker.resident_tokens,
            blocks=store.blocks,
            bytes=store.bytes,
            max_bytes=store.max_bytes,
            evictions=store.evictions,
            pins=store.pins,
            pinned_bytes=store.pinned_bytes,
            max_pinned_bytes=store.max_pinned_bytes,
            dropped=store.dropped,
            tiers=tuple(tiers_of(store)),
        )

    @property
    def hit_rate(self) -> float:
        """Share of requests that reused something."""
        return self.hits / self.total_requests if self.total_requests else 0.0

    @property
    def token_hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """What came of warming one prompt."""

    tokens: int
    computed: int  # of these; the others were stored
    stored_bytes: int  # of its KV; 0 if the store had no room for it
    seconds: float  # with the wait for requests that went before

    @property
    def reused(self) -> int:
        return self.tokens - self.computed

    def as_dict(self) -> dict[str, Any]:
        """Its wire form, and what commands print."""
        return {
            "tokens": self.tokens,
            "computed": self.computed,
            "reused": self.reused,
            "bytes": self.stored_bytes,
            "seconds": round(self.seconds, 3),
        }
