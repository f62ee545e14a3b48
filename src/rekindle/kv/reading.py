"""How files of blocks are read: in order, into slabs, with few calls of the system, and ahead where that helps.

A file costs an opening, a status, a read and a closing. Some files are opened before the first of them is read, up to a
slab's bytes, so that there is one slab for all of them; a file that is missing ends the look ahead, because what follows it
in a chain is mostly missing too.

The read is first asked of the page cache alone. If that doesn't have all of the file, the disk is what takes the time,
and from then on the system is told of the files that follow, so that it fetches them meanwhile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from rekindle.kv.slabs import SLAB_BYTES, Slabs

_MAX_OPEN = 64  # files
_AHEAD_BYTES = 8 << 20  # more would only delay the file that is waited for
_MIN_AHEAD, _MAX_AHEAD = 2, 128  # files
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class Contents(NamedTuple):
    """All of a file."""

    data: memoryview
    used_ns: int  # its modification time


class _Open(NamedTuple):
    handle: int
    num_bytes: int
    used_ns: int


def read_files(paths: Sequence[str], slabs: Slabs) -> Iterator[Contents | None]:
    """Each file when it is asked for, None for one that is missing; none is held here. Raises OSError, and ends."""
    ahead = _Ahead(paths)
    files: deque[_Open] = deque()
    rooms: deque[memoryview] = deque()
    try:
        for index in range(len(paths)):
            if not files:
                files.extend(_open_some(paths, index))
                rooms.extend(slabs.rooms([file.num_bytes for file in files]))
            yield _read(files, rooms.popleft(), index, ahead) if files else None
    finally:
        for file in files:
            os.close(file.handle)


def _open_some(paths: Sequence[str], start: int) -> list[_Open]:
    """The files that fill a slab, one at least, up to the first that is missing. Raises OSError if it is the first's."""
    files: list[_Open] = []
    left = SLAB_BYTES
    try:
        for index in range(start, min(len(paths), start + _MAX_OPEN)):
            files.append(_open(paths[index]))
            left -= files[-1].num_bytes
            if left < files[-1].num_bytes:  # the next one is mostly as large
                break
    except FileNotFoundError:
        pass
    except OSError:
        if not files:
            raise
    return files


def _open(path: str) -> _Open:
    handle = os.open(path, _FLAGS)
    try:
        status = os.fstat(handle)
    except BaseException:
        os.close(handle)
        raise
    return _Open(handle, status.st_size, status.st_mtime_ns)


def _read(files: deque[_Open], room: memoryview, index: int, ahead: _Ahead) -> Contents:
    """The first of the open files, which is closed then."""
    handle, num_bytes, used_ns = files[0]
    length = _from_page_cache(handle, room)
    ahead.note(index, files, in_memory=length == num_bytes)
    if length < num_bytes:
        with open(handle, "rb", buffering=0, closefd=False) as file:
            file.seek(length)
            while length < num_bytes and (count := file.readinto(room[length:])):
                length += count
    os.close(files.popleft().handle)
    return Contents((room if length == num_bytes else room[:length]).toreadonly(), used_ns)


def _from_page_cache(handle: int, room: memoryview) -> int:
    """How many of a file's first bytes were read without asking the disk, where it is a system that can tell."""
    if _NO_WAIT is None:
        return 0
    try:
        return os.preadv(handle, [room], 0, _NO_WAIT)
    except OSError:  # nothing of it is there, or a file system that can't tell
        return 0


class _Ahead:
    """Has the system fetch files that will be read soon, each once, from the first one on that it had to fetch."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._next: int | None = None  # the first of which the system was not told; None while all were in its memory

    def note(self, index: int, files: Sequence[_Open], *, in_memory: bool) -> None:
        """The first of these open files, which follow each other, is about to be read."""
        if self._next is None and in_memory:
            return
        depth = min(max(_AHEAD_BYTES // max(files[0].num_bytes, 1), _MIN_AHEAD), _MAX_AHEAD)
        start, stop = max(self._next or 0, index + 1), index + 1 + depth
        for following in range(start, min(stop, len(self._paths))):
            if following - index < len(files):
                _advise(files[following - index].handle)
            else:
                fetch_soon(self._paths[following])
        self._next = max(start, stop)


def fetch_soon(path: str) -> None:
    """Have the system fetch a file, without waiting for it."""
    with suppress(OSError):
        handle = os.open(path, _FLAGS)
        try:
            _advise(handle)
        finally:
            os.close(handle)


def _advise(handle: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
