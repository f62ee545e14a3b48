"""One request on its way through the scheduler.

waiting -> reading (prefill) -> decoding -> done
              ^  swapped out and in again  ^
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from rekindle.engine.protocol import Payload, Placed, SequenceId, Work
from rekindle.kv.block import Block
from rekindle.kv.store import Fetched, Match
from rekindle.reuse.plan import Plan
from rekindle.serve.grammar import Grammar
from rekindle.serve.request import Done, Event, FinishReason, Generation, Piece, Sink, Timings, TokenInfo, Usage
from rekindle.serve.sampling import Sampler, Vector, largest, log_softmax
from rekindle.serve.text import TextStream
from rekindle.tokens import Tokens, as_tokens

if TYPE_CHECKING:
    from rekindle.serve.looking import Looking

_log = logging.getLogger(__name__)
Bytes = Callable[[int], bytes]
_NOT_STORED = Match((), 0, None)


@dataclass
class Clock:
    """Moments of a request, in seconds of time.perf_counter."""

    arrived: float
    submitted: float
    admitted: float = 0.0
    planned: float = 0.0
    restored: float = 0.0
    fetch_started: float = 0.0
    fetch_ended: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def fetched(self, now: float) -> None:
        """The fetch has ended; the one who waited for it may say so before the one who fetched."""
        self.fetch_ended = min(now, self.fetch_ended or now)


def payload_of(block: Block, fingerprint: bytes) -> Payload:
    """What the store has kept, for the engine whose fingerprint this is."""
    return Payload(block.tokens, block.position, block.payload, fingerprint)


@dataclass(frozen=True, eq=False)
class Part(Placed):
    """Stored KV that is to be placed as part of a chunk."""

    chunk: int  # index among the prompt's
    match: Match = _NOT_STORED  # what was found of the chunk, if it is from the store
    index: int = 0  # of the payload's block in it

    def position_of(self, payload: Payload) -> int:
        """Where the first token of a payload that goes on like this one would come to stand in the prompt."""
        return payload.position + self.position - (self.payload.position + self.start)

    def turned(self, payload: Payload) -> Part:
        """The same tokens of a payload that was turned to where they go."""
        start = self.position - payload.position
        return replace(self, payload=payload, start=start, stop=start + len(self))


@dataclass(eq=False)
class Run:
    """The state of one request. Owned by the scheduler; only `cancelled` is set from outside."""

    generation: Generation
    sink: Sink
    grammar: Grammar | None
    clock: Clock
    cancelled: bool = False
    seq: SequenceId | None = None  # None: waiting or swapped out
    swapped: list[Payload] | None = None  # its KV while it is swapped out, in order
    plan: Plan | None = None
    read: int = 0  # prompt tokens in the engine
    parts: deque[Part] = field(default_factory=deque)  # of chunks, still to be placed
    refused: set[int] = field(default_factory=set)  # chunks that were to be placed, and that the engine did not take
    in_turn: bool = False  # which are placed each in its turn, because an attempt to do more at once has failed
    looking: Looking | None = None  # before its plan is made, at what to compute of its chunks
    pending: int | None = None  # sampled, its KV not computed yet
    generated: list[int] = field(default_factory=list)
    marks: dict[int, Vector] = field(default_factory=dict)  # sequence length -> logits after it
    prefill_calls: int = 0
    parked: int = 0  # tokens that the plan reuses and this run computed: before it made way, or for lack of cells
    fetch: Future[Fetched] | None = None  # of KV from slower tiers; started when something is missing
    text: list[str] = field(default_factory=list)
    context: Context = field(default_factory=copy_context)  # of whoever made the request: its id, its trace

    number: int = 0  # in the order of arrival
    passed: int = 0  # requests that arrived later and were started while this one waited
    reusable: int = 0  # prompt tokens known to be in the engine or in memory, for policies that ask
    waits_for: Run | None = None  # somebody who is just reading, or for whom is fetched, what this prompt begins with
    waits_until: int = 0  # so many tokens of it
    blocked_at: int = -1  # `State.departures` when there was no room

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.generation.sampling)
        self._stream = TextStream(self.generation.stop)

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def prompt(self) -> Tokens:
        return self.generation.prompt.tokens

    @property
    def salt(self) -> bytes:
        return self.generation.prompt.salt

    @property
    def tokens(self) -> Tokens:
        """Prompt and answer."""
        return np.concatenate([self.prompt, as_tokens(self.generated)])

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def priority(self) -> int:
        return self.generation.priority

    @property
    def is_running(self) -> bool:
        """Whether it was started and has KV of its own, in the engine or swapped out."""
        return self.seq is not None or self.swapped is not None

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self.read < len(self.generation.prompt.tokens)  # asked for many times a token

    @property
    def due(self) -> bool:
        """Whether what comes next is not computed but placed."""
        return bool(self.parts) and self.parts[0].position == self.read

    @property
    def unread(self) -> int:
        """Prompt tokens to be computed still, to look or to read."""
        unread = len(self.prompt) - self.read - sum(map(len, self.parts))
        return unread if self.looking is None else self.looking.cost

    @property
    def held(self) -> int:
        """Prompt tokens that have cells."""
        return self.read if self.looking is None else self.looking.position

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.generated)

    @property
    def exact(self) -> int:
        """Tokens from the first on whose KV is what reading them gives: all of them, unless chunks were placed."""
        if self.looking is not None:
            return self.read
        blended = self.plan is not None and self.plan.blended
        return self.plan.exact if self.plan is not None and blended else self.length

    @property
    def exact_marks(self) -> dict[int, Vector]:
        """Logits that others may use."""
        return {length: logits for length, logits in self.marks.items() if length <= self.exact}

    @property
    def fetched(self) -> Fetched:
        """What has come of its fetch from slower tiers."""
        is_lost = self.fetch is None or not self.fetch.done() or self.fetch.cancelled() or self.fetch.exception()
        return Fetched() if self.fetch is None or is_lost else self.fetch.result()

    def work(self, count: int, cells: int = 0) -> Work:
        """The next tokens to compute, at most `count`, and what of chunks goes between them, if that fits in `cells`."""
        assert self.seq is not None
        if not self.generation.use_kv_cache:
            return Work(self.seq, self.tokens)
        if not self.reading:
            assert self.pending is not None
            return Work(self.seq, as_tokens([self.pending]))
        placed = self._between(count, cells)
        begins = [self.read, *(part.position + len(part) for part in placed)]
        following = self.parts[len(placed)].position if len(placed) < len(self.parts) else len(self.prompt)
        ends = [*(part.position for part in placed), following]
        free = np.concatenate([self.prompt[begin:end] for begin, end in zip(begins, ends, strict=True)])
        tokens = free[: min(count, cells - sum(map(len, placed))) if placed else count]
        return Work(self.seq, tokens, len(tokens) == len(free) and following == len(self.prompt), placed)

    def _between(self, count: int, cells: int) -> tuple[Part, ...]:
        """Parts to place between the next tokens: of those that have one of these behind them, what there are cells for."""
        num_taken = num_placed = num_computed = 0
        position, ends = self.read, [*(part.position for part in self.parts), len(self.prompt)][1:]
        for number, (part, end) in enumerate(zip(self.parts, ends, strict=True), 1):
            num_computed += part.position - position
            num_placed += len(part)
            position = part.position + len(part)
            if num_computed >= count or num_computed + num_placed >= cells:
                break
            if position < end:
                num_taken = number
        return tuple(islice(self.parts, num_taken))

    def got_on(self, work: Work) -> None:
        """This much of the prompt is in the engine now."""
        self.prefill_calls += 1
        self.read = min(len(self.prompt), self.read + work.num_cells)
        for _ in work.placed:
            self.parts.popleft()

    def start(self, plan: Plan) -> None:
        """What is planned to be reused is in the engine."""
        self.plan, self.read = plan, plan.begin
        self.waits_for, self.reusable = None, 0

    def advance(self, logits: Vector, piece: Bytes, is_end: Callable[[int], bool]) -> FinishReason | None:
        """Sample the next token and send it. Returns why the answer is complete, if it is."""
        token, info = self._sample(logits, piece)
        now = time.perf_counter()
        self.clock.first_token = self.clock.first_token or now
        self.clock.last_token = now
        if is_end(token) and not self.generation.ignore_eos:
            return "stop"
        self.generated.append(token)
        self.pending = token
        text = self._stream.add(info.piece)
        self.text.append(text)
        self.send(Piece(text, (info,)))
        if self._stream.stopped or (self.grammar is not None and self.grammar.finished):
            return "stop"
        return "length" if len(self.generated) == self.generation.max_tokens else None

    def _sample(self, logits: Vector, piece: Bytes) -> tuple[int, TokenInfo]:
        wanted = self.generation.sampling.top_logprobs
        token = self._sampler.choose(logits if self.grammar is None else self.grammar.mask(logits))
        if self.grammar is not None:
            self.grammar.accept(token)
        if wanted is None:
            return token, TokenInfo(token, piece(token))
        logprobs = log_softmax(logits)
        best = sorted(largest(logprobs, wanted) if wanted else (), key=lambda each: -logprobs[each])
        top = tuple((int(each), piece(int(each)), float(logprobs[each])) for each in best)
        return token, TokenInfo(token, piece(token), float(logprobs[token]), top)

    def finish(self, reason: FinishReason) -> None:
        """Send what was held back, and the end."""
        rest = self._stream.flush()
        if rest:
            self.text.append(rest)
            self.send(Piece(rest, ()))
        assert self.plan is not None or reason == "cancelled"
        plan = self.plan or Plan((), 0, None)
        cached = max(0, plan.reused - self.parked)
        usage = Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=cached,
            blended_tokens=max(0, plan.blended - self.parked),
            completion_tokens=len(self.generated),
        )
        self.send(
            Done(
                reason=reason,
                usage=usage,
                timings=self._timings(),
                plan=plan,
                text="".join(self.text),
                tokens=tuple(self.generated),
                kept=max(self.exact_marks, default=0),
                unread=max(0, len(self.prompt) - self.read),
            )
        )

    def send(self, event: Event) -> None:
        """A sink that fails has no reader any more: the request ends."""
        try:
            self.sink(event)
        except Exception:
            self.context.run(_log.exception, "a request's sink failed; the request is cancelled")
            self.cancelled = True

    def _timings(self) -> Timings:
        clock, now = self.clock, time.perf_counter()

        def span(start: float, stop: float) -> float:
            return max(0.0, stop - start) * 1000 if start and stop else 0.0

        fetch_ms = span(clock.fetch_started, clock.fetch_ended)
        return Timings(
            tokenize_ms=self.generation.tokenize_ms,
            queue_ms=span(clock.submitted, clock.admitted or now) - fetch_ms,
            lookup_ms=span(clock.admitted, clock.planned),
            restore_ms=span(clock.planned, clock.restored) + fetch_ms,
            prefill_ms=span(clock.restored, clock.first_token),
            ttft_ms=span(clock.arrived, clock.first_token),
            decode_ms=span(clock.first_token, clock.last_token),
            total_ms=span(clock.arrived, now),
            prefill_calls=self.prefill_calls,
        )
