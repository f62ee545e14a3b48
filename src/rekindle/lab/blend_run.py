"""One blended prompt on a bare engine: chunks on their own, what is remembered of them, plans carried out, answers.

What is done here is what a server does with a blended request, without its store and its queue: KV of chunks is at hand
as payloads. So times are those of restoring from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import Engine, Payload, Placed, SequenceId, Work
from rekindle.lab.blend_tasks import Asked, BlendTask
from rekindle.reuse.blend import Blend, Memory, OnItsOwn, make_blend_plan
from rekindle.reuse.blend_select import Floats
from rekindle.reuse.plan import Fork, Place, Plan, Resident, Stored, make_plan
from rekindle.reuse.prompt import Prompt
from rekindle.serve.looking import begin_look, look_plan
from rekindle.serve.run import Part
from rekindle.tokens import SHORT_REST, Tokens, as_tokens

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt that was read in some way, ready for its questions."""

    seq: SequenceId
    seconds: float  # from nothing to here
    computed: int  # tokens
    calls: int  # of the model
    plan: Plan


@dataclass(frozen=True, eq=False)
class Reply:
    """The greedy answer to one question."""

    tokens: tuple[int, ...]  # without the end
    logits: Vector  # of the first


class ChunkKV:
    """KV of chunks on their own, and what is remembered of them."""

    def __init__(self, engine: Engine, head: Tokens) -> None:
        self._engine, self._head = engine, head
        self.memory = Memory()
        self._payloads: dict[bytes, Payload] = {}

    def warm(self, chunk: Tokens) -> Payload:
        """Compute a chunk on its own, once."""
        key = chunk.tobytes()
        if key not in self._payloads:
            seq = self._engine.open()
            self._engine.forward([Work(seq, np.concatenate([self._head, chunk]), logits=False)])
            self._payloads[key] = self._engine.export(seq, len(self._head), len(self._head) + len(chunk))
            self._engine.close(seq)
        return self._payloads[key]

    def remember(self, prompt: Prompt, seq: SequenceId) -> None:
        """Compare the chunks of a prompt that was read exactly with themselves on their own."""
        for chunk in prompt.chunks:
            tokens = prompt.tokens[chunk.start : chunk.stop]
            if len(tokens):
                in_place = self._engine.export(seq, chunk.start, chunk.stop)
                self.memory.add(tokens.tobytes(), self._engine.compare(in_place, self.warm(tokens)))

    def known(self, prompt: Prompt) -> list[OnItsOwn | None]:
        """What is at hand of each chunk of a prompt."""
        keys = [prompt.tokens[chunk.start : chunk.stop].tobytes() for chunk in prompt.chunks]
        return [
            OnItsOwn(self._payloads[key].position, len(self._payloads[key]), self.memory.get(key))
            if key in self._payloads
            else None
            for key in keys
        ]

    def payload(self, prompt: Prompt, chunk: int) -> Payload:
        span = prompt.chunks[chunk]
        return self._payloads[prompt.tokens[span.start : span.stop].tobytes()]


def read_fully(engine: Engine, prompt: Prompt) -> Reading:
    """Prefill, nothing reused."""
    return carry_out(engine, prompt, make_plan(prompt, [], Stored()))


def read_after(engine: Engine, prompt: Prompt, other: SequenceId) -> Reading:
    """What a prefix cache gives: share the beginning of a sequence that is in the engine."""
    plan = make_plan(prompt, [Resident(other, engine.tokens(other))], Stored())
    return carry_out(engine, prompt, plan)


def read_blended(
    engine: Engine, prompt: Prompt, kv: ChunkKV, blend: Blend, *, at_once: bool = True, question: Tokens | None = None
) -> Reading:
    """Chunks placed, some of their tokens computed anew. The clock includes making the plan, and looking first.

    `at_once`: turn all chunks to where they go by one `move`, else each by its own `place`. `question`: what will be asked
    behind the prompt, for choices that look at it.
    """
    if blend.looks:
        return _read_looked(engine, prompt, kv, blend, as_tokens([]) if question is None else question)
    began = time.perf_counter()  # clock on: all payloads are in memory
    plan = make_blend_plan(prompt, make_plan(prompt, [], Stored()), kv.known(prompt), blend)
    placed = [chunk for chunk in plan.chunks if chunk.placed]
    payloads = [kv.payload(prompt, chunk.index) for chunk in placed]
    if at_once and len(payloads) > 1:
        payloads = engine.move(payloads, [chunk.start for chunk in placed])
    prepared = time.perf_counter() - began
    reading = carry_out(engine, prompt, plan, {chunk.index: each for chunk, each in zip(placed, payloads, strict=True)})
    return replace(reading, seconds=reading.seconds + prepared)


def read_singly(engine: Engine, prompt: Prompt, kv: ChunkKV, blend: Blend) -> Reading:
    """CacheBlend's own rule, for "deviation": the highest scores are recomputed token by token, and what is in no chunk
    with them, after all chunks were placed. A server goes by ranges, which on some engines are a call each.
    """

    def choose(seq: SequenceId, scores: Floats) -> None:
        is_chunk = np.zeros(len(prompt), dtype=bool)
        for chunk in prompt.chunks:
            is_chunk[chunk.start : chunk.stop] = True
        chunked = np.flatnonzero(is_chunk)
        best = chunked[np.argsort(-scores[chunked], kind="stable")[: round(blend.ratio * len(chunked))]]
        chosen = ~is_chunk
        chosen[best] = True
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).tolist()
        engine.recompute(seq, list(zip(edges[::2], edges[1::2], strict=True)))

    return _read_looked(engine, prompt, kv, blend, as_tokens([]), choose)


def _read_looked(
    engine: Engine,
    prompt: Prompt,
    kv: ChunkKV,
    blend: Blend,
    question: Tokens,
    choose: Callable[[SequenceId, Floats], None] | None = None,
) -> Reading:
    """As a server does, all at once; with `choose`, all chunks are placed first. What was computed is given in tokens that
    go through all layers, as many as its token-layers make.
    """
    began, computed, calls = time.perf_counter(), engine.num_token_layers, engine.num_calls
    asked = prompt if blend.select != "query" else replace(prompt, tokens=np.concatenate([prompt.tokens, question]))
    exact, known = make_plan(asked, [], Stored()), kv.known(asked)
    parts = [
        Part(kv.payload(asked, step.chunk), first, first + step.stop - step.start, step.start, step.chunk)
        for step in look_plan(asked, exact, known).steps
        if isinstance(step, Place) and step.chunk is not None
        for first in [step.start - asked.chunks[step.chunk].start]
    ]
    seq, looking = engine.open(), begin_look(engine, asked, exact, known, blend, parts)
    while not looking.done:
        looking.go_on(seq, len(asked), engine.num_free_cells)
    plan, due = looking.chosen(SHORT_REST, None if choose is None else Blend("none"))
    read_on(engine, seq, prompt, [part for part in due if part.position < len(prompt)])
    if choose is not None:
        choose(seq, looking.scores)
    work = (engine.num_token_layers - computed) / engine.spec.num_layers
    return Reading(seq, time.perf_counter() - began, round(work), engine.num_calls - calls, plan)


def carry_out(engine: Engine, prompt: Prompt, plan: Plan, payloads: Mapping[int, Payload] | None = None) -> Reading:
    """Every step of a plan, from left to right. `payloads` of chunks, by their index."""
    began, computed, calls = time.perf_counter(), engine.num_computed, engine.num_calls
    fork = next((step for step in plan.steps if isinstance(step, Fork)), None)
    seq = engine.open() if fork is None else engine.fork(fork.seq, fork.stop)
    placed = []
    for step in plan.steps:
        if isinstance(step, Place):
            assert step.chunk is not None and payloads is not None
            first = step.start - prompt.chunks[step.chunk].start
            placed.append(Placed(payloads[step.chunk], first, first + step.stop - step.start, step.start))
    read_on(engine, seq, prompt, placed)
    seconds = time.perf_counter() - began
    return Reading(seq, seconds, engine.num_computed - computed, engine.num_calls - calls, plan)


def read_on(engine: Engine, seq: SequenceId, prompt: Prompt, placed: Sequence[Placed]) -> None:
    """The rest of a prompt, with stored KV where it goes: as a server does, in one call where the engine can."""
    begins = [engine.length(seq), *(piece.position + len(piece) for piece in placed)]
    gaps = list(zip(begins, [*(piece.position for piece in placed), len(prompt)], strict=True))
    last = max((index for index, (start, stop) in enumerate(gaps) if start < stop), default=0)
    if engine.places_between and last:
        tokens = np.concatenate([prompt.tokens[start:stop] for start, stop in gaps])
        engine.forward([Work(seq, tokens, logits=last == len(placed), placed=tuple(placed[:last]))])
        gaps, placed = [], placed[last:]
    for gap, piece in zip_longest(gaps, placed):
        if gap is not None and gap[0] < gap[1]:
            engine.forward([Work(seq, prompt.tokens[gap[0] : gap[1]], logits=gap[1] == len(prompt))])
        if piece is not None:
            engine.place(seq, piece.payload, piece.position, start=piece.start, stop=piece.stop)


def first_token_seconds(engine: Engine, seq: SequenceId, asked: Asked) -> float:
    """From a prompt that was read to the logits of the answer's first token."""
    began = time.perf_counter()
    fork = engine.fork(seq, engine.length(seq))
    engine.forward([Work(fork, asked.tokens)])
    seconds = time.perf_counter() - began  # clock off: logits are there
    engine.close(fork)
    return seconds


def answer(engine: Engine, seq: SequenceId, asked: Sequence[Asked], is_end: Callable[[int], bool]) -> list[Reply]:
    """Greedy answers to all questions, one batch for all of them at each step."""
    forks = [engine.fork(seq, engine.length(seq)) for _ in asked]
    logits = engine.forward([Work(fork, each.tokens) for fork, each in zip(forks, asked, strict=True)])
    first = [logits[fork].copy() for fork in forks]
    tokens: list[list[int]] = [[] for _ in asked]
    running = dict(enumerate(forks))
    rows = {index: first[index] for index in running}
    while running:
        for index in list(running):
            token = int(rows[index].argmax())
            if is_end(token):
                del running[index]
                continue
            tokens[index].append(token)
            if len(tokens[index]) >= asked[index].max_tokens:
                del running[index]
        if running:
            work = [Work(fork, as_tokens([tokens[index][-1]])) for index, fork in running.items()]
            logits = engine.forward(work)
            rows = {index: logits[fork] for index, fork in running.items()}
    for fork in forks:
        engine.close(fork)
    return [Reply(tuple(said), row) for said, row in zip(tokens, first, strict=True)]


def met_before(engine: Engine, task: BlendTask, kv: ChunkKV) -> SequenceId:
    """Read the chunks in the order in which they were met first, compute them on their own, remember the difference."""
    prompt = task.met_prompt
    seq = read_fully(engine, prompt).seq
    kv.remember(prompt, seq)
    return seq
