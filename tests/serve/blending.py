"""Blended prompts for tests, and what an engine without a server computes for their plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tests.engine.conftest import TOY_SPEC
from tests.serve.conftest import Answer, Stage, ids

from rekindle.engine.protocol import Engine, SequenceId, Work
from rekindle.engine.toy import ToyEngine
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Place, Plan, Stored, make_plan
from rekindle.reuse.prompt import Prompt, join
from rekindle.tokens import Tokens, as_tokens

HEAD = [1]
GAP = [2, 2]
A, B, C, D = (ids(seed, count) for seed, count in ((21, 100), (22, 64), (23, 45), (24, 150)))
BLEND = Blend("first", 0.2)


def prompt_of(chunks: Sequence[Sequence[int]], *, gap: Sequence[int] = GAP, salt: bytes = b"") -> Prompt:
    """The head, chunks with a gap behind each, and a question."""
    parts = [(as_tokens(HEAD), False)]
    for chunk in chunks:
        parts += [(as_tokens(chunk), True), (as_tokens(gap), False)]
    return join([*parts, (as_tokens([5, 6, 7]), False)], salt=salt)


def carried_out(engine: Engine, prompt: Prompt, plan: Plan, head: Sequence[int] = HEAD) -> SequenceId:
    """A sequence with what a plan gives: exact where it says so, chunks on their own where it places them."""
    seq = engine.open()
    for step in plan.steps:
        if isinstance(step, Place) and step.chunk is not None:
            assert step.source is not None
            chunk = prompt.chunks[step.chunk]
            own = engine.open()
            engine.forward([Work(own, np.concatenate([as_tokens(head), prompt.tokens[chunk.start : chunk.stop]]))])
            payload = engine.export(own, step.source, step.source + step.stop - step.start)
            engine.close(own)
            engine.place(seq, payload, step.start)
        else:
            engine.forward([Work(seq, prompt.tokens[step.start : step.stop])])
    return seq


def toy_answer(prompt: Prompt, plan: Plan, count: int, head: Sequence[int] = HEAD) -> list[int]:
    """What the toy says after a plan was carried out; its last step computes."""
    engine = ToyEngine(TOY_SPEC, 4000)
    seq = carried_out(engine, prompt, plan, head)
    last = engine.tokens(seq)[-1:]
    engine.truncate(seq, engine.length(seq) - 1)
    said: list[int] = []
    token: Tokens = last
    for _ in range(count):
        said.append(int(engine.forward([Work(seq, token)])[seq].argmax()))
        token = as_tokens(said[-1:])
    return said


def blend_stage(num_cells: int = 2000, **options: object) -> Stage:
    return Stage(num_cells, **({"head": HEAD} | options))  # type: ignore[arg-type]


def study(stage: Stage) -> None:
    """All that is done when nobody asks for anything."""
    while stage.scheduler.use_idle_time():
        stage.run()


def learned(*chunks: list[int], **options: object) -> Stage:
    """A stage that has met these chunks, one by one."""
    stage = blend_stage(**options)  # type: ignore[arg-type]
    for chunk in chunks:
        stage.ask(prompt_of([ids(9, 30), chunk]), 1, blend=BLEND)
        study(stage)
    stage.scheduler.residents.clear()
    return stage


def chunks_of(answer: Answer) -> list[tuple[int, int]]:
    """(placed, recomputed) of each chunk."""
    return [(chunk.placed, chunk.recomputed) for chunk in answer.done.plan.chunks]


def fresh(prompt: Prompt, count: int = 5) -> list[int]:
    return toy_answer(prompt, make_plan(prompt, [], Stored()), count)
