"""Files are read in order and whole, into few pieces of memory, and fetched ahead where the disk has to be asked."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rekindle.kv import reading
from rekindle.kv.reading import Contents, read_files
from rekindle.kv.slabs import SLAB_BYTES, Slabs


def make_files(folder: Path, sizes: list[int]) -> list[str]:
    generator = np.random.default_rng(1)
    paths = [folder / f"{index}" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(generator.bytes(size))
    return [str(path) for path in paths]


def is_of(contents: Contents | None, path: str) -> bool:
    assert contents is not None
    same_time = contents.used_ns == Path(path).stat().st_mtime_ns
    return contents.data.readonly and same_time and bytes(contents.data) == Path(path).read_bytes()


@pytest.mark.parametrize("sizes", [[0], [1, 63, 64, 65], [100_000] * 40, [3_000_000] * 7, [SLAB_BYTES + 5, 10], []])
def test_files_come_whole_and_in_order(tmp_path: Path, sizes: list[int]) -> None:
    paths = make_files(tmp_path, sizes)
    got = list(read_files(paths, Slabs()))
    assert all(is_of(contents, path) for contents, path in zip(got, paths, strict=True))


def test_a_missing_file_is_none_in_its_place(tmp_path: Path) -> None:
    paths = make_files(tmp_path, [1000] * 9)
    for index in (0, 3, 4, 8):
        Path(paths[index]).unlink()
    there = [contents is not None for contents in read_files(paths, Slabs())]
    assert there == [index not in (0, 3, 4, 8) for index in range(9)]


def test_a_file_that_changes_after_it_was_looked_at(tmp_path: Path) -> None:
    """Whoever reads it checks it: no more is given than there is, and no more than there was."""
    paths = make_files(tmp_path, [1000] * 5)
    files = read_files(paths, Slabs())
    assert is_of(next(files), paths[0])
    Path(paths[1]).unlink()
    os.truncate(paths[2], 400)
    os.truncate(paths[3], 4000)
    removed = next(files)
    assert removed is None or len(removed.data) == 1000
    shorter, longer, last = files
    assert is_of(shorter, paths[2]) or (shorter is not None and len(shorter.data) == 400)
    assert longer is not None and len(longer.data) == 1000
    assert is_of(last, paths[4])


def test_no_file_stays_open(tmp_path: Path) -> None:
    """Whether all are read, or some, or one can't be."""
    paths = make_files(tmp_path, [1000] * 5)
    assert len(list(read_files(paths, Slabs()))) == 5
    files = read_files(paths, Slabs())
    assert is_of(next(files), paths[0])
    assert isinstance(files, Generator)
    files.close()
    (tmp_path / "folder").mkdir()
    files = read_files([*paths[:3], str(tmp_path / "folder"), paths[4]], Slabs())
    for path in paths[:3]:
        assert is_of(next(files), path)
    with pytest.raises(IsADirectoryError):
        next(files)
    assert not open_files(tmp_path)


def open_files(folder: Path) -> list[Path]:
    """Of this process, those in a folder."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(handle.readlink())
    return [path for path in found if path.is_relative_to(folder.resolve())]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        list(read_files([str(tmp_path)], Slabs()))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        list(read_files([str(tmp_path / "file" / "name")], Slabs()))


@pytest.mark.parametrize("cold_from", [0, 2, 19, None])
def test_files_that_are_not_in_memory_are_fetched_ahead_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold_from: int | None
) -> None:
    """And none before the first that is not."""
    paths = make_files(tmp_path, [2_000_000] * 20)
    num_read = 0
    fetched: list[tuple[str, int]] = []

    def found(handle: int, room: memoryview) -> int:
        """As if they were in memory before, whatever the system has let go of meanwhile."""
        return os.preadv(handle, [room[:1000] if cold_from is not None and num_read >= cold_from else room], 0)

    monkeypatch.setattr(reading, "_from_page_cache", found)
    advise = reading._advise

    def advised(handle: int) -> None:
        fetched.append((str(Path(f"/proc/self/fd/{handle}").readlink()), num_read))
        advise(handle)

    monkeypatch.setattr(reading, "_advise", advised)
    for contents, path in zip(read_files(paths, Slabs()), paths, strict=True):
        assert is_of(contents, path)
        num_read += 1
    assert [path for path, _ in fetched] == (paths[cold_from + 1 :] if cold_from is not None else [])
    assert all(0 < paths.index(path) - so_far <= 8 for path, so_far in fetched)


def test_a_file_that_can_be_opened_and_not_looked_at_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network's file system, if the file has just been replaced there."""
    paths = make_files(tmp_path, [1000])
    opened, closed = list[int](), list[int]()

    def opens(path: str, flags: int) -> int:
        opened.append(os.open(path, flags))
        return opened[-1]

    def closes(handle: int) -> None:
        closed.append(handle)
        os.close(handle)

    def stale(handle: int) -> None:
        raise OSError(errno.ESTALE, "stale")

    system = SimpleNamespace(**vars(os) | {"open": opens, "close": closes, "fstat": stale})
    monkeypatch.setattr(reading, "os", system)
    with pytest.raises(OSError, match="stale"):
        next(read_files(paths, Slabs()))
    assert opened == closed != []


def test_a_file_that_the_system_has_dropped_is_read_from_the_disk(tmp_path: Path) -> None:
    """As far as a system lets go of it; either way it comes whole."""
    paths = make_files(tmp_path, [1_000_000] * 4)
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    got = list(read_files(paths, Slabs()))
    assert all(is_of(contents, path) for contents, path in zip(got, paths, strict=True))
    reading.fetch_soon(paths[0])
    reading.fetch_soon(str(tmp_path / "nothing"))
