"""Requests over time, one step after another: admit, batch, forward, emit.

A batch holds one token of every decoding request and as much prefill as they can bear, so that a long prompt never stalls
the others. What the words of a step mean is said where they are done:

    who is started, and from what    admission.py    in the order of a policy: policies.py
    who gives way for lack of cells  room.py         idle sequences first: residents.py; before that: rent.py
    what is computed                 batch.py        how much of a prompt at once: pace.py
    what is sampled and sent         run.py
    what is placed of chunks         blending.py     and learned of them in idle time: studies.py

Prompts that are only to be warmed are read one at a time and while nobody else has work. When a request comes, what was
read so far makes way at once, as a resident; it goes on from there.

Here is no thread and no queue to wait on: a worker calls `step` as long as it returns work done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from rekindle.engine.protocol import Engine, Logits
from rekindle.errors import EngineError, RekindleError
from rekindle.kv.speed import Speed
from rekindle.kv.store import Store
from rekindle.model.tokenizer import Tokenizer
from rekindle.serve.admission import Admission, Fetch
from rekindle.serve.batch import Batch, least_cells, make_batch, place_in_turn
from rekindle.serve.blending import Blending, place_due
from rekindle.serve.observe import Observer
from rekindle.serve.pace import Pace
from rekindle.serve.policies import Policy
from rekindle.serve.rent import EXPECTED_ANSWER, Rent
from rekindle.serve.request import Failed, FinishReason
from rekindle.serve.residents import Residents, patient
from rekindle.serve.room import Room
from rekindle.serve.run import Run
from rekindle.serve.sampling import Vector
from rekindle.serve.scores import Scores
from rekindle.serve.state import Counts, State
from rekindle.serve.studies import Studies
from rekindle.tokens import as_tokens

_log = logging.getLogger(__name__)


class Step(NamedTuple):
    """What one step did."""

    admitted: int = 0
    computed: int = 0  # tokens forwarded
    finished: int = 0  # requests that ended, in whatever way
    decoded: int = 0  # of the computed tokens, those of answers
    seconds: float = 0.0  # the whole step

    @property
    def idle(self) -> bool:
        return not (self.admitted or self.computed or self.finished)


class Scheduler:
    """Owns the engine's sequences. Not thread-safe."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        tokenizer: Tokenizer,
        *,
        max_running: int,
        max_residents: int,
        prefill_budget: int,
        min_tokens: int,
        max_length: int,
        slowdown: float = math.inf,
        fetch: Fetch | None = None,
        observer: Observer | None = None,
        policy: Policy | None = None,
        blending: Blending | None = None,
    ) -> None:
        """At most `prefill_budget` prompt tokens beside answers, and no more than make a step `slowdown` times as long.

        `fetch` starts to bring a prompt's KV from slower tiers into memory; whoever gives it wakes the worker.
        """
        self._engine = engine
        self._store = store
        self._tokenizer = tokenizer
        self._max_length = max_length
        observer = observer or Observer()
        self._state = State(
            engine=engine,
            store=store,
            residents=Residents(engine, store, max_residents=max_residents, observer=observer),
            policy=policy or Policy(),
            observer=observer,
            max_running=max_running,
            min_tokens=min_tokens,
        )
        self._room = Room(self._state)
        self._rent = Rent(engine, store, self._state.residents)
        head = as_tokens([])
        blending = self._blending = blending or Blending(store, head, Scores(engine.spec.fingerprint, head))
        self._admission = Admission(self._state, self._room, blending, fetch)
        self._studies = Studies(self._state, blending, max_length=max_length, submit=self.submit)
        self._pace = Pace(limit=prefill_budget, slowdown=slowdown)

    @property
    def waiting(self) -> list[Run]:
        """In the order of arrival; those that were swapped out are among them."""
        return self._state.waiting

    @property
    def running(self) -> list[Run]:
        return self._state.running

    @property
    def residents(self) -> Residents:
        return self._state.residents

    @property
    def counts(self) -> Counts:
        return self._state.counts

    @property
    def prefill_speed(self) -> Speed:
        """Of prompt tokens when nothing else is computed."""
        return self._pace.prefill

    def submit(self, run: Run) -> None:
        self._state.arrive(run)
        self._admission.expect(run)
        self._state.watching(run).queued(run)

    def step(self) -> Step:
        started = time.perf_counter()
        step = self._step()._replace(seconds=time.perf_counter() - started)
        self._state.observer.stepped(step)
        return step

    def _step(self) -> Step:
        finished = self._end_cancelled()
        self._park_warming()
        admitted, ended = self._admit()
        batch = Batch()
        try:
            self._collect_rent(admitted - ended)
            self._room.secure(least_cells(self._state), self._fail)
            place_due(self._state)
            batch = make_batch(self._state, self._pace)
            logits = self._forward(batch)
        except EngineError as error:
            for run in batch.runs or list(self.running):
                self._fail(run, error)
                finished += 1
            return Step(admitted, 0, finished + ended)
        finished += self._emit(batch, logits)
        finished += self._look(batch)
        return Step(admitted, batch.num_tokens + batch.num_looking, finished + ended, batch.num_decoding)

    def use_idle_time(self, hurried: Callable[[], bool] = patient) -> bool:
        """Do one thing more that nobody waits for, or a part of it if somebody comes; False if there is none."""
        return self.residents.save_one(hurried) or self._studies.go_on()

    def when_studied(self, tell: Callable[[], object]) -> None:
        """Call this once when chunks that were met are computed on their own; at once if there are none."""
        self._studies.when_done(tell)

    def clear_cache(self) -> None:
        """Forget residents and what is in memory; running requests go on."""
        self.residents.clear()
        self._studies.clear()
        self._store.clear_memory()

    def let_go(self, holder: str) -> None:
        """Nobody goes on with what this name holds, nor with what it has just given up."""
        self._end_cancelled()
        self.residents.let_go(holder)

    def check_integrity(self) -> None:
        """Recount engine and store, and every sequence's owner. Raises AssertionError."""
        self._engine.check_integrity()
        self._store.check_integrity()
        self._state.check_integrity()

    def abandon(self, error: RekindleError) -> None:
        """Tell every request that it failed, and let nobody wait, without touching the engine, which may be broken."""
        abandoned = (*self.waiting, *self.running)
        self.waiting.clear()
        self.running.clear()
        for run in abandoned:
            run.send(Failed(error))
        self._studies.release()
        for run in abandoned:
            try:
                self._state.watching(run).failed(run, error)
            except Exception:  # it may be what has failed before
                run.context.run(_log.exception, "an observer could not be told of a failure")

    # The parts of a step.

    def _admit(self) -> tuple[int, int]:
        """Start whom there is room for; returns how many, and how many of them ended at once."""
        started: list[Run] = []
        ended = 0
        while (run := self._admission.admit_one(self._fail, started)) is not None:
            started.append(run)
            if not run.reading and not run.generated and len(run.prompt) in run.marks:  # its first logits were kept
                reason = self._advance(run, run.marks[len(run.prompt)])
                if reason is not None:
                    self._end(run, reason)
                    ended += 1
        self._admission.tell_used()
        return len(started), ended

    def _collect_rent(self, num_started: int) -> None:
        if num_started:
            answers = sum(min(run.generation.max_tokens or EXPECTED_ANSWER, EXPECTED_ANSWER) for run in self.running)
            unread = sum(run.unread for run in self.running if run.reading)
            self._rent.collect(answers + unread, len(self.running) - num_started)
        elif self.running:
            self._rent.prepare()

    def _forward(self, batch: Batch) -> Logits:
        if not batch.work:
            return {}
        self._rent.count(batch.num_tokens)
        started = time.perf_counter()
        try:
            logits = self._engine.forward(batch.work)
        except EngineError as error:
            if not place_in_turn(batch, error):
                raise
            logits = self._engine.forward(batch.work)
        seconds = batch.seconds = time.perf_counter() - started
        if batch.num_placed and self._pace.prefill.seconds_per_token is not None:
            pass  # how long the tokens took cannot be told
        elif batch.look is None or not batch.num_decoding:
            self._pace.learn(batch.num_decoding, batch.num_prefill, seconds)
        if self._blending.rows is not None and not batch.num_decoding:
            self._blending.rows.add(batch.num_prefill, seconds)
        if len(batch.runs) == 1 and batch.num_prefill and not batch.num_placed:
            self._store.prefill_cost.add(batch.runs[0].read, batch.num_prefill, seconds)
        for run, item in zip(batch.runs, batch.work, strict=True):
            if run.reading:
                run.got_on(item)
        return logits

    def _look(self, batch: Batch) -> int:
        """A slice of what has to be seen before a prompt is read; returns how many requests it ended: none, or that one."""
        run = batch.look
        if run is None:
            return 0
        started = time.perf_counter()
        try:
            is_planned = self._blending.look_on(run, batch.num_looking, batch.look_cells)
        except EngineError as error:
            self._fail(run, error)
            return 1
        run.prefill_calls += 1
        if batch.num_decoding:  # who is answered waits for it as for prompt tokens
            self._pace.learn(
                batch.num_decoding, batch.num_prefill + batch.num_looking, time.perf_counter() - started + batch.seconds
            )
        if is_planned:
            self._state.planned(run)
        return 0

    def _emit(self, batch: Batch, logits: Logits) -> int:
        """Sample for every request whose logits came, then end those that are complete; returns how many."""
        ended = []
        for run in batch.runs:
            if run.seq in logits:
                if not run.generated:
                    run.marks[len(run.prompt)] = logits[run.seq].copy()
                reason = self._advance(run, logits[run.seq])
                if reason is not None:
                    ended.append((run, reason))
        for run, reason in ended:
            self._end(run, reason)
        return len(ended)

    def _advance(self, run: Run, logits: Vector) -> FinishReason | None:
        """Sample one token; says why the answer is complete, if it is."""
        assert run.seq is not None
        if not run.generation.answers:
            return "length"
        before = run.clock.last_token
        reason = run.advance(logits, self._tokenizer.piece, self._tokenizer.is_end)
        if before:
            self._state.observer.token(run, run.clock.last_token - before)
        else:
            self._state.observer.first_token(run)
        self.counts.generated_tokens += 1
        if reason is None and run.length >= self._max_length:
            reason = "length"
        if reason is not None:
            run.marks[self._engine.length(run.seq)] = logits.copy()
        return reason

    def _park_warming(self) -> None:
        """What is being warmed makes way as soon as anybody else has work."""
        if any(not run.generation.warm for run in (*self.waiting, *self.running)):
            for run in [run for run in self.running if run.generation.warm]:
                assert run.plan is not None
                run.parked += run.read - run.plan.reused
                self._leave(run)
                self._state.put_back(run)

    # Endings.

    def _end(self, run: Run, reason: FinishReason) -> None:
        if reason != "cancelled":
            self._studies.meet(run)
        self._leave(run)
        self._state.remove(run)
        run.finish(reason)
        self._state.watching(run).finished(run, reason)

    def _fail(self, run: Run, error: RekindleError) -> None:
        self._leave(run)
        self._state.remove(run)
        run.send(Failed(error))
        self._state.watching(run).failed(run, error)

    def _leave(self, run: Run) -> None:
        """Take a request's sequence; what it has computed stays as a resident if it is worth keeping.

        Warmed prompts are saved to the store as soon as they are whole, and are the first to leave the engine.
        """
        seq, run.seq, run.swapped = run.seq, None, None
        if seq is None:
            return
        generation = run.generation
        length = min(self._engine.length(seq), run.exact)
        try:
            self._engine.truncate(seq, length)
        except EngineError as error:  # what is not exact is nobody else's to see
            run.context.run(_log.warning, "what a request has computed is not kept: %s", error)
            self._engine.close(seq)
            return
        if generation.reuses and (generation.hold or length >= self._state.least_tokens(run)) and length:
            self.residents.add(seq, run.salt, run.exact_marks, spare=generation.warm, hold=generation.hold)
            if generation.warm and run.marks:
                self.residents.save(seq)
        else:
            self._engine.close(seq)

    def _end_cancelled(self) -> int:
        cancelled = [run for run in (*self.waiting, *self.running) if run.cancelled]
        for run in cancelled:
            self._end(run, "cancelled")
        return len(cancelled)
