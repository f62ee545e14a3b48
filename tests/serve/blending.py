"""Blended prompts for tests, and what an engine without a server computes for their plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tests.engine.conftest import TOY_SPEC

from rekindle.engine.protocol import Engine, SequenceId, Work
from rekindle.engine.toy import ToyEngine
from rekindle.reuse.plan import Place, Plan
from rekindle.reuse.prompt import Prompt, join
from rekindle.tokens import Tokens, as_tokens

HEAD = [1]
GAP = [2, 2]


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
