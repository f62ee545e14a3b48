"""When idle residents leave although there is room: as soon as they cost more than bringing them back.

An engine may look at all cells in use, whoever's they are: llama.cpp scans a mask over every cell up to the highest one in
use, for each token that it computes. So residents that nobody uses make every step longer. Measured per token computed and
idle cell, on one thread: gemma3-270m 65 ns while reading and 160 ns while decoding, tinyllama-1.1b 290 and 880 ns. Putting
a cell back from the store's memory takes about 4,000 ns, and to save it first 13,000 ns.

That is the question whether to rent or to buy, and this is its well-known answer: a resident leaves once as many tokens
were computed beside it as pay for its way back,

    IDLE_TOKENS     if it is in the store already
    UNSAVED_TOKENS  if it must be saved first
    BUSY_TOKENS     if others are running when a request is started

so that it never costs more than about twice what knowing the future would. That is looked at when a request is started, and
what requests are about to compute counts at once: a long prompt is not read beside what it would drive out. It is looked at
then only, and sooner where nobody else runs, because who leaves makes room in low cells. A sequence that goes on there has
its cells out of order, and sums over them are rounded differently: the same request would less often get the same answer.

What the store can't keep whole stays, and so does what somebody holds. While answers are being given, saving is done a
piece in a step.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from rekindle.engine.protocol import Engine
from rekindle.kv.store import Store
from rekindle.serve.residents import Resident, Residents

IDLE_TOKENS = 64
UNSAVED_TOKENS = 256
BUSY_TOKENS = 512
EXPECTED_ANSWER = 128  # tokens, where a request allows more or does not say


class Rent:
    """Counts what is computed beside each resident, and lets those go that have cost enough."""

    def __init__(self, engine: Engine, store: Store, residents: Residents) -> None:
        self._engine = engine
        self._store = store
        self._residents = residents
        self._computed = 0
        self._since: WeakKeyDictionary[Resident, tuple[int, int]] = WeakKeyDictionary()  # -> (last use, computed then)

    def count(self, num_tokens: int) -> None:
        """So many tokens were computed."""
        self._computed += num_tokens

    def collect(self, coming: int, num_others: int) -> int:
        """Let residents go before so many more tokens are computed; returns how many went.

        `num_others` requests were running when those were started for whom this is done.
        """
        if not self._engine.reads_idle_cells:
            return 0
        left = 0
        for resident in self._residents.idle():
            cost = self._beside(resident) + coming
            if not resident.saved and cost >= UNSAVED_TOKENS and not num_others:
                self._residents.save(resident.seq)
            if resident.saved and cost >= (BUSY_TOKENS if num_others else IDLE_TOKENS):
                left += self._end(resident)
        return left

    def prepare(self) -> None:
        """Save a piece of one that will have to go and that no idle time has saved."""
        if self._engine.reads_idle_cells and len(self._residents):
            cost = {resident: self._beside(resident) for resident in self._residents.idle()}
            waiting = (each for each, tokens in cost.items() if not each.saved and tokens >= UNSAVED_TOKENS)
            if (resident := next(waiting, None)) is not None:
                self._residents.save_piece(resident)

    def _beside(self, resident: Resident) -> int:
        """Tokens computed since its last use."""
        used, computed = self._since.get(resident, (-1, 0))
        if used != resident.used:
            self._since[resident] = resident.used, self._computed
            return 0
        return self._computed - computed

    def _end(self, resident: Resident) -> bool:
        """Unless that would free nothing or lose something; then it is looked at again after as many tokens."""
        if not self._engine.num_own(resident.seq) or self._store.missing(resident.tokens, resident.salt):
            self._since[resident] = resident.used, self._computed
            return False
        self._residents.leave(resident)
        return True
