"""How long llama.cpp's threads wait busily for each other.

llama.cpp computes a token in hundreds of pieces, and its threads meet after each. Built with GCC they meet in libgomp,
which lets a thread spin for milliseconds before it sleeps, as long as there are no more of its own threads than cores;
other processes it does not count. Where some other program holds one of the cores, each meeting then takes as long as the
system lets that program run, while the core that spins is lost to it. Measured with gemma3-270m q8_0, two threads on two
cores and a dozen other busy processes: 400 to 1,300 ms a token; with 1,000 turns, which is what libgomp itself takes where
its threads are more than the cores, 84 ms; when it sleeps at once 60 ms. 1,000 turns are about 20 microseconds, longer
than most meetings take on a quiet machine.

libgomp reads its settings once, when it is loaded. So it is loaded here, before llama.cpp is, with that setting; whoever
has chosen otherwise by GOMP_SPINCOUNT or OMP_WAIT_POLICY is obeyed. Other copies of libgomp, such as PyTorch's, are left
alone.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

SPIN_COUNT = 1000
_SETTING = "GOMP_SPINCOUNT"
_LIBRARY = "libgomp.so.1"


def load() -> None:
    """Load libgomp so, if there is one and nobody did before."""
    if _SETTING in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ[_SETTING] = str(SPIN_COUNT)
    try:
        with suppress(OSError):
            ctypes.CDLL(_LIBRARY)
    finally:
        del os.environ[_SETTING]
