"""Memory for blocks that are read from files: a few large pieces instead of many small ones.

New memory is dear. The system gives it out page by page, each at the first touch of its 4 KB, and clears it; on a
virtual machine that can take several times as long as copying a file into it. Two things help:

- Blocks that are read together share a *slab*, of huge pages where the system has them: one interruption for 2 MB
  instead of 512.
- A slab whose last block is gone is kept for the next reader, up to a few of them, and not cleared again. And some are
  made ready while nobody waits.

    | block | block | block | block | … | block |   |      a slab: whole huge pages, blocks in steps of 64 bytes

A slab stays as long as anybody holds a block in it. Chains die from the tail, so a chain that is dying holds half a slab
for nothing, on average. Few and small blocks, of less than a huge page, get memory of their own.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

SLAB_BYTES = 8 << 20  # at most, unless one block takes more
_HUGE_PAGE_BYTES = 2 << 20
_STEP_BYTES = 64  # every room begins at a multiple of it
_MAX_IDLE = 8  # slabs


class Slabs:
    """Thread-safe, without a lock: slabs come back whenever Python finds that nobody holds them any more."""

    def __init__(self) -> None:
        self._idle: deque[mmap.mmap] = deque(maxlen=_MAX_IDLE)  # beyond that the oldest is given back to the system

    def rooms(self, sizes: Sequence[int]) -> list[memoryview]:
        """A writable view of each of these sizes in bytes, contents undefined. Memory is freed with the last view of it."""
        total = sum(map(_rounded, sizes))
        if total + _HUGE_PAGE_BYTES // 4 < _HUGE_PAGE_BYTES:
            return [np.empty(size, np.uint8).data for size in sizes]
        slab = self._slab(-(-total // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES, total)
        rooms, start = [], 0
        for size in sizes:
            rooms.append(slab[start : start + size])
            start += _rounded(size)
        return rooms

    def _slab(self, num_bytes: int, used_bytes: int) -> memoryview:
        """Of so many bytes, of which so many will be touched."""
        mapping = self._take_idle(num_bytes) or _new(num_bytes, used_bytes)
        owner = np.frombuffer(mapping, np.uint8)  # that all views of the slab hold
        weakref.finalize(owner, self._idle.append, mapping).atexit = False
        return owner.data

    def prepare(self, num_bytes: int) -> None:
        """Have so many bytes ready, as far as that many are kept: the system gives them out now."""
        missing = min(-(-num_bytes // SLAB_BYTES), _MAX_IDLE) - sum(
            len(each) == SLAB_BYTES for each in list(self._idle)
        )
        for _ in range(missing):
            mapping = _new(SLAB_BYTES, SLAB_BYTES)
            np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE] = 0  # outside Python's lock
            self._idle.append(mapping)

    def _take_idle(self, num_bytes: int) -> mmap.mmap | None:
        """One of this size, or one that is not twice as large."""
        for _ in range(len(self._idle)):
            try:
                mapping = self._idle.pop()  # the latest one may still be in the processor's cache
            except IndexError:  # another reader was faster
                return None
            if num_bytes <= len(mapping) < 2 * num_bytes:
                return mapping
            self._idle.appendleft(mapping)
        return None


def _rounded(size: int) -> int:
    return -(-size // _STEP_BYTES) * _STEP_BYTES


def _new(num_bytes: int, used_bytes: int) -> mmap.mmap:
    """Of huge pages, but for an end that would use less than three quarters of one."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = (used_bytes + _HUGE_PAGE_BYTES // 4) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    with suppress(OSError):  # of a system built without them
        mapping.madvise(mmap.MADV_HUGEPAGE, 0, whole)
    return mapping
