"""What one step computes: a token of every answer, and prompt tokens as far as the pace and the cells allow."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from rekindle.engine.protocol import Work
from rekindle.errors import EngineError
from rekindle.serve.pace import Pace
from rekindle.serve.policies import Rank
from rekindle.serve.run import Run
from rekindle.serve.state import State

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Batch:
    """Requests and their work, side by side."""

    runs: list[Run] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    num_decoding: int = 0  # answers that go on
    num_prefill: int = 0  # prompt tokens
    num_tokens: int = 0  # rows of all work together
    num_placed: int = 0  # tokens whose KV is placed between those
    look: Run | None = None  # who looks on before it reads …
    num_looking: int = 0  # … with as much work as so many prompt tokens
    look_cells: int = 0  # and at most so many cells
    seconds: float = 0.0  # that computing it took, without the look


def least_cells(state: State) -> int:
    """Cells that the next step must have: one for every answer, or where there is none, for some prompt to get on."""
    decoding = sum(1 for run in state.running if not run.reading)
    if decoding or not state.running:
        return decoding
    reading = by_urgency(state)
    if reading[0].due:
        return len(reading[0].parts[0].payload)
    if reading[0].looking is not None:
        return reading[0].looking.least_cells
    return 1 if reading[0].generation.use_kv_cache else len(reading[0].prompt)


def make_batch(state: State, pace: Pace) -> Batch:
    """For the cells that are free now. Changes no request, but takes the KV of those that do without a KV cache."""
    batch = Batch()
    for run in state.running:
        if not run.reading:
            _add(batch, state, run, 1)
    if len(batch.runs) == len(state.running):
        return batch
    reading = [run for run in by_urgency(state) if not run.due]
    hurried = any(run.generation.warm for run in reading)  # who comes has to wait for one step of it
    unread = sum(run.unread for run in reading)
    budget = pace.chunk(batch.num_decoding, len(reading), unread, hurried=hurried) if reading else 0
    for run in reading:
        room = state.engine.num_free_cells - batch.num_tokens - batch.num_placed - batch.look_cells
        if budget <= 0:
            break
        if run.looking is not None:  # where nobody else gets on, it is to find out that it can't
            if batch.look is None and (room >= run.looking.least_cells or not batch.runs):
                batch.look, batch.look_cells = run, min(room, run.looking.most_cells)
                batch.num_looking = min(budget, run.looking.cost)
                budget -= batch.num_looking
        elif room > 0 and (run.generation.use_kv_cache or len(run.prompt) <= room):
            budget -= _add(batch, state, run, min(budget, room), room)
    return batch


def by_urgency(state: State) -> list[Run]:
    """Requests whose prompts are being read. One that others wait for is as urgent as the most urgent of them."""
    ranks: dict[Run, Rank] = {run: state.rank(run) for run in state.running if run.reading}
    for waiting in state.waiting:
        if waiting.waits_for in ranks:
            ranks[waiting.waits_for] = min(ranks[waiting.waits_for], state.rank(waiting))
    return sorted(ranks, key=lambda run: ranks[run])


def place_in_turn(batch: Batch, error: EngineError) -> bool:
    """After an error: have each request do no more than what comes before the next part of a chunk, now and from now on.

    So one whose KV can't be placed is told apart from the others. False if they did no more than that.
    """
    mixed = [index for index, work in enumerate(batch.work) if work.placed]
    for index in mixed:
        run, work = batch.runs[index], batch.work[index]
        run.context.run(_log.warning, "chunks' KV is placed part by part, as all at once has failed: %s", error)
        run.in_turn = True
        tokens = work.tokens[: work.placed[0].position - run.read]
        batch.work[index] = replace(work, tokens=tokens, logits=False, placed=())
        batch.num_tokens -= len(work.tokens) - len(tokens)
        batch.num_prefill -= len(work.tokens) - len(tokens)
    batch.num_placed = 0
    return bool(mixed)


def _add(batch: Batch, state: State, run: Run, count: int, room: int = 0) -> int:
    """Returns how many tokens. There is `room` for so many cells."""
    assert run.seq is not None
    if not run.generation.use_kv_cache:
        state.engine.truncate(run.seq, 0)
    at_once = state.engine.places_between and not batch.num_decoding and not run.in_turn
    work = run.work(count, room if at_once else 0)
    batch.runs.append(run)
    batch.work.append(work)
    batch.num_tokens += len(work.tokens)
    batch.num_placed += work.num_cells - len(work.tokens)
    if run.reading:
        batch.num_prefill += len(work.tokens)
    else:
        batch.num_decoding += 1
    return len(work.tokens)
