"""Plots are written whole or refused in words, and what can't be written is refused before anything is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekindle.cli.app import app
from rekindle.errors import InvalidRequest
from rekindle.lab.image import check_image, image

pytest.importorskip("matplotlib")


def test_an_image_has_the_format_that_its_name_says(tmp_path: Path) -> None:
    for name, beginning in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")):
        check_image(tmp_path / name)
        with image(tmp_path / name, 2, 1) as figure:
            figure.add_subplot().plot([1, 2])
        assert (tmp_path / name).read_bytes().startswith(beginning)


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    check_image(None)
    for name, words in (("no/a.png", "no folder"), ("a.txt", "expected the ending of an image"), (".", "is a folder")):
        with pytest.raises(InvalidRequest, match=words):
            check_image(tmp_path / name)
    assert not list(tmp_path.iterdir()), "checking wrote something"


def test_without_matplotlib_it_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    check_image(None)
    with pytest.raises(InvalidRequest, match=r"rekindle\[lab\]"):
        check_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "command", ["trace nothing.jsonl", "store --model nothing", "load --model nothing", "blend nothing"]
)
def test_commands_check_before_they_begin(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["lab", *command.split(), "--plot", str(tmp_path / "no" / "a.png")])
    assert result.exit_code == 2 and "there is no folder" in result.stderr
