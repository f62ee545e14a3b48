"""Chunks that were met, studied when there is nothing else to do.

A chunk that nothing was at hand of has been computed in place, after all that stood before it. Once the request has its
answer, the sequence is set aside, and in idle time each such chunk is warmed: read on its own and stored, so that the next
prompt can place it wherever it stands. Then both KVs of it are at hand, and how far they lie apart, token by token, is
remembered (`scores.py`): it says which of its tokens depend most on what came before. A chunk that was placed although
nothing is remembered of it, because somebody has warmed it ahead of time, is recomputed in the sequence set aside.

Nobody waits for a study. Chunks are warmed as prompts are, one at a time while nobody else has work, and recomputed a few
tokens at a time, so that whoever comes is served next; what was set aside leaves the engine before anything else does, and
then the chunk is warmed but not compared. The queue is bounded, and what is still in it at the end is forgotten.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rekindle.engine.protocol import Payload
from rekindle.errors import EngineError
from rekindle.kv.keys import Key
from rekindle.reuse.prompt import Prompt
from rekindle.serve.blending import Blending, blends, cut, whole_blocks
from rekindle.serve.request import Done, Event, Failed, Generation
from rekindle.serve.residents import Resident
from rekindle.serve.run import Clock, Run, payload_of
from rekindle.serve.state import State
from rekindle.tokens import common_length

_log = logging.getLogger(__name__)
MAX_QUEUE = 256  # chunks
SLICE = 128  # tokens that are recomputed before somebody else may come


@dataclass(eq=False)
class Meeting:
    """A chunk that stood in a prompt."""

    key: Key
    own: Prompt  # [head, chunk]
    start: int  # in the sequence set aside
    aside: Resident | None  # None: there was no sequence to keep it in, or none that still has all of it
    computed: int  # of its tokens, those computed in place: all or none to begin with
    warmed: bool = False


class Studies:
    """The chunks of one scheduler that are to be studied."""

    def __init__(self, state: State, blending: Blending, *, max_length: int, submit: Callable[[Run], object]) -> None:
        self._state = state
        self._blending = blending
        self._head = len(blending.head)
        self._max_length = max_length
        self._submit = submit
        self._queue: deque[Meeting] = deque()
        self._is_warming = False
        self._waiting: list[Callable[[], object]] = []

    def meet(self, run: Run) -> None:
        """Queue those chunks of a complete run that there is something to learn about; its sequence is still whole."""
        if run.seq is None or run.plan is None or not blends(run):
            return
        engine = self._state.engine
        new = list(self._unknown(run))[: MAX_QUEUE - len(self._queue)]
        whole = [
            meeting for meeting in new if meeting.start >= engine.reach(run.seq)
        ]  # no layer has given up any of it
        if whole and engine.num_free_sequences:
            stop = max(meeting.start + len(meeting.own) - self._head for meeting in whole)
            try:
                aside = self._state.residents.set_aside(engine.fork(run.seq, stop))
            except EngineError as error:
                run.context.run(_log.info, "chunks are not compared with themselves on their own: %s", error)
                aside = None
            for meeting in whole:
                meeting.aside = aside
        self._queue.extend(new)

    def _unknown(self, run: Run) -> Iterator[Meeting]:
        """Chunks that nothing is remembered of, or that were computed in place and are not stored on their own."""
        assert run.plan is not None and run.generation.blend is not None
        prompt = run.generation.prompt
        remembers = run.generation.blend.select in ("auto", "remembered")
        queued = {meeting.key for meeting in self._queue}
        for told, own in zip(run.plan.chunks, self._blending.own_prompts(prompt), strict=False):
            length, key = told.stop - told.start, self._blending.key(own)
            is_fit = max(1, self._state.min_tokens) <= length and len(own) < self._max_length
            placed = told.placed and told.index not in run.refused
            if not is_fit or key in queued or (placed and not remembers):
                continue
            if self._blending.scores.get(key) is None or (not placed and self._stored(own) is None):
                queued.add(key)
                yield Meeting(key, own, told.start, None, 0 if told.placed else length)

    def go_on(self) -> bool:
        """Warm or compare one chunk; False if there is nothing to do but to wait."""
        if self._is_warming:
            return False
        if not self._queue:
            self.release()
            return False
        meeting = self._queue[0]
        payloads = self._stored(meeting.own)
        if payloads is None and not meeting.warmed:
            meeting.warmed = True
            self._warm(meeting.own)
            return True
        if payloads is not None and self._recompute(meeting):
            return True
        self._queue.popleft()
        if payloads is not None:
            self._compare(meeting, payloads)
        if meeting.aside is not None and not any(other.aside is meeting.aside for other in self._queue):
            self._state.residents.release(meeting.aside)
        return True

    def when_done(self, tell: Callable[[], object]) -> None:
        """Call this when the queue is empty and there is idle time."""
        self._waiting.append(tell)

    def release(self) -> None:
        """Whoever waits need not wait any more."""
        for tell in self._waiting:
            tell()
        self._waiting.clear()

    def clear(self) -> None:
        """Forget what is queued."""
        self._queue.clear()

    def _warm(self, own: Prompt) -> None:
        def ended(event: Event) -> None:
            self._is_warming = not isinstance(event, Done | Failed)

        now = time.perf_counter()
        self._is_warming = True
        self._submit(Run(Generation(prompt=own, warm=True), ended, None, Clock(arrived=now, submitted=now)))

    def _stored(self, own: Prompt) -> list[Payload] | None:
        """What the store's memory has of a chunk on its own, if that is all of it."""
        match = self._state.store.match(own.tokens, own.salt)
        blocks = whole_blocks(match)
        if sum(len(block.tokens) for block in blocks) < len(own):
            return None
        fingerprint = self._state.engine.spec.fingerprint
        return [payload_of(block, fingerprint) for block in blocks]

    def _recompute(self, meeting: Meeting) -> bool:
        """Compute some more of a chunk in place; False if that is done, or can't be."""
        length, done = len(meeting.own) - self._head, meeting.computed
        if done == length or meeting.aside is None or not self._state.residents.has(meeting.aside):
            return False
        stop = min(length, done + SLICE)
        try:
            self._state.engine.recompute(meeting.aside.seq, [(meeting.start + done, meeting.start + stop)])
        except EngineError as error:
            _log.info("a chunk is not studied: %s", error)
            self._state.residents.release(meeting.aside)
            return False
        meeting.computed = stop
        return True

    def _compare(self, meeting: Meeting, payloads: list[Payload]) -> None:
        """Remember how far the two KVs of a chunk lie apart, if that in place is still here."""
        aside, start = meeting.aside, meeting.start
        if aside is None or not self._state.residents.has(aside):
            return
        engine, length = self._state.engine, len(meeting.own) - self._head
        try:
            alone = self._alone(meeting.own, payloads)
            if alone is not None:
                in_place = engine.export(aside.seq, start, start + length)
                self._blending.scores.add(meeting.key, engine.compare(in_place, alone))
        except EngineError as error:
            _log.warning("a chunk could not be compared with itself on its own: %s", error)

    def _alone(self, own: Prompt, payloads: list[Payload]) -> Payload | None:
        """A chunk's KV on its own, as one; None if there is no room to put it together."""
        engine = self._state.engine
        for view in self._state.residents.views(own.salt):
            if not view.reach and common_length(view.tokens, own.tokens) == len(own):
                return engine.export(view.seq, self._head, len(own))
        if engine.num_free_cells < len(own) or not engine.num_free_sequences:
            return None
        return cut(engine, payloads, self._head)
