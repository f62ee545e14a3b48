"""The files of the disk tier: what they are called, and how they are read, written, walked and set aside.

    <folder>/v1/ab/cd/abcd….safetensors          a block, by its key
    <folder>/v1/ab/cd/abcd….<key>.safetensors    a tail, by its parent's key and its own, so that one small folder has
                                                 all tails of a parent
    <folder>/v1/ab/cd/.<random>.writing          a file that is being written, or was when its writer died
    <folder>/v1/aside/                           the last few files that were not what was written
    <folder>/v1/models/<fingerprint>.json        what people call the model that a fingerprint stands for
    <folder>/v1/scores/                          what was learned of chunks; written elsewhere, deleted with the rest

A file gets its name only when it is whole, so readers need no lock. There is no fsync: what a killed process has written
stays, and what a power failure tears fails its checksum. Everything here raises OSError as it comes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rekindle.kv.format import SUFFIX, VERSION, Buffer
from rekindle.kv.keys import Key
from rekindle.kv.tier import Place

_NAME = re.compile(rf"(?:([0-9a-f]{{32}})\.)?([0-9a-f]{{32}}){re.escape(SUFFIX)}")
_FAN = re.compile(r"[0-9a-f]{2}")
_LABEL = re.compile(r"([0-9a-f]+)\.json")
_WRITING = ".writing"
_PAGE_BYTES = 4096  # what a file system gives out at once, mostly
_MAX_ASIDE = 16
_TRIES = 3
_MOST_LISTED = 256  # names
STEP_NS = 1000  # between the marks of a block and its successor, in one use
KEPT_NS = 60 * 10**9  # a file marked as used so far in the future is pinned until then
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600  # prompts are private


@dataclass(frozen=True, kw_only=True)
class File:
    path: Path
    num_bytes: int  # as it occupies the disk
    used_ns: int  # its modification time, which a use sets anew
    block: bool  # or else something half written


def disk_bytes(length: int) -> int:
    """What a file of this length takes of the disk."""
    return -(-length // _PAGE_BYTES) * _PAGE_BYTES


def last_use(path: Path) -> int | None:
    """When a file was last used; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


class Folder:
    """One folder of blocks, shared with whoever else uses it. Holds nothing but its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = path / f"v{VERSION}"
        self._prefix = f"{self._root}/"
        self._aside = self._root / "aside"
        self._models = self._root / "models"
        self.scores = self._root / "scores"

    def name_of(self, place: Place) -> str:
        """The path of its file: a string made in one go, because this is done for every look-up."""
        file = _file_of(place)
        return f"{self._prefix}{file[:2]}/{file[2:4]}/{file}"

    def path_of(self, place: Place) -> Path:
        return Path(self.name_of(place))

    def contains(self, places: Sequence[Place]) -> list[bool]:
        """Which of these there is a file of.

        Tails of one parent, of which a prompt may end with 64, are in one folder: one listing costs less than looking
        for each, unless the folder is large.
        """
        listed = {parent: self._names_beside(parent) for parent in {place.parent for place in places if place.tail}}
        return [self._is_there(place, listed[place.parent] if place.tail else None) for place in places]

    def _names_beside(self, parent: Key) -> frozenset[str] | None:
        """The names of all files in the folder of a parent's tails; None if they are too many to look through."""
        try:
            with os.scandir(self._fan(parent)) as entries:
                names = frozenset(entry.name for entry in islice(entries, _MOST_LISTED + 1))
        except FileNotFoundError:
            return frozenset()
        return names if len(names) <= _MOST_LISTED else None

    def _is_there(self, place: Place, names: frozenset[str] | None) -> bool:
        return last_use(self.path_of(place)) is not None if names is None else _file_of(place) in names

    def read(self, path: Path) -> bytes:
        """All of a file. For many files see `read_files`."""
        return path.read_bytes()

    def read_beginning(self, path: Path) -> bytes:
        with path.open("rb", buffering=0) as file:
            return file.read(_PAGE_BYTES)

    def write(self, path: Path, parts: Sequence[Buffer], used_ns: int) -> None:
        """Make a whole file appear under this name, at once; on failure nothing is left behind."""
        temporary = path.with_name(f".{os.urandom(8).hex()}{_WRITING}")
        handle = self._create(temporary)
        try:
            try:
                for part in parts:
                    _write_all(handle, memoryview(part))
                os.utime(handle, ns=(used_ns, used_ns))
            finally:
                os.close(handle)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def try_writing(self) -> None:
        """Make the folder if need be, and a file in it that goes at once."""
        path = self._root / "00" / "00" / f".{os.urandom(8).hex()}{_WRITING}"
        try:
            os.close(self._create(path))
        finally:
            self.delete(path)

    def delete(self, path: Path) -> None:
        """A file, if it is there, and the folders that it leaves empty, which would make every walk longer."""
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
            path.parent.parent.rmdir()

    def walk(self) -> Iterator[File]:
        """All blocks and half-written files. Other people's files are passed over."""
        for folder in self._folders():
            for entry in _entries(folder):
                block = _NAME.fullmatch(entry.name) is not None
                if (block or entry.name.endswith(_WRITING)) and entry.is_file(follow_symlinks=False):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    used_ns, num_bytes = status.st_mtime_ns, disk_bytes(status.st_size)
                    yield File(path=Path(entry.path), num_bytes=num_bytes, used_ns=used_ns, block=block)

    def set_aside(self, path: Path, max_bytes: int) -> None:
        """Take a file out of use, but keep it for whoever wants to know, beside the last few such files."""
        self._aside.mkdir(_FOLDER_MODE, exist_ok=True)
        path.replace(self._aside / path.name)
        left = max_bytes
        kept = sorted(self.set_aside_files(), key=lambda file: file.used_ns, reverse=True)
        for index, file in enumerate(kept):
            left -= file.num_bytes
            if index >= _MAX_ASIDE or left < 0:
                file.path.unlink(missing_ok=True)

    def aside_bytes(self) -> int:
        return sum(file.num_bytes for file in self.set_aside_files())

    def clear(self) -> None:
        """Delete all that is ours, and the folders that are empty then."""
        for path in [*(file.path for file in [*self.walk(), *self.set_aside_files()]), *self._labels()]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.scores, ignore_errors=True)
        for folder in [*self._folders(), *self._fans(self._root), self._aside, self._models, self._root]:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()

    # What models are called.

    def label(self, fingerprint: bytes, facts: Mapping[str, Any]) -> None:
        """Note what a fingerprint stands for, unless it was noted. Best effort: no block depends on it."""
        path = self._models / f"{fingerprint.hex()}.json"
        with suppress(OSError):
            if not path.exists():
                self.write(path, [json.dumps(facts).encode()], time.time_ns())

    def labels(self) -> dict[bytes, dict[str, Any]]:
        """What was noted, by fingerprint; what can't be read is left out."""
        found = {}
        for path in self._labels():
            with suppress(OSError, ValueError):
                facts = json.loads(path.read_bytes())
                if isinstance(facts, dict):
                    found[bytes.fromhex(path.stem)] = facts
        return found

    def _labels(self) -> list[Path]:
        return [Path(entry.path) for entry in _entries(self._models) if _LABEL.fullmatch(entry.name)]

    def _fan(self, key: Key) -> Path:
        name = key.hex()
        return self._root / name[:2] / name[2:4]

    def _folders(self) -> Iterator[Path]:
        for outer in self._fans(self._root):
            yield from self._fans(outer)

    def _fans(self, folder: Path) -> list[Path]:
        return [Path(entry.path) for entry in _entries(folder) if _FAN.fullmatch(entry.name) and entry.is_dir()]

    def set_aside_files(self) -> list[File]:
        found = []
        for entry in _entries(self._aside):
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                size = disk_bytes(status.st_size)
                found.append(File(path=Path(entry.path), num_bytes=size, used_ns=status.st_mtime_ns, block=False))
        return found

    def _create(self, path: Path) -> int:
        """A new file, and the folders to it. Others may be deleting them, being empty, so it may take a few tries."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        for _ in range(_TRIES):
            try:
                return os.open(path, flags, _FILE_MODE)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for folder in (self.path, self._root, path.parent.parent, path.parent):
                    with suppress(FileNotFoundError, FileExistsError):  # it was there, and is gone when looked at
                        folder.mkdir(_FOLDER_MODE, exist_ok=True)
        return os.open(path, flags, _FILE_MODE)


def _file_of(place: Place) -> str:
    """What its file is called; the two folders that it lies in are called as this begins."""
    file = f"{place.key.hex()}{SUFFIX}"
    return f"{place.parent.hex()}.{file}" if place.tail else file


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _write_all(handle: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(handle, data) :]
