"""How a waiting request becomes a running one: what is known of its prompt, what is planned, and what is put back.

In the order of the policy's ranks each waiting request gets its turn, until one finds no room: then all wait, so that the
large are not passed by the small for ever. Two kinds of request are passed over meanwhile: one whose KV is being fetched
from a slower tier, and one whose beginning another request is reading right now, because in a moment it can be shared.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from enum import Enum

from rekindle.engine.protocol import Payload, SequenceId
from rekindle.errors import ContextFull, EngineError
from rekindle.kv.store import Fetched, Match
from rekindle.reuse.plan import Fork, Place, Plan, Resident, Stored, make_plan
from rekindle.serve.blending import Blending, Found, blends, cells_to_prepare, in_words, prepare
from rekindle.serve.room import Room
from rekindle.serve.run import Part, Run, payload_of
from rekindle.serve.sampling import Vector
from rekindle.serve.state import State, shares, twins
from rekindle.tokens import common_length

_log = logging.getLogger(__name__)
Fetch = Callable[[Run], Future[Fetched]]


class Outcome(Enum):
    """What came of the attempt to start a request."""

    STARTED = "started"
    NO_ROOM = "no room"
    WAITS = "waits"  # for its own good, and holds up nobody


class Admission:
    """Starts waiting requests of a state."""

    def __init__(self, state: State, room: Room, blending: Blending, fetch: Fetch | None) -> None:
        self._state = state
        self._blending = blending
        self._room = room
        self._engine = state.engine
        self._store = state.store
        self._fetch = fetch
        self._used: list[Match] = []  # what the store is still to be told of

    def expect(self, run: Run) -> None:
        """Note how much of a new request can be reused, for policies that ask."""
        if self._state.policy.looks_at_reuse and run.generation.reuses:
            residents, match = self._known(run)
            held = max((common_length(run.prompt, resident.tokens) for resident in residents), default=0)
            known = self._look(run).known
            run.reusable = max(held, match.length, sum(own.length for own in known if own is not None))

    def tell_used(self) -> None:
        """Tell the store what was used since it was told last: that can wait until first tokens are sent."""
        for match in self._used:
            self._store.used(match)
        self._used.clear()

    def admit_one(self, fail: Callable[[Run, EngineError], object], started: Collection[Run] = ()) -> Run | None:
        """Start the first that can be; None if that is nobody. One whose KV can't be put back has to `fail`.

        Nobody is swapped out for it who was `started` in this step: two whom the policy prefers to each other would
        change places for ever, and nothing be computed.
        """
        state = self._state
        if not self._may_start():
            return None
        for run in sorted(self._candidates(), key=state.rank):
            less_urgent = [other for other in state.running if state.policy.preempts(run, other)]
            victims = [other for other in less_urgent if other not in started]
            victims.sort(key=state.rank, reverse=True)
            is_blocked = bool(state.running) and run.blocked_at == state.departures
            if is_blocked or len(state.running) - len(victims) >= state.max_running:
                return None
            try:
                outcome = self._start(run, victims) if run.swapped is None else self._resume(run, victims)
            except EngineError as error:
                fail(run, error)
                continue
            if outcome is Outcome.NO_ROOM and len(victims) == len(less_urgent):
                run.blocked_at = state.departures
            if outcome is not Outcome.WAITS:
                return run if outcome is Outcome.STARTED else None
        return None

    def _may_start(self) -> bool:
        """Whether to look at all."""
        return bool(self._state.waiting) and (
            len(self._state.running) < self._state.max_running or self._state.policy.may_preempt
        )

    def _candidates(self) -> list[Run]:
        """Who may start now; prompts are warmed one at a time and when there is nobody else."""
        state = self._state
        requests = [run for run in state.waiting if not run.generation.warm]
        if not requests and not state.running:
            requests = state.waiting
        return [run for run in requests if not self._must_wait(run)]

    def _must_wait(self, run: Run) -> bool:
        """Whether what it waits for is still to come; cheap, for it is asked in every step."""
        if run.fetch is not None and not run.fetch.done():
            return True
        other = run.waits_for
        if other is None:
            return False
        if other.seq is not None:
            return other.read < run.waits_until
        return other.fetch is not None and not other.fetch.done()

    def _resume(self, run: Run, victims: list[Run]) -> Outcome:
        return Outcome.STARTED if self._room.resume(run, victims) else Outcome.NO_ROOM

    def _start(self, run: Run, victims: list[Run]) -> Outcome:
        """Plan a prompt and put what is reused into the engine."""
        started = time.perf_counter()
        if (hold := run.generation.hold) is not None and hold.cut is not None:
            self._state.residents.cut(hold.name, hold.cut, run.salt)
        if (twin := self._twin(run)) is not None:
            return self._start_beside(run, twin, [other for other in victims if other is not twin])
        residents, match = self._known(run)
        found = self._look(run)
        exact = make_plan(run.generation.prompt, residents, self._stored(run, match))
        plan = self._plan(run, exact, found)
        if self._can_fetch_soon(run, plan) or self._begin_fetch(run, plan) or self._can_share_soon(run, plan):
            return Outcome.WAITS
        planned = time.perf_counter()
        logits = None if plan.computed else self._known_logits(plan, match)
        try:
            restored = self._restore(run, plan, match, found, victims)
        except EngineError as error:
            run.context.run(_log.warning, "stored KV cannot be used and is computed again: %s", error)
            exact, logits = make_plan(run.generation.prompt, [], Stored()), None
            plan = self._blending.nothing_placed(run, exact)
            restored = self._restore(run, plan, Match((), 0, None), Found(), victims)
        if not restored:
            return Outcome.NO_ROOM
        if run.fetch is not None:
            run.clock.fetched(started)  # it may not have been noted yet: this thread is woken first
        run.clock.admitted, run.clock.planned, run.clock.restored = started, planned, time.perf_counter()
        self._used.append(match)
        self._blending.used(plan, found)
        self._blending.begin_look(run, self._engine, exact, plan, found)
        run.start(plan if run.looking is None else exact)
        if logits is not None:
            run.marks[plan.total] = logits
        self._state.enter(run)
        self._promise(run)
        self._state.watching(run).begun(run)
        if run.looking is None:
            self._state.planned(run)
        return Outcome.STARTED

    def _twin(self, run: Run) -> Run | None:
        """Another answer to the same request, whose reading can be shared although nobody else may."""
        for other in self._state.running:
            assert other.seq is not None
            if twins(run, other) and (other.reading or self._engine.reach(other.seq) <= len(run.prompt)):
                return other
        return None

    def _start_beside(self, run: Run, twin: Run, victims: list[Run]) -> Outcome:
        """Share the whole prompt with one that has read it in the way in which it is to be read, or wait until it has."""
        total = len(run.prompt)
        if twin.reading:
            run.waits_for, run.waits_until = twin, total
            return Outcome.WAITS
        assert twin.seq is not None and twin.plan is not None
        started = time.perf_counter()
        if not self._room.make_sequence(keep=[twin.seq]):
            return Outcome.NO_ROOM
        seq = self._engine.fork(twin.seq, total)
        if not self._room.make(1, [seq], victims):
            self._engine.close(seq)
            return Outcome.NO_ROOM
        reason = "another answer to this request has read all of it, with chunks placed"
        step = Fork(twin.seq, 0, total, reason, twin.plan.exact, twin.plan.blended)
        run.clock.admitted, run.clock.planned, run.clock.restored = started, started, time.perf_counter()
        run.seq, run.refused = seq, set(twin.refused)
        run.start(Plan((step,), total, None, twin.plan.chunks))
        run.read = total
        run.marks[total] = twin.marks[total]
        self._state.enter(run)
        self._state.watching(run).begun(run)
        self._state.planned(run)
        return Outcome.STARTED

    def _plan(self, run: Run, exact: Plan, found: Found) -> Plan:
        """With chunks placed where they can be made ready: that takes cells beside those of the exact beginning."""
        plan = self._blending.plan(run, exact, found)
        forked = sum(step.stop for step in plan.steps if isinstance(step, Fork))
        return plan if forked + self._to_prepare(plan, found) <= self._engine.num_cells else exact

    def _to_prepare(self, plan: Plan, found: Found) -> int:
        return cells_to_prepare(self._engine, plan, found, len(self._blending.head))

    # What is known.

    def _known(self, run: Run) -> tuple[list[Resident], Match]:
        if not run.generation.reuses:
            return [], Match((), 0, None)
        return [*self._busy(run), *self._state.residents.views(run.salt)], self._store.match(run.prompt, run.salt)

    def _busy(self, run: Run) -> Iterable[Resident]:
        """Running requests' sequences: they can be shared at once."""
        for other in self._state.running:
            if other.seq is not None and shares(other, run):
                tokens = self._engine.tokens(other.seq)[: other.exact]
                yield Resident(other.seq, tokens, frozenset(other.exact_marks), self._engine.reach(other.seq))

    def _look(self, run: Run) -> Found:
        return self._blending.look(run, self._state.least_tokens(run)) if blends(run) else Found()

    def _stored(self, run: Run, match: Match) -> Stored:
        fetched = run.fetched
        has_logits, tier = match.logits is not None, next(reversed(fetched.tokens), "memory")
        return Stored(match.length, has_logits, self._store.block_tokens, in_words(fetched), tier, fetched.refused)

    def _known_logits(self, plan: Plan, match: Match) -> Vector:
        """Logits after the prompt, of a plan that computes nothing.

        A sequence that is only forked for a beginning may have as many tokens and others at its end.
        """
        whole = (step.seq for step in plan.steps if isinstance(step, Fork) and step.stop == plan.total)
        source = next(whole, None)
        resident = None if source is None else self._state.residents.touch(source)
        marks = (
            [resident.marks]
            if resident
            else [other.exact_marks for other in self._state.running if other.seq == source]
        )
        logits = next((each[plan.total] for each in marks if plan.total in each), match.logits)
        assert logits is not None
        return logits

    # What is worth waiting for.

    def _gain(self, run: Run, other: Run, plan: Plan) -> int:
        """Length of the common beginning if it is worth waiting for, else 0."""
        common = min(other.exact, common_length(run.prompt, other.prompt)) if shares(run, other) else 0
        return common if common - plan.reused >= max(1, self._state.min_tokens) else 0

    def _wait_for(self, run: Run, others: dict[Run, int]) -> bool:
        """Wait for the one that promises most; False if none promises anything."""
        run.waits_for = max(others, key=lambda other: others[other], default=None)
        run.waits_until = 0 if run.waits_for is None else others[run.waits_for]
        return run.waits_until > 0

    def _can_fetch_soon(self, run: Run, plan: Plan) -> bool:
        """Whether a common beginning is just being fetched for another request."""
        fetching = [other for other in self._state.waiting if other.fetch is not None and not other.fetch.done()]
        return self._wait_for(run, {other: self._gain(run, other, plan) for other in fetching})

    def _can_share_soon(self, run: Run, plan: Plan) -> bool:
        """Whether another request is just reading a common beginning."""
        common = {other: self._gain(run, other, plan) for other in self._state.running if other.reading}
        return self._wait_for(run, {other: length for other, length in common.items() if other.read < length})

    def _begin_fetch(self, run: Run, plan: Plan) -> bool:
        """Look into slower tiers for what would have to be computed; once for each request."""
        looks = self._fetch is not None and run.fetch is None and run.generation.reuses
        if not looks or plan.computed < self._state.least_tokens(run):
            return False
        assert self._fetch is not None
        run.clock.fetch_started = time.perf_counter()
        run.fetch = self._fetch(run)
        run.fetch.add_done_callback(lambda _: run.clock.fetched(time.perf_counter()))
        return True

    def _promise(self, run: Run) -> None:
        """What a started request holds in a moment, others can reuse."""
        if self._state.policy.looks_at_reuse:
            for other in self._state.waiting:
                if shares(run, other):
                    common = min(run.exact, common_length(run.prompt, other.prompt))
                    other.reusable = max(other.reusable, common)

    # What is put back.

    def _restore(self, run: Run, plan: Plan, match: Match, found: Found, victims: list[Run]) -> bool:
        """Fork and place as planned; False if there is no room. Then, and on an error, nothing is left behind.

        Parts of chunks are only prepared: their places come when the prompt has been read up to them.
        """
        fork = next((step for step in plan.steps if isinstance(step, Fork)), None)
        if not self._room.make_sequence(keep=[] if fork is None else [fork.seq]):
            return False
        seq = self._engine.open() if fork is None else self._engine.fork(fork.seq, fork.stop)
        try:
            if fork is not None:
                self._state.residents.touch(fork.seq)
            placed = [block.position + len(block.tokens) for block in match.blocks]  # the last may go beyond the prompt
            cells = max(plan.total, *placed, 0) - (0 if fork is None else fork.stop) + 1
            cells = max(cells, self._to_prepare(plan, found))
            # with room for all, a sequence that comes back can be forked anywhere; else it takes what its end can see
            is_tight = not self._room.is_enough(cells) and not run.generation.prompt.chunks and not run.generation.hold
            has_sequence = not plan.blended or self._room.make_sequence(keep=[] if fork is None else [fork.seq])
            if not has_sequence or not self._room.make(cells, [seq], victims):
                self._engine.close(seq)
                return False
            run.parts = self._prepare(plan, found)
            for step in plan.steps:
                if isinstance(step, Place) and step.chunk is None:
                    self._place(seq, step, match, until=step.stop if is_tight else 0)
        except EngineError:
            self._engine.close(seq)
            raise
        run.seq = seq
        return True

    def _place(self, seq: SequenceId, step: Place, match: Match, *, until: int) -> None:
        fingerprint = self._engine.spec.fingerprint
        blocks = [block for block in match.blocks if step.start <= block.position < step.stop]
        assert blocks[0].position == self._engine.length(seq)
        payloads = [payload_of(block, fingerprint) for block in blocks]
        try:
            self._engine.place_all(seq, payloads, until=until)
        except EngineError:
            self._place_each(seq, payloads, match, until=until)
        self._engine.truncate(seq, step.stop)  # the last block may go on with other tokens

    def _place_each(self, seq: SequenceId, payloads: Iterable[Payload], match: Match, *, until: int) -> None:
        """One by one, so that it is known what the engine refuses: nobody is to find that again. Raises EngineError."""
        for payload in payloads:
            try:
                self._engine.place(seq, payload, payload.position, until=until)
            except ContextFull:
                raise
            except EngineError:
                self._store.discard(match, payload.position // self._store.block_tokens)
                raise

    def _prepare(self, plan: Plan, found: Found) -> deque[Part]:
        """Parts of chunks; those chunks that the engine refuses are forgotten. Raises EngineError."""
        try:
            return prepare(self._engine, plan, found)
        except ContextFull:
            raise
        except EngineError:
            self._blending.discard(self._engine, plan, found)
            raise
