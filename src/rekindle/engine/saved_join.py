"""Several states that llama.cpp saved, as one: what it loads in one call instead of many.

    cells 0-63 │ K, V of layer 0, 1, …        for each layer the rows of
    cells 64-127 │ K, V of layer 0, 1, …  ->  all cells │ K, V of layer 0, 1, …   all states, in order

To load a state costs llama.cpp something whatever is in it: it makes room for bookkeeping of 256 sequences, and looks at
all cells of the cache a few times. To join is to copy once more. So it pays for small states. Measured, in microseconds of
processor time for each state of 64 tokens, loaded one by one and joined: 66 KB 49 and 23 in a cache of 8,192 cells, 83 and
28 in one of 32,768; 1.2 and 1.4 MB about the same both ways, and in small caches up to a quarter more when joined.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rekindle.errors import ForeignPayload

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
Positions = npt.NDArray[np.int32]
_F16 = 1  # ggml's number of the type

MAX_STATE_BYTES = 256 << 10  # that are worth joining
MAX_JOINED_BYTES = 4 << 20  # more would not stay in a processor's cache until it is loaded

_FRONT = 8  # bytes: magic, flags
_COUNTS = struct.Struct("<II")  # streams, cells
_CELL = 12  # bytes: position, number of sequences, one sequence
_KINDS = struct.Struct("<II")  # whether V is transposed, layers
_TENSOR = struct.Struct("<iQ")  # type, bytes of a row


class _Alike(NamedTuple):
    """Tensors with rows of the same size, one behind the other."""

    start: int  # of the first one's type, in the state
    num: int
    row_bytes: int


class _Cache(NamedTuple):
    """One of a model's caches, in a state."""

    cells: int
    start: int  # of the first cell's position
    tensors: tuple[_Alike, ...]


def join(states: Sequence[memoryview], room: Bytes) -> int | None:
    """Write one state into `room`, of the cells of all states in their order; returns its bytes.

    None if they are of different sizes or kinds, can't be read, or `room` is too small: then `room` holds nonsense.
    """
    sources = [np.frombuffer(state, np.uint8) for state in states]
    first = sources[0]
    if sum(map(len, sources)) > len(room) or any(len(source) != len(first) for source in sources):
        return None
    try:
        caches = list(_caches(states[0]))
    except struct.error:
        return None
    if any(cache is None for cache in caches):
        return None
    room[:_FRONT] = first[:_FRONT]
    end = _FRONT
    for cache in caches:
        assert cache is not None
        if not _same_kind(cache, states):
            return None
        end = _join_cache(cache, sources, room, end)
    return end


def saved_keys(state: memoryview) -> tuple[list[Positions], list[Halves]]:
    """Views of a state, to be read or written: of each cache the positions of its cells, of each layer K [cells, width].

    Raises ForeignPayload if they are not in f16, or can't be read.
    """
    positions: list[Positions] = []
    keys: list[Halves] = []
    try:
        caches = list(_caches(state))
        for cache in caches:
            if cache is None:
                raise ForeignPayload("a saved state is torn, or of a kind whose keys can't be read")
            positions.append(np.ndarray((cache.cells,), "<i4", state, cache.start, (_CELL,)))
            keys += _keys(state, cache)
    except struct.error as error:
        raise ForeignPayload(f"a saved state is torn: {error}") from None
    return positions, keys


def _keys(state: memoryview, cache: _Cache) -> list[Halves]:
    """Of one cache: the first half of its tensors, for those of V come behind all of K."""
    found = []
    for alike in cache.tensors:
        step = _TENSOR.size + cache.cells * alike.row_bytes
        for start in range(alike.start, alike.start + alike.num * step, step):
            kind, row_bytes = _TENSOR.unpack_from(state, start)
            if kind != _F16:
                raise ForeignPayload(f"keys of ggml's type {kind} can't be turned here, those in f16 can")
            found.append(np.ndarray((cache.cells, row_bytes // 2), "<f2", state, start + _TENSOR.size))
    return found[: len(found) // 2]


def _caches(state: memoryview) -> Iterator[_Cache | None]:
    """What a state holds; None for what is not understood. Raises struct.error if it is torn."""
    offset = _FRONT
    while offset < len(state):
        streams, cells = _COUNTS.unpack_from(state, offset)
        if streams != 1 or not cells:
            yield None
            return
        start = offset + _COUNTS.size
        transposed, layers = _KINDS.unpack_from(state, start + cells * _CELL)
        if transposed:
            yield None
            return
        tensors: list[_Alike] = []
        offset = start + cells * _CELL + _KINDS.size
        for _ in range(2 * layers):
            _, row_bytes = _TENSOR.unpack_from(state, offset)
            if tensors and tensors[-1].row_bytes == row_bytes:
                tensors[-1] = tensors[-1]._replace(num=tensors[-1].num + 1)
            else:
                tensors.append(_Alike(offset, 1, row_bytes))
            offset += _TENSOR.size + cells * row_bytes
        yield _Cache(cells, start, tuple(tensors)) if offset <= len(state) else None


def _same_kind(cache: _Cache, states: Sequence[memoryview]) -> bool:
    """Whether all states have, before and behind their rows, what this one's has: then all else lies alike too."""
    end = cache.start + cache.cells * _CELL
    parts = [slice(cache.start - _COUNTS.size, cache.start), slice(end, end + _KINDS.size)]
    for alike in cache.tensors:
        last = alike.start + (alike.num - 1) * (_TENSOR.size + cache.cells * alike.row_bytes)
        parts += [slice(start, start + _TENSOR.size) for start in (alike.start, last)]
    return all(state[part] == states[0][part] for state in states[1:] for part in parts)


def _join_cache(cache: _Cache, sources: Sequence[Bytes], room: Bytes, end: int) -> int:
    """Write one cache of all states at `end`; returns where it ends."""
    first, cells = sources[0], cache.cells * len(sources)
    _COUNTS.pack_into(room.data, end, 1, cells)
    end += _COUNTS.size
    size = cache.cells * _CELL
    for source in sources:
        room[end : end + size] = source[cache.start : cache.start + size]
        end += size
    room[end : end + _KINDS.size] = first[cache.start + size : cache.start + size + _KINDS.size]
    end += _KINDS.size
    for alike in cache.tensors:
        joined = alike._replace(start=end)
        _heads(room, joined, cells)[:] = _heads(first, alike, cache.cells)
        rows = _rows(room, joined, cells)
        width = cache.cells * alike.row_bytes
        for index, source in enumerate(sources):
            rows[:, index * width : (index + 1) * width] = _rows(source, alike, cache.cells)
        end += alike.num * (_TENSOR.size + cells * alike.row_bytes)
    return end


def _heads(state: Bytes, alike: _Alike, cells: int) -> Bytes:
    """[tensors, bytes] what stands before each tensor's rows, as a view."""
    step = _TENSOR.size + cells * alike.row_bytes
    return np.ndarray((alike.num, _TENSOR.size), np.uint8, state.data, alike.start, (step, 1))


def _rows(state: Bytes, alike: _Alike, cells: int) -> Bytes:
    """[tensors, bytes] the rows of each tensor, as a view."""
    step = _TENSOR.size + cells * alike.row_bytes
    shape = (alike.num, cells * alike.row_bytes)
    return np.ndarray(shape, np.uint8, state.data, alike.start + _TENSOR.size, (step, 1))
