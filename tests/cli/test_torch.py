"""Commands with the torch engine: what they say of it, and how they refuse."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rekindle.model import ember

from .conftest import Run

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 3


def test_what_torch_has_stored_is_listed_as_text(run_here: Run, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    told = run_here("generate", "--engine", "torch", "--store", store, "--raw", "--max-tokens", "2", STORY)
    assert told.returncode == 0, told.stderr
    (listed,) = json.loads(run_here("cache", "ls", "--store", store, "--json").stdout)["prompts"]
    assert listed["model"] == "ember"
    assert listed["text"].startswith("Vodris paints in orange.")


def test_a_server_says_what_computes(environment: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "rekindle",
        "serve",
        "--model",
        str(ember.hf_path()),
        "--port",
        "0",
        "--store",
        "none",
    ]
    server = subprocess.Popen(
        [*command, "--dtype", "bfloat16"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert server.stdout is not None
    said = server.stdout.readline()
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    server.stdout.close()
    assert "model hf, engine torch, 2048 cells, 1 thread, bfloat16 KV" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--engine", "torch", "--kv-type", "q4_0"), "kv_type q4_0 is for llama.cpp"),
        (("--dtype", "bfloat16"), "dtype is for the torch engine"),
        (("--model", str(ember.hf_path()), "--engine", "llama"), "is a folder, and llama.cpp reads .gguf files"),
        (("--engine", "torc"), "setting engine"),
    ],
)
def test_refusals_are_one_line(run_here: Run, arguments: tuple[str, ...], reason: str) -> None:
    done = run_here("generate", *arguments, "x")
    assert done.returncode != 0 and done.stdout == ""
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1
