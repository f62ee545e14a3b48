"""docs/live.md is executed: its scripts run against a server, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rekindle.api.live_wire import TYPES
from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "live.md").read_text("utf-8")
SCRIPTS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Service.open(Settings(threads=1, store="none")) as service, running(service) as url:
        yield url


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_scripts_run(number: int, url: str) -> None:
    port = str(urlsplit(url).port)
    code = re.sub(r"\b8000\b", port, SCRIPTS[number])
    assert code != SCRIPTS[number]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "orange" in result.stdout or int(result.stdout.split()[-1]) > 0


def test_every_message_is_described() -> None:
    for kind in TYPES:
        assert f'{{"type": "{kind}"' in PAGE


def test_commands_and_settings_exist() -> None:
    for flag in re.findall(r"`(--[a-z-]+)`", PAGE):
        name = flag.removeprefix("--").replace("-", "_")
        assert name in Settings.model_fields or name in {"url", "max_retries", "listen", "speak"}, flag
