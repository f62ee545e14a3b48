"""How much memory the store may take, when nobody says: a share of what is free at start.

Free is what the system could give without swapping: not used, or used for files that can be read again. In a container
the container's limit counts as well, and that of every group around it (cgroup v2 and v1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SHARE = 4  # a quarter of what is free
LEAST_BYTES, MOST_BYTES = 64 << 20, 16 << 30
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def memory_budget(free_bytes: int) -> int:
    """Bytes for the store's memory tier, of so many that are free."""
    return min(max(free_bytes // SHARE, LEAST_BYTES), MOST_BYTES)


def free_bytes(groups: Path = _GROUPS, own_group: Path = _OWN_GROUP) -> int:
    """What this process could still take."""
    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups(groups, own_group)]))


def _left_in_groups(groups: Path, own_group: Path) -> Iterator[int]:
    """Of each group that this process is in and that has a limit, what is left of it."""
    with suppress(OSError):
        for line in own_group.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # version 2; or 1, where each controller has a tree of its own
                version_2 = not controllers
                root = groups if version_2 else groups / "memory"
                names = ("memory.max", "memory.current") if version_2 else _VERSION_1
                inner = root / path.lstrip("/")
                for folder in (inner, *inner.parents):
                    if folder.is_relative_to(root):
                        yield from _left(folder, *names)


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(folder: Path, limit: str, usage: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # not there, as in a container that sees its own group as the root; or "max"
        used = int((folder / usage).read_text())
        yield int((folder / limit).read_text()) - used + _file_bytes(folder)


def _file_bytes(folder: Path) -> int:
    """Of the memory that a group uses, what holds files and hasn't been asked for lately: it is given up when needed."""
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == "inactive_file":
                return int(value)
    return 0
