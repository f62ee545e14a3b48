"""llama.cpp's log, as Python log records.

llama.cpp has one log callback per process, so this is the one place with a module-level object: the callback must stay
referenced as long as the process lives. Errors are kept for a moment, so that a failed load can say why it failed.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque

import llama_cpp

# ggml's debug, info, warn, error. Its warnings are for who tunes a context, such as that all sequences together may be
# longer than the one that the model was trained for; of that ours are kept within bounds by the scheduler.
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.DEBUG, 4: logging.WARNING}
_log = logging.getLogger("rekindle.llama")
_errors: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    message = text.decode("utf-8", "replace").rstrip()
    if level == 4 and message:
        _errors.append(message)
    if message and _log.isEnabledFor(_LEVELS.get(level, logging.DEBUG)):
        _log.log(_LEVELS.get(level, logging.DEBUG), message)


def install() -> None:
    """Send llama.cpp's log to the logger "rekindle.llama". May be called again."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def take_errors() -> str:
    """What llama.cpp complained of since the last call, in one line."""
    text = "; ".join(_errors)
    _errors.clear()
    return text
