"""A llama.cpp batch over numpy arrays, filled without a Python loop over tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from rekindle.tokens import Tokens


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
            self._positions[row:end] = np.arange(span.position, span.position + len(span.tokens))
            self._seqs[row:end] = span.seq
            self._logits[row:end] = 0
            if span.logits:
                self._logits[end - 1] = 1
                outputs.append((span.seq, end - 1))
            row = end
        self.raw.n_tokens = row
        return outputs


def split(spans: Iterable[Span], limit: int) -> Iterator[list[Span]]:
    """The same spans in batches of at most `limit` tokens, order kept; logits stay with a span's last part."""
    part: list[Span] = []
    room = limit
    for span in spans:
        start = 0
        while start < len(span.tokens):
            stop = min(len(span.tokens), start + room)
            last = stop == len(span.tokens)
            part.append(Span(span.seq, span.position + start, span.tokens[start:stop], span.logits and last))
            room -= stop - start
            start = stop
            if room == 0:
                yield part
                part, room = [], limit
    if part:
        yield part


def _pointer(values: Any, kind: Any) -> Any:
    return ctypes.cast(values.ctypes.data, ctypes.POINTER(kind))
