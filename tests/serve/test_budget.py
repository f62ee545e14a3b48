"""The store as set, and its memory when nobody says: a share of what is free, in this container and on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import psutil
import pytest

import rekindle
from rekindle.cli.serve import describe
from rekindle.errors import InvalidRequest
from rekindle.kv.policies import DEFAULT, POLICIES
from rekindle.serve.budget import LEAST_BYTES, MOST_BYTES, free_bytes, memory_budget
from rekindle.settings import Settings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "budget"),
    [(8 * GIB, 2 * GIB), (0, LEAST_BYTES), (100 << 20, LEAST_BYTES), (1 << 50, MOST_BYTES), (64 * GIB, 16 * GIB)],
)
def test_a_quarter_within_bounds(free: int, budget: int) -> None:
    assert memory_budget(free) == budget


def group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_machines_free_memory_without_groups(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    assert free_bytes(tmp_path / "none", tmp_path / "missing") == pytest.approx(available, rel=0.5)


def test_the_smallest_limit_of_all_groups_counts(tmp_path: Path) -> None:
    """Version 2: our group has no limit, the one around it has; what holds old files is as good as free."""
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    group(tmp_path / "groups/outer/inner", memory__max="max", memory__current=5000)
    group(
        tmp_path / "groups/outer", memory__max=30_000, memory__current=12_000, memory__stat="anon 1\ninactive_file 700"
    )
    assert free_bytes(tmp_path / "groups", own) == 18_700


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/\n")
    group(tmp_path / "groups", memory__max=9000, memory__current=10_000)
    assert free_bytes(tmp_path / "groups", own) == 0


def test_groups_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,cpuacct:/\n3:memory:/docker/abc\n")
    group(tmp_path / "groups/memory", memory__limit_in_bytes=2000, memory__usage_in_bytes=500)
    assert free_bytes(tmp_path / "groups", own) == 1500


def test_what_is_no_group_file_is_passed_over(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/\n")
    group(tmp_path / "groups", memory__max="?", memory__current="?", memory__stat="x")
    assert free_bytes(tmp_path / "groups", own) > 0


def test_the_settings_know_all_policies() -> None:
    assert set(get_args(Settings.model_fields["store_policy"].annotation)) == set(POLICIES)
    assert Settings.load(None, {}).store_policy == DEFAULT
    with pytest.raises(InvalidRequest, match=r"store_policy: .*'prospect', 'gdsf' or 'lru', got 'lfu'"):
        Settings.load(None, {}, store_policy="lfu")


def test_the_store_is_as_set() -> None:
    settings = {"store_memory": "100MiB", "store_policy": "lru", "store_pinned": 0.25, "store_quota": 0.5}
    with rekindle.load(engine="toy", store="none", **settings) as llm:
        stats = llm.service._store.stats()
        assert (stats.max_bytes, stats.policy, stats.max_pinned_bytes) == (100 << 20, "lru", 25 << 20)
        assert llm.service._store._memory._shares.max_share_bytes == 50 << 20
        assert describe(llm.service).endswith("100.0MiB of memory for stored KV")


def test_unless_set_its_memory_is_a_share_of_what_is_free_and_the_start_says_so() -> None:
    with rekindle.load(engine="toy", store="none") as llm:
        assert llm.stats().max_bytes == pytest.approx(memory_budget(free_bytes()), rel=0.5)
        assert describe(llm.service).endswith(" of memory for stored KV (a quarter of what was free)")
