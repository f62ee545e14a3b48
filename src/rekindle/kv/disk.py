"""The disk tier: the file system is the index, so there is none to lose, and a restart starts warm.

Several processes may use one folder, and any number of models: a key names the model too. They need no agreement but the
file system's: a block appears whole or not at all, and its modification time is its last use. What is kept in memory is
only a count of bytes and a list of the next victims, both from the last walk through the folder, which is repeated when
the victims have run out or much has been written since. So the budget holds at every moment in a folder with one writer;
each further writer can exceed it by about as much as it writes between two walks, 1/32 of the budget.

Eviction is by last use. A use of a chain marks its head as used last, its tail a little earlier, so chains die from the
tail. A victim is looked at once more before it goes: if anyone has used it since the walk, it stays.

Of the policies that memory knows the disk has none, but the order of last use, which needs no memory, is the same for all
processes and models and is known after a restart. On a trace of conversations (12,031 requests, 512-token blocks) with a
memory of a quarter of the disk under `prospect` before it, blocks found in either, with last use / `prospect` on disk:
.119/.161 for 4,000 blocks, .225/.239 for 10,000, .291/.304 for 20,000, .326/.336 for 30,000. A disk that is worth having
holds more than a few thousand blocks, and there 3 to 6 % more hits don't pay for an index in every process.

A pinned block is marked as used at the time when its pin ends, which is yet to come. So it is younger than all that could
displace it, for every process and after every restart, and ages like any other from then on. If such blocks take more than
half of the budget, which one process's pins seldom do, those that end first go like others.
"""

from __future__ import annotations

import errno
import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rekindle.errors import CorruptBlock, TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.breaker import Breaker
from rekindle.kv.folder import KEPT_NS, STEP_NS, File, Folder, disk_bytes, last_use
from rekindle.kv.format import Buffer, decode, encode_parts, fingerprint_of
from rekindle.kv.reading import read_files
from rekindle.kv.slabs import Slabs
from rekindle.kv.tier import Place, TierStats, place_of
from rekindle.kv.totals import Totals

_TOUCH_NS = 10 * 10**9  # a mark younger than this is not renewed
_MAX_VICTIMS = 4096
_WALK_SHARE = 32  # of the budget: written since the last walk, it asks for another
_KEPT_SHARE = 2  # of the budget: the most that pinned blocks may take
_ASIDE_SHARE = 16  # of the budget: the most that files set aside may take
_DEAD_WRITER_SECONDS = 600
_MAX_BACKOFF_SECONDS = 30.0


class DiskTier:
    """Blocks in a folder. Thread-safe; reading takes no lock. Opening it touches nothing: the first use does."""

    name = "disk"

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: bytes,
        max_bytes: int,
        label: Mapping[str, Any] | None = None,
        ready_bytes: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`label` is what people call the model: it is noted in the folder, for those who look into it.

        `ready_bytes` are expected to be read for a prompt; `prepare` has memory for them.
        """
        self.max_bytes = max_bytes
        self._label = label
        self._ready_bytes = ready_bytes
        self._folder = Folder(folder)
        self._slabs = Slabs()
        self._fingerprint = fingerprint
        self._clock = clock
        self._reads = Breaker(clock, max_backoff_seconds=_MAX_BACKOFF_SECONDS)
        self._writes = Breaker(clock, max_faults=1, max_backoff_seconds=_MAX_BACKOFF_SECONDS)
        self._writing = threading.Lock()  # one change at a time
        self._totals = Totals()
        self._aside_bytes = 0
        self._marking = threading.Lock()  # for the next line, held for moments
        self._last_mark = 0
        self._kept_bytes = 0  # pinned, as of the last walk
        self._victims: deque[File] = deque()  # least recently used first, as of the last walk
        self._gone: set[Path] = set()  # since then; perhaps still among the victims, but counted out
        self._bytes_since_walk: int | None = None  # None before the first

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    # Reading.

    def get(self, places: Sequence[Place]) -> Iterator[Block | None]:
        """Read as they are asked for; what the system doesn't have in its memory is fetched ahead."""
        paths = [self._folder.name_of(place) for place in places]
        used: list[tuple[str, int]] = []
        misses = read_bytes = 0
        try:
            with self._reads.attempt(), self._faults("read"):
                for path, place, contents in zip(paths, places, read_files(paths, self._slabs), strict=True):
                    block = None if contents is None else self._decoded(contents.data, path, place)
                    if block is not None and contents is not None:
                        used.append((path, contents.used_ns))
                        read_bytes += len(contents.data)
                    else:
                        misses += 1
                    contents = None  # so that one less is in memory while the next is read
                    yield block
                    block = None
        finally:
            self._totals.add(hits=len(used), misses=misses, read_bytes=read_bytes)
            self._mark(used)

    def contains(self, places: Sequence[Place]) -> list[bool]:
        with self._reads.attempt(), self._faults("read"):
            return self._folder.contains(places)

    def _decoded(self, data: Buffer, path: str | Path, place: Place) -> Block | None:
        """A file that is not the block it should be is set aside, and counted as that."""
        try:
            block = decode(data, self._fingerprint)
            if (block.key, block.parent, block.logits is not None) != (place.key, place.parent, place.tail):
                raise CorruptBlock(f"the block {place} expected, got {place_of(block)}")
        except CorruptBlock:
            self._totals.add(corrupt=1)
            self._set_aside(Path(path))
            return None
        return block

    def _set_aside(self, path: Path) -> None:
        with suppress(OSError):  # in a read-only folder it stays, and is a miss every time
            num_bytes = disk_bytes(path.stat().st_size)
            self._folder.set_aside(path, self.max_bytes // _ASIDE_SHARE)
            self._count_out(path, num_bytes)
            self._aside_bytes = self._folder.aside_bytes()

    # Marking uses.

    def touch(self, places: Sequence[Place]) -> None:
        with self._reads.attempt(), self._faults("read"):
            paths = [self._folder.path_of(place) for place in places]
            found = ((path, last_use(path)) for path in paths)
            self._mark([(path, used_ns) for path, used_ns in found if used_ns is not None])

    def keep(self, places: Sequence[Place], until: float) -> None:
        end = int(until * 1e9)
        self._remark(places, lambda index, used_ns: max(used_ns, end - index * STEP_NS))

    def release(self, places: Sequence[Place]) -> None:
        newest = self._newest_mark(len(places))
        self._remark(places, lambda index, used_ns: min(used_ns, newest - index * STEP_NS))

    def _remark(self, places: Sequence[Place], mark_of: Callable[[int, int], int]) -> None:
        """Give the blocks that are there new marks, by their index and old mark."""
        with self._reads.attempt(), self._faults("read"):
            for index, place in enumerate(places):
                path = self._folder.path_of(place)
                used_ns = last_use(path)
                if used_ns is not None and (mark := mark_of(index, used_ns)) != used_ns:
                    with suppress(OSError):  # gone, or not ours to mark
                        os.utime(path, ns=(mark, mark))

    def _mark(self, chain: Sequence[tuple[str | Path, int | None]]) -> int:
        """Mark the files of a chain, given head first with their last use, as used now. None: one still to be written.

        Nothing is ever left with an older mark than its successor, so a young mark is renewed if one behind it is.
        Returns the head's mark; each successor's is a step older.
        """
        newest = self._newest_mark(len(chain))
        behind = 0
        for index, (path, used_ns) in reversed(list(enumerate(chain))):
            mark = newest - index * STEP_NS
            if used_ns is None:
                behind = mark
            elif used_ns >= max(behind, newest - _TOUCH_NS):
                behind = used_ns
            else:
                behind = mark
                with suppress(OSError):  # gone, or not ours to mark: reading goes on
                    os.utime(path, ns=(mark, mark))
        return newest

    def _newest_mark(self, length: int) -> int:
        """The mark of the head of a chain of this length, younger by all of it than any that was given."""
        with self._marking:
            self._last_mark = max(int(self._clock() * 1e9), self._last_mark + (length + 1) * STEP_NS)
            return self._last_mark

    # Writing.

    def put(self, chain: Sequence[Block]) -> None:
        """Blocks that don't fit beside more recently used ones are left out, and so are those after them."""
        with self._writing, self._writes.attempt(), self._faults("written"):
            paths = [self._folder.path_of(place_of(block)) for block in chain]
            known = [last_use(path) for path in paths]
            newest = self._mark(list(zip(paths, known, strict=True)))
            for index, (block, path) in enumerate(zip(chain, paths, strict=True)):
                if known[index] is None and not self._write(path, block, newest - index * STEP_NS):
                    return
            if self._label is not None:
                self._folder.label(self._fingerprint, self._label)

    def _write(self, path: Path, block: Block, mark: int) -> bool:
        """Whether there was room for it."""
        parts = encode_parts(block, self._fingerprint)
        length = sum(len(part) for part in parts)
        num_bytes = disk_bytes(length)
        if not self._make_room(num_bytes, mark):
            return False
        self._folder.write(path, parts, mark)
        self._totals.add(blocks=1, num_bytes=num_bytes, written_bytes=length)
        self._bytes_since_walk = (self._bytes_since_walk or 0) + num_bytes
        return True

    def _make_room(self, num_bytes: int, mark: int) -> bool:
        """Evict until so much fits. False, with nothing lost for it, if that would cost what is used more recently."""
        if num_bytes > self.max_bytes:
            return False
        if self._bytes_since_walk is None or self._bytes_since_walk > self.max_bytes // _WALK_SHARE:
            self._walk()
        walked = False
        while self._totals.num_bytes + self._aside_bytes + num_bytes > self.max_bytes:
            if self._victims:
                victim = self._victims.popleft()
                if victim.used_ns < mark:
                    self._evict(victim)
                elif self._kept_bytes <= self.max_bytes // _KEPT_SHARE:
                    return False
                elif self._is_kept(victim):  # or else it has just been used, and what is pinned too much pays
                    self._evict(victim)
            elif walked:
                return False
            else:
                self._walk()
                walked = True
        return True

    def _evict(self, victim: File) -> None:
        """Unless it has been used since the walk."""
        used_ns = last_use(victim.path)
        if used_ns == victim.used_ns:
            self._folder.delete(victim.path)
            self._totals.add(evictions=1)
            if self._is_kept(victim):
                self._kept_bytes -= victim.num_bytes
        if used_ns == victim.used_ns or (used_ns is None and victim.path not in self._gone):
            self._totals.add(blocks=-1, num_bytes=-victim.num_bytes)

    def _is_kept(self, file: File) -> bool:
        return file.used_ns > self._clock() * 1e9 + KEPT_NS

    def remove(self, places: Sequence[Place]) -> None:
        with self._writing, self._writes.attempt(), self._faults("written"):
            for place in places:
                path = self._folder.path_of(place)
                with suppress(FileNotFoundError):
                    num_bytes = disk_bytes(path.stat().st_size)
                    self._folder.delete(path)
                    self._count_out(path, num_bytes)

    def _count_out(self, path: Path, num_bytes: int) -> None:
        """A block has gone that was no victim."""
        self._gone.add(path)
        self._totals.add(blocks=-1, num_bytes=-num_bytes)

    def clear(self) -> None:
        """All blocks of all models, and what was set aside."""
        self._writes.try_now()
        with self._writing, self._writes.attempt(), self._faults("written"):
            self._folder.clear()
            self._walk()

    def clear_model(self) -> None:
        """What a file is of says its beginning, so this reads a little of every file."""
        self._writes.try_now()
        with self._writing, self._writes.attempt(), self._faults("written"):
            for file in self._folder.walk():
                with suppress(FileNotFoundError):
                    if file.block and fingerprint_of(self._folder.read_beginning(file.path)) == self._fingerprint:
                        self._folder.delete(file.path)
            self._walk()

    def probe(self, *, writing: bool) -> None:
        """Reading counts what is there, see `scan`; writing makes the folder if it is missing."""
        if not writing:
            return self.scan()
        with self._writing, self._writes.attempt(), self._faults("written"):
            return self._folder.try_writing()

    def prepare(self) -> None:
        self._slabs.prepare(self._ready_bytes)

    # Counting.

    def scan(self) -> None:
        """Count what is in the folder, whoever wrote it, and clear away what dead writers left: microseconds a file."""
        with self._writing, self._reads.attempt(), self._faults("read"):
            self._walk()

    def _walk(self) -> None:
        too_old = int((self._clock() - _DEAD_WRITER_SECONDS) * 1e9)
        blocks, num_bytes, files = 0, 0, []
        for file in self._folder.walk():
            if not file.block and file.used_ns < too_old:
                with suppress(OSError):
                    file.path.unlink(missing_ok=True)
                    continue
            num_bytes += file.num_bytes
            if file.block:
                blocks += 1
                files.append(file)
        self._totals.recounted(blocks, num_bytes)
        self._kept_bytes = sum(file.num_bytes for file in files if self._is_kept(file))
        self._aside_bytes = self._folder.aside_bytes()
        self._gone.clear()
        self._victims = deque(heapq.nsmallest(_MAX_VICTIMS, files, key=lambda file: file.used_ns))
        self._bytes_since_walk = 0

    def stats(self) -> TierStats:
        return self._totals.stats(
            self.name,
            max_bytes=self.max_bytes,
            faults=self._reads.faults + self._writes.faults,
            state=self._writes.state if self._writes.state != "ok" else self._reads.state,
            other_bytes=self._aside_bytes,
        )

    def complaints(self) -> Iterator[str]:
        """Reads every file, of any model, and says which are not the blocks they should be."""
        for file in self._folder.walk():
            if file.block:
                with self._faults("read"), suppress(FileNotFoundError):
                    try:
                        block = decode(self._folder.read(file.path), None)
                    except CorruptBlock as error:
                        yield f"{file.path}: {error}"
                        continue
                    if self._folder.path_of(place_of(block)) != file.path:
                        yield f"{file.path}: this is {place_of(block)}, filed wrong"

    def check_integrity(self) -> None:
        """What other processes have changed since the last `scan` is taken for a wrong count."""
        with self._writing:
            assert not (found := list(self.complaints())), "\n".join(found)
            files = list(self._folder.walk())
            blocks, num_bytes = len([file for file in files if file.block]), sum(file.num_bytes for file in files)
            assert self._totals.blocks == blocks, f"{self._totals.blocks} blocks counted, {blocks} there"
            assert self._totals.num_bytes == num_bytes, f"{self._totals.num_bytes} bytes counted, {num_bytes} there"
            assert self._aside_bytes == self._folder.aside_bytes()
            assert self._totals.num_bytes + self._aside_bytes <= self.max_bytes

    def close(self) -> None:
        """Nothing is held."""

    @contextmanager
    def _faults(self, done: str) -> Iterator[None]:
        """OSError as TierUnavailable, in words."""
        try:
            yield
        except OSError as error:
            full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or 0)
            raise TierUnavailable(f"the store's folder {self._folder.path} can't be {done}: {full}") from error
