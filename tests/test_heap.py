"""What the C library keeps of freed memory, asked of a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

can_look = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell what is held")
if not hasattr(ctypes.CDLL(None), "malloc_trim"):
    pytest.skip("the C library is not glibc", allow_module_level=True)

ARENAS = """
import ctypes, threading
from rekindle import heap
heap.share_arenas()
library = ctypes.CDLL(None)
library.malloc.restype = library.fdopen.restype = ctypes.c_void_p
allocated, told = threading.Barrier(9), threading.Event()
def allocate():
    library.malloc(1000)
    allocated.wait()
    told.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
allocated.wait()
told.set()
library.malloc_info(0, ctypes.c_void_p(library.fdopen(1, b"w")))
library.fflush(None)
"""

RESIDENT = """
from pathlib import Path
import resource
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
"""

TRIM = """
import numpy as np
from rekindle import heap
blocks = [np.ones(40_000, np.uint8) for _ in range(5_000)]
kept = blocks[::100]
full = resident()
del blocks
heap.trim()
print(full, resident())
"""

CLEAR = """
import rekindle
with rekindle.load(threads=1, store="none", store_memory="1GiB") as llm:
    for number in range(8):
        llm.warm([[number, *range(300, 1300)]], raw=True)
    stored = llm.stats().bytes
    full = resident()
    llm.clear_cache()
    print(stored, full, resident())
"""


def said(program: str, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout


def test_threads_share_two_arenas_unless_the_user_has_said_how_many() -> None:
    assert said(ARENAS).count("<heap nr=") == 2
    assert said(ARENAS, MALLOC_ARENA_MAX="3").count("<heap nr=") == 3


@can_look
def test_what_is_free_between_what_is_kept_goes_back_to_the_system() -> None:
    full, left = map(int, said(RESIDENT + TRIM).split())
    assert left < full / 2


@can_look
def test_who_clears_the_cache_has_its_memory_back() -> None:
    stored, full, left = map(int, said(RESIDENT + CLEAR).split())
    assert stored > 8e6
    assert full - left > stored / 2
