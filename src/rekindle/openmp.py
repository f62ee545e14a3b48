"""How long llama.cpp's threads wait busily for each other.

llama.cpp computes a token in hundreds of pieces, and its threads meet after each. Built with GCC they meet in libgomp,
which lets a thread spin for milliseconds before it sleeps. On a machine of our own that is best: a meeting takes less
than falling asleep and being woken. But where some other program holds one of the cores, each meeting takes as long as
the system lets that program run, while the core that spins is lost to it. libgomp knows better only where its own threads
are more than the cores: then they spin for a moment only. Measured with gemma3-270m q8_0, two threads on two cores and a
dozen other busy processes, ms a token: 300 to 1,500 as it is by itself; 160 with a limit of 4,000 turns, 50 with 1,000, 30
with the 100 turns that libgomp takes where its threads are too many. On a quiet machine 1,000 turns cost up to a tenth.

libgomp reads its settings once, when it is loaded. What can be changed later is how many threads it has: `add_team` gives
the calling thread a team of its own, whose threads do nothing but sleep, and from then on all teams spin for a moment only.
They go when that thread ends. Who decides when is `serve/crowding.py`, which watches the process's threads. Where they
can't be watched, a fixed limit of `SPIN_COUNT` is set here, before llama.cpp loads the library. Whoever has chosen
otherwise by GOMP_SPINCOUNT or OMP_WAIT_POLICY is obeyed. Other copies of libgomp, such as PyTorch's, are left alone.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

SPIN_COUNT = 1000  # about 20 microseconds
_SETTING = "GOMP_SPINCOUNT"
_CHOICES = (_SETTING, "OMP_WAIT_POLICY")
_LIBRARY = "libgomp.so.1"
_WATCH = Path("/proc/self/schedstat")  # of Linux; each thread has one too


def is_chosen() -> bool:
    """Whether the user said how threads are to wait."""
    return any(name in os.environ for name in _CHOICES)


def can_adapt() -> bool:
    """Whether it is ours to say how threads wait, and it can be seen how long they wait for a core."""
    return not is_chosen() and _WATCH.exists() and _library() is not None


def load() -> None:
    """Load libgomp, if there is one and nobody did before, so that its threads don't wait busily for long."""
    if is_chosen() or _WATCH.exists():
        return
    os.environ[_SETTING] = str(SPIN_COUNT)
    try:
        _library()
    finally:
        del os.environ[_SETTING]


def add_team(num_threads: int) -> None:
    """Give the calling thread a team of so many threads, itself included; the others sleep until it ends."""
    library, nothing = _library(), ctypes.CDLL(None).free  # which does nothing with a null pointer
    assert library is not None, "there is no libgomp"
    library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    library.GOMP_parallel(ctypes.cast(nothing, ctypes.c_void_p), None, num_threads, 0)


def _library() -> ctypes.CDLL | None:
    with suppress(OSError):
        return ctypes.CDLL(_LIBRARY)
    return None
