"""What every lab command says of a model or a file that is not what it should be, before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekindle.cli.app import app
from rekindle.lab.store import TIERS
from rekindle.lab.store_lookups import PROMPT_BLOCKS
from rekindle.lab.trace import CAPACITIES
from rekindle.model.source import locate

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


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("blend FILE --speed --plot p.png", "--plot is not for --speed"),
        ("blend FILE --speed --documents 3", "--documents is not for --speed"),
        ("blend FILE --speed --gate 0.9", "--gate is not for --speed"),
        ("blend FILE --speed --data x.jsonl", "--data is not for --speed"),
        ("blend FILE --speed --ratio 0.1 --ratio 0.2", "--ratio: with --speed one is expected"),
        ("blend FILE --chunks 4", "--chunks is for --speed"),
        ("blend FILE --chunk-tokens 64", "--chunk-tokens is for --speed"),
        ("blend FILE --rounds 2 --documents 3", "--rounds is for --speed"),
        ("blend FILE --peer llama-server", "--peer is for --speed"),
        ("live FILE --part talk --samples 3", "--samples is for the part ttft, which is not run"),
        ("live FILE --part ttft --part drift --turns 5", "--turns is for the part talk, which is not run"),
        ("live FILE --part ttft --kv-type q8_0", "--kv-type is for the part drift, which is not run"),
    ],
)
def test_options_of_what_is_not_run_are_not_ignored(command: str, said: str) -> None:
    assert said in _refused(command, Path("nowhere.gguf"), 2)


def test_a_models_folder_is_told_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the torch engine could serve."""
    monkeypatch.setattr("rekindle.lab.decode.Service.open", lambda settings: pytest.fail("it is loaded"))
    folder = locate("builtin", "torch")
    assert f"{folder} is a folder; a .gguf file is expected" in _refused("decode FILE", folder, 1)


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
