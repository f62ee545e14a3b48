"""What the C library keeps of memory that was freed.

glibc gives each thread an *arena* of its own, up to eight per core, and memory goes back to the arena it came from. KV is
made by one thread, read from files by others, and freed by whichever forgets it last; so each arena grows to the most that
ever came from it, and the process to the sum of that, which is more than was ever in use at once. Two arenas are enough
here: most of what the threads of a Python program ask for comes from Python's own pools.

And what is freed in the middle of an arena stays with the process until it is asked for. Other C libraries have none of
this, and are left alone.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

NUM_ARENAS = 2
_CHOICES = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_arenas() -> None:
    """Have all threads that begin from now on share a few arenas, unless the user has said how many."""
    if any(name in os.environ for name in _CHOICES):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, NUM_ARENAS)


def trim() -> None:
    """Give what is free back to the system. Takes milliseconds for each 100 MB that were freed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
