"""How files of blocks are read: in order, into slabs, with few calls of the system, and ahead where that helps.

A file costs a status, an opening, a read and a closing. The statuses of some files are asked for before the first of
them is read, up to a slab's bytes, so that there is one slab for all of them; a file that is missing ends the look
ahead, because what follows it in a chain is mostly missing too.

The read is first asked of the page cache alone. If that doesn't have all of the file, the disk is what takes the time,
and from then on the system is told of the files that follow, so that it fetches them meanwhile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rekindle.kv.slabs import SLAB_BYTES, Slabs

_AHEAD_BYTES = 8 << 20  # more would only delay the file that is waited for
_MIN_AHEAD, _MAX_AHEAD = 2, 128  # files
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)


@dataclass(slots=True)
class Contents:
    """All of a file."""

    data: memoryview
    used_ns: int  # its modification time


def read_files(paths: Sequence[str], slabs: Slabs) -> Iterator[Contents | None]:
    """Each file when it is asked for, None for one that is missing; none is held here. Raises OSError, and ends."""
    rooms: deque[tuple[memoryview, int]] = deque()  # and the time of last use, of the files looked ahead to
    ahead = _Ahead(paths)
    for index, path in enumerate(paths):
        if not rooms:
            found = _look_ahead(paths, index)
            times = [status.st_mtime_ns for status in found]
            rooms.extend(zip(slabs.rooms([status.st_size for status in found]), times, strict=True))
        yield _read(path, *rooms.popleft(), index, ahead) if rooms else None


def _look_ahead(paths: Sequence[str], start: int) -> list[os.stat_result]:
    """Of the files that fill a slab, one at least, up to the first that is missing."""
    found: list[os.stat_result] = []
    left = SLAB_BYTES
    with suppress(FileNotFoundError):
        for index in range(start, len(paths)):
            status = os.stat(paths[index])  # noqa: PTH116 (a Path takes as long to make)
            left -= status.st_size
            if found and left < 0:
                break
            found.append(status)
    return found


def _read(path: str, room: memoryview, used_ns: int, index: int, ahead: _Ahead) -> Contents | None:
    try:
        handle = os.open(path, _FLAGS)
    except FileNotFoundError:  # it was there a moment ago
        return None
    try:
        length = _from_page_cache(handle, room)
        ahead.note(index, in_memory=length == len(room), num_bytes=len(room))
        if length < len(room):
            with open(handle, "rb", buffering=0, closefd=False) as file:
                file.seek(length)
                while length < len(room) and (count := file.readinto(room[length:])):
                    length += count
    finally:
        os.close(handle)
    return Contents(room[:length].toreadonly(), used_ns)


def _from_page_cache(handle: int, room: memoryview) -> int:
    """How many of a file's first bytes were read without asking the disk, where it is a system that can tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 0
    try:
        return os.preadv(handle, [room], 0, os.RWF_NOWAIT)
    except OSError:  # nothing of it is there, or a file system that can't tell
        return 0


class _Ahead:
    """Has the system fetch files that will be read soon, each once, from the first one on that it had to fetch."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._next: int | None = None  # the first of which the system was not told; None while all were in its memory

    def note(self, index: int, *, in_memory: bool, num_bytes: int) -> None:
        """This file is about to be read."""
        if self._next is None and in_memory:
            return
        depth = min(max(_AHEAD_BYTES // max(num_bytes, 1), _MIN_AHEAD), _MAX_AHEAD)
        start, stop = max(self._next or 0, index + 1), index + 1 + depth
        for path in self._paths[start:stop]:
            fetch_soon(path)
        self._next = max(start, stop)


def fetch_soon(path: str) -> None:
    """Have the system fetch a file, without waiting for it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            handle = os.open(path, _FLAGS)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)
