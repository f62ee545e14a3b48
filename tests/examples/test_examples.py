"""The examples run, on the real model, and what they show adds up.

As processes of their own, as users run them. Where that is not the point those on PyTorch run in this one, which has
imported it already: that takes longer than most of what they do.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")), reason="needs torch and transformers"
)


def run(name: str, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    one_thread = {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}  # small work: more threads would wait for each other
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | one_thread | (env or {}),
        check=False,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    if not find_spec("torch"):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_here(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The same in this process."""
    path, out, err = EXAMPLES / f"{name}.py", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, one_thread(), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(path), *options])
        patch.syspath_prepend(str(EXAMPLES))
        patch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    code = end.value.code
    if isinstance(code, str):  # what the interpreter does with it
        code, _ = 1, err.write(code)
    return subprocess.CompletedProcess([name, *options], code or 0, out.getvalue(), err.getvalue())


def report_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def check_times(report: dict[str, Any]) -> None:
    for arm in ("without_cache", "with_cache"):
        times = report[arm]
        assert 0 < times["p50_ms"] <= times["p95_ms"] <= times["p99_ms"]
        assert times["first_token_p50_ms"] < times["p50_ms"]
        assert times["requests_per_second"] == pytest.approx(1000 / times["average_ms"])
    assert report["speed_up"] > 0
    assert report["stats"]["time_saved_seconds"] > 0


@pytest.mark.slow
def test_rag() -> None:
    options = ("--tokens", "2000", "--questions", "3", "--passages", "3", "--threads", "1")
    report = report_of(run("rag", *options, "--select", "first", "--json"))
    answers = report["answers"]
    assert len(answers) == 3 and report["warm_seconds"] > 0
    for each in answers:
        exact, blended = each["exact"], each["blended"]
        assert blended["prompt"] == exact["prompt"] > 1000
        assert exact["answer"] and blended["computed"] < 0.5 * exact["prompt"]
    first = answers[0]
    assert first["exact"]["computed"] == first["exact"]["prompt"]  # it finds nothing that the other way has read
    assert 0 < first["blended"]["computed"] < 0.4 * first["exact"]["computed"]
    assert first["exact"]["answer"] == first["question"]["expected"]


@pytest.mark.slow
def test_rag_about_a_folder(tmp_path: Path) -> None:
    asked = ("--question", "Which firm does Vodris belong to?", "--passages", "12", "--select", "first")
    result = run("rag", str(EXAMPLES / "village"), *asked, "--threads", "1", "--ratio", "1")
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0].startswith("12 passages") and lines[-1].startswith("1 of 1 answers the same")
    for name in ("exact", "blended"):
        assert any(line.startswith(f"{name}: Vodris belongs to Nouraix.") for line in lines)
    empty = tmp_path / "empty"
    empty.mkdir()
    for options, message in (
        ([str(empty), "--question", "Who?"], "has no .txt"),
        ([str(EXAMPLES)], "expected a question"),
        ([str(EXAMPLES), "--question", " "], "expected a question"),
        ([str(tmp_path / "none"), "--question", "Who?"], "there is no folder"),
        (["--model", "none.gguf"], "there is no model file"),
        (["--select", "best"], "--select is one of none, first,"),
    ):
        refused = run_here("rag", *options)
        assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_rag_about_a_folder_of_anything(tmp_path: Path) -> None:
    """Files that are no text are left out, long ones are cut, and a question that nothing answers is told so."""
    (tmp_path / "bytes.txt").write_bytes(b"\xff\x00\x01")
    (tmp_path / "zeros.md").write_bytes(b"a\x00b")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    paragraphs = [f"Vodris paints in orange, says page {number}. " * 9 for number in range(12)]
    (tmp_path / "LONG.TXT").write_text("\n\n".join(paragraphs) + "\n\n" + "word " * 4000)
    options = (str(tmp_path), "--question", "Xyzzy?", "--passages", "2", "--threads", "1", "--json")
    result = run("rag", *options)
    report = report_of(result)
    assert "left out: bytes.txt: it is not UTF-8 text" in result.stderr and "image.png" not in result.stderr
    assert "left out: zeros.md: it is not text" in result.stderr
    assert "no passage shares a word with this question: Xyzzy?" in result.stderr
    (answer,) = report["answers"]
    assert 300 < answer["exact"]["prompt"] < 3000 and answer["blended"]["computed"] < answer["exact"]["computed"]
    refused = run_here("rag", *options[:-3], "--passages", "40")
    assert refused.returncode == 1 and "put fewer before a question: --passages" in refused.stderr


@needs_torch
@pytest.mark.slow
def test_comparison() -> None:
    result = run("comparison", "--requests", "8", "--prefixes", "2", "--tokens", "200", "--max-tokens", "4")
    report = report_of(result)
    check_times(report)
    stats = report["stats"]
    assert (stats["total_requests"], stats["misses"]) == (8, 2)
    assert stats["hit_rate_percent"] == 75
    assert report["workload"]["prompt_tokens"] > 200
    assert report["equal_answers"] >= 7  # one may hang on rounding
    for words in ("without cache", "P99", "requests/s", "Hit rate 75.0 %", "time saved"):
        assert words in result.stdout
    assert "100%" in result.stderr  # the progress bar


@needs_torch
@pytest.mark.slow
def test_multilayer() -> None:
    options = ("--rounds", "3", "--continuations", "3", "--tokens", "150", "--new-tokens", "30", "--max-tokens", "4")
    result = run_here("multilayer", *options)
    report = report_of(result)
    check_times(report)
    num_layers = report["workload"]["layers"]
    assert report["requests"] == {"asked": 9, "found": 6, "continued": 2}
    assert report["layers"] == {"asked": 9 * num_layers, "found": 6 * num_layers}
    assert report["stats"]["hits"] == 6 + 2  # whole contexts and beginnings, each one request
    assert report["stats"]["misses"] == 3
    assert report["tokens"]["read"] < report["tokens"]["in_prompts"] / 3
    assert report["equal_answers"] >= 8
    for words in ("6 of 9 (66.7 %)", f"{6 * num_layers} of {9 * num_layers}", "tokens read"):
        assert words in result.stdout


@needs_torch
@pytest.mark.slow
def test_a_cache_that_is_too_small_costs_time_but_no_answer() -> None:
    options = ("--rounds", "2", "--continuations", "2", "--tokens", "60", "--max-tokens", "3", "--max-size-gb", "1e-6")
    report = report_of(run_here("multilayer", *options))
    assert report["requests"] == {"asked": 4, "found": 0, "continued": 0}
    assert report["equal_answers"] >= 3


CACHE = ("--tokens", "300", "--max-new-tokens", "4")


@needs_torch
@pytest.mark.slow
def test_transformers_cache_in_two_processes(tmp_path: Path) -> None:
    one, two = (each("transformers_cache", *CACHE, "--kv", str(tmp_path)) for each in (run, run_here))
    first, second = report_of(one)["requests"], report_of(two)["requests"]
    assert [each["kind"] for each in first] == ["cold", "hit", "hit with suffix"]
    assert [each["kind"] for each in second] == ["hit", "hit", "hit"]  # of what the first process has kept
    assert all(each["equal"] for each in (*first, *second))
    cold, hit, suffix = first
    assert (cold["computed"], hit["computed"]) == (cold["prompt_tokens"], 0) and 0 < suffix["computed"] < 20
    assert [each["model_calls_before_the_first_token"] for each in first] == [1, 0, 1]
    for step in ("1 tokenise", "2 look up", "3 split", "4 load", "5 prefill", "6 decode", "7 return", "8 timings"):
        assert one.stdout.count(step) == 3
    assert "skipped: the logits are at hand" in one.stdout and "place + " in one.stdout


@needs_torch
@pytest.mark.slow
def test_transformers_cache_with_another_model(tmp_path: Path) -> None:
    """A Gemma 3 with sliding windows and random weights, saved as anybody would, without a chat template."""
    import torch
    from transformers import AutoTokenizer

    from rekindle.lab.torch_models import TINY, random_model
    from rekindle.model import ember

    config = TINY["gemma3"]()
    config.vocab_size = 2302
    random_model(config, torch.float32).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(ember.hf_path())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    report = report_of(run_here("transformers_cache", *CACHE, "--model", str(tmp_path), "--dtype", "bfloat16"))
    assert report["dtype"] == "torch.bfloat16"
    assert [each["kind"] for each in report["requests"]] == ["cold", "hit", "hit with suffix"]
    assert report["requests"][1]["equal"]


VOICE = ("--speed", "4", "--patient")  # a busy machine may be too slow for people


def check_conversation(report: dict[str, Any]) -> None:
    greeting, *questions = report["turns"]
    assert greeting["was_stopped"] and " Hello. Ask me about the people, the firms".startswith(greeting["answer"][:30])
    assert [turn["answer"].strip() for turn in questions] == [
        "Hudik paints in gold.",
        "Grevmar works as a gardener.",
        "Bubris lives in Patham.",
    ]
    for turn in report["turns"]:
        assert turn["transcripts"] == len(turn["said"].split()) + 1
        assert 4 < turn["computed_tokens_unread"] < 20 < turn["prompt_tokens"]
    left, unread = (sum(turn[key] for turn in report["turns"]) for key in ("computed_tokens", "computed_tokens_unread"))
    assert left < unread / 2  # 4 a turn, at most


def test_voice_pipeline_in_this_process() -> None:
    result = run("voice_pipeline", *VOICE)
    check_conversation(report_of(result))
    for words in ("hears     What collar", "user      What colour", "objects   ", "were left to read", "TTFT *"):
        assert words in result.stdout


def test_voice_pipeline_over_the_socket() -> None:
    settings = Settings(threads=1, store="none", api_key="right")
    with Service.open(settings) as service, running(service) as url:
        check_conversation(report_of(run("voice_pipeline", *VOICE, "--url", url, "--api-key", "right")))


RECOGNISER = """
import json
for each in ({"partial": ""}, {"partial": "who paints in"}, {"text": "Who paints in gold?"}, {"text": ""}):
    print(json.dumps(each), flush=True)
"""


def test_voice_pipeline_with_a_recogniser_and_a_voice(tmp_path: Path) -> None:
    """Programs that speak the formats of Vosk and of espeak-ng take the places of the real ones."""
    (tmp_path / "recogniser.py").write_text(RECOGNISER)
    voice = tmp_path / "espeak-ng"
    voice.write_text(f"#!/bin/sh\ncat > {tmp_path}/said\n")
    voice.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    listen = f"{sys.executable} {tmp_path}/recogniser.py"
    (turn,) = report_of(run("voice_pipeline", *VOICE, "--speak", "--listen", listen, env=environment))["turns"]
    assert (turn["said"], turn["transcripts"]) == ("Who paints in gold?", 2)
    assert turn["answer"].strip() == (tmp_path / "said").read_text().strip() == "Hudik paints in gold."


def test_what_is_not_there_is_told_without_a_traceback(tmp_path: Path) -> None:
    for name, options, words in (
        ("voice_pipeline", ("--url", "http://127.0.0.1:1"), "cannot talk to http://127.0.0.1:1"),
        *(
            [("transformers_cache", ("--model", str(tmp_path)), "expected a folder")]
            if find_spec("transformers")
            else []
        ),
    ):
        result = run_here(name, *options)
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_voice_pipeline_without_a_voice(tmp_path: Path) -> None:
    result = run("voice_pipeline", "--speak", env={"PATH": str(tmp_path)})
    assert result.returncode == 1 and result.stderr.startswith("--speak needs espeak-ng")


@pytest.mark.parametrize("name", ["comparison", "multilayer", "transformers_cache"])
def test_without_torch_the_examples_say_what_to_install(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = run(name, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr.startswith('This example needs PyTorch and transformers: pip install "rekindle[torch]"')
    assert "Traceback" not in result.stderr
