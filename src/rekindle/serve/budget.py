"""How much memory the store may take, when nobody says: a share of what is free at start.

Free is what the system could give without swapping: not used, or used for files that can be read again. In a container
the container's limit counts as well, and that of every group around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from rekindle.serve.groups import GROUPS, OWN_GROUP, own_groups

SHARE = 4  # a quarter of what is free
LEAST_BYTES, MOST_BYTES = 64 << 20, 16 << 30
_FILES = {
    2: ("memory.max", "memory.current"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}  # of each version: the limit, and what is used


def memory_budget(free_bytes: int) -> int:
    """Bytes for the store's memory tier, of so many that are free."""
    return min(max(free_bytes // SHARE, LEAST_BYTES), MOST_BYTES)


def free_bytes(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """What this process could still take."""
    own = own_groups("memory", groups, own_group)
    left = (number for group in own for number in _left(group.folder, *_FILES[group.version]))
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def _left(folder: Path, limit: str, usage: str) -> Iterator[int]:
    """What is left of a group's limit; nothing if it has none."""
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
