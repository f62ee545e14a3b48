"""Looking into what llama.cpp saved of a sequence.

    magic, flags │ for each cache:  streams │ for each stream:
      cells │ (position, sequences, ids) of each cell │ V transposed? │ layers
      (type, bytes per row, rows) K of each layer │ (type, bytes per row, rows) V of each layer

A model with sliding windows has two caches, one behind the other. Rows come in the order of cells, which need not be that
of positions. With flash attention V is not transposed. Integers are little-endian and nothing is padded. This is what
`llama_kv_cache::state_write` does in the release that is pinned here.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from rekindle.errors import ForeignPayload

Floats = npt.NDArray[np.float32]
_F16, _Q8_0, _Q4_0 = 1, 8, 2  # ggml's numbers of types
_BLOCK = 32  # values in a block of a quantised row


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._offset = data, 0

    @property
    def at_end(self) -> bool:
        return self._offset >= len(self._data)

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._offset)
        self._offset += struct.calcsize("<" + layout)
        return values

    def take(self, size: int) -> memoryview:
        part = self._data[self._offset : self._offset + size]
        if len(part) != size:
            raise ForeignPayload(f"the payload is torn: {size} bytes expected at {self._offset}, {len(part)} are left")
        self._offset += size
        return part


def saved_values(data: memoryview) -> list[Floats]:
    """V of each layer, [tokens, width], tokens by position. Raises ForeignPayload if it can't be read."""
    reader = _Reader(data)
    try:
        reader.numbers("II")
        layers: list[Floats] = []
        while not reader.at_end:
            (streams,) = reader.numbers("I")
            for _ in range(streams):
                layers += _stream(reader)
    except struct.error as error:
        raise ForeignPayload(f"the payload is torn: {error}") from None
    return layers


def _stream(reader: _Reader) -> list[Floats]:
    (count,) = reader.numbers("I")
    if not count:
        return []
    positions = []
    for _ in range(count):
        position, num_ids = reader.numbers("iI")
        reader.take(4 * num_ids)
        positions.append(position)
    order = np.argsort(positions)
    is_transposed, num_layers = reader.numbers("II")
    if is_transposed:
        raise ForeignPayload("V is saved transposed; it can only be looked into with flash attention on")
    for _ in range(num_layers):
        _rows(reader, count)
    return [_decoded(*_rows(reader, count))[order] for _ in range(num_layers)]


def _rows(reader: _Reader, count: int) -> tuple[int, npt.NDArray[np.uint8]]:
    """Type and bytes [tokens, bytes] of one layer's K or V."""
    kind, size = reader.numbers("iQ")
    return kind, np.frombuffer(reader.take(count * size), dtype=np.uint8).reshape(count, size)


def _decoded(kind: int, rows: npt.NDArray[np.uint8]) -> Floats:
    """Values [tokens, width] of rows in f16, or in blocks of 32 with one f16 scale before them."""
    if kind == _F16:
        return rows.view("<f2").astype(np.float32)
    if kind not in (_Q8_0, _Q4_0):
        raise ForeignPayload(f"KV of ggml's type {kind} can't be looked into; f16, q8_0 and q4_0 can")
    blocks = rows.reshape(len(rows), -1, 2 + (_BLOCK if kind == _Q8_0 else _BLOCK // 2))
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    numbers = np.ascontiguousarray(blocks[..., 2:])
    if kind == _Q8_0:
        values = numbers.view(np.int8).astype(np.float32)
    else:
        values = np.concatenate([numbers & 15, numbers >> 4], axis=-1).astype(np.float32) - 8
    return (values * scales).reshape(len(rows), -1)


def distances(one: list[Floats], other: list[Floats]) -> Floats:
    """[tokens] how far V lies apart, beside V's usual size, on average over the layers."""
    total = np.zeros(len(one[0]), dtype=np.float32)
    for mine, yours in zip(one, other, strict=True):
        size = np.linalg.norm(yours, axis=1).mean()
        total += np.linalg.norm(mine - yours, axis=1) / max(float(size), 1e-6)
    return total / np.float32(len(one))
