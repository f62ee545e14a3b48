"""Runs a program that ends with whoever started it, however that happens.

    python -m rekindle.lab.load.leash PROGRAM ARGUMENT …

The program takes this process over, so its id and its output are those of this one. A watcher is left beside it, which
reads the standard input: when that ends, because whoever holds its other end closed it or died, the program is told to end.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    program = os.getpid()
    if os.fork() == 0:
        _watch(program)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.execvp(sys.argv[1], sys.argv[1:])


def _watch(program: int) -> None:
    try:
        while os.read(0, 1024):
            pass
        if os.getppid() == program:  # it has not ended by itself
            os.kill(program, signal.SIGTERM)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
