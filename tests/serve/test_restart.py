"""KV that outlives the process, on the real engine: restarts, two servers on one folder, a killed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rekindle
from rekindle.serve.request import Done

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 20
CHILD = """
import sys, rekindle
llm = rekindle.load(threads=1, store=sys.argv[1])
print(llm.generate(sys.argv[2], max_tokens=6), flush=True)
llm.service.settle()
print("settled", flush=True)
llm.generate("Another prompt that is long enough to be stored. " * 40, max_tokens=2000, ignore_eos=True)
"""


def answer(folder: Path, prompt: str = STORY, **settings: object) -> tuple[str, Done, int]:
    """Answer, how it ended, and the tokens computed, in a process-like fresh engine."""
    with rekindle.load(threads=1, store=str(folder), store_flush_seconds=60, **settings) as llm:
        text = llm.generate(prompt, max_tokens=6)
        assert llm.last is not None
        return text, llm.last, llm.service.num_computed


def test_after_a_restart_nothing_is_computed_before_the_first_token(tmp_path: Path) -> None:
    cold, first, _ = answer(tmp_path)
    warm, second, computed = answer(tmp_path)
    assert warm == cold
    assert (first.usage.cached_tokens, second.usage.computed_tokens, second.timings.prefill_calls) == (0, 0, 0)
    assert computed <= len(second.tokens)  # the answer's own tokens
    assert "fetched from disk" in second.plan.steps[0].reason


def test_two_servers_on_one_folder_use_each_others_blocks_at_once(tmp_path: Path) -> None:
    with rekindle.load(threads=1, store=str(tmp_path)) as one, rekindle.load(threads=1, store=str(tmp_path)) as other:
        for llm in (one, other):
            text = llm.generate(STORY, max_tokens=6)
            llm.service.settle()
        assert other.last is not None and other.last.usage.computed_tokens == 0
        assert text == one.generate(STORY, max_tokens=6)


def test_another_kv_type_or_salt_finds_nothing(tmp_path: Path) -> None:
    answer(tmp_path)
    assert answer(tmp_path, kv_type="q8_0")[1].usage.cached_tokens == 0
    with rekindle.load(threads=1, store=str(tmp_path)) as llm:
        prompt = llm.service.text_prompt(STORY, salt=b"another")
        assert llm.service._store.fetch(prompt.tokens, prompt.salt).tokens == {}


def test_a_killed_server_leaves_what_it_had_settled(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), STORY], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert child.stdout is not None
    said = child.stdout.readline().rstrip("\n")
    assert child.stdout.readline() == "settled\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    text, done, _ = answer(tmp_path)
    assert (text, done.usage.computed_tokens) == (said, 0)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "foreign"])
def test_damaged_files_are_computed_again(tmp_path: Path, damage: str) -> None:
    cold = answer(tmp_path)[0]
    for file in sorted(tmp_path.rglob("*.safetensors"))[::2]:
        data = bytearray(file.read_bytes())
        if damage == "remove":
            file.unlink()
        elif damage == "truncate":
            file.write_bytes(data[: len(data) // 2])
        elif damage == "foreign":
            file.write_bytes(b"not a block")
        else:
            data[len(data) // 2] ^= 16
            file.write_bytes(data)
    text, done, _ = answer(tmp_path)
    assert text == cold
    assert done.usage.cached_tokens < done.usage.prompt_tokens


def test_a_folder_that_cannot_be_used_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("where a folder should be")
    text, done, _ = answer(file)
    assert text and done.usage.cached_tokens == 0
    assert len([record for record in caplog.records if "cannot be written to" in record.message]) == 1
