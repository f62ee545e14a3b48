"""A plan that reuses chunks wherever they stand.

A chunk *on its own* is the prompt [head, chunk], read for nobody and kept under the ordinary prefix keys; the head is the
model's BOS, or what a user configured. So look-up, tiers, pins and eviction need nothing new. Its KV lacks what stands
before the chunk now, and it stands elsewhere. The engine mends the second exactly, by rotation. The first is mended by
computing some of its tokens anew, which `blend_select` chooses.

A plan is carried out from left to right, and every step goes on at the sequence's end:

    0      exact      gap + first   placed        gap + first  placed          question   length
    |=================|------------|=============|-----------|================|------------|
      fork, place       compute      place         compute     place            compute

So what is computed sees all that stands before it and nothing else: the causal mask follows from the order, a chosen
range costs no model call of its own where it continues what is computed anyway, and the work can be batched with other
requests'. The exact beginning comes first, a chunk that is missing is computed like any other text, and the last token
is always computed for its logits.

Some engines compute some numbers of tokens faster than others; `blend_rows` fits a plan to that.

What stands behind the first placed chunk is not what a prefill gives: `Plan.exact` says how far a sequence may be kept,
stored and shared as exact KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from rekindle.engine.protocol import KV, Range
from rekindle.errors import InvalidRequest, check_number, counted, similar
from rekindle.reuse.blend_rows import fit_rows
from rekindle.reuse.blend_select import LOOKING, REMEMBERED, Choice, Floats, Select, Span, choose
from rekindle.reuse.plan import ChunkPlan, Compute, Looked, Place, Plan, Step
from rekindle.reuse.prompt import Chunk, Prompt
from rekindle.tokens import SHORT_REST

SELECTS: tuple[Select, ...] = get_args(Select)
JUDGED_AT = 0.25  # of the model's layers: V is judged there unless it is said; see docs/blending.md
NOT_AT_HAND = "not kept on its own: it was neither warmed nor met before, or is shorter than what is kept"
SHORTEST = 8  # tokens; what could be placed between two computed ranges is computed with them if it is shorter


@dataclass(frozen=True)
class Blend:
    """How placed chunks are mended. Raises InvalidRequest for a selection, a ratio or a layer that is none."""

    select: Select = "auto"
    ratio: float = 0.15  # of the tokens that could be placed, to be computed all the same
    layer: int | None = None  # of "deviation": where it is judged, from 0; None: a quarter of the way through the model
    judge: KV = "V"  # and what of the KV there

    def __post_init__(self) -> None:
        check_select(self.select, SELECTS)
        if self.judge not in ("K", "V"):
            raise InvalidRequest(f"blend.judge must be K or V, got {self.judge!r}", param="blend.judge")
        if self.layer is not None:
            check_number("blend.layer", self.layer, 1, whole=True)  # before that one nothing can differ yet
        check_number("blend.ratio", self.ratio, 0, 1)

    @property
    def looks(self) -> bool:
        """Whether something has to be computed before it is chosen."""
        return self.select in LOOKING and 0 < self.ratio < 1

    def judged_at(self, num_layers: int) -> int:
        """The layer of "deviation", in a model of so many."""
        return max(1, round(num_layers * JUDGED_AT)) if self.layer is None else self.layer

    def name(self, num_layers: int) -> str:
        """What reports call it: one that judges elsewhere is another."""
        at = f" {self.judge}{self.judged_at(num_layers)}" if self.select == "deviation" else ""
        return self.select + at


def check_select(select: object, offered: Sequence[str], param: str = "blend.select") -> None:
    """Raises InvalidRequest for a selection that is not among those offered."""
    if select not in offered:
        hint = similar(str(select), offered)
        if select in LOOKING:
            hint = ", which looks into the model's layers before it chooses: this engine can't, the torch engine can"
        raise InvalidRequest(f"blend.select must be one of {', '.join(offered)}, got {select!r}{hint}", param=param)


@dataclass(frozen=True, eq=False)
class OnItsOwn:
    """What is at hand of a chunk that was computed on its own."""

    head: int  # tokens before it there: the position of its first token
    length: int  # tokens of the chunk, from its first, whose KV is at hand
    scores: Floats | None = None  # [tokens of the chunk] how far each one's KV once differed from that in place
    fetched: str = ""  # what of it was brought from slower tiers for this prompt, in words


def make_blend_plan(
    prompt: Prompt,
    exact: Plan,
    known: Sequence[OnItsOwn | None],
    blend: Blend,
    *,
    slow_from: int = SHORT_REST,
    looked: Looked | None = None,
) -> Plan:
    """The exact plan with chunks placed in what it computes. `known` has an entry for each of the prompt's chunks.

    `slow_from`: see `fit_rows`. `looked`: how its scores were found, if that was for this prompt.
    """
    assert len(known) == len(prompt.chunks)
    begin, last = exact.reused, exact.total - 1
    placeable = {
        index: (max(chunk.start, begin), min(chunk.start + own.length, chunk.stop, last))
        for index, (chunk, own) in enumerate(zip(prompt.chunks, known, strict=True))
        if own is not None
    }
    placeable = {index: span for index, span in placeable.items() if span[0] < span[1]}
    reason = REMEMBERED if looked is None else looked.reason
    choices = choose(list(_spans(prompt, known, placeable, begin)), blend.select, blend.ratio, reason)
    placed = {index: list(_rest(span, choices)) for index, span in placeable.items()}
    placed, choices = fit_rows((begin, exact.total), placed, choices, slow_from)
    steps = [
        *exact.steps[: len(exact.steps) - bool(exact.computed)],
        *_walk(begin, exact, prompt, known, placed, choices),
    ]
    chunks = tuple(
        _report(index, chunk, begin, known[index], placed.get(index, []), placeable.get(index), choices)
        for index, chunk in enumerate(prompt.chunks)
    )
    return Plan(tuple(steps), exact.total, exact.miss, chunks, looked)


def with_scores(prompt: Prompt, known: Sequence[OnItsOwn | None], scores: Floats) -> list[OnItsOwn | None]:
    """What is at hand, with a score for each of the prompt's tokens in place of what is remembered."""
    pairs = zip(prompt.chunks, known, strict=True)
    return [None if own is None else replace(own, scores=scores[chunk.start : chunk.stop]) for chunk, own in pairs]


def _spans(prompt: Prompt, known: Sequence[OnItsOwn | None], placeable: dict[int, Range], begin: int) -> Iterator[Span]:
    stops = {stop for _, stop in placeable.values()}
    for index, (start, stop) in placeable.items():
        own, offset = known[index], prompt.chunks[index].start
        scores = None if own is None or own.scores is None else own.scores[start - offset : stop - offset]
        yield Span(start, stop, is_begin=start > begin and start not in stops, scores=scores)


def _rest(span: Range, choices: Sequence[Choice]) -> Iterator[Range]:
    """What of a span is placed: all but what was chosen, and what would be too short."""
    chosen = [choice for choice in choices if span[0] <= choice.start < span[1]]
    edges = [span[0], *(edge for choice in chosen for edge in (choice.start, choice.stop)), span[1]]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        is_between = start > span[0] and stop < span[1]
        if stop - start >= (SHORTEST if is_between else 1):
            yield start, stop


def _walk(
    begin: int,
    exact: Plan,
    prompt: Prompt,
    known: Sequence[OnItsOwn | None],
    placed: dict[int, list[Range]],
    choices: Sequence[Choice],
) -> Iterator[Step]:
    """Place and compute in turn, from `begin` to the prompt's end."""
    position = begin
    for index, ranges in sorted(placed.items()):
        own, chunk = known[index], prompt.chunks[index]
        assert own is not None
        for start, stop in ranges:
            if position < start:
                yield Compute(position, start, _why(position, start, choices, begin))
            source = own.head + start - chunk.start
            origin = f"on its own; {own.fetched}" if own.fetched else "on its own"
            reason = f"chunk {index} was computed {origin}; moved by {start - source:+}"
            yield Place(start, stop, reason, source=source, chunk=index)
            position = stop
    if position < exact.total:
        reasons = [step.reason for step in exact.steps if isinstance(step, Compute) and position == begin]
        yield Compute(position, exact.total, reasons[0] if reasons else _why(position, exact.total, choices, begin))


def _why(start: int, stop: int, choices: Sequence[Choice], begin: int) -> str:
    chosen = [choice for choice in choices if start <= choice.start < stop]
    count = sum(choice.stop - choice.start for choice in chosen)
    reasons = []
    if count < stop - start:
        beginning = "not read before after this beginning" if begin else "not read before"
        reasons.append(
            beginning if start == begin else f"{counted(stop - start - count, 'token')} that no chunk at hand has"
        )
    if count:
        reasons.append(
            f"{counted(count, 'token')} of chunks: {', '.join(dict.fromkeys(choice.reason for choice in chosen))}"
        )
    return "; ".join(reasons)


def _report(
    index: int,
    chunk: Chunk,
    begin: int,
    own: OnItsOwn | None,
    placed: Sequence[Range],
    placeable: Range | None,
    choices: Sequence[Choice],
) -> ChunkPlan:
    num_placed = sum(stop - start for start, stop in placed)
    num_exact = min(len(chunk), max(0, begin - chunk.start))
    chosen = [choice for choice in choices if placeable is not None and placeable[0] <= choice.start < placeable[1]]
    recomputed = 0 if placeable is None else placeable[1] - placeable[0] - num_placed
    why = ", ".join(dict.fromkeys(choice.reason for choice in chosen)) or None
    return ChunkPlan(
        index=index,
        start=chunk.start,
        stop=chunk.stop,
        exact=num_exact,
        placed=num_placed,
        recomputed=recomputed,
        moved=None if own is None or not num_placed else chunk.start - own.head,
        why=NOT_AT_HAND if own is None and num_exact < len(chunk) else why,
    )


class Memory:
    """What is remembered of chunks: each token's difference between in place and on its own, averaged over meetings.

    Keeps the most recently met `max_chunks`, under any key that names a chunk's tokens. Not thread-safe.
    """

    def __init__(self, max_chunks: int = 10_000) -> None:
        self._max_chunks = max_chunks
        self._scores: dict[bytes, tuple[int, Floats]] = {}

    def add(self, key: bytes, scores: Floats) -> None:
        """One more meeting."""
        count, mean = self._scores.get(key, (0, np.zeros_like(scores)))
        self.put(key, count + 1, mean + (scores - mean) / np.float32(count + 1))

    def put(self, key: bytes, count: int, mean: Floats) -> None:
        """What so many meetings have given."""
        self._scores.pop(key, None)  # or else it would stay at its old place in the order
        self._scores[key] = (count, mean)
        if len(self._scores) > self._max_chunks:
            del self._scores[next(iter(self._scores))]

    def meetings(self, key: bytes) -> int:
        """How many of them the scores are averaged over."""
        return self._scores.get(key, (0, None))[0]

    def get(self, key: bytes) -> Floats | None:
        found = self._scores.get(key)
        return None if found is None else found[1]

    def __len__(self) -> int:
        return len(self._scores)
