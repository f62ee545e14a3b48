"""The llama.cpp engine: the seven verbs on one unified KV cache.

`fork` is metadata only, because all sequences live in one stream. `export` and `place` go through a scratch sequence:
llama.cpp saves and loads whole sequences, so a range is copied (as metadata) into the scratch, saved from there, and the
other way round. Three facts of llama.cpp shape this file:

- A shift of K is lazy: it runs inside the next decode. Exporting in between would save new positions with unrotated K, so
  `export` first runs a decode of one throw-away token if a shift is pending. One cell is kept back for it.
- A position belongs to a cell, not to a sequence. So cells that other sequences share can't be shifted in place: `drop`
  copies them first.
- Sliding-window layers see a cell as free once it has left the window of the only sequence that holds it, also in a cache
  of full size, and they leave such cells out of a saved state. Both would lose what a later `fork` or `truncate` needs. So
  for such models every sequence has a twin (its "guard") that holds the same cells, which keeps them in use, and payloads
  are saved in pieces no longer than the window.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from rekindle.engine.batch import Batch, Span, split
from rekindle.engine.pieces import PIECE, Joiner, unpack
from rekindle.engine.protocol import Logits, Payload, Range, SequenceId, Work
from rekindle.engine.saved import distances, saved_values
from rekindle.engine.sequences import BookKeeping, SequenceTable
from rekindle.engine.turning import Turner
from rekindle.engine.verify import check_moves, check_payload, check_same, check_work
from rekindle.errors import ContextFull, EngineError, ForeignPayload, ModelError
from rekindle.model import llama_log
from rekindle.model.fingerprint import fingerprint
from rekindle.model.gguf import GgufModel
from rekindle.model.spec import ModelSpec
from rekindle.tokens import as_tokens

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
SCRATCH = 0
MAX_SEQUENCES = 127  # llama.cpp has 256 ids: the scratch, these, and a guard for each
GUARD = 128  # id of a sequence's guard minus the sequence's own
BATCH_TOKENS = 2048
MICRO_BATCH_TOKENS = 512


class LlamaEngine(BookKeeping):
    """See the module's docstring; the meaning of each method is in `Engine`."""

    turns_all_cells = True  # until it has shown how they turn, by one `move`; see `turning.py`
    reads_idle_cells = True  # its mask has a column for each, up to the last in use

    def __init__(
        self,
        model: GgufModel,
        *,
        num_cells: int,
        threads: int,
        kv_type: str = "f16",
        max_sequences: int = 64,
    ) -> None:
        """At most MAX_SEQUENCES sequences. Raises ModelError if the model's cache can't be cut at a token, or llama.cpp
        refuses the settings.
        """
        if model.uncuttable is not None:
            raise ModelError(
                f"{model.name} ({model.architecture}) is {model.uncuttable}; Rekindle serves models whose cache can be "
                "cut at any token"
            )
        self._model = model
        weights = model.files.weights_digest()  # before there is a context, which would have to be freed
        self._context = _open_context(model, num_cells, threads, kv_type, max_sequences + 1)
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._window = model.window
        self._shift_pending = False
        capacity = int(llama_cpp.llama_n_batch(self._context))  # BATCH_TOKENS, less for a small context
        self._batch = Batch(capacity)
        # beyond a sliding window, llama.cpp could reuse cells of the batch itself
        self._limit = min(capacity, model.window) if model.window else capacity
        self._table = SequenceTable(num_cells, range(1, max_sequences + 1))
        self.num_calls = 0
        self.num_computed = 0
        self.spec = _spec(model, weights, kv_type, bool(llama_cpp.llama_memory_can_shift(self._memory)))
        self._joiner = Joiner(self.spec.fingerprint)
        self._turner = Turner(model, kv_type)

    # The seven verbs.

    def forward(self, work: Sequence[Work]) -> Logits:
        check_work(self._table, work, self.spec)
        spans = [Span(item.seq, self.length(item.seq), item.tokens, item.logits) for item in work]
        try:
            logits = self._compute(spans)
        except EngineError:
            for span in spans:
                self._remove(span.seq, span.position)
            raise
        for item in work:
            self._table.append(item.seq, item.tokens)
        return logits

    def fork(self, seq: SequenceId, length: int) -> SequenceId:
        new = self._table.fork(seq, length)
        self._share(seq, new, 0, length)
        return new

    def truncate(self, seq: SequenceId, length: int) -> None:
        self._table.truncate(seq, length)
        self._remove(seq, length)

    def drop(self, seq: SequenceId, start: int, stop: int) -> None:
        self._table.check_range(seq, start, stop)
        length = self.length(seq)
        if stop == length or start == stop:
            return self.truncate(seq, length - (stop - start))
        if not self.spec.can_shift:
            raise EngineError(f"{self.spec.architecture} KV cannot be moved: a cut may only be made at the end")
        if self._table.num_shared(seq, stop, length):
            return self._drop_shared(seq, start, stop)
        self._table.cut(seq, start, stop)
        self._remove(seq, start, stop)
        self._shift(seq, stop, start - stop)
        return None

    def _drop_shared(self, seq: SequenceId, start: int, stop: int) -> None:
        """Others see the cells that would have to move, so this sequence gets copies of them."""
        length = self.length(seq)
        freed = length - start - self._table.num_shared(seq, start, length)
        self._table.check_room(length - stop - freed)
        rest = self.export(seq, stop, length)
        self.truncate(seq, start)
        self.place(seq, rest, start)

    def export(self, seq: SequenceId, start: int, stop: int) -> Payload:
        self._table.check_range(seq, start, stop)
        self._settle()
        data = self._save_all(seq, start, stop)
        return Payload(self._table.tokens(seq)[start:stop], start, data, self.spec.fingerprint)

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
        try:
            self._put(seq, payload, position, start, stop)
        except EngineError:
            self._remove(seq, position)
            raise
        self._table.append(seq, payload.tokens[start:stop])

    def place_all(self, seq: SequenceId, payloads: Iterable[Payload], *, until: int = 0) -> None:
        super().place_all(seq, self._joiner.joined(payloads), until=until)

    def move(self, payloads: Sequence[Payload], positions: Sequence[int]) -> list[Payload]:
        check_moves(self._table, payloads, positions, self.spec)
        if self._turner.can_turn(payloads, positions):
            return [
                self._turner.turned(payload, position) for payload, position in zip(payloads, positions, strict=True)
            ]
        moved = list(payloads)
        moves = [index for index, payload in enumerate(payloads) if positions[index] != payload.position]
        holding = self._table.open()  # none of its cells are the table's: it is gone before anybody else may ask
        try:
            for index in sorted(moves, key=lambda index: positions[index]):
                self._put(holding, payloads[index], positions[index], 0, len(payloads[index]))
            self._settle()
            for index in moves:
                start, stop = positions[index], positions[index] + len(payloads[index])
                moved[index] = replace(payloads[index], position=start, data=self._save_all(holding, start, stop))
        finally:
            self._remove(holding, 0)
            self._table.close(holding)
        self._turner.learn(payloads, moved)
        self.turns_all_cells = not self._turner.knows
        return moved

    def recompute(self, seq: SequenceId, ranges: Sequence[Range]) -> None:
        self._table.check_ranges(seq, ranges)
        ranges = [(start, stop) for start, stop in ranges if start < stop]
        self._table.check_room(sum(stop - start for start, stop in ranges))
        if not ranges:
            return
        tokens, length = self._table.tokens(seq), self.length(seq)
        # a batch must follow a sequence's last token: set the rest aside
        self._share(seq, SCRATCH, ranges[0][0], length)
        try:
            for start, stop in ranges:
                self._remove(seq, start)
                self._compute([Span(seq, start, tokens[start:stop], False)])
                self._share(SCRATCH, seq, stop, length)
        except EngineError:
            self._remove(seq, ranges[0][0])
            self._share(SCRATCH, seq, ranges[0][0], length)
            raise
        finally:
            self._remove(SCRATCH, 0)
        for start, stop in ranges:
            self._table.renew(seq, start, stop)

    # Looking into KV.

    def compare(self, one: Payload, other: Payload) -> npt.NDArray[np.float32]:
        check_same(one, other, self.spec)
        if not len(one):
            return np.zeros(0, dtype=np.float32)
        return distances(_values(one), _values(other))

    # Book-keeping.

    def close(self, seq: SequenceId) -> None:
        self._table.close(seq)
        self._remove(seq, 0)

    def check_integrity(self) -> None:
        """Also asks llama.cpp for the first and last position of each sequence."""
        self._table.check_integrity()
        assert llama_cpp.llama_memory_seq_pos_max(self._memory, SCRATCH) == -1
        for seq in self._table.ids:
            length = self.length(seq) if self._table.is_open(seq) else 0
            assert llama_cpp.llama_memory_seq_pos_max(self._memory, seq) == length - 1
            assert llama_cpp.llama_memory_seq_pos_min(self._memory, seq) == (0 if length else -1)

    def shutdown(self) -> None:
        """Frees the context; the model stays open."""
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None

    # llama.cpp underneath. Sequence ids below include the scratch; guards follow their sequence.

    def _compute(self, spans: Sequence[Span]) -> Logits:
        """Decode spans, in as few calls as allowed. Raises EngineError; what was decoded by then stays in the cache."""
        logits: Logits = {}
        vocab_size = self.spec.vocab_size
        for part in split(spans, self._limit, MICRO_BATCH_TOKENS):
            outputs = self._batch.fill(part)
            if logits:  # llama.cpp is about to write over them
                logits = {seq: row.copy() for seq, row in logits.items()}
            self._decode()
            self.num_computed += self._batch.raw.n_tokens
            for span in part:
                self._guard(span.seq, span.position, span.position + len(span.tokens))
            for seq, row in outputs:
                pointer = llama_cpp.llama_get_logits_ith(self._context, row)
                address = ctypes.addressof(pointer.contents)
                values = memoryview((ctypes.c_float * vocab_size).from_address(address))
                logits[seq] = np.frombuffer(values, dtype=np.float32)
        return logits

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch.raw)
        self.num_calls += 1
        if status == 1:
            raise ContextFull(f"llama.cpp found no free cells for {self._batch.raw.n_tokens} tokens")
        if status:
            raise EngineError(f"llama_decode returned {status}: {llama_log.take_errors() or 'no reason given'}")
        self._shift_pending = False

    def _settle(self) -> None:
        """Run a pending shift now, by decoding one token that is thrown away."""
        if self._shift_pending:
            self._batch.fill([Span(SCRATCH, 0, as_tokens([0]), False)])
            self._decode()
            self._remove(SCRATCH, 0)

    def _share(self, source: int, target: int, start: int, stop: int) -> None:
        """Let `target` see the cells of `source` at [start, stop)."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, stop)
        self._guard(target, start, stop)

    def _guard(self, seq: int, start: int, stop: int) -> None:
        if self._window:
            llama_cpp.llama_memory_seq_cp(self._memory, seq, seq + GUARD, start, stop)

    def _remove(self, seq: int, start: int, stop: int = -1) -> None:
        for each in (seq, seq + GUARD) if self._window else (seq,):
            if not llama_cpp.llama_memory_seq_rm(self._memory, each, start, stop):
                raise EngineError(f"llama.cpp cannot remove positions from {start} on from sequence {each}")

    def _trim(self, seq: int, start: int, stop: int) -> None:
        """Leave the positions [start, stop) and no others."""
        if start:
            self._remove(seq, 0, start)
        self._remove(seq, stop)

    def _shift(self, seq: int, start: int, by: int) -> None:
        llama_cpp.llama_memory_seq_add(self._memory, seq, start, -1, by)
        self._shift_pending = True

    def _put(self, seq: int, payload: Payload, position: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of a payload into a sequence, from `position` on. What was put before a failure stays."""
        by = position - (payload.position + start)
        if by and payload.position + by >= 0 and self._turner.can_turn([payload], [payload.position + by]):
            payload, by = self._turner.turned(payload, payload.position + by), 0
        try:
            for offset, count, data in unpack(payload):
                first, end = max(start, offset), min(stop, offset + count)
                if first >= end:
                    continue
                begin, whole = payload.position + offset, end - first == count
                if whole and begin == position == 0:
                    # no scratch needed: loading clears its destination, which is empty
                    self._load(data, seq, 0, count)
                    self._guard(seq, 0, count)
                    continue
                self._load(data, SCRATCH, begin, count)
                if not whole:
                    self._trim(SCRATCH, payload.position + first, payload.position + end)
                if by:
                    self._shift(SCRATCH, 0, by)
                self._share(SCRATCH, seq, payload.position + first + by, payload.position + end + by)
                self._clear_scratch()
        except EngineError:
            self._clear_scratch()
            raise

    def _clear_scratch(self) -> None:
        """Of what was loaded or saved through it, which has no guard."""
        llama_cpp.llama_memory_seq_rm(self._memory, SCRATCH, -1, -1)

    def _save_all(self, seq: int, start: int, stop: int) -> memoryview:
        """The content of a payload; no shift may be pending."""
        pieces = [self._save(seq, *piece) for piece in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _pieces(self, start: int, stop: int) -> list[Range]:
        """A range cut so that no piece is longer than the sliding window."""
        step = self._window or max(1, stop - start)
        return [(first, min(stop, first + step)) for first in range(start, stop, step)]

    def _save(self, seq: int, start: int, stop: int) -> memoryview:
        llama_cpp.llama_memory_seq_cp(self._memory, seq, SCRATCH, start, stop)
        try:
            size = llama_cpp.llama_state_seq_get_size(self._context, SCRATCH)
            buffer = np.empty(PIECE.size + size, dtype=np.uint8)
            PIECE.pack_into(buffer.data, 0, start, stop - start, size)
            pointer = ctypes.cast(buffer.ctypes.data + PIECE.size, ctypes.POINTER(ctypes.c_uint8))
            written = llama_cpp.llama_state_seq_get_data(self._context, pointer, size, SCRATCH)
        finally:
            self._clear_scratch()
        if written != size:
            raise EngineError(f"llama.cpp saved {written} of {size} bytes; {llama_log.take_errors()}")
        return buffer.data

    def _load(self, data: memoryview, seq: int, position: int, count: int) -> None:
        """A saved piece into an empty sequence. Raises ForeignPayload, and then that is empty still."""
        pointer = ctypes.cast(np.frombuffer(data, dtype=np.uint8).ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        read = llama_cpp.llama_state_seq_set_data(self._context, pointer, len(data), seq)
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, seq)
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, seq)
        if read != len(data) or (first, last) != (position, position + count - 1):
            llama_cpp.llama_memory_seq_rm(self._memory, seq, -1, -1)
            raise ForeignPayload(
                f"llama.cpp took {read} of {len(data)} bytes for positions [{position}, {position + count}); "
                f"{llama_log.take_errors() or 'the payload is torn'}"
            )


def _values(payload: Payload) -> list[npt.NDArray[np.float32]]:
    """V of each layer, [tokens, width]."""
    pieces = [saved_values(data) for _, _, data in unpack(payload)]
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def _open_context(model: GgufModel, num_cells: int, threads: int, kv_type: str, num_ids: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = num_cells + 1  # one cell is kept back, see `_settle`
    params.n_batch = BATCH_TOKENS
    params.n_ubatch = MICRO_BATCH_TOKENS
    params.n_seq_max = num_ids  # of those that are decoded or saved; guards may lie above
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.kv_unified = True
    params.swa_full = True
    params.no_perf = True
    llama_log.take_errors()
    context = llama_cpp.llama_init_from_model(model.handle, params)
    if not context:
        reason = llama_log.take_errors() or "no reason given"
        raise ModelError(f"llama.cpp cannot make a context of {num_cells} {kv_type} cells for {model.name}: {reason}")
    return context


def _spec(model: GgufModel, weights: bytes, kv_type: str, can_shift: bool) -> ModelSpec:
    quantised = kv_type != "f16"
    rotated = quantised and model.head_size % 64 == 0 and not int(os.environ.get("LLAMA_ATTN_ROT_DISABLE") or 0)
    facts = {
        "weights": weights.hex(),
        "engine": f"llama-cpp-python {llama_cpp.__version__}",
        "layout": "unified, flash attention",
        "kv_type": kv_type,
        "rotated": rotated,  # quantised K is kept in a rotated space where the head's width allows it
    }
    return ModelSpec(
        name=model.name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        train_context=model.train_context,
        kv_bytes_per_token=model.kv_bytes_per_token(kv_type),
        window=model.window,
        kv_type=kv_type,
        can_shift=can_shift and (rotated or not quantised),  # else llama.cpp's shift crashes (its issue 25636)
        fingerprint=fingerprint(facts),
    )
