"""How libgomp is loaded: asked of libgomp itself, which shows its settings when it is told to."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

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


def test_threads_wait_busily_for_a_short_time_only() -> None:
    said = shown("import rekindle, os; print('left', os.environ.get('GOMP_SPINCOUNT'))")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in said
    assert "left None" in said, "programs that are started from here choose for themselves"


def test_llama_cpp_meets_in_the_library_that_was_loaded_here() -> None:
    said = shown("import rekindle, llama_cpp; print(sum('libgomp' in line for line in open('/proc/self/maps')) > 0)")
    assert said.count("GOMP_SPINCOUNT") == 1
    assert "True" in said


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_chose_stays(name: str, value: str) -> None:
    said = shown("import rekindle.errors, ctypes; ctypes.CDLL('libgomp.so.1')", **{name: value})
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" not in said
    assert "GOMP_SPINCOUNT" in said
