"""What a tier counts: what it was asked for, and what it holds, as far as it knows."""

from __future__ import annotations

import threading

from rekindle.kv.tier import TierStats


class Totals:
    """Thread-safe."""

    def __init__(self) -> None:
        self.blocks = self.num_bytes = 0  # held
        self._hits = self._misses = self._evictions = self._corrupt = 0
        self._read_bytes = self._written_bytes = 0
        self._lock = threading.Lock()

    def add(
        self,
        *,
        hits: int = 0,
        misses: int = 0,
        corrupt: int = 0,
        evictions: int = 0,
        blocks: int = 0,
        num_bytes: int = 0,
        read_bytes: int = 0,
        written_bytes: int = 0,
    ) -> None:
        """The one place where numbers change, but for a recount. Never below zero: others' blocks can be lost uncounted."""
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._corrupt += corrupt
            self._evictions += evictions
            self._read_bytes += read_bytes
            self._written_bytes += written_bytes
            self.blocks = max(0, self.blocks + blocks)
            self.num_bytes = max(0, self.num_bytes + num_bytes)

    def recounted(self, blocks: int, num_bytes: int) -> None:
        """This is what is held."""
        with self._lock:
            self.blocks, self.num_bytes = blocks, num_bytes

    def stats(self, name: str, *, max_bytes: int | None, faults: int, state: str, other_bytes: int = 0) -> TierStats:
        """`other_bytes` are held beside blocks."""
        with self._lock:
            return TierStats(
                name=name,
                blocks=self.blocks,
                bytes=self.num_bytes + other_bytes,
                max_bytes=max_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
                faults=faults,
                corrupt=self._corrupt,
                state=state,
            )
