"""Every command explains itself, quickly."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import rekindle
from rekindle.cli.app import app

from .conftest import Run

COMMANDS = [
    [],
    ["serve"],
    ["chat"],
    ["generate"],
    ["info"],
    ["demo"],
    ["version"],
    ["cache"],
    *(["cache", name] for name in ("stats", "ls", "verify", "clear", "prune", "warm", "pin", "pins", "unpin")),
    ["live"],
    ["live", "in"],
    ["live", "out"],
    ["lab"],
    ["lab", "model"],
    ["lab", "decode"],
    ["lab", "engines"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command: list[str], flag: str) -> None:
    result = CliRunner().invoke(app, [*command, flag])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_no_option_lacks_its_help() -> None:
    for command in COMMANDS:
        result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [*command, "--help"])
        options = [line.strip("│ ").split() for line in result.output.splitlines() if line.startswith("│ --")]
        assert options
        assert all(len(words) > 3 for words in options), options


def test_the_version_names_the_parts_that_compute(run: Run) -> None:
    result = run("version")
    assert result.returncode == 0
    assert result.stdout.startswith(f"rekindle {rekindle.__version__}\nllama-cpp-python 0.3.")


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys\n"
        "from rekindle.cli import main\n"
        "sys.argv = ['rekindle', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "assert not {'llama_cpp', 'torch', 'fastapi', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_refused(run: Run) -> None:
    result = run("sreve")
    assert result.returncode == 2
    assert "sreve" in result.stderr
    assert "Traceback" not in result.stderr
