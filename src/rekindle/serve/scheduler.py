"""Requests over time, one step after another: admit, batch, forward, emit.

A batch holds one token of every decoding request and as much prefill as the budget allows, so that a long prompt never
stalls the others. A prompt whose beginning is being read right now waits for it and forks. When cells run out, residents
go to the store first; then the request that was admitted last is swapped out, and resumed later with nothing recomputed.

Prompts that are only to be warmed are read one at a time and while nobody else has work. When a request comes, what was
read so far makes way at once, as a resident; it goes on from there.

Here is no thread and no queue to wait on: a worker calls `step` as long as it returns work done.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum

from rekindle.engine.protocol import Engine, Logits, Payload, SequenceId, Work
from rekindle.errors import EngineError, RekindleError
from rekindle.kv.speed import Speed
from rekindle.kv.store import Fetched, Match, Store
from rekindle.model.tokenizer import Tokenizer
from rekindle.reuse.plan import Fork, Place, Plan, Resident, Stored, make_plan
from rekindle.serve.observe import Observer
from rekindle.serve.request import Failed, FinishReason
from rekindle.serve.residents import Residents
from rekindle.serve.run import Run
from rekindle.serve.sampling import Vector
from rekindle.tokens import common_length

_log = logging.getLogger(__name__)
_NOBODY = Observer()
LONE_BUDGET = 2048  # prompt tokens per step when nobody is decoding


@dataclass
class Counts:
    """Totals since the start."""

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    swaps: int = 0


@dataclass(frozen=True)
class Step:
    """What one step did."""

    admitted: int = 0
    computed: int = 0  # tokens forwarded
    finished: int = 0  # requests that ended, in whatever way
    decoded: int = 0  # of the computed tokens, those of answers
    seconds: float = 0.0  # the whole step

    @property
    def idle(self) -> bool:
        return not (self.admitted or self.computed or self.finished)


class Admission(Enum):
    """What came of the attempt to start a request."""

    STARTED = "started"
    NO_ROOM = "no room"
    WORTH_WAITING = "worth waiting"  # another request is reading the same beginning


@dataclass(eq=False)
class _Batch:
    runs: list[Run] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


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
        fetch: Callable[[Run], Future[Fetched]] | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`fetch` starts to bring a prompt's KV from slower tiers into memory; whoever gives it wakes the worker."""
        self._engine = engine
        self._store = store
        self._tokenizer = tokenizer
        self._max_running = max_running
        self._budget = prefill_budget
        self._min_tokens = min_tokens
        self._max_length = max_length
        self._observer = observer or Observer()
        self.residents = Residents(engine, store, max_residents=max_residents, observer=self._observer)
        self.waiting: deque[Run] = deque()
        self.running: list[Run] = []  # in the order of admission
        self.counts = Counts()
        self.prefill_speed = Speed()
        self._fetch = fetch

    def submit(self, run: Run) -> None:
        self.waiting.append(run)
        self._watching(run).queued(run)

    def step(self) -> Step:
        started = time.perf_counter()
        step = replace(self._step(), seconds=time.perf_counter() - started)
        self._observer.stepped(step)
        return step

    def _step(self) -> Step:
        finished = self._end_cancelled()
        admitted = self._admit()
        batch = _Batch()
        try:
            self._fill(batch)
            logits = self._forward(batch)
        except EngineError as error:
            return Step(admitted, 0, finished + self._fail(batch.runs or list(self.running), error))
        decoded = sum(1 for run in batch.runs if run.generated)
        finished += self._emit(batch, logits)
        return Step(admitted, sum(len(item.tokens) for item in batch.work), finished, decoded)

    def clear_cache(self) -> None:
        """Forget residents and what is in memory; running requests go on."""
        self.residents.clear()
        self._store.clear_memory()

    def check_integrity(self) -> None:
        """Recount engine and store, and every sequence's owner. Raises AssertionError."""
        self._engine.check_integrity()
        self._store.check_integrity()
        assert all(run.seq is not None for run in self.running)
        assert all(run.seq is None for run in self.waiting)

    def abandon(self, error: RekindleError) -> None:
        """Tell every request that it failed, without touching the engine, which may be broken."""
        for run in (*self.waiting, *self.running):
            run.send(Failed(error))
            self._watching(run).failed(run, error)
        self.waiting.clear()
        self.running.clear()

    def _watching(self, run: Run) -> Observer:
        """Who is told of a run: of warming nobody, as it is no request that anybody waits for."""
        return _NOBODY if run.generation.warm else self._observer

    # Admission.

    def _admit(self) -> int:
        """Start waiting requests, oldest first, as long as there is room. Some wait for a prefix that is being read."""
        admitted = 0
        is_busy = any(not run.generation.warm for run in (*self.waiting, *self.running))
        if is_busy:
            self._park()
        for run in list(self.waiting):
            if len(self.running) >= self._max_running:
                break
            if run.generation.warm and (is_busy or self.running):
                continue
            try:
                started = self._resume(run) if run.swapped is not None else self._start(run)
            except EngineError as error:
                self._fail([run], error)
                continue
            if started is Admission.NO_ROOM:
                break
            admitted += started is Admission.STARTED
        return admitted

    def _start(self, run: Run) -> Admission:
        """Plan a prompt and put what is reused into the engine."""
        if run.fetch is not None and not run.fetch.done():
            return Admission.WORTH_WAITING
        started = time.perf_counter()
        residents, match = self._known(run)
        plan = make_plan(run.generation.prompt, residents, self._stored(run, match))
        if self._begin_fetch(run, plan):
            return Admission.WORTH_WAITING
        if self._readable_soon(run) - plan.reused >= max(1, self._min_tokens):
            return Admission.WORTH_WAITING
        planned = time.perf_counter()
        logits = None if plan.computed else self._known_logits(plan, match)
        try:
            restored = self._restore(run, plan, match)
        except EngineError as error:
            _log.warning("stored KV cannot be used and is computed again: %s", error)
            self._store.clear_memory()
            plan, logits = make_plan(run.generation.prompt, [], Stored()), None
            restored = self._restore(run, plan, Match((), 0, None))
        if not restored:
            return Admission.NO_ROOM
        run.clock.admitted, run.clock.planned, run.clock.restored = started, planned, time.perf_counter()
        run.plan, run.read = plan, plan.reused
        self._enter(run)
        self._count(run, plan)
        self._watching(run).admitted(run, plan)
        if logits is not None:
            run.marks[plan.total] = logits
            reason = self._advance(run, logits)
            if reason is not None:
                self._end(run, reason)
        return Admission.STARTED

    def _park(self) -> None:
        """What is being warmed makes way."""
        for run in [run for run in self.running if run.generation.warm]:
            assert run.seq is not None and run.plan is not None
            run.parked += run.read - run.plan.reused
            self._leave(run)
            self.waiting.append(run)

    def _begin_fetch(self, run: Run, plan: Plan) -> bool:
        """Look into slower tiers for what would have to be computed; once for each request."""
        looks = self._fetch is not None and run.fetch is None and run.generation.reuses
        if not looks or plan.computed < max(1, self._min_tokens):
            return False
        assert self._fetch is not None
        run.clock.fetch_started = time.perf_counter()
        run.fetch = self._fetch(run)
        run.fetch.add_done_callback(lambda _: setattr(run.clock, "fetch_ended", time.perf_counter()))
        return True

    def _stored(self, run: Run, match: Match) -> Stored:
        fetched = Fetched() if run.fetch is None or run.fetch.exception() else run.fetch.result()
        words = ", ".join(f"{count} tokens fetched from {tier}" for tier, count in fetched.tokens.items())
        return Stored(match.length, match.logits is not None, self._store.block_tokens, words, fetched.refused)

    def _readable_soon(self, run: Run) -> int:
        """Tokens of this prompt that a request which is being read now will hold in a moment."""
        if not run.generation.reuses:
            return 0
        readers = [other for other in self.running if other.reading and _shares(other, run)]
        return max((common_length(run.prompt, other.prompt) for other in readers), default=0)

    def _enter(self, run: Run) -> None:
        self.waiting.remove(run)
        self.running.append(run)

    def _known(self, run: Run) -> tuple[list[Resident], Match]:
        if not run.generation.reuses:
            return [], Match((), 0, None)
        busy = [
            Resident(other.seq, self._engine.tokens(other.seq), frozenset(other.marks))
            for other in self.running
            if other.seq is not None and _shares(other, run)
        ]
        return busy + self.residents.views(_salt(run)), self._store.match(run.prompt, _salt(run))

    def _restore(self, run: Run, plan: Plan, match: Match) -> bool:
        """Fork and place as planned; False if there is no room. Then, and on an error, nothing is left behind."""
        fork = next((step for step in plan.steps if isinstance(step, Fork)), None)
        while not self._engine.num_free_sequences:
            if not self.residents.evict(keep=[] if fork is None else [fork.seq]):
                return False
        seq = self._engine.open() if fork is None else self._engine.fork(fork.seq, fork.stop)
        try:
            if fork is not None:
                self.residents.touch(fork.seq)
            placed = [block.position + len(block.tokens) for block in match.blocks]  # the last may go beyond the prompt
            if not self._make_room(max(plan.total, *placed, 0) - (0 if fork is None else fork.stop) + 1, seq):
                self._engine.close(seq)
                return False
            for step in plan.steps:
                if isinstance(step, Place):
                    self._place(seq, step, match)
        except EngineError:
            self._engine.close(seq)
            raise
        run.seq = seq
        return True

    def _place(self, seq: SequenceId, step: Place, match: Match) -> None:
        fingerprint = self._engine.spec.fingerprint
        for block in match.blocks:
            if step.start <= block.position < step.stop:
                payload = Payload(block.tokens, block.position, block.payload, fingerprint)
                self._engine.place(seq, payload, block.position)
        self._engine.truncate(seq, step.stop)  # the last block may go on with other tokens

    def _known_logits(self, plan: Plan, match: Match) -> Vector:
        """Logits after the prompt, of a plan that computes nothing."""
        source = next((step.seq for step in plan.steps if isinstance(step, Fork)), None)
        resident = None if source is None else self.residents.touch(source)
        marks = [resident.marks] if resident else [other.marks for other in self.running if other.seq == source]
        logits = next((each[plan.total] for each in marks if plan.total in each), match.logits)
        assert logits is not None
        return logits

    def _count(self, run: Run, plan: Plan) -> None:
        if run.generation.reuses and not run.generation.warm:
            self.counts.requests += 1
            self.counts.hits += plan.reused > 0
            self.counts.prompt_tokens += plan.total
            self.counts.cached_tokens += plan.reused

    # Room.

    def _make_room(self, cells: int, *new: SequenceId) -> bool:
        """Free cells, beside those that running requests are about to take, by letting residents go.

        False, and nothing has left, if that would not be enough. `new` are sequences of the request that asks.
        """
        promised = sum(1 + len(run.prompt) - run.read for run in self.running)
        if self._engine.num_free_cells >= cells + promised:
            return True
        held = self._engine.num_held([*new, *(run.seq for run in self.running if run.seq is not None)])
        if self.running and self._engine.num_cells - held < cells + promised:
            return False
        while self._engine.num_free_cells < cells + promised and self.residents.evict():
            pass
        return bool(self._engine.num_free_cells >= cells + promised or not self.running)

    def _swap_out(self, run: Run) -> None:
        """Take a running request's KV out of the engine; it waits at the head of the queue."""
        assert run.seq is not None
        run.swapped = self._engine.export(run.seq, 0, self._engine.length(run.seq))
        self._engine.close(run.seq)
        run.seq = None
        self.running.remove(run)
        self.waiting.appendleft(run)
        self.counts.swaps += 1
        self._watching(run).swapped(run)

    def _resume(self, run: Run) -> Admission:
        assert run.swapped is not None
        while not self._engine.num_free_sequences and self.residents.evict():
            pass
        if not self._engine.num_free_sequences or not self._make_room(len(run.swapped) + 1):
            return Admission.NO_ROOM
        run.seq = self._engine.open()
        self._engine.place(run.seq, run.swapped, 0)
        run.swapped = None
        self._enter(run)
        self._watching(run).resumed(run)
        return Admission.STARTED

    # The batch.

    def _fill(self, batch: _Batch) -> None:
        """One token of every decoding request, and of the reading ones, oldest first, as much as the budget allows."""
        decoding = [run for run in self.running if not run.reading]
        is_small = decoding or any(run.generation.warm for run in self.running)  # who comes has to wait for one step
        budget = self._budget if is_small else max(self._budget, LONE_BUDGET)
        first = next((run for run in self.running if run.reading), None)
        least = 0 if first is None else 1 if first.generation.use_kv_cache else len(first.prompt)
        self._secure(len(decoding) or least)
        for run in [run for run in self.running if not run.reading]:
            self._add(batch, run, 1)
        for run in [run for run in self.running if run.reading]:
            room = self._engine.num_free_cells - sum(len(item.tokens) for item in batch.work)
            if budget <= 0 or room <= 0:
                break
            if run.generation.use_kv_cache or len(run.prompt) <= room:
                budget -= self._add(batch, run, min(budget, room))

    def _add(self, batch: _Batch, run: Run, count: int) -> int:
        assert run.seq is not None
        if not run.generation.use_kv_cache:
            self._engine.truncate(run.seq, 0)
        tokens = run.work(count)
        complete = not run.reading or run.read + len(tokens) >= len(run.prompt)
        batch.runs.append(run)
        batch.work.append(Work(run.seq, tokens, logits=complete))
        return len(tokens)

    def _secure(self, cells: int) -> None:
        """Make sure that every decoding request can take one token: residents leave, then the youngest are swapped out."""
        while self._engine.num_free_cells < cells and self.residents.evict():
            pass
        while self._engine.num_free_cells < cells and len(self.running) > 1:
            victim = self.running[-1]
            cells -= not victim.reading
            try:
                self._swap_out(victim)
            except EngineError as error:
                self._fail([victim], error)

    def _forward(self, batch: _Batch) -> Logits:
        if not batch.work:
            return {}
        started = time.perf_counter()
        logits = self._engine.forward(batch.work)
        if all(run.reading for run in batch.runs):
            self.prefill_speed.add(sum(len(item.tokens) for item in batch.work), time.perf_counter() - started)
        for run, item in zip(batch.runs, batch.work, strict=True):
            if run.reading:
                run.prefill_calls += 1
                run.read = min(len(run.prompt), run.read + len(item.tokens))
        return logits

    def _emit(self, batch: _Batch, logits: Logits) -> int:
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
        if run.generation.warm:
            return "length"
        before = run.clock.last_token
        reason = run.advance(logits, self._tokenizer.piece, self._tokenizer.is_end)
        if before:
            self._watching(run).token(run, run.clock.last_token - before)
        else:
            self._watching(run).first_token(run)
        self.counts.generated_tokens += 1
        if reason is None and run.length >= self._max_length:
            reason = "length"
        if reason is not None:
            run.marks[self._engine.length(run.seq)] = logits.copy()
        return reason

    # Endings.

    def _end(self, run: Run, reason: FinishReason) -> None:
        self._leave(run)
        run.finish(reason)
        self._watching(run).finished(run, reason)

    def _leave(self, run: Run) -> None:
        """Take a request out; what it has computed stays as a resident if it is worth keeping.

        Warmed prompts are saved to the store as soon as they are whole, and are the first to leave the engine.
        """
        if run in self.running:
            self.running.remove(run)
        elif run in self.waiting:
            self.waiting.remove(run)
        seq, run.seq, run.swapped = run.seq, None, None
        if seq is None:
            return
        generation = run.generation
        if generation.reuses and self._engine.length(seq) >= max(1, self._min_tokens):
            self.residents.add(seq, _salt(run), run.marks, spare=generation.warm)
            if generation.warm and run.marks:
                self.residents.save(seq)
        else:
            self._engine.close(seq)

    def _end_cancelled(self) -> int:
        cancelled = [run for run in (*self.waiting, *self.running) if run.cancelled]
        for run in cancelled:
            self._end(run, "cancelled")
        return len(cancelled)

    def _fail(self, runs: Iterable[Run], error: RekindleError) -> int:
        runs = list(runs)
        for run in runs:
            self._leave(run)
            run.send(Failed(error))
            self._watching(run).failed(run, error)
        return len(runs)


def _salt(run: Run) -> bytes:
    return run.generation.prompt.salt


def _shares(one: Run, other: Run) -> bool:
    """Whether two requests may use each other's KV."""
    return one.generation.reuses and other.generation.reuses and _salt(one) == _salt(other)
