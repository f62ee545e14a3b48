"""llama.cpp's quantiser as a program of its own: `quantiser.py SOURCE TARGET FILE_TYPE THREADS`.

It runs for up to minutes inside one C call, which no signal ends and which speaks only through a log callback that the
whole process shares. In a process of its own it can be stopped at once, its log is its standard error, and an engine in
the caller's process keeps its log. Needs nothing of this package.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp

_BUFFER_BYTES = 256 << 20  # of rows held at once


def main(source: str, target: str, file_type: int, threads: int) -> int:
    """Exit status: 0 if the target is whole."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = threads
    params.max_buf_size = _BUFFER_BYTES
    llama_cpp.llama_backend_init()
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
