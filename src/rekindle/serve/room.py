"""Cells and sequences as one budget, and who gives way when it runs out.

First sequences give up what only going back needs, if the model has layers that see a window only. Then idle residents
leave for the store, the one that is worth least first (`residents.py` says how that is reckoned).
Then running requests are swapped out, those that the policy ranks last first: their KV is kept as bytes, in pieces, and
put back when there is room, so nothing is computed twice. A beginning that somebody else holds by then is shared instead
of put back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from rekindle.engine.protocol import Payload, SequenceId
from rekindle.errors import EngineError
from rekindle.serve.run import Run
from rekindle.serve.state import State, shares
from rekindle.tokens import common_length

_log = logging.getLogger(__name__)
SWAP_BLOCKS = 4  # store blocks per piece of a swapped request
RESUME_STEPS = 8  # a swapped request is resumed when everybody can go on for so many steps


class Room:
    """Makes room in the engine of a state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._engine = state.engine
        self._residents = state.residents
        self._piece = SWAP_BLOCKS * state.store.block_tokens

    def make_sequence(self, keep: Iterable[SequenceId] = ()) -> bool:
        """Free a sequence; residents to keep don't leave for it."""
        while not self._engine.num_free_sequences:
            if not self._residents.evict(keep, for_cells=False):
                return False
        return True

    def make(self, cells: int, new: Sequence[SequenceId] = (), victims: Sequence[Run] = ()) -> bool:
        """Free cells, beside those that running requests are about to take, and a place to run.

        Residents leave, then `victims` are swapped out, in their order. False, and nobody has left, if that would not be
        enough. `new` are sequences of the request that asks.
        """
        if not self._is_possible(cells, new, victims):
            return False
        queue = deque(victims)
        try:
            while queue and len(self._state.running) >= self._state.max_running:
                self.swap_out(queue.popleft())
            while not self.is_enough(cells) and (self._give_up() or self._residents.evict()):
                pass
            while not self.is_enough(cells) and queue:
                self.swap_out(queue.popleft())
        except EngineError as error:
            _log.warning("a running request could not be swapped out and goes on: %s", error)
        return self.is_enough(cells) or not self._state.running

    def is_enough(self, cells: int) -> bool:
        """Whether so many are free beside those that running requests are about to take."""
        return self._engine.num_free_cells >= cells + self._promised(self._state.running)

    def _is_possible(self, cells: int, new: Sequence[SequenceId], victims: Sequence[Run]) -> bool:
        running = self._state.running
        if len(running) - len(victims) >= self._state.max_running:
            return False
        if len(running) < self._state.max_running and self.is_enough(cells):
            return True
        staying = [run for run in running if run not in victims]
        held = self._engine.num_held([*new, *(run.seq for run in staying if run.seq is not None)])
        held -= sum(self._releasable(run) for run in staying)
        return not staying or self._engine.num_cells - held >= cells + self._promised(staying)

    def _give_up(self) -> bool:
        """Have an idle sequence, or else a running one, free what only going back needs. False if nobody has much of it."""
        if self._residents.give_up_one():
            return True
        for run in sorted(self._state.running, key=self._state.rank, reverse=True):
            salt = run.salt if run.generation.reuses else None
            if self._releasable(run) and run.seq is not None and self._residents.give_up(run.seq, salt, run.marks):
                return True
        return False

    def _releasable(self, run: Run) -> int:
        """Cells that a running request would free if it gave up going back by more than a block.

        None if somebody may yet cut it or look into it.
        """
        if run.seq is None or run.generation.hold is not None or run.generation.prompt.chunks:
            return 0
        size = self._state.store.block_tokens
        cells = self._engine.num_releasable(run.seq, max(0, self._engine.length(run.seq) - size))
        return cells if cells >= size else 0

    def _promised(self, runs: Iterable[Run]) -> int:
        """Cells for the rest of their prompts, and one more each."""
        return sum(1 + len(run.prompt) - run.held for run in runs)

    def secure(self, cells: int, fail: Callable[[Run, EngineError], object]) -> None:
        """Make sure that the next step has cells: residents leave, then requests are swapped out, but never the last.

        A decoding request that is swapped out needs one cell less. One that can't be swapped out has to `fail`: what it
        has computed is a resident then, and leaves before anybody else has to.
        """
        state = self._state
        while self._engine.num_free_cells < cells:
            if self._give_up() or self._residents.evict():
                continue
            if len(state.running) <= 1:
                return
            victim = max(state.running, key=state.rank)
            cells -= not victim.reading
            try:
                self.swap_out(victim)
            except EngineError as error:
                fail(victim, error)

    def swap_out(self, run: Run) -> None:
        """Take a running request's KV out of the engine; it waits at its place in the queue. Raises EngineError."""
        assert run.seq is not None
        if run.looking is not None:  # what it has seen so far is not kept
            run.looking.restart()
            self._engine.truncate(run.seq, run.read)
        length = self._engine.length(run.seq)
        starts = range(0, length, self._piece)
        run.swapped = [self._engine.export(run.seq, start, min(length, start + self._piece)) for start in starts]
        self._engine.close(run.seq)
        run.seq = None
        self._state.put_back(run)
        self._state.counts.swaps += 1
        self._state.watching(run).swapped(run)

    def resume(self, run: Run, victims: Sequence[Run] = ()) -> bool:
        """Put a swapped request's KV back, but for a beginning that another sequence holds; False if there is no room."""
        assert run.swapped is not None
        source, shared = self._longest_shared(run, run.swapped)
        if not self.make_sequence(keep=[] if source is None else [source]):
            return False
        seq = self._engine.open() if source is None else self._engine.fork(source, shared)
        rest = [payload for payload in run.swapped if payload.position >= shared]
        slack = RESUME_STEPS * (len(self._state.running) + 1)
        try:
            cells = sum(len(payload) for payload in rest) + 1
            if not self.make(min(cells + slack, self._engine.num_cells - shared), [seq], victims):
                self._engine.close(seq)
                return False
            assert not rest or rest[0].position == self._engine.length(seq)
            self._engine.place_all(seq, rest)
        except EngineError:
            self._engine.close(seq)
            raise
        run.seq, run.swapped = seq, None
        self._state.enter(run)
        self._state.watching(run).resumed(run)
        return True

    def _longest_shared(self, run: Run, pieces: Sequence[Payload]) -> tuple[SequenceId | None, int]:
        """Who holds most of the beginning of a swapped request, in whole pieces."""
        held = run.tokens[: min(run.exact, sum(len(payload) for payload in pieces))]
        best, longest = None, 0
        if run.generation.reuses:
            views = [
                (r.seq, self._engine.tokens(r.seq)[: r.exact])
                for r in self._state.running
                if r.seq is not None and shares(r, run)
            ]
            views += [(view.seq, view.tokens) for view in self._residents.views(run.salt)]
            for seq, tokens in views:
                shared = common_length(held, tokens) // self._piece * self._piece
                if shared > longest and shared >= self._engine.reach(seq):
                    best, longest = seq, shared
        return best, longest
