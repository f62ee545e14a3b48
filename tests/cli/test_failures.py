"""What can go wrong ends with one clear line on stderr and the right exit code, never with a traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rekindle.model.ember import weights_path

from .conftest import Run

ENTRIES = (("info",), ("generate", "Hello.", "--model"), ("serve", "--port", "0", "--model"))


def corrupt(folder: Path, kind: str) -> str:
    """The path of a model that is none."""
    path = folder / "model.gguf"
    whole = weights_path().read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"This is not a model.", "torn": whole[: len(whole) // 2]}[kind])
    return str(path)


def check_refusal(result: subprocess.CompletedProcess[str], path: str) -> None:
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("rekindle: ")
    assert path in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "torn"])
def test_a_model_that_cannot_be_loaded(run_here: Run, tmp_path: Path, kind: str) -> None:
    path = corrupt(tmp_path, kind)
    for command in (("info",), ("generate", "Hello.", "--model")):
        check_refusal(run_here(*command, path), path)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [*((entry, "torn") for entry in ENTRIES), (ENTRIES[-1], "missing")],
    ids=lambda each: each if isinstance(each, str) else each[0],
)
def test_a_process_whose_model_cannot_be_loaded(run: Run, tmp_path: Path, entry: tuple[str, ...], kind: str) -> None:
    """Here llama.cpp's own words would be seen too."""
    path = corrupt(tmp_path, kind)
    check_refusal(run(*entry, path), path)


@pytest.mark.parametrize("name", ["hf:owner/repo", "hf:owner/repo:model.gguf"])
def test_a_hub_model_offline_names_the_cache_that_was_searched(run: Run, tmp_path: Path, name: str) -> None:
    cache = tmp_path / "hub"
    result = run("info", name, env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)})
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "cannot be reached" in result.stderr
    assert str(cache) in result.stderr


def test_a_hub_that_cannot_be_reached_names_the_cache_that_was_searched(run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    result = run("info", "hf:owner/repo", env={"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_CACHE": str(cache)})
    assert result.returncode == 1
    assert str(cache) in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_hub_name_without_an_owner(run_here: Run) -> None:
    result = run_here("info", "hf:model")
    assert result.returncode == 1
    assert "expected hf:owner/repo" in result.stderr


def test_a_model_that_is_recurrent_is_refused_with_the_reason(run: Run, run_here: Run, tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    assert run_here("lab", "model", "tiny-mamba", str(path)).returncode == 0
    result = run("generate", "Hello.", "--model", str(path))
    assert result.returncode == 1
    assert "recurrent" in result.stderr


@pytest.mark.parametrize("arguments", [("nosuch", "q8_0"), ("tiny-llama", "q9_9")])
def test_an_unknown_shape_or_quantisation(run_here: Run, tmp_path: Path, arguments: tuple[str, str]) -> None:
    shape, quant = arguments
    result = run_here("lab", "model", shape, "--quant", quant, str(tmp_path / "out.gguf"))
    assert result.returncode == 2
    assert "rekindle: no " in result.stderr
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(run_here: Run, prompt: str) -> None:
    for result in (run_here("generate", prompt), run_here("generate", "-", stdin=prompt)):
        assert result.returncode == 2
        assert result.stderr == "rekindle: the prompt is empty: at least one token is needed\n"


def test_a_prompt_that_is_not_text(run_here: Run) -> None:
    result = run_here("generate", "-", stdin=b"\xff\xfe")
    assert result.returncode == 2
    assert "not UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tokens", "0"), "max_tokens must be a whole number of at least 1, got 0"),
        (("--temperature", "nan"), "temperature must be a number between 0 and 100, got nan"),
        (("--context", "256"), "the prompt has "),
    ],
)
def test_impossible_wishes(run_here: Run, options: tuple[str, str], message: str) -> None:
    result = run_here("generate", "word " * 300, *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_chatting_with_a_server_that_is_not_there(run_here: Run) -> None:
    result = run_here("chat", "--url", "http://127.0.0.1:1", stdin="Hello.\n")
    assert result.returncode == 1
    assert "cannot talk to http://127.0.0.1:1" in result.stderr


def test_a_document_that_is_missing(run_here: Run, tmp_path: Path) -> None:
    result = run_here("chat", "--file", str(tmp_path / "missing.txt"), stdin="Hello.\n")
    assert result.returncode == 2
    assert "missing.txt: No such file" in result.stderr
