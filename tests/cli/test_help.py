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


@pytest.mark.parametrize("command", ["version", "--version"])
def test_the_version_names_the_parts_that_compute(command: str, run: Run) -> None:
    result = run(command)
    assert result.returncode == 0
    assert result.stdout.startswith(f"rekindle {rekindle.__version__}\nllama-cpp-python 0.3.")


LOADED = """
import sys
from rekindle.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (None, 0, 1), end.code
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
MODELS = {"llama_cpp", "torch", "transformers", "tokenizers", "safetensors", "jinja2", "psutil", "llguidance"}
SERVERS = {"fastapi", "starlette", "uvicorn", "prometheus_client", "redis", "websockets"}
NOBODY = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("command", "spared"),
    [
        ("--help", MODELS | SERVERS | {"numpy"}),
        ("serve --help", MODELS | SERVERS | {"numpy"}),
        ("version", MODELS | SERVERS | {"numpy"}),
        ("--version", MODELS | SERVERS | {"numpy"}),
        ("cache ls", MODELS | SERVERS),
        ("cache stats", MODELS | SERVERS),
        ("cache clear --yes", MODELS | SERVERS),
        (f"cache warm --prompt hello --url {NOBODY}", MODELS | SERVERS),
        (f"generate hello --url {NOBODY}", MODELS | SERVERS | {"numpy"}),
        (f"chat --url {NOBODY}", MODELS | SERVERS | {"numpy"}),
        (f"demo --url {NOBODY}", MODELS | SERVERS | {"numpy"}),
        (f"live out --url {NOBODY} --max-retries 0", MODELS | SERVERS - {"websockets"} | {"numpy"}),
    ],
)
def test_a_command_loads_only_what_it_needs(command: str, spared: set[str], environment: dict[str, str]) -> None:
    """Importing a model library, or a server's, takes longer than all that these commands do."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *command.split()], env=environment, capture_output=True, text=True, input=""
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "typer" in loaded
    assert not loaded & spared


def test_an_unknown_command_is_refused(run_here: Run) -> None:
    result = run_here("sreve")
    assert result.returncode == 2
    assert "sreve" in result.stderr
    assert "Traceback" not in result.stderr
