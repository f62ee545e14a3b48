"""Memory shared by blocks: rooms never overlap, and it lives as long as anybody holds a view of it."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.kv.slabs import SLAB_BYTES, Slabs

MEGABYTE = 1 << 20


@given(st.lists(st.integers(0, 3 * MEGABYTE), max_size=12))
@settings(deadline=None, max_examples=40)
def test_rooms_have_their_sizes_and_do_not_overlap(sizes: list[int]) -> None:
    rooms = Slabs().rooms(sizes)
    assert [room.nbytes for room in rooms] == sizes
    for number, room in enumerate(rooms):
        np.frombuffer(room, np.uint8)[:] = number
    assert all((np.frombuffer(room, np.uint8) == number).all() for number, room in enumerate(rooms))


def test_a_slab_is_used_again_when_its_last_view_is_gone() -> None:
    slabs = Slabs()
    rooms = slabs.rooms([MEGABYTE] * 8)
    rooms[3][:4] = b"here"
    address = np.frombuffer(rooms[0], np.uint8).ctypes.data
    last = np.frombuffer(rooms[3][:4], np.uint8)
    del rooms
    gc.collect()
    others = slabs.rooms([MEGABYTE] * 8)
    others[3][:4] = b"away"
    assert bytes(last) == b"here", "one view is enough to keep it"
    del last
    again = slabs.rooms([MEGABYTE] * 8)
    assert np.frombuffer(again[0], np.uint8).ctypes.data == address


@pytest.mark.parametrize("num_bytes", [2 * MEGABYTE, SLAB_BYTES, 3 * SLAB_BYTES])
def test_few_idle_slabs_are_kept(num_bytes: int) -> None:
    slabs = Slabs()
    held = [slabs.rooms([num_bytes]) for _ in range(20)]
    held.clear()
    assert len(slabs._idle) == 8
    slabs.rooms([num_bytes + MEGABYTE * 2])
    slabs.rooms([num_bytes // 2])
    assert len(slabs._idle) == 8, "one too small is no use, and one twice as large a waste"
    if num_bytes > 2 * MEGABYTE:
        room = slabs.rooms([num_bytes - MEGABYTE * 2])
        assert len(slabs._idle) == 7
        del room
        assert len(slabs._idle) == 8


def test_what_was_prepared_is_used_and_made_again() -> None:
    slabs = Slabs()
    slabs.prepare(2 * SLAB_BYTES + 1)
    assert [len(slab) for slab in slabs._idle] == [SLAB_BYTES] * 3
    rooms = slabs.rooms([MEGABYTE] * 7)
    assert len(slabs._idle) == 2
    slabs.prepare(2 * SLAB_BYTES + 1)
    assert len(slabs._idle) == 3
    del rooms
    assert len(slabs._idle) == 4
    slabs.prepare(100 * SLAB_BYTES)
    assert len(slabs._idle) == 8
    slabs.prepare(0)
    assert len(slabs._idle) == 8


def test_small_rooms_keep_nothing_but_themselves() -> None:
    slabs = Slabs()
    rooms = slabs.rooms([1000] * 10)
    del rooms
    assert not slabs._idle


def test_many_readers_at_once() -> None:
    slabs = Slabs()

    def use(number: int) -> bool:
        right = True
        for _ in range(50):
            rooms = slabs.rooms([MEGABYTE] * 2)
            for room in rooms:
                room[:: MEGABYTE // 4] = bytes([number] * 4)
            right = right and all(bytes(room[:: MEGABYTE // 4]) == bytes([number] * 4) for room in rooms)
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))
