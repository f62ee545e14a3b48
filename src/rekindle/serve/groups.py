"""The control groups that this process is in: what a container, a service or a pod is given of the machine.

A group's limit holds for all groups within it, so all from ours up to the root are asked (cgroup v2 and v1; with version 1
each controller has a tree of its own). A container sees its own group as the root, though it may be told another path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


class Group(NamedTuple):
    """One of them; there need be no such folder, nor any file in it."""

    folder: Path
    version: Literal[1, 2]


def own_groups(controller: str, groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> Iterator[Group]:
    """Ours and all around it, in the trees that may have this controller."""
    with suppress(OSError):
        for line in own_group.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _to_the_root(groups, path, 2)
            elif controller in controllers.split(","):
                yield from _to_the_root(groups / controller, path, 1)


def _to_the_root(root: Path, path: str, version: Literal[1, 2]) -> Iterator[Group]:
    inner = root / path.lstrip("/")
    for folder in (inner, *inner.parents):
        if folder.is_relative_to(root):
            yield Group(folder, version)
