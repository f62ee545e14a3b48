"""Writing to slower tiers, later: a bounded queue between the store and them.

`offer` never waits: what does not fit in the queue is dropped and counted, because a request must not wait for a disk. The
caller gives the thread: it calls `run`, which returns after `close`. Uses of what memory holds are told the same way.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from threading import Condition

from rekindle.errors import TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.keys import Key
from rekindle.kv.outages import Outages
from rekindle.kv.tier import Place, Tier

_PLACE_BYTES = 256  # that a place in the queue takes, about

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """Something to do, and what it takes of the queue's room."""

    run: Callable[[], None]
    num_bytes: int
    num_blocks: int = 0  # to be written
    keys: frozenset[Key] = frozenset()  # of these, those whose bytes count here; others are in the queue before it


class Behind:
    """Chains of blocks on their way to slower tiers. Thread-safe."""

    def __init__(self, tiers: Sequence[Tier], *, max_bytes: int) -> None:
        self.dropped = 0  # blocks that found the queue full
        self._tiers = tiers
        self._max_bytes = max_bytes
        self._num_bytes = 0  # queued or being written
        self._num_blocks = 0  # the same
        self._keys: set[Key] = set()  # of the blocks in it
        self._queue: deque[_Job] = deque()
        self._changed = Condition()
        self._closed = False
        self._outages = Outages("written to")

    def offer(self, chain: Sequence[Block], tiers: Sequence[Tier] | None = None) -> bool:
        """Queue the blocks of one chain, given head first, for these tiers or all. False if not all found room.

        The head of a chain is worth keeping without its end, so as much is queued as fits; an empty queue takes anything.
        A chain that grows is offered again and again: what is in the queue already takes no room again.
        """
        with self._changed:
            room = self._max_bytes - self._num_bytes
            sizes = list(accumulate(self._room_of(block) for block in chain))
            count = len(chain) if self._num_bytes == 0 else sum(size <= room for size in sizes)
            head = chain[:count]
            self.dropped += len(chain) - count
            if not head:
                return not chain
            write = partial(self._write, self._tiers if tiers is None else tiers, head)
            keys = frozenset(block.key for block in head) - self._keys
            return self._add(_Job(write, sizes[count - 1], count, keys)) and count == len(chain)

    def _room_of(self, block: Block) -> int:
        return _PLACE_BYTES if block.key in self._keys else block.num_bytes

    def touch(self, places: Sequence[Place]) -> bool:
        """Tell all tiers, later, that this chain, given head first, was used; False if there was no room."""
        return self._tell(places, lambda tier: tier.touch(places))

    def keep(self, places: Sequence[Place], until: float) -> None:
        """Have all tiers, later, keep this chain, given head first, until a Unix time. This always finds room."""
        self._tell(places, lambda tier: tier.keep(places, until), always=True)

    def release(self, places: Sequence[Place]) -> None:
        """Have all tiers, later, keep this chain, given head first, no longer than any other."""
        self._tell(places, lambda tier: tier.release(places), always=True)

    def remove(self, places: Sequence[Place]) -> None:
        """Have all tiers, later, forget these."""
        self._tell(places, lambda tier: tier.remove(places), always=True)

    def _tell(self, places: Sequence[Place], what: Callable[[Tier], None], *, always: bool = False) -> bool:
        return self._add(_Job(partial(self._each, what), len(places) * _PLACE_BYTES), always=always)

    def _add(self, job: _Job, *, always: bool = False) -> bool:
        if not self._tiers:
            return True
        with self._changed:
            full = self._num_bytes and self._num_bytes + job.num_bytes > self._max_bytes
            if self._closed or (full and not always):
                self.dropped += job.num_blocks
                return False
            self._num_bytes += job.num_bytes
            self._num_blocks += job.num_blocks
            self._keys |= job.keys
            self._queue.append(job)
            self._changed.notify_all()
            return True

    def run(self) -> None:
        """Do what is queued until closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = self._queue.popleft()
            self._do(job)

    def drain(self) -> None:
        """Do what is queued now, on the caller's own thread; for those who have none to give to `run`."""
        while True:
            with self._changed:
                if not self._queue:
                    return
                job = self._queue.popleft()
            self._do(job)

    def _do(self, job: _Job) -> None:
        try:
            job.run()
        finally:
            with self._changed:
                self._forget([job])

    def _forget(self, jobs: Iterable[_Job]) -> None:
        """What these jobs took of the queue's room is free."""
        for job in jobs:
            self._num_bytes -= job.num_bytes
            self._num_blocks -= job.num_blocks
            self._keys -= job.keys
        self._changed.notify_all()

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything offered so far is written; False if it took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_bytes == 0, timeout_seconds)

    def clear(self) -> None:
        """Forget what is queued; a chain that is being written right now is not."""
        with self._changed:
            self._forget(self._queue)
            self._queue.clear()

    def close(self, timeout_seconds: float) -> bool:
        """Write what is queued, for so long at most, and let `run` return. False if some was given up."""
        done = self.flush(timeout_seconds)
        with self._changed:
            self._closed = True
            left = self._num_blocks
            self.dropped += sum(job.num_blocks for job in self._queue)
            self.clear()
        if not done:
            _log.warning("stopped with up to %d blocks not written to slower tiers", left)
        return done

    def probe(self) -> None:
        """Find out which tiers can't be written now, and say so in the log."""
        for tier in self._tiers:
            try:
                tier.probe(writing=True)
            except TierUnavailable as error:
                self._outages.failed(tier.name, error)

    def _each(self, what: Callable[[Tier], None]) -> None:
        for tier in self._tiers:
            try:
                what(tier)
            except TierUnavailable:
                pass  # its state says so; what it has not heard of it keeps longer, or forgets sooner
            except Exception:
                _log.exception("telling the %s tier of blocks failed", tier.name)

    def _write(self, tiers: Sequence[Tier], chain: Sequence[Block]) -> None:
        for tier in tiers:
            self._write_to(tier, chain)

    def _write_to(self, tier: Tier, chain: Sequence[Block]) -> None:
        try:
            tier.put(chain)
        except TierUnavailable as error:
            self._outages.failed(tier.name, error)
        except Exception:
            _log.exception("writing to the %s tier failed", tier.name)
        else:
            self._outages.worked(tier.name)
