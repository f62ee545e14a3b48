"""Servers that are asked in turn, all of them up.

A machine changes its speed by a fifth and more within minutes, which is more than two good servers differ. So what can be
asked in pieces of a few seconds is: one *turn* is one piece, a prompt that is read or a stream that is decoded, asked of
every server right after the other. Who is first changes from turn to turn and from round to round, A B B A, so that a
machine that becomes slower does so for both. The ratio of a turn is of two pieces that lie seconds apart; the median over
all turns, with its quartiles, is steadier than any ratio of means.

A server that waits must cost the other nothing. After an answer threads still spin for some milliseconds, and a server may
tidy up: Rekindle saves what it has read once nobody was answered for 50 ms. So the next is asked when the last was at rest
for `QUIET_SECONDS`. What it did until then is in its processor time, not in the times of its answers; what it still used
while the other was asked is reported. Measured with gemma3-270m: at rest within 0.12 s, then 0.2 % of a core for Rekindle,
whose HTTP server (uvicorn) ticks ten times a second, and less than 0.01 % for llama-server.

Servers stay up for all rounds, as they do where they are used: each round has texts of its own, and what is left of earlier
ones is theirs to deal with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from rekindle.lab.load.client import ServerError
from rekindle.lab.load.drive import Load
from rekindle.lab.load.figures import Figure
from rekindle.lab.load.servers import Server

QUIET_SECONDS = 0.15
QUIET_SHARE = 0.02  # of a core that a server at rest may use; Rekindle's uses 0.2 %, llama-server's less
_LONGEST_SECONDS = 10.0  # that a server is waited for to come to rest
Turn = Callable[
    [Load], Awaitable[list[Figure]]
]  # asks one server one piece; raises ServerError if that can't be measured


@dataclass
class Arm:
    """One server in one round, and what came of its turns."""

    name: str
    server: Server
    load: Load
    figures: list[Figure] = field(default_factory=list)  # of its turns, in their order
    cpu_seconds: list[float | None] = field(default_factory=list)  # of its turns, until it was at rest
    idle_seconds: float = 0.0  # for which others were asked
    idle_cpu_seconds: list[float | None] = field(default_factory=list)  # that it used meanwhile

    async def take(self, turn: Turn) -> None:
        """Raises ServerError with the server's name if what is asked can't be measured."""
        try:
            self.figures += await turn(self.load)
        except ServerError as error:
            raise ServerError(f"{self.name}: {error}") from None
        self.load.pause()


async def take_turns(arms: Sequence[Arm], turns: Sequence[Turn], first: int = 0) -> None:
    """Ask all arms all turns; the arm after the `first`, counted round and round, begins. Raises ServerError."""
    await _rest(arms, arms)
    for number, turn in enumerate(turns, first):
        for asked in arms if number % 2 == 0 else arms[::-1]:
            before = [arm.server.cpu_seconds() for arm in arms]
            began = time.perf_counter()
            await asked.take(turn)
            await _rest([asked], arms)
            seconds = time.perf_counter() - began
            for arm, used in zip(arms, before, strict=True):
                if arm is asked:
                    arm.cpu_seconds.append(_since(arm.server, used))
                else:
                    arm.idle_seconds += seconds
                    arm.idle_cpu_seconds.append(_since(arm.server, used))


async def _rest(those: Sequence[Arm], arms: Sequence[Arm]) -> None:
    """Until they are at rest; a server without neighbours is not waited for."""
    if len(arms) > 1:
        for arm in those:
            await at_rest(arm.server)


async def at_rest(server: Server) -> None:
    """Until it has used next to nothing for a while; for that while if nobody knows. Not for ever: the report tells."""
    deadline = time.perf_counter() + _LONGEST_SECONDS
    while True:
        before, began = server.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(QUIET_SECONDS)
        used, now = _since(server, before), time.perf_counter()
        if used is None or used <= QUIET_SHARE * (now - began) or now > deadline:
            return


def _since(server: Server, before: float | None) -> float | None:
    after = server.cpu_seconds()
    return None if before is None or after is None else after - before
