"""A llama.cpp batch over numpy arrays, filled without a Python loop over tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from rekindle.tokens import SHORT_REST, Tokens, first_part


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens of one sequence at consecutive positions."""

    seq: int
    position: int  # of the first token
    tokens: Tokens
    logits: bool  # whether the last token's are wanted


class Batch:
    """Up to `capacity` tokens for one `llama_decode`."""

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, dtype=np.int32)
        self._positions = np.zeros(capacity, dtype=np.int32)
        self._counts = np.ones(capacity, dtype=np.int32)  # sequences per token: one
        self._seqs = np.zeros(capacity, dtype=np.int32)
        self._pointers = self._seqs.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)  # token i -> &seqs[i]
        self._logits = np.zeros(capacity, dtype=np.int8)
        self.raw: Any = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._logits, ctypes.c_int8),
        )

    def fill(self, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """Replace the content. Returns (sequence, row) of each span whose logits are wanted."""
        row = 0
        outputs = []
        for span in spans:
            end = row + len(span.tokens)
            self._tokens[row:end] = span.tokens
            single = len(span.tokens) == 1
            self._positions[row:end] = span.position if single else np.arange(span.position, span.position + end - row)
            self._seqs[row:end] = span.seq
            self._logits[row:end] = 0
            if span.logits:
                self._logits[end - 1] = 1
                outputs.append((span.seq, end - 1))
            row = end
        self.raw.n_tokens = row
        return outputs


def split(spans: Iterable[Span], limit: int, micro: int) -> Iterator[list[Span]]:
    """The same spans in batches of at most `limit` tokens, order kept; logits stay with a span's last part.

    llama.cpp cuts a batch into micro-batches of `micro` tokens. Where one of all these would be short, batches end earlier.
    """
    spans = list(spans)
    left = sum(len(span.tokens) for span in spans)
    if 0 < left <= min(limit, micro):  # as they are: every step that only decodes
        yield spans
        return
    part: list[Span] = []
    room = _size(left, limit, micro)
    for span in spans:
        start = 0
        while start < len(span.tokens):
            stop = min(len(span.tokens), start + room)
            last = stop == len(span.tokens)
            part.append(Span(span.seq, span.position + start, span.tokens[start:stop], span.logits and last))
            room -= stop - start
            left -= stop - start
            start = stop
            if room == 0:
                yield part
                part, room = [], _size(left, limit, micro)


def _size(left: int, limit: int, micro: int) -> int:
    """Of the next batch: whole micro-batches before the last two, if the last would be short; then two that are not."""
    rest = left % micro
    if left < micro or micro > limit or not 0 < rest < SHORT_REST:
        return min(left, limit)
    return first_part(left, micro) if left < 2 * micro else min(limit, left - rest - micro)


def _pointer(values: Any, kind: Any) -> Any:
    return ctypes.cast(values.ctypes.data, ctypes.POINTER(kind))
