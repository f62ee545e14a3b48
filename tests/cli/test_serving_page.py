"""docs/serving.md says what is so: its options exist, its unit is one, its codes are the program's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rekindle.cli.options import flag_of
from rekindle.errors import Overloaded, PromptTooLong, RekindleError, TimedOut
from rekindle.settings import Settings

PAGE = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text("utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_every_option_that_is_named_exists() -> None:
    named = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", PAGE))
    assert len(named) > 8
    assert named <= {flag_of(name) for name in Settings.model_fields}


@pytest.mark.parametrize("error", [Overloaded, TimedOut, PromptTooLong], ids=lambda error: error.__name__)
def test_codes_stand_beside_their_status(error: type[RekindleError]) -> None:
    assert f"{error.status}, `{error.code}`" in PAGE


def test_the_supervisor_waits_long_enough() -> None:
    unit = block("ini")
    stop, drain = (float(re.search(rf"{name}[= ](\d+)", unit)[1]) for name in ("TimeoutStopSec", "--drain-seconds"))  # type: ignore[index]
    assert stop >= drain + Settings().store_flush_seconds + 10


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one(tmp_path: Path) -> None:
    unit = tmp_path / "rekindle.service"
    unit.write_text(block("ini").replace("/opt/rekindle/bin/rekindle", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "rekindle.service" in line]
    assert complaints == []
