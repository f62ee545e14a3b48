"""Writing to slower tiers, later: a bounded queue between the store and them.

`offer` never waits: what does not fit in the queue is dropped and counted, because a request must not wait for a disk. The
caller gives the thread: it calls `run`, which returns after `close`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from threading import Condition

from rekindle.errors import TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.tier import Tier

_log = logging.getLogger(__name__)


class Behind:
    """Chains of blocks on their way to slower tiers. Thread-safe."""

    def __init__(self, tiers: Sequence[Tier], *, max_bytes: int) -> None:
        self.dropped = 0  # blocks that found the queue full
        self._tiers = tiers
        self._max_bytes = max_bytes
        self._num_bytes = 0  # queued or being written
        self._queue: deque[tuple[Sequence[Block], Sequence[Tier]]] = deque()
        self._changed = Condition()
        self._closed = False
        self._failing: set[str] = set()  # names of tiers whose failure has been logged

    def offer(self, chain: Sequence[Block], tiers: Sequence[Tier] | None = None) -> bool:
        """Queue the blocks of one chain, given head first, for these tiers or all; False if there was no room."""
        size = sum(block.num_bytes for block in chain)
        with self._changed:
            if self._closed or self._num_bytes + size > self._max_bytes:
                self.dropped += len(chain)
                return False
            self._num_bytes += size
            self._queue.append((chain, self._tiers if tiers is None else tiers))
            self._changed.notify_all()
            return True

    def run(self) -> None:
        """Write what is queued until closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                chain, tiers = self._queue.popleft()
            try:
                for tier in tiers:
                    self._write(tier, chain)
            finally:
                with self._changed:
                    self._num_bytes -= sum(block.num_bytes for block in chain)
                    self._changed.notify_all()

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything offered so far is written; False if it took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_bytes == 0, timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Write what is queued, for so long at most, and let `run` return. False if some was given up."""
        done = self.flush(timeout_seconds)
        with self._changed:
            self._closed = True
            given_up = sum(len(chain) for chain, _ in self._queue)
            self._num_bytes -= sum(block.num_bytes for chain, _ in self._queue for block in chain)
            self._queue.clear()
            self.dropped += given_up
            self._changed.notify_all()
        if not done:
            _log.warning("stopped with %d blocks not written to slower tiers", given_up)
        return done

    def _write(self, tier: Tier, chain: Sequence[Block]) -> None:
        """A tier that fails is logged once, until it works again."""
        try:
            tier.put(chain)
        except TierUnavailable as error:
            if tier.name not in self._failing:
                self._failing.add(tier.name)
                _log.warning("the %s tier cannot be written to, requests go on without it: %s", tier.name, error)
        else:
            if tier.name in self._failing:
                self._failing.remove(tier.name)
                _log.info("the %s tier can be written to again", tier.name)
