"""How libgomp is loaded: asked of libgomp itself, which shows its settings when it is told to."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rekindle.openmp import SPIN_COUNT

try:
    ctypes.CDLL("libgomp.so.1")
except OSError:
    pytest.skip("there is no libgomp here", allow_module_level=True)


def shown(program: str, **variables: str) -> str:
    """What a program prints whose libgomp tells its settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=clean | {"OMP_DISPLAY_ENV": "verbose"} | variables, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_where_threads_can_t_be_watched_they_wait_busily_for_a_short_time_only() -> None:
    blind = "from pathlib import Path; Path.exists = lambda path: False; "
    said = shown(blind + "import rekindle, os; print('left', os.environ.get('GOMP_SPINCOUNT'))")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in said
    assert "left None" in said, "programs that are started from here choose for themselves"


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell how threads wait")
def test_where_they_can_libgomp_keeps_its_own_setting() -> None:
    said = shown("import rekindle, llama_cpp")
    assert "GOMP_SPINCOUNT = '300000'" in said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list threads")
def test_a_team_lasts_as_long_as_the_thread_that_asked_for_it() -> None:
    program = """
import os, threading, time
from rekindle import openmp
count = lambda: len(os.listdir("/proc/self/task"))
def ask():
    openmp.add_team(3)
    print("during", count())
print("before", count())
thread = threading.Thread(target=ask)
thread.start()
thread.join()
end = time.monotonic() + 60
while count() > 1 and time.monotonic() < end:
    pass
print("after", count())
"""
    said = shown(program)
    assert [line for line in said.splitlines() if line.startswith(("before", "during", "after"))] == [
        "before 1",
        "during 4",
        "after 1",
    ]


def test_llama_cpp_meets_in_the_library_that_was_loaded_here() -> None:
    said = shown("import rekindle, llama_cpp; print(sum('libgomp' in line for line in open('/proc/self/maps')) > 0)")
    assert said.count("GOMP_SPINCOUNT") == 1
    assert "True" in said


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_chose_stays(name: str, value: str) -> None:
    said = shown("import rekindle.errors, ctypes; ctypes.CDLL('libgomp.so.1')", **{name: value})
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" not in said
    assert "GOMP_SPINCOUNT" in said
