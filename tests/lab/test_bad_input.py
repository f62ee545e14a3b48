"""What every lab command says of a model or a file that is not what it should be, before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekindle.cli.app import app
from rekindle.lab.store import TIERS
from rekindle.lab.store_lookups import PROMPT_BLOCKS
from rekindle.lab.trace import CAPACITIES

WITH_MODEL = (
    "blend FILE",
    "blend FILE --speed",
    "decode FILE",
    "exact FILE",
    "live FILE",
    "load --model FILE",
    "restart FILE",
    "soak FILE",
    "store --model FILE --tier memory --payload 64 --blocks 1 --rounds 1 --size 0",
)
WITH_FILE = ("blend --data FILE", "trace FILE", "load --workload trace --trace FILE")


@pytest.fixture(params=["missing", "folder", "empty", "text"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Named after what it is."""
    kind: str = request.param
    path = tmp_path / f"{kind}.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "hello\n")
    return path


@pytest.mark.parametrize("command", WITH_MODEL)
def test_a_model_that_is_none(command: str, file: Path) -> None:
    said = _refused(command, file, 1)
    words = {"missing": "there is no model file", "folder": "is a folder", "empty": "is empty", "text": "is not a GGUF"}
    assert words[file.stem] in said and str(file) in said


@pytest.mark.parametrize("command", WITH_FILE)
def test_a_file_that_is_none(command: str, file: Path) -> None:
    said = _refused(command, file, 2)
    words = {"missing": "No such file", "folder": "Is a directory", "empty": " no", "text": "JSON"}
    assert words[file.stem] in said and str(file) in said and "Errno" not in said


@pytest.mark.parametrize("command", ["store --tier disk", "restart builtin"])
def test_a_folder_where_nothing_can_be_written(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        assert f"no files can be written in {folder}" in _refused(f"{command} --folder FILE", folder, 2)


def test_help_names_what_is_taken_by_default() -> None:
    said = {
        command: " ".join(CliRunner().invoke(app, ["lab", command, "--help"], env={"COLUMNS": "300"}).stdout.split())
        for command in ("trace", "store")
    }
    assert f"default: {CAPACITIES[0]} to {CAPACITIES[-1]}" in said["trace"]
    assert f"{', '.join(TIERS[:-1])} or {TIERS[-1]}; may be repeated; default: all" in said["store"]
    assert f"{PROMPT_BLOCKS} or more" in said["store"]


def _refused(command: str, file: Path, code: int) -> str:
    """The one line on stderr."""
    arguments = [str(file) if part == "FILE" else part for part in command.split()]
    result = CliRunner().invoke(app, ["lab", *arguments])
    assert result.exit_code == code, result.output
    assert not result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    return line
