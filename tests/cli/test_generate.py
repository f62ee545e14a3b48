"""`rekindle generate` and `rekindle chat` with a model in the same process."""

from __future__ import annotations

import json

from .conftest import Run

QUESTION = "Vodris paints in orange. What colour does Vodris paint in?"


def test_the_answer_goes_to_stdout_and_nothing_else(run: Run) -> None:
    result = run("generate", QUESTION, "--max-tokens", "16")
    assert result.returncode == 0
    assert result.stdout.strip()
    assert result.stdout.endswith("\n")
    assert result.stderr == ""


def test_stdin_is_a_prompt_like_any_other(run_here: Run) -> None:
    assert run_here("generate", "-", stdin=QUESTION).stdout == run_here("generate", QUESTION).stdout


def test_stats_go_to_stderr(run_here: Run) -> None:
    result = run_here("generate", QUESTION, "--stats", "--max-tokens", "4")
    assert result.stderr.startswith("prompt: 0 tokens reused, ")
    assert result.stdout == run_here("generate", QUESTION, "--max-tokens", "4").stdout


def test_json_holds_text_usage_timings_and_plan(run_here: Run) -> None:
    result = run_here("generate", QUESTION, "--json", "--max-tokens", "4")
    answer = json.loads(result.stdout)
    assert answer["text"].strip() == run_here("generate", QUESTION, "--max-tokens", "4").stdout.strip()
    usage = answer["usage"]
    assert usage["computed_tokens"] == usage["prompt_tokens"] > 0
    assert answer["timings"]["prefill_calls"] >= 1
    assert answer["plan"]["total"] == usage["prompt_tokens"]


def test_raw_text_is_not_put_through_the_template(run_here: Run) -> None:
    counts = {
        mode: json.loads(run_here("generate", QUESTION, mode, "--json", "--max-tokens", "1").stdout)["usage"][
            "prompt_tokens"
        ]
        for mode in ("--chat", "--raw")
    }
    assert counts["--raw"] < counts["--chat"]


def test_a_chat_over_a_pipe_answers_line_by_line(run: Run) -> None:
    result = run("chat", "--max-tokens", "8", stdin="Hello.\n\nThank you.\n/quit\nNot said.\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.count("tokens reused") == 2


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(run: Run) -> None:
    result = run("chat", "--max-tokens", "8", stdin=f"{'word ' * 5000}\nHello.\n")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 1
    assert "rekindle: the prompt has" in result.stderr
