"""llama.cpp's log, borrowed for a while.

llama.cpp writes its log to one callback per process. A library must not print, and the reason for a failure stands only
in the log; so around a call that may fail the log is heard here, and given back afterwards.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llama_cpp


@contextmanager
def heard(line: Callable[[str], None] | None = None) -> Iterator[deque[str]]:
    """Keep the log silent inside; yields its last few lines as they come, each of which also goes to `line`."""
    last_lines: deque[str] = deque(maxlen=3)

    def hear(_level: int, text: bytes, _data: int | None) -> None:
        words = text.decode(errors="replace").strip(" .\r\n")
        if words:
            last_lines.append(words)
            if line is not None:
                line(words)

    previous, previous_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(previous_data))
    callback = llama_cpp.llama_log_callback(hear)  # llama.cpp holds a bare pointer to it, so it must outlive the block
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield last_lines
    finally:
        llama_cpp.llama_log_set(previous, previous_data)
