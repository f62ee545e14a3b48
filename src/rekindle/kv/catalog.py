"""What is in a store's folder, seen from outside: blocks of any model, without an engine and without counting a use.

A file's beginning says which block it is and what it follows, so the blocks of a folder form trees, one for each model and
salt. Each way from a root to an end is a *chain*: the beginning of a prompt, as long as it is stored.

    root ── block ── block ─┬─ block ── tail     two chains that share two blocks
                            └─ tail

A block whose predecessor is missing is an *orphan*: nothing finds it until somebody computes the predecessor again.

Other processes may use the folder meanwhile. So what is listed here may be gone a moment later, and nothing is deleted
that was used after it was listed. Faults of the file system are raised as StoreError.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.errors import CorruptBlock, StoreError
from rekindle.kv.folder import KEPT_NS, STEP_NS, File, Folder
from rekindle.kv.format import VERSION, Front, decode, peek
from rekindle.kv.keys import Key, block_key, tail_key
from rekindle.kv.tier import place_of
from rekindle.tokens import Tokens

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_VERSION_FOLDER = re.compile(r"v(\d+)")


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """One block of the folder."""

    file: File
    front: Front


@dataclass(frozen=True, eq=False)
class Chain:
    """Blocks that follow each other, head first, up to one after which nothing is stored."""

    entries: tuple[Entry, ...]

    @property
    def key(self) -> Key:
        """Of its last block."""
        return self.entries[-1].front.key

    @property
    def fingerprint(self) -> bytes:
        return self.entries[-1].front.fingerprint

    @property
    def is_whole(self) -> bool:
        """Whether it begins where a prompt begins."""
        return self.entries[0].front.position == 0

    @property
    def length(self) -> int:
        """Tokens up to its end."""
        return self.entries[-1].front.end

    @property
    def num_bytes(self) -> int:
        """On the disk, blocks that it shares with other chains included."""
        return sum(entry.file.num_bytes for entry in self.entries)

    @property
    def used_ns(self) -> int:
        """When its last block was used last."""
        return self.entries[-1].file.used_ns

    def tokens(self, limit: int) -> Tokens:
        """The first tokens that it has, at most so many."""
        parts: list[Tokens] = []
        for entry in self.entries:
            if sum(map(len, parts)) >= limit:
                break
            parts.append(entry.front.tokens)
        return np.concatenate(parts)[:limit]


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalog:
    """A folder's content at one moment."""

    path: Path
    entries: tuple[Entry, ...]
    strange: tuple[File, ...]  # named like blocks, but they don't begin like one
    unfinished: tuple[File, ...]  # being written, or left by a writer that died
    num_aside: int
    aside_bytes: int
    labels: dict[bytes, dict[str, Any]]  # fingerprint -> what was noted of its model
    other_versions: tuple[str, ...]  # names of folders that another version of Rekindle wrote
    is_writable: bool

    @property
    def num_bytes(self) -> int:
        """Of everything that is ours."""
        files = [*(entry.file for entry in self.entries), *self.strange, *self.unfinished]
        return sum(file.num_bytes for file in files) + self.aside_bytes

    def chains(self) -> list[Chain]:
        """All chains, those of orphans too. One that is the beginning of another is not listed."""
        blocks = {entry.front.key: entry for entry in self.entries if not entry.front.tail}
        return [Chain(tuple(_way_to(end, blocks))) for end in _ends(self.entries)]

    def orphans(self) -> list[Entry]:
        """Blocks and tails of which a predecessor is missing."""
        ends: dict[Key, int] = {}  # of blocks that can be found -> where they end
        lost = []
        for entry in sorted(self.entries, key=lambda entry: entry.front.position):
            front = entry.front
            if front.position and ends.get(front.parent) != front.position:
                lost.append(entry)
            elif not front.tail:
                ends[front.key] = front.end
        return lost

    def name_of(self, fingerprint: bytes) -> str:
        """What people call the model, or the fingerprint's beginning."""
        name = self.labels.get(fingerprint, {}).get("name")
        return name if isinstance(name, str) and name else fingerprint.hex()[:12]

    def pins(self, now_ns: int) -> list[Chain]:
        """The pinned prompts; which end first, first. One that goes on in another is listed too: it has its own end."""
        pinned = [entry for entry in self.entries if is_pinned(entry, now_ns)]
        followed = {entry.front.parent for entry in pinned}
        blocks = {entry.front.key: entry for entry in self.entries if not entry.front.tail}
        ends = [entry for entry in pinned if entry.front.tail or entry.front.key not in followed]
        return sorted((Chain(tuple(_way_to(end, blocks))) for end in ends), key=lambda chain: chain.used_ns)

    def fingerprints(self) -> list[bytes]:
        return sorted({entry.front.fingerprint for entry in self.entries})


def is_pinned(entry: Entry, now_ns: int) -> bool:
    """A pinned block is marked as used when its pin ends."""
    return entry.file.used_ns > now_ns + KEPT_NS


def unpin(catalog: Catalog, chain: Chain, now_ns: int) -> None:
    """End a pin: what no other pin names is as if it were used now. Raises StoreError."""
    others = [other for other in catalog.pins(now_ns) if other.key != chain.key]
    with told(catalog.path):
        for index, entry in enumerate(chain.entries):
            ends = [other.used_ns for other in others if entry in other.entries]
            mark = max([now_ns, *ends]) - index * STEP_NS
            if mark < entry.file.used_ns:
                with suppress(FileNotFoundError):
                    os.utime(entry.file.path, ns=(mark, mark))


def read_catalog(path: Path) -> Catalog:
    """List a folder: one small read for each file. Raises StoreError."""
    with told(path):
        versions = _versions(path)
        folder = Folder(path)
        entries: list[Entry] = []
        strange: list[File] = []
        unfinished: list[File] = []
        for file in folder.walk():
            with suppress(FileNotFoundError):
                front = _front(folder, file) if file.block else None
                if front is not None:
                    entries.append(Entry(file, front))
                else:
                    (strange if file.block else unfinished).append(file)
        aside = folder.set_aside_files()
        return Catalog(
            path=path,
            entries=tuple(entries),
            strange=tuple(strange),
            unfinished=tuple(unfinished),
            num_aside=len(aside),
            aside_bytes=sum(file.num_bytes for file in aside),
            labels=folder.labels(),
            other_versions=tuple(versions),
            is_writable=os.access(path, os.W_OK | os.X_OK),
        )


@contextmanager
def told(path: Path) -> Iterator[None]:
    """OSError as StoreError, in words."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise StoreError(f"cannot use the store in {path}: {os.strerror(error.errno or 0)} ({where})") from error


def _versions(path: Path) -> list[str]:
    """Names of other versions' folders. Raises StoreError if this is no store, or only another version's."""
    if not path.exists():
        raise StoreError(f"there is no folder {path}: expected the folder of a store, as a server's --store names it")
    if not path.is_dir():
        raise StoreError(f"expected the folder of a store, got the file {path}")
    names = sorted(each.name for each in path.iterdir())
    versions = [name for name in names if _VERSION_FOLDER.fullmatch(name) and name != f"v{VERSION}"]
    if names and f"v{VERSION}" not in names:
        if versions:
            raise StoreError(f"{path} was written by another version: expected v{VERSION}, got {', '.join(versions)}")
        raise StoreError(f"{path} is not a store: expected a folder v{VERSION} in it, got {_some(names)}")
    return versions


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _front(folder: Folder, file: File) -> Front | None:
    beginning = folder.read_beginning(file.path)
    return peek(beginning) or peek(folder.read(file.path))  # blocks of very many tokens begin with more of them


def _ends(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Blocks and tails after which nothing is stored, and that are not the beginning of what stands beside them."""
    beside: dict[Key, list[Entry]] = defaultdict(list)
    for entry in entries:
        beside[entry.front.parent].append(entry)
    for siblings in beside.values():
        spelled = sorted(((entry.front.tokens.astype(">i4").tobytes(), entry) for entry in siblings), key=_spelling)
        followers = [spelling for spelling, _ in spelled[1:]]
        for (spelling, entry), following in zip(spelled, [*followers, None], strict=True):
            if entry.front.tail:
                if following is None or not following.startswith(spelling):
                    yield entry
            elif entry.front.key not in beside:
                yield entry


def _spelling(spelled: tuple[bytes, Entry]) -> bytes:
    return spelled[0]


def _way_to(end: Entry, blocks: dict[Key, Entry]) -> list[Entry]:
    """From the first of its predecessors that is there. Headers are unchecked, so positions must fit: that ends it too."""
    way = [end]
    while True:
        before = blocks.get(way[-1].front.parent)
        first = way[-1].front.position
        if before is None or before.front.end != first or before.front.position >= first:
            return way[::-1]
        way.append(before)


# Checking.


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A file that is not what it should be, or that is of no use."""

    path: Path
    what: str
    is_orphan: bool  # the block itself is right, but its predecessor is missing


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came of reading everything."""

    num_blocks: int  # that are right, orphans included
    num_bytes: int  # read
    problems: tuple[Problem, ...]
    num_set_aside: int


def verify(path: Path, *, repair: bool = False, progress: Progress = lambda done, total: None) -> Check:
    """Read every block and check its checksum, its keys and its predecessors; with `repair` set aside what is wrong.

    Raises StoreError.
    """
    with told(path):
        _versions(path)
        folder = Folder(path)
        files = [file for file in folder.walk() if file.block]
        total, done, num_aside = sum(file.num_bytes for file in files), 0, 0
        problems: list[Problem] = []
        good: dict[Key, tuple[int, int]] = {}  # block -> where its first token is, and where the next one's would be
        waiting: list[tuple[Path, Key, int]] = []  # path, parent, position of all that follow something
        num_blocks = 0
        for file in files:
            with suppress(FileNotFoundError):
                what, front = _read_whole(folder, file.path)
                if what is not None:
                    problems.append(Problem(path=file.path, what=what, is_orphan=False))
                    if repair:
                        folder.set_aside(file.path, total)
                        num_aside += 1
                elif front is not None:
                    num_blocks += 1
                    if not front.tail:
                        good[front.key] = (front.position, front.end)
                    if front.position:
                        waiting.append((file.path, front.parent, front.position))
            done += file.num_bytes
            progress(done, total)
        problems += _orphans(waiting, good)
        return Check(num_blocks=num_blocks, num_bytes=done, problems=tuple(problems), num_set_aside=num_aside)


def _read_whole(folder: Folder, path: Path) -> tuple[str | None, Front | None]:
    """What is wrong with a file, or else what is in it."""
    data = folder.read(path)
    try:
        block = decode(data, None)
    except CorruptBlock as error:
        return str(error), None
    key = (block_key if block.logits is None else tail_key)(block.parent, block.tokens)
    if key != block.key:
        return f"its tokens make the key {key.hex()}, it says {block.key.hex()}", None
    if folder.path_of(place_of(block)) != path:
        return f"this is {place_of(block)}, filed wrong", None
    return None, peek(data)


def _orphans(waiting: Iterable[tuple[Path, Key, int]], good: dict[Key, tuple[int, int]]) -> Iterator[Problem]:
    for path, parent, position in waiting:
        found = good.get(parent)
        if found is None and path.exists():
            what = f"its predecessor {parent.hex()} is missing"
        elif found is not None and found[1] != position:
            what = f"it begins at token {position}, but its predecessor ends at token {found[1]}"
        else:
            continue
        yield Problem(path=path, what=what, is_orphan=True)


# Deleting.


@dataclass(frozen=True, kw_only=True)
class Prune:
    """What to delete. Without any of the last three: everything of the models that are named."""

    fingerprints: frozenset[bytes] | None = None  # only of these models; None: of all
    unused_since_ns: int | None = None  # what was not used since then
    orphans: bool = False  # what has lost a predecessor
    max_bytes: int | None = None  # the least recently used, until the rest fits


def choose(catalog: Catalog, wish: Prune, now_ns: int) -> list[Entry]:
    """What `wish` means for a folder, ends of chains first. What is pinned stays."""
    scope = [
        entry
        for entry in catalog.entries
        if (wish.fingerprints is None or entry.front.fingerprint in wish.fingerprints) and not is_pinned(entry, now_ns)
    ]
    if wish.unused_since_ns is None and not wish.orphans and wish.max_bytes is None:
        return _ends_first(scope if wish.fingerprints is not None else [])
    chosen = set(catalog.orphans()) & set(scope) if wish.orphans else set()
    if wish.unused_since_ns is not None:
        chosen |= {entry for entry in scope if entry.file.used_ns < wish.unused_since_ns}
    if wish.max_bytes is not None:
        named = [e for e in catalog.entries if wish.fingerprints is None or e.front.fingerprint in wish.fingerprints]
        left = sum(entry.file.num_bytes for entry in named) - sum(entry.file.num_bytes for entry in chosen)
        for entry in _ends_first([entry for entry in scope if entry not in chosen]):
            if left <= wish.max_bytes:
                break
            chosen.add(entry)
            left -= entry.file.num_bytes
    return _ends_first(chosen)


def _ends_first(entries: Iterable[Entry]) -> list[Entry]:
    """Least recently used first; a use marks a block as younger than its successor."""
    return sorted(entries, key=lambda entry: (entry.file.used_ns, -entry.front.position))


def delete(path: Path, entries: Iterable[Entry]) -> list[Entry]:
    """Delete these, but for what was used or deleted since they were listed; returns the deleted. Raises StoreError."""
    deleted = []
    with told(path):
        folder = Folder(path)
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.file.path.stat().st_mtime_ns == entry.file.used_ns:
                    folder.delete(entry.file.path)
                    deleted.append(entry)
    return deleted


def delete_everything(path: Path) -> None:
    """All blocks of all models, and what was set aside. Raises StoreError."""
    with told(path):
        _versions(path)
        Folder(path).clear()
