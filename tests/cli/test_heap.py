"""Heaps that threads share, counted in the process's own map of memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps for threads are glibc's")

PROGRAM = """
import ctypes, threading
from rekindle.cli.heap import share_heaps
print(share_heaps())
allocate = ctypes.CDLL(None).malloc
allocate.restype = ctypes.c_void_p
together = threading.Barrier(8)
places = []

def work():
    together.wait()
    places.extend(allocate(ctypes.c_size_t(50_000)) for _ in range(20))
    together.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len({place >> 26 for place in places}))  # heaps of threads begin at multiples of 64 MiB
"""


def heaps(**variables: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | variables, capture_output=True, text=True, check=True
    )
    shared, count = done.stdout.split()
    return shared == "True", int(count)


def test_threads_share_heaps() -> None:
    shared, count = heaps()
    assert shared
    assert count <= 3, "the main one may lie across a boundary"


def test_what_the_user_chose_stays() -> None:
    shared, count = heaps(MALLOC_ARENA_MAX="8")
    assert not shared
    assert count > 3
