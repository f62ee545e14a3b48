"""What a measurement ran on, and the one physical limit that matters most for decoding: how fast memory can be read."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rekindle.serve.cores import usable_cores as usable_cores

_BUFFER_BYTES = 512 << 20  # many times any cache that one process gets
_ROUNDS = 5


@dataclass(frozen=True)
class Machine:
    """The facts that a reader needs to place a measurement."""

    processor: str
    cores: int  # that this process may use
    memory_bytes: int
    system: str
    python: str
    llama_cpp: str  # version of the binding


def this_machine() -> Machine:
    """Describe the machine that runs this."""
    return Machine(
        processor=_processor(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        llama_cpp=version("llama-cpp-python"),
    )


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory together: the best of some runs over 512 MB.

    Which of numpy's kernels reads fastest differs between processors, so two are tried and the faster one counts; a
    limit must not be too low. It is still what a program reaches, not what the memory's data sheet says.
    """
    import numpy as np  # here: to say what the machine is needs no numbers

    slices = np.array_split(np.ones(_BUFFER_BYTES // 4, np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for kernel in (lambda part: np.dot(part, part), lambda part: part.view(np.uint8).max()):
            for _ in range(_ROUNDS):
                began = time.perf_counter()  # clock on: all slices are handed out
                list(pool.map(kernel, slices))
                best = max(best, _BUFFER_BYTES / (time.perf_counter() - began))  # clock off: the last one is read
    return best


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
