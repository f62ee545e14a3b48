"""Blended requests: KV of chunks from the store, placed wherever the chunks now stand.

A chunk on its own is the prompt [head, chunk] and is kept like any other, so what is at hand of it is a matter of a
look-up, in memory here and in slower tiers where blocks are fetched. What `reuse/blend.py` plans with that is carried out
in three parts:

    admission    the exact beginning, as for every prompt; then, if the engine does that faster than to turn each as it is
                 placed, all blocks of which something will be placed are turned to where they will stand, by one `move`
    each step    a part of a block goes into the sequence as soon as the prompt has been read up to it; what is computed
                 in a step ends where the next part begins. An engine that can place KV between tokens that it computes
                 does both in one call, of as many tokens as a step may have, while nobody is being answered: who is
                 would have to wait for all that is placed
    the end      the sequence is cut back to its exact part before anybody else may see it

Blocks lie in the process' memory, not in the engine, until they are placed: a request that is swapped out keeps
them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rekindle.engine.protocol import Engine, Payload
from rekindle.errors import ContextFull, EngineError, InvalidRequest, counted
from rekindle.kv.block import Block
from rekindle.kv.keys import Key
from rekindle.kv.speed import Speed
from rekindle.kv.store import Fetched, Match, Store
from rekindle.model.spec import ModelSpec
from rekindle.reuse.blend import SELECTS, Blend, OnItsOwn, check_select, make_blend_plan
from rekindle.reuse.blend_select import LOOKING, Select
from rekindle.reuse.plan import Place, Plan
from rekindle.reuse.prompt import Prompt
from rekindle.serve.batch import by_urgency
from rekindle.serve.looking import begin_look, look_plan
from rekindle.serve.request import Generation
from rekindle.serve.rows import Rows
from rekindle.serve.run import Part, Run, payload_of
from rekindle.serve.scores import Scores
from rekindle.serve.state import State
from rekindle.tokens import SHORT_REST, Tokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedChunks(Fetched):
    """What came of a blended prompt's fetch; the fields of the class above are those of its exact beginning."""

    chunks: tuple[Fetched, ...] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """What the store's memory has of a prompt's chunks, each on its own."""

    known: list[OnItsOwn | None] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    blocks: list[list[Block]] = field(default_factory=list)  # `whole_blocks` of these


def offered(spec: ModelSpec) -> tuple[Select, ...]:
    """Ways of choosing that there are with an engine."""
    return tuple(select for select in SELECTS if spec.can_look or select not in LOOKING)


def check_layer(blend: Blend, spec: ModelSpec, param: str) -> None:
    """Raises InvalidRequest for a layer at which nothing can be judged in this model."""
    if blend.select == "deviation" and not blend.judged_at(spec.num_layers) < spec.num_layers:
        raise InvalidRequest(
            f"deviation is judged at a layer from 1 to {spec.num_layers - 1} of {spec.name}'s "
            f"{counted(spec.num_layers, 'layer')}, as in the first nothing can differ yet; got {blend.layer}",
            param=param,
        )


def check_blend(generation: Generation, spec: ModelSpec) -> None:
    """Raises InvalidRequest for what can't be blended here."""
    blend = generation.blend
    if blend is None:
        return
    check_select(blend.select, offered(spec), "rekindle.blend.select")
    check_layer(blend, spec, "rekindle.blend.layer")
    check_movable(spec, "rekindle.blend", "leave blend out, and chunks are reused as part of exact beginnings only")


def check_movable(spec: ModelSpec, param: str, advice: str) -> None:
    """Raises InvalidRequest, with what to do, for a model whose chunks can't be placed elsewhere."""
    if not spec.can_shift:
        raise InvalidRequest(
            f"{spec.name} ({spec.architecture}, {spec.kv_type}) can't be blended: its KV can't be moved to other "
            f"positions; {advice}",
            param=param,
        )


def tell_if_unmovable(spec: ModelSpec) -> None:
    """A line in the log of a server that is to blend whatever is marked, with a model that it can't do that with."""
    try:
        check_movable(spec, "blend", "marked chunks are read exactly")
    except InvalidRequest as error:
        _log.warning("%s", error)


def own_prompt(head: Tokens, chunk: Tokens, salt: bytes) -> Prompt:
    """A chunk on its own."""
    return Prompt(np.concatenate([head, chunk]), salt=salt)


class Blending:
    """Looks chunks up, plans with them and prepares what is placed. Owned by the scheduler, but for `fetch`."""

    def __init__(self, store: Store, head: Tokens, scores: Scores, rows: Rows | None = None) -> None:
        """`rows`: for an engine that may compute more rows in less time."""
        self.rows = rows
        self.head = head
        self.scores = scores
        self._store = store

    def own_prompts(self, prompt: Prompt) -> list[Prompt]:
        """Of each chunk."""
        chunks = (prompt.tokens[chunk.start : chunk.stop] for chunk in prompt.chunks)
        return [own_prompt(self.head, chunk, prompt.salt) for chunk in chunks]

    def key(self, own: Prompt) -> Key:
        """Names what is remembered of the chunk that this prompt is of."""
        return self.scores.key(own.tokens[len(self.head) :], own.salt)

    def fetch(self, prompt: Prompt, compute: Speed | None) -> FetchedChunks:
        """Bring the prompt's beginning, all its chunks and what is remembered of them into memory. For other threads."""
        beginning = self._store.fetch(prompt.tokens, prompt.salt, compute=compute)
        chunks = []
        for chunk, own in zip(prompt.chunks, self.own_prompts(prompt), strict=True):
            chunks.append(self._store.fetch(own.tokens, own.salt, compute=compute) if len(chunk) else Fetched())
            if len(chunk):
                self.scores.fetch(self.key(own), len(chunk))
        return FetchedChunks(beginning.tokens, beginning.refused, tuple(chunks))

    def look(self, run: Run, least_tokens: int) -> Found:
        """What is at hand of a run's chunks; of a chunk with less than `least_tokens` nothing."""
        prompt, found = run.generation.prompt, Found()
        fetched = run.fetched.chunks if isinstance(run.fetched, FetchedChunks) else ()
        for index, own in enumerate(self.own_prompts(prompt)):
            match = self._store.match(own.tokens, own.salt)
            blocks = whole_blocks(match)
            length = sum(len(block.tokens) for block in blocks) - len(self.head)
            is_known = length >= max(1, least_tokens)
            scores = self.scores.get(self.key(own)) if is_known else None
            words = in_words(fetched[index]) if fetched else ""
            found.known.append(OnItsOwn(len(self.head), length, scores, words) if is_known else None)
            found.matches.append(match)
            found.blocks.append(blocks)
        return found

    def plan(self, run: Run, exact: Plan, found: Found) -> Plan:
        """The exact plan with what was found placed; that plan itself if the run does not blend."""
        blend = run.generation.blend
        if blend is None or not blends(run):
            return exact
        prompt = run.generation.prompt
        if blend.looks:
            return look_plan(prompt, exact, found.known)
        return make_blend_plan(prompt, exact, found.known, blend, slow_from=self._slow_from)

    def nothing_placed(self, run: Run, exact: Plan) -> Plan:
        """The exact plan, that tells of each chunk that it is computed: so there is something to learn from the run."""
        return self.plan(run, exact, Found([None] * len(run.generation.prompt.chunks)))

    def begin_look(self, run: Run, engine: Engine, exact: Plan, plan: Plan, found: Found) -> None:
        """Have a run look first, if it has to: its parts are all that could be placed."""
        blend, prompt = run.generation.blend, run.generation.prompt
        if blend is not None and blend.looks and plan.blended:
            run.looking = begin_look(engine, prompt, exact, found.known, blend, run.parts)
            run.parts = deque()

    def look_on(self, run: Run, count: int, cells: int) -> bool:
        """One slice of a look, see `Looking.go_on`; True if that was the last, and the run has its plan. One that fails
        is read exactly, and what the engine refused is forgotten. Raises EngineError if even its sequence can't be cut.
        """
        looking = run.looking
        assert looking is not None and run.seq is not None
        try:
            looking.go_on(run.seq, count, cells)
        except EngineError as error:
            run.context.run(_log.warning, "what to compute of chunks cannot be seen, and all is: %s", error)
            if looking.trying is not None:
                forget(self._store, run, looking.trying, error)
            looking.give_up(run.seq)
            assert run.plan is not None
            run.looking = None
            run.start(self.nothing_placed(run, run.plan))
            return True
        if looking.done:
            plan, run.parts = looking.chosen(self._slow_from)
            run.looking = None
            run.start(plan)
        return looking.done

    @property
    def _slow_from(self) -> int:
        return SHORT_REST if self.rows is None else self.rows.slow_from

    def used(self, plan: Plan, found: Found) -> None:
        """Tell the store which chunks a plan has placed."""
        for chunk in plan.chunks:
            if chunk.placed:
                self._store.used(found.matches[chunk.index])

    def discard(self, engine: Engine, plan: Plan, found: Found) -> None:
        """Have the store forget which of the chunks that a plan places can't be prepared, not even on their own."""
        for chunk in plan.chunks:
            blocks = [blocks if index == chunk.index else [] for index, blocks in enumerate(found.blocks)]
            try:
                prepare(engine, plan, replace(found, blocks=blocks))
            except ContextFull:
                pass  # what there was no room for is good
            except EngineError:
                self._store.discard(found.matches[chunk.index])


def whole_blocks(match: Match) -> list[Block]:
    """Of what was found, blocks that hold nothing else; another prompt's tail, of which only some is shared, does."""
    return [block for block in match.blocks if block.position + len(block.tokens) <= match.length]


def blends(run: Run) -> bool:
    """Whether chunks are looked for."""
    generation = run.generation
    return generation.blend is not None and generation.reuses and bool(generation.prompt.chunks)


def prepare(engine: Engine, plan: Plan, found: Found) -> deque[Part]:
    """What a plan places of chunks, in order. Raises EngineError.

    Turned to where it goes, all of it by one `move`, if the engine is one that does so faster: that needs a free sequence
    and `cells_to_prepare` free cells.
    """
    parts = list(_parts(engine.spec.fingerprint, plan, found))
    if engine.turns_all_cells:
        blocks = {(part.chunk, part.payload.position): part for part in parts}
        payloads = [_headless(engine, found, part) for part in blocks.values()]
        positions = [part.position_of(payload) for part, payload in zip(blocks.values(), payloads, strict=True)]
        moved = engine.move(payloads, positions) if payloads else []
        turned = dict(zip(blocks, moved, strict=True))
        parts = [part.turned(turned[part.chunk, part.payload.position]) for part in parts]
    return deque(parts)


def cells_to_prepare(engine: Engine, plan: Plan, found: Found, head: int) -> int:
    """Free cells that `prepare` needs, with a head of so many tokens."""
    if not engine.turns_all_cells:
        return 0
    sizes = {(part.chunk, part.payload.position): len(part.payload) for part in _parts(b"", plan, found)}
    return max(sum(sizes.values()), head + max(sizes.values())) if sizes else 0


def _parts(fingerprint: bytes, plan: Plan, found: Found) -> Iterator[Part]:
    """What each block has of each step that places a part of a chunk; a block may have some of several."""
    for step in plan.steps:
        if isinstance(step, Place) and step.chunk is not None and step.source is not None:
            by, source_stop = step.start - step.source, step.source + step.stop - step.start
            for index, block in enumerate(found.blocks[step.chunk]):
                start = max(0, step.source - block.position)
                stop = min(len(block.tokens), source_stop - block.position)
                if start < stop:
                    payload = payload_of(block, fingerprint)
                    position = block.position + start + by
                    yield Part(payload, start, stop, position, step.chunk, found.matches[step.chunk], index)


def _headless(engine: Engine, found: Found, part: Part) -> Payload:
    """A part's block without what it has of the head, which would reach over what stands before the chunk."""
    own, position = found.known[part.chunk], part.payload.position
    assert own is not None
    if position >= own.head:
        return part.payload
    blocks = [block for block in found.blocks[part.chunk] if block.position <= position]
    payloads = [payload_of(block, engine.spec.fingerprint) for block in blocks]
    return cut(engine, payloads, own.head)


def cut(engine: Engine, payloads: Sequence[Payload], start: int) -> Payload:
    """KV of a prompt in pieces that follow each other, from token `start` on, as one. Raises EngineError."""
    seq = engine.open()
    try:
        engine.place_all(seq, payloads)
        return engine.export(seq, start, engine.length(seq))
    finally:
        engine.close(seq)


def place_due(state: State) -> None:
    """Chunks' KV goes where prompts have been read up to, as far as there are cells beside those for answers.

    Where nobody is being answered, room has been made; what finds none even so is computed like any other text.
    """
    if not any(run.parts for run in state.running):
        return
    num_decoding = sum(not run.reading for run in state.running)
    for run in [run for run in by_urgency(state) if run.due]:
        while run.due and state.engine.num_free_cells >= len(run.parts[0].payload) + num_decoding:
            try:
                _place(state.engine, run)
            except EngineError as error:
                run.context.run(_log.warning, "a chunk's KV cannot be placed and is computed instead: %s", error)
                forget(state.store, run, run.parts[0], error)
                _give_up(run, len(run.parts))
        if run.due and not num_decoding:
            _give_up(run, 1)
            num_decoding = 1  # one is enough for a step that gets on


def _place(engine: Engine, run: Run) -> None:
    assert run.seq is not None
    part = run.parts[0]
    engine.place(run.seq, part.payload, run.read, start=part.start, stop=part.stop)
    run.parts.popleft()
    run.read += len(part)


def forget(store: Store, run: Run, part: Part, error: EngineError) -> None:
    """Nobody is to find again what the engine has refused; what it had no room for is good."""
    if not isinstance(error, ContextFull):
        store.discard(part.match, part.index)
        run.refused.add(part.chunk)


def _give_up(run: Run, count: int) -> None:
    for _ in range(count):
        run.parked += len(run.parts.popleft())


def in_words(fetched: Fetched) -> str:
    """What a fetch has brought, for the reasons of a plan."""
    return ", ".join(f"{counted(count, 'token')} fetched from {tier}" for tier, count in fetched.tokens.items())
