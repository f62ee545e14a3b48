"""A deterministic toy engine: a test double that speaks the seven verbs over plain integers.

The "KV" of a token is one 64-bit state, mixed from the token and from the states of all tokens before it, each with its
distance. So it depends on context and on relative position only, as attention with RoPE does: a chunk computed elsewhere
is the same, a chunk computed with other neighbours is not, and `recompute` mends it. Logits are a hash of the last state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import KV, Logits, Payload, Range, SequenceId, Work
from rekindle.engine.sequences import BookKeeping, SequenceTable
from rekindle.engine.verify import (
    check_fingerprint,
    check_layer,
    check_moves,
    check_payload,
    check_probed,
    check_same,
    check_work,
    joined,
)
from rekindle.errors import ForeignPayload
from rekindle.model.spec import ModelSpec
from rekindle.tokens import Tokens

_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
States = npt.NDArray[np.uint64]


def _hash(values: States) -> States:
    values = (values ^ (values >> np.uint64(30))) * _MIX[1]
    values = (values ^ (values >> np.uint64(27))) * _MIX[2]
    return values ^ (values >> np.uint64(31))


class ToyEngine(BookKeeping):
    """See the module's docstring; the meaning of each method is in `Engine`."""

    turns_all_cells = True
    places_between = True

    def __init__(self, spec: ModelSpec, num_cells: int, max_sequences: int = 64) -> None:
        self.spec = spec
        self._table = SequenceTable(num_cells, range(max_sequences))
        self._states = np.zeros(num_cells, dtype=np.uint64)
        self._vocabulary = np.arange(spec.vocab_size, dtype=np.uint64) * _MIX[0]
        self.num_calls = 0
        self.num_computed = 0

    def forward(self, work: Sequence[Work]) -> Logits:
        check_work(self._table, work, self.spec, places_between=True)
        for piece in (piece for item in work for piece in item.placed):
            _check_size(piece.payload)
        self.num_calls += 1
        logits: Logits = {}
        for item in work:
            start = self._table.length(item.seq)
            tokens, ranges = joined(item, start)
            cells = self._table.append(item.seq, tokens)
            for piece in item.placed:
                states = np.frombuffer(piece.payload.data, dtype=np.uint64)
                first = piece.position - start
                self._states[cells[first : first + len(piece)]] = states[piece.start : piece.stop]
            for begin, end in ranges:
                self._compute(item.seq, begin, end)
            if item.logits:
                last = self._states[self._table.cells(item.seq)[-1]]
                noise = _hash(self._vocabulary ^ last) >> np.uint64(40)  # 24 random bits
                logits[item.seq] = noise.astype(np.float32) / np.float32(1 << 20)
        return logits

    def fork(self, seq: SequenceId, length: int) -> SequenceId:
        return self._table.fork(seq, length)

    def truncate(self, seq: SequenceId, length: int) -> None:
        self._table.truncate(seq, length)

    def drop(self, seq: SequenceId, start: int, stop: int) -> None:
        self._table.cut(seq, start, stop)

    def export(self, seq: SequenceId, start: int, stop: int) -> Payload:
        self._table.check_range(seq, start, stop)
        states = self._states[np.array(self._table.cells(seq)[start:stop], dtype=np.intp)]
        return Payload(self._table.tokens(seq)[start:stop], start, memoryview(states.tobytes()), self.spec.fingerprint)

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
        start, stop = check_payload(self._table, seq, payload, position, (start, stop), self.spec)
        _check_size(payload)
        states = np.frombuffer(payload.data, dtype=np.uint64)
        self._states[self._table.append(seq, payload.tokens[start:stop])] = states[start:stop]

    def move(self, payloads: Sequence[Payload], positions: Sequence[int]) -> list[Payload]:
        check_moves(self._table, payloads, positions, self.spec)
        return [replace(payload, position=position) for payload, position in zip(payloads, positions, strict=True)]

    def recompute(self, seq: SequenceId, ranges: Sequence[Range]) -> None:
        self._table.check_ranges(seq, ranges)
        self._table.check_room(sum(stop - start for start, stop in ranges))
        for start, stop in ranges:
            old = np.array(self._table.cells(seq)[start:stop], dtype=np.intp)
            self._states[self._table.renew(seq, start, stop)] = self._states[old]
            self._compute(seq, start, stop)
            self.num_calls += stop > start

    def compare(self, one: Payload, other: Payload) -> npt.NDArray[np.float32]:
        """1 where states differ."""
        check_same(one, other, self.spec)
        states = (np.frombuffer(payload.data, dtype=np.uint64) for payload in (one, other))
        return np.not_equal(*states).astype(np.float32)

    def probe(self, seq: SequenceId, tokens: Tokens, layer: int) -> None:
        """Its only state is taken for what all layers but the first keep."""
        check_layer(layer, self._looking())
        check_work(self._table, [Work(seq, tokens)], self.spec)
        self.num_calls += 1
        start = self._table.length(seq)
        self._table.append(seq, tokens)
        self._compute(seq, start, start + len(tokens))
        self.num_computed -= len(tokens)
        self.num_probed += layer * len(tokens)

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
        """1 where states differ."""
        check_layer(layer, self._looking())
        stop = len(payload) if stop is None else stop
        check_probed(self._table, seq, payload, position, (start, stop))
        check_fingerprint(payload, self.spec)
        own = np.frombuffer(payload.data, dtype=np.uint64)[start:stop]
        fresh = self.export(seq, position, position + stop - start)
        mended = replace(fresh, data=memoryview(own.tobytes()))
        return mended, np.not_equal(own, np.frombuffer(fresh.data, dtype=np.uint64)).astype(np.float32)

    def attention(self, seq: SequenceId, tokens: Tokens) -> npt.NDArray[np.float32]:
        """All of it goes to equal tokens, each query's own among them."""
        self._looking()
        start = self.length(seq) if self._table.is_open(seq) else 0
        self.forward([Work(seq, tokens, logits=False)])
        all_tokens = self.tokens(seq)
        received = np.zeros(len(all_tokens), dtype=np.float32)
        for position in range(start, len(all_tokens)):
            equal = np.flatnonzero(all_tokens[: position + 1] == all_tokens[position])
            received[equal] += np.float32(1 / len(equal))
        return received

    def _looking(self) -> ModelSpec:
        if not self.spec.can_look:
            raise self._cannot_look()
        return self.spec

    def close(self, seq: SequenceId) -> None:
        self._table.close(seq)

    def check_integrity(self) -> None:
        self._table.check_integrity()

    def shutdown(self) -> None:
        pass

    def _compute(self, seq: SequenceId, start: int, stop: int) -> None:
        """Each token's state from its id and all states before it in the sequence."""
        row = self._table.row(seq)
        cells = np.array(row.cells, dtype=np.intp)
        for index in range(start, stop):
            distance = np.arange(index, 0, -1, dtype=np.uint64) * _MIX[0]
            seen = _hash(self._states[cells[:index]] ^ distance).sum(dtype=np.uint64)
            token = np.array([row.tokens[index]], dtype=np.uint64) * _MIX[1]
            self._states[cells[index]] = _hash(token ^ seen ^ _MIX[2])[0]
        self.num_computed += stop - start


def _check_size(payload: Payload) -> None:
    """Raises ForeignPayload."""
    if len(payload.data) != 8 * len(payload):
        raise ForeignPayload(f"{8 * len(payload)} bytes expected for {len(payload)} tokens, got {len(payload.data)}")
