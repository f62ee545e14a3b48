"""Cores that the engine may use when nobody says: affinity and the container's quota, from files like the system's and from
the system's own."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve.test_budget import group

from rekindle.serve.assembly import num_threads
from rekindle.serve.cores import usable_cores
from rekindle.settings import Settings

CORES = 8


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", CORES),
        ("150000 100000", 2),
        ("140000 100000", 1),
        ("250000 50000", 5),
        ("10000 100000", 1),
        ("1600000 100000", CORES),
        ("", CORES),
        ("many 100000", CORES),
        ("100000 0", CORES),
    ],
)
def test_the_quota_of_a_container_that_sees_its_group_as_the_root(tmp_path: Path, quota: str, cores: int) -> None:
    group(tmp_path / "groups", cpu__max=quota)
    assert usable_cores(tmp_path / "groups", own(tmp_path, "0::/\n")) == cores


def test_the_smallest_quota_of_all_groups_counts(tmp_path: Path) -> None:
    group(tmp_path / "groups/outer/inner", cpu__max="max 100000")
    group(tmp_path / "groups/outer", cpu__max="300000 100000")
    group(tmp_path / "groups", cpu__max="400000 100000")
    group(tmp_path / "groups/beside", cpu__max="100000 100000")
    assert usable_cores(tmp_path / "groups", own(tmp_path, "0::/outer/inner\n")) == 3


@pytest.mark.parametrize(("quota", "cores"), [(-1, CORES), (350_000, 4)])
def test_groups_of_version_1(tmp_path: Path, quota: int, cores: int) -> None:
    group(tmp_path / "groups/cpu/docker/abc", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100_000)
    group(tmp_path / "groups/docker/abc", cpu__max="100000 100000")  # of no controller that this process has
    text = "5:cpu,cpuacct:/docker/abc\n4:cpuset:/other\n3:memory:/docker/abc\n"
    assert usable_cores(tmp_path / "groups", own(tmp_path, text)) == cores


def test_without_groups_all_cores_count_and_who_says_how_many_is_obeyed(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "missing") == CORES
    assert num_threads(Settings.load(None, {}, threads=5)) == 5


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A group of this machine that may use as much time as one core has; a process joins by its number."""
    root = Path("/sys/fs/cgroup")
    folder = root / ("cpu" if (root / "cpu").is_dir() else "") / f"rekindle-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("making a control group is not permitted")
    try:
        (folder / "cpu.max").write_text("100000 100000") if (folder / "cpu.max").exists() else None
        if (folder / "cpu.cfs_quota_us").exists():
            (folder / "cpu.cfs_quota_us").write_text("100000")
        if not list(folder.glob("cpu.[mc]*")):
            pytest.skip("this machine's groups have no quota")
        yield folder
    finally:
        folder.rmdir()


CHILD = """
import os, pathlib, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from rekindle.serve.cores import usable_cores
from rekindle.serve.assembly import num_threads
from rekindle.settings import Settings
os.sched_getaffinity = lambda _: {0, 1, 2}
print(usable_cores(), num_threads(Settings.load(None, {})))
"""


def test_a_real_group(one_core: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(one_core)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


BUSY = """
import os, pathlib, sys, time
from rekindle.serve.crowding import waited_seconds
folder = pathlib.Path(sys.argv[1])
for name, text in (("cpu.max", "30000 100000"), ("cpu.cfs_quota_us", "30000")):
    if (folder / name).exists():
        (folder / name).write_text(text)
(folder / "cgroup.procs").write_text(str(os.getpid()))
before, until = sum(waited_seconds().values()), time.monotonic() + 1
while time.monotonic() < until:
    pass
print(sum(waited_seconds().values()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not count what threads wait")
def test_standing_still_for_a_quota_counts_as_waiting_for_a_core(one_core: Path) -> None:
    """It is what crowding is told by."""
    done = subprocess.run([sys.executable, "-c", BUSY, str(one_core)], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.4
