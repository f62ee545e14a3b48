"""Choices that look before they choose, for one prompt: what is computed only to see which tokens to compute anew.

The prompt's own sequence is used, behind its exact beginning, and cut back to it when enough was seen; then the prompt is
read by the plan that was chosen, like any other. So a look is done in slices beside what others compute, and what it
leaves are scores and, of `deviation`, better payloads.

    deviation   The prompt, up to the last chunk at hand, goes through the layers before the one that judges, where it is
                compared with what is stored. What those layers keep of chunks is then fresh, and goes into what will be
                placed: the outcome is CacheBlend's, where all tokens are computed up to that layer and the chosen ones
                beyond it. The chosen ones go through the first layers twice.
    query       Chunks are placed as they are, what is between them is computed, and then the question, which is all behind
                the last chunk; what it attends to is added up over its tokens, heads and layers.

Budget counts both, in token-layers. It does not count the product that makes K and V of the layer that judges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rekindle.engine.protocol import Engine, SequenceId, Work
from rekindle.errors import ContextFull
from rekindle.reuse.blend import Blend, OnItsOwn, make_blend_plan, with_scores
from rekindle.reuse.blend_select import Floats
from rekindle.reuse.plan import Looked, Place, Plan
from rekindle.reuse.prompt import Prompt
from rekindle.serve.run import Part
from rekindle.tokens import Tokens


class Looking(ABC):
    """One look. `go_on` until it is `done`, then `chosen`; `restart` when its sequence was cut back meanwhile."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        exact: Plan,
        known: Sequence[OnItsOwn | None],
        blend: Blend,
        parts: Sequence[Part],
    ) -> None:
        """`parts`: all that could be placed, which is what `look_plan` places."""
        self._engine, self._prompt, self._blend = engine, prompt, blend
        self._exact, self._known, self._parts = exact, known, tuple(parts)
        self._num_layers = engine.spec.num_layers
        self._num_tokens = 0  # computed to look, restarts included
        self.trying: Part | None = None  # what the engine is just being given, or has refused
        self.restart()

    def restart(self) -> None:
        """Look again from the beginning."""
        self.position = self._exact.ready  # to which the sequence reaches
        self._left = deque(self._parts)  # still to be passed
        self._seen: list[Part] = []
        self._scores = np.zeros(len(self._prompt), dtype=np.float32)

    @property
    def done(self) -> bool:
        return self.position >= self._end

    @property
    def cost(self) -> int:
        """Tokens through all layers that are as much work as what is left."""
        return -(-(self._end - self.position) * self._layers // self._num_layers)

    @property
    def least_cells(self) -> int:
        """Without so many free ones it does not go on."""
        return 1

    @property
    def most_cells(self) -> int:
        """So many are enough for all that is left."""
        return self._end - self.position + max(len(part.payload) for part in self._parts)

    def go_on(self, seq: SequenceId, count: int, cells: int) -> int:
        """Look on, with about as much work as `count` tokens through all layers, in so many free cells; returns how much
        it was. At its end the sequence is cut back. Raises EngineError.
        """
        if cells < self.least_cells:
            raise ContextFull(f"{self.least_cells} cells are needed to look on, {cells} are free")
        before = self._num_tokens
        self._go_on(seq, max(1, count * self._num_layers // self._layers), cells)
        if self.done:
            self.give_up(seq)
        return -(-(self._num_tokens - before) * self._layers // self._num_layers)

    def give_up(self, seq: SequenceId) -> None:
        """The sequence is as it was before. Raises EngineError."""
        self._engine.truncate(seq, self._exact.ready)

    @property
    def scores(self) -> Floats:
        """[tokens of the prompt] what was seen, as far as it has looked."""
        return self._scores

    def chosen(self, slow_from: int, blend: Blend | None = None) -> tuple[Plan, deque[Part]]:
        """The plan, by another `blend` if there is one, and what it places."""
        known = with_scores(self._prompt, self._known, self._scores)
        looked = Looked(self._reason, self._num_tokens, self._layers, self._num_layers)
        plan = make_blend_plan(
            self._prompt, self._exact, known, blend or self._blend, slow_from=slow_from, looked=looked
        )
        return plan, deque(_pieces(plan, self._seen))

    def _next(self, stop: int) -> Tokens:
        return self._prompt.tokens[self.position : stop]

    @property
    @abstractmethod
    def _end(self) -> int:
        """Where the look ends."""

    @property
    @abstractmethod
    def _layers(self) -> int:
        """That each token goes through."""

    @property
    @abstractmethod
    def _reason(self) -> str:
        """Why what is chosen is."""

    @abstractmethod
    def _go_on(self, seq: SequenceId, count: int, cells: int) -> None:
        """Compute at most `count` tokens."""


class Deviation(Looking):
    """See the module's docstring."""

    @property
    def _end(self) -> int:
        return self._parts[-1].position + len(self._parts[-1])

    @property
    def _layers(self) -> int:
        return self._blend.judged_at(self._num_layers)

    @property
    def _reason(self) -> str:
        return f"their {self._blend.judge} at layer {self._layers} differs most from that on its own"

    def _go_on(self, seq: SequenceId, count: int, cells: int) -> None:
        stop = min(self._end, self.position + min(count, cells))
        self._engine.probe(seq, self._next(stop), self._layers)
        self._num_tokens += stop - self.position
        self.position = stop
        while self._left and self._left[0].position + len(self._left[0]) <= stop:
            part = self.trying = self._left.popleft()
            mended, scores = self._engine.refreshed(
                seq, part.payload, part.position, self._layers, self._blend.judge, start=part.start, stop=part.stop
            )
            self._scores[part.position : part.position + len(part)] = scores
            self.trying = None
            self._seen.append(replace(part, payload=mended, start=0, stop=len(part)))


class Query(Looking):
    """See the module's docstring."""

    @property
    def _question(self) -> int:
        """Where it begins: behind all chunks, or at the last token."""
        return min(max(chunk.stop for chunk in self._prompt.chunks), len(self._prompt) - 1)

    @property
    def _end(self) -> int:
        return len(self._prompt)

    @property
    def _layers(self) -> int:
        return self._num_layers

    @property
    def _reason(self) -> str:
        return "the question attends to them most"

    @property
    def cost(self) -> int:
        return self._end - self.position - sum(map(len, self._left))

    @property
    def least_cells(self) -> int:
        is_due = self._left and self._left[0].position == self.position
        return len(self._left[0].payload) if is_due else 1

    def _go_on(self, seq: SequenceId, count: int, cells: int) -> None:
        free = self._engine.num_free_cells - cells  # for others
        while self._left and self._left[0].position == self.position:
            part = self._left[0]
            if self._engine.num_free_cells - free < len(part.payload):
                return
            self.trying = part
            self._engine.place(seq, part.payload, self.position, start=part.start, stop=part.stop)
            self.trying = None
            self.position += len(part)
            self._seen.append(self._left.popleft())
        count = min(count, self._engine.num_free_cells - free)
        if count < 1:
            return
        ends = [self._end, self._question, *(part.position for part in self._left)]
        stop = min(self.position + count, *(end for end in ends if end > self.position))
        if self.position < self._question:
            self._engine.forward([Work(seq, self._next(stop), logits=False)])
        else:
            self._scores[:stop] += self._engine.attention(seq, self._next(stop))
        self._num_tokens += stop - self.position
        self.position = stop


def look_plan(prompt: Prompt, exact: Plan, known: Sequence[OnItsOwn | None]) -> Plan:
    """All that could be placed, placed."""
    return make_blend_plan(prompt, exact, known, Blend("none", 0.0))


def begin_look(
    engine: Engine, prompt: Prompt, exact: Plan, known: Sequence[OnItsOwn | None], blend: Blend, parts: Sequence[Part]
) -> Looking:
    """What `blend` asks for; see `Looking`."""
    kind = {"deviation": Deviation, "query": Query}[blend.select]
    return kind(engine, prompt, exact, known, blend, parts)


def _pieces(plan: Plan, parts: Sequence[Part]) -> Iterator[Part]:
    """Of each step that places a part of a chunk, what each of the given parts has."""
    for step in plan.steps:
        if isinstance(step, Place) and step.chunk is not None:
            for part in parts:
                start, stop = max(step.start, part.position), min(step.stop, part.position + len(part))
                if start < stop:
                    offset = part.start + start - part.position
                    yield replace(part, start=offset, stop=offset + stop - start, position=start)
