"""The command as users meet it: a process with arguments, stdin, an environment, and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekindle.cli.app import app

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = {"REKINDLE_CONTEXT": "2048", "REKINDLE_THREADS": "1"}  # enough for these tests, and quick to open


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A plain terminal of 120 columns, a home of its own, no settings but small ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REKINDLE_", "HF_"))}
    own = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "120", "TERM": "dumb"}
    return kept | own | SMALL | {"NO_COLOR": "1"}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Run `rekindle` with arguments to its end."""

    def call(
        *arguments: str, stdin: str | bytes = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [sys.executable, "-m", "rekindle", *arguments],
            input=data,
            capture_output=True,
            env=environment | dict(env or {}),
            timeout=120,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture
def run_here(environment: dict[str, str]) -> Run:
    """The same in this process, which is quicker: for commands about which neither signals, pipes nor C code matter."""

    def call(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
        env = dict.fromkeys(os.environ) | environment
        done = CliRunner(env=env).invoke(app, arguments, input=stdin, prog_name="rekindle")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return call
