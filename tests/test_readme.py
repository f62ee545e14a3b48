"""README.md is executed: its Python runs, its curl lines get answers, its tables are what the code would write now."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekindle.api.server import running
from rekindle.cli.app import app
from rekindle.cli.reference import commands_table, replace_part, settings_table
from rekindle.serve.service import Service
from rekindle.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def curl_lines() -> list[str]:
    script = "\n".join(block for block in blocks("bash") if "curl" in block)
    return [f"curl {command}".strip() for command in re.split(r"^curl ", script, flags=re.MULTILINE)[1:]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing goes to, or comes from, the cache folder of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def url(cache: None) -> Iterator[str]:
    with closing(Service.open(Settings(context=2048))) as service, running(service) as url:
        yield url


@pytest.mark.parametrize(("name", "table"), [("commands", commands_table()), ("settings", settings_table())])
def test_tables_are_up_to_date(name: str, table: str) -> None:
    assert replace_part(README, name, table) == README, "run: python -m rekindle.cli.reference README.md"


def test_the_python_example_prints_the_answer_twice() -> None:
    (code,) = blocks("python")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    first, second = printed.getvalue().split("\n")
    assert first and first == second


def test_the_example_with_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rekindle.model import ember

    monkeypatch.chdir(tmp_path)
    (code,) = blocks("py")
    tokenizer = AutoTokenizer.from_pretrained(ember.hf_path())
    token_ids = tokenizer("Vodris paints in orange. " * 30)["input_ids"]
    names = {
        "model": AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=torch.float32),
        "tokenizer": tokenizer,
        "token_ids": token_ids,
        "input_ids": torch.tensor([token_ids]),
    }
    known = []
    for _ in range(2):  # once cold, and once with what is kept then
        with redirect_stdout(io.StringIO()):
            exec(compile(code, "README.md", "exec"), names)
        known.append(names["known"].length)
    assert known[0] < 64 and known[1] == len(token_ids) // 64 * 64


def test_make_targets_exist() -> None:
    commands = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert commands == ["demo", "serve"]
    for target in commands:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", curl_lines(), ids=lambda command: re.findall(r"8000(\S+)", command)[0])
def test_curl_lines_get_answers(command: str, url: str) -> None:
    silent = command.replace(ADDRESS, url).replace(
        "curl", "curl --silent --show-error --fail-with-body --noproxy '*'", 1
    )
    done = subprocess.run(["sh", "-c", silent], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    if "stream" in command:
        assert done.stdout.rstrip().endswith("data: [DONE]")
    else:
        assert isinstance(json.loads(done.stdout), dict)


def test_every_option_that_is_named_exists() -> None:
    """Options in the text belong to the command they are written after."""
    for command, option in re.findall(r"`rekindle ((?:cache |lab )?[a-z]+)[^`]*?(--[a-z-]+)[^`]*`", README):
        done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [*command.split(), "--help"])
        assert option in done.output, f"rekindle {command} {option}"


def test_no_line_is_too_long_to_read() -> None:
    prose = re.sub(r"^```.*?^```$|^\|[^\n]*$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert max(len(line) for line in prose.splitlines()) <= 120
