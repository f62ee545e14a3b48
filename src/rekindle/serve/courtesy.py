"""A moment for first tokens to leave, where the engine's threads take all cores.

When a token was sampled, the next step begins at once, and llama.cpp's threads are on every core before the event loop has
written the token to the client's socket. It then waits for a core for milliseconds, as does a client on the same machine.
For the tokens of a stream that is the same each time; but a first token that needed no model call, or few, comes twice as
late. So after a first token nothing is computed for `SECONDS`, which costs that stream as much once, and all together no
more than `SHARE` of the time.

Measured with gemma3-270m q8_0, two threads on two cores, a prompt of 1,000 tokens again and again, from the client's
request to its first token: 3.7 to 10.3 ms, middle 6.0, without; 3.2 to 6.0, middle 3.9, with 1.5 ms. The event loop
needs 0.8 of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rekindle.serve.observe import Observer
from rekindle.serve.run import Run

SECONDS = 0.0015
SHARE = 0.05


class Courtesy(Observer):
    """Waits after first tokens, on the worker's thread: does on purpose what no other observer may."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wait: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock = clock
        self._wait = wait
        self._last = -math.inf

    def first_token(self, run: Run) -> None:
        now = self._clock()
        if now - self._last >= SECONDS / SHARE:
            self._last = now
            self._wait(SECONDS)
