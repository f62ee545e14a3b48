"""Several states that llama.cpp saved, as one: what it loads in one call instead of many.

    cells 0-63 │ K, V of layer 0, 1, …        for each layer the rows of
    cells 64-127 │ K, V of layer 0, 1, …  ->  all cells │ K, V of layer 0, 1, …   all states, in order

To load a state costs llama.cpp something whatever is in it: it makes room for bookkeeping of 256 sequences, and looks at
all cells of the cache a few times. To join is to copy once more. So it pays where states are small or the cache is large;
`worth_joining` says where. Layouts are those that `saved` describes.

Measured, in microseconds for each state of 64 tokens, loaded one by one and joined: 66 KB 49 and 20; 1.2 MB (two caches)
200 and 190 in 4,352 cells; 1.4 MB 129 and 157 in 2,304 cells, 156 and 147 in 8,192.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

MAX_JOINED_BYTES = 4 << 20  # more would not stay in a processor's cache until it is loaded
_CALL_BYTES = 384 << 10  # that could be copied in the time that a call takes at least
_CELL_BYTES, _WINDOW_CELL_BYTES = 60, 160  # and for each cell of the cache; sliding windows have two caches and guards

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


def worth_joining(state_bytes: int, num_cells: int, *, window: bool) -> bool:
    """Whether states of this size load faster joined, in a cache of so many cells."""
    per_cell = _WINDOW_CELL_BYTES if window else _CELL_BYTES
    return 2 * state_bytes <= MAX_JOINED_BYTES and state_bytes < _CALL_BYTES + per_cell * num_cells


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
        if not _same_kind(cache, sources):
            return None
        end = _join_cache(cache, sources, room, end)
    return end


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


def _same_kind(cache: _Cache, sources: Sequence[Bytes]) -> bool:
    """Whether all states have what this one's first state says between its rows."""
    begin, end = cache.start - _COUNTS.size, cache.start + cache.cells * _CELL
    first = sources[0]
    for source in sources[1:]:
        if not (source[begin : cache.start] == first[begin : cache.start]).all():
            return False
        if not (source[end : end + _KINDS.size] == first[end : end + _KINDS.size]).all():
            return False
        if not all((_heads(source, a, cache.cells) == _heads(first, a, cache.cells)).all() for a in cache.tensors):
            return False
    return True


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
