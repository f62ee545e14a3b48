"""How many cores the engine's threads may use, when nobody says how many they are.

Those that this process may run on, and no more than its container may use at a time. A container's quota is a time: so many
milliseconds of computing in each period, on whichever cores. Threads that are more than that use it up before the period
ends, and then all of them stand still for the rest of it, which every stream sees as a gap. So a quota counts as cores,
rounded: where less than half of the last thread's time is given, what it adds is lost again by standing still.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rekindle.serve.groups import GROUPS, OWN_GROUP, Group, own_groups


def usable_cores(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """Cores that this process may use, at least one."""
    quotas = (quota for group in own_groups("cpu", groups, own_group) for quota in _quota(group))
    return max(1, min([reachable_cores(), *(int(quota + 0.5) for quota in quotas)]))


def reachable_cores() -> int:
    """Cores that this process's threads may run on, whether all at a time or not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(group: Group) -> Iterator[float]:
    """In cores; nothing if there is none."""
    with suppress(OSError, ValueError, ZeroDivisionError):  # not there; or "max"
        if group.version == 2:
            used, period = (group.folder / "cpu.max").read_text().split()
        else:
            used, period = ((group.folder / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        if int(used) > 0:  # -1 is none, with version 1
            yield int(used) / int(period)
