"""What all tests share: a cache folder of their own, anew for each module, so that nothing is warm that should be cold.

`make test` runs them in several processes, the workers, each of which takes whole files. Each keeps to cores of its own,
as do the processes that its tests start: compute threads of two workers on one core would wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import HealthCheck, settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Nor does how long a server takes to read and to answer; 5 seconds are too short on a machine that is busy otherwise.
DEFAULT_TIMEOUT_CONFIG.connect = DEFAULT_TIMEOUT_CONFIG.read = DEFAULT_TIMEOUT_CONFIG.write = 60


def pytest_configure() -> None:
    worker, num_workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, cores[number::num_workers] or {cores[number % len(cores)]})


@pytest.fixture(scope="session", autouse=True)
def sessions_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures of a session, which come before those of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
