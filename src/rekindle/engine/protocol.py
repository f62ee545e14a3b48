"""The language of the engine: seven verbs on sequences of KV.

Every kind of reuse is a sentence in it. A prefix hit is a `fork` or a few `place`s; a conversation that slides is a `drop`;
a document that moved is a little `forward` and a `place` of the rest, or a `place` and a little `recompute`. Beside the
verbs stand `move`, which prepares many places at once, `compare`, looks into the model's layers, and book-keeping: `open`,
`close`, and questions about lengths and free cells.

A cell holds the KV of one token. Sequences that were forked share cells. Verbs check before they change: one that raises
leaves every sequence as it was. Engines are not thread-safe; one thread owns an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from rekindle.model.spec import ModelSpec
from rekindle.tokens import Tokens

SequenceId = int
Range = tuple[int, int]  # positions [start, stop)
KV = Literal["K", "V"]
Logits = dict[SequenceId, npt.NDArray[np.float32]]  # [vocab_size] each, valid until the engine's next verb


@dataclass(frozen=True, eq=False)
class Payload:
    """The KV of a token range, in the engine's own format."""

    tokens: Tokens  # [count]
    position: int  # of the first token, where the KV was computed
    data: memoryview
    fingerprint: bytes  # of the engine that made it
    lacks: int = 0  # of so many of its first tokens what layers with a sliding window keep is missing: see `release`

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Placed:
    """Tokens [start, stop) of a payload, for the places from `position` on."""

    payload: Payload
    start: int
    stop: int
    position: int  # of its first token in the sequence

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def by(self) -> int:
        """How far it is moved."""
        return self.position - self.payload.position - self.start


@dataclass(frozen=True, eq=False)
class Work:
    """Tokens to append to one sequence."""

    seq: SequenceId
    tokens: Tokens  # [count] to be computed, at least one
    logits: bool = True  # whether the logits after the last of them are wanted
    placed: tuple[Placed, ...] = ()  # stored KV between them, in order; a token follows. Only if `places_between`

    @property
    def num_cells(self) -> int:
        """Cells that it takes."""
        return len(self.tokens) + sum(map(len, self.placed))


class Engine(Protocol):
    """Computes KV and logits. Errors are `EngineError`s: ContextFull, BadRange, UnknownSequence, ForeignPayload."""

    spec: ModelSpec
    turns_all_cells: bool  # turning keys goes over all cells, however few are meant: so better turn many by one `move`
    places_between: bool  # whether a `Work` may have KV placed between its tokens
    reads_idle_cells: bool  # whether computing takes longer for cells in use that none of the sequences computed sees

    # The seven verbs.

    def forward(self, work: Sequence[Work]) -> Logits:
        """Append tokens to one or more sequences, as one batch; at most one `Work` per sequence.

        Where a work has stored KV `placed` between its tokens, those follow the sequence's end in the places that it leaves
        free, and the outcome is that of `forward` and `place` in turn: a token sees all that stands before it.

        Returns logits for each sequence whose work asked for them; they may lie in the engine's own memory, so copy what
        is to be kept beyond the next verb. Raises ContextFull, UnknownSequence, BadRange (no tokens, or a sequence twice),
        EngineError for a token outside the vocabulary, and for `placed` what `place` does.
        """

    def fork(self, seq: SequenceId, length: int) -> SequenceId:
        """A new sequence that shares the first `length` tokens. Copies nothing. Raises ContextFull, BadRange."""

    def truncate(self, seq: SequenceId, length: int) -> None:
        """Forget the tokens from `length` on. Raises BadRange."""

    def drop(self, seq: SequenceId, start: int, stop: int) -> None:
        """Cut out [start, stop); what follows slides down to `start`, its K re-rotated. Raises BadRange, ContextFull."""

    def export(self, seq: SequenceId, start: int, stop: int) -> Payload:
        """The KV of [start, stop) as bytes. Changes nothing. Raises BadRange."""

    def place(
        self,
        seq: SequenceId,
        payload: Payload,
        position: int,
        *,
        start: int = 0,
        stop: int | None = None,
        until: int = 0,
    ) -> None:
        """Put stored KV at the end of a sequence (`position` = its length), re-rotated if it was computed elsewhere.

        Of the payload's tokens only [start, stop) are put there; as many cells as it has in all must be free. `until` is
        the length that the sequence will have before anything is computed, if nobody will go back below it: what a
        sliding window can't see from there is left out, as if it had been released. Raises
        BadRange, ContextFull, ForeignPayload; EngineError if it would have to shift and the model can't.
        """

    def place_all(self, seq: SequenceId, payloads: Iterable[Payload], *, until: int = 0) -> None:
        """Put these at the end of a sequence, one behind the other, as `place` would each; all of them or none.

        An engine for which a call is dear (llama.cpp) makes fewer of them. Raises as `place` does.
        """

    def move(self, payloads: Sequence[Payload], positions: Sequence[int]) -> list[Payload]:
        """The same KV re-rotated to where it will be placed, all at once; no sequence changes.

        For many that will be placed with computing in between: an engine whose rotation goes over all its cells (llama.cpp)
        then does it once instead of once for each. Needs as many free cells as the payloads have tokens, and a free
        sequence. Raises BadRange (positions overlap), ContextFull, ForeignPayload; EngineError if the model can't shift.
        """

    def recompute(self, seq: SequenceId, ranges: Sequence[Range]) -> None:
        """Compute the KV of these ranges anew, in place, in order, each token seeing all before it.

        Ranges ascend and don't overlap. Needs as many free cells as the ranges have tokens, so that a failure can be taken
        back. Raises BadRange, ContextFull.
        """

    # Looking into KV.

    def compare(self, one: Payload, other: Payload) -> npt.NDArray[np.float32]:
        """[count] how far the KV of the same tokens lies apart, token by token: |V - V'| beside V's usual size, on average
        over the layers.

        V is not rotated, so it does not matter where the payloads were computed, only after what. Raises BadRange if the
        tokens differ, ForeignPayload.
        """

    # Looking before it is chosen what to compute, if `spec.can_look`; other engines raise EngineError.

    def probe(self, seq: SequenceId, tokens: Tokens, layer: int) -> None:
        """Append tokens that are computed as far as K and V of `layer` (from 0): all layers before it, and no more.

        Nothing can go on from there: such a sequence is for more probing, for `refreshed`, and to be truncated to where it
        was before. Raises as `forward` does, and BadRange if there are no layers before this one or it is none.
        """

    def refreshed(
        self,
        seq: SequenceId,
        payload: Payload,
        position: int,
        layer: int,
        kv: KV,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Payload, npt.NDArray[np.float32]]:
        """Tokens [start, stop) of a payload as they would be at `position`, where a sequence was probed with them: KV of
        the layers before `layer` is the sequence's, the rest the payload's own, turned.

        Also [stop - start] how far K or V (`kv`) at the layer lie apart, token by token: |X - X'|. Raises BadRange if there
        are other tokens, ForeignPayload.
        """

    def attention(self, seq: SequenceId, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Append tokens, and say [length] how much of their attention each token of the sequence gets, added up over these
        tokens, all heads and all layers. Raises as `forward` does.
        """

    # Book-keeping.

    def open(self) -> SequenceId:
        """A new, empty sequence. Raises ContextFull when there are too many."""

    def close(self, seq: SequenceId) -> None:
        """End a sequence and free the cells that no other shares."""

    def release(self, seq: SequenceId, length: int) -> None:
        """Give up going back below `length`: what only that needs is freed, which is what the layers with a sliding window
        hold beyond their window. Without such layers nothing happens.

        Afterwards the sequence can be forked, truncated and computed anew from `reach` on or not at all, and payloads of
        tokens that were given up lack a part. Other sequences that share the cells keep them. Raises BadRange.
        """

    def num_releasable(self, seq: SequenceId, length: int) -> int:
        """Cells that `release` at this length would free. Raises UnknownSequence."""

    def reach(self, seq: SequenceId) -> int:
        """The least length, but for 0, at which the sequence can go on; 0 as long as nothing was given up.

        It may be beyond the sequence's length while payloads that lack something are being placed.
        """

    def tokens(self, seq: SequenceId) -> Tokens:
        """A copy of the sequence's tokens."""

    def length(self, seq: SequenceId) -> int: ...

    @property
    def num_cells(self) -> int:
        """Cells in all."""

    @property
    def num_free_cells(self) -> int: ...

    def num_own(self, seq: SequenceId) -> int:
        """Cells that only this sequence sees: what closing it frees."""

    def num_held(self, seqs: Iterable[SequenceId]) -> int:
        """Cells that any of these sequences sees."""

    @property
    def num_free_sequences(self) -> int: ...

    @property
    def num_calls(self) -> int:
        """Model calls so far (decodes of the underlying library)."""

    @property
    def num_computed(self) -> int:
        """Tokens computed so far."""

    @property
    def num_token_layers(self) -> int:
        """Tokens computed so far, once for each layer that they went through; those of `probe` are among them."""

    def check_integrity(self) -> None:
        """Recount everything from scratch. Raises AssertionError."""

    def shutdown(self) -> None:
        """Free the engine; nothing may be called afterwards."""
