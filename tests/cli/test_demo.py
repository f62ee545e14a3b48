"""The tour: its checks catch what they are for, and the real model passes them over HTTP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rekindle.cli.demo import Round, Stop, check
from rekindle.cli.reference import measured_table
from rekindle.cli.talk import Answer
from rekindle.cli.village import Question, read_village
from rekindle.errors import RekindleError

from .conftest import Run


def answer(prompt: int, cached: int, calls: int, text: str = "Yes.") -> Answer:
    return Answer(
        text=text,
        finish_reason="stop",
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=10,
        timings={"ttft_ms": 5.0, "prefill_calls": calls},
    )


def good() -> list[Stop]:
    def stop(name: str, prompt: int, cached: int, calls: int) -> Stop:
        question = Question("Really?", "Yes.", "direct")
        return Stop(
            name=name, question=question, answer=answer(prompt, cached, calls), without_reuse=answer(prompt, 0, 1)
        )

    return [
        stop("cold", 100, 0, 1),
        stop("repeated", 100, 100, 0),
        stop("shared", 101, 90, 1),
        stop("turn", 120, 110, 1),
    ]


def checked(stops: list[Stop], index: int, changed: Answer) -> list[str]:
    stops[index] = replace(stops[index], answer=changed)
    cold, repeated, shared, second = stops
    tour: Round = (cold, repeated, shared, second)
    return check(tour)


@pytest.mark.parametrize(
    ("index", "changed", "problem"),
    [
        (0, answer(100, 5, 1), "cold prompt was not cold"),
        (1, answer(100, 100, 1), "model calls before its first token"),
        (1, answer(100, 99, 0), "computed again"),
        (2, answer(101, 10, 1), "shared passages were computed again"),
        (3, answer(120, 108, 1), "more than what follows the first answer"),
        (3, answer(120, 110, 1, text="No."), "without reuse 'Yes.'"),
        (2, answer(101, 90, 1, text=" "), "the answer is empty"),
    ],
)
def test_each_check_catches_its_fault(index: int, changed: Answer, problem: str) -> None:
    assert checked(good(), 0, answer(100, 0, 1)) == []
    assert any(problem in each for each in checked(good(), index, changed))


def test_the_real_model_computes_nothing_twice(run: Run) -> None:
    result = run("demo", "--rounds", "1", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["problems"] == []
    cold, repeated, shared, second = report["steps"]
    assert cold["reused_tokens"] == 0
    assert (repeated["computed_tokens"], repeated["calls_before_first_token"]) == (0, 0)
    assert shared["computed_tokens"] < 20
    assert second["computed_tokens"] < 20
    assert all(step["same_as_without_reuse"] for step in report["steps"])
    assert measured_table(report).count("\n| ") == 5


def test_a_server_that_cannot_start_is_told_once(run: Run) -> None:
    result = run("demo", env={"REKINDLE_MODEL": "/no/such/model.gguf"})
    assert result.returncode == 1
    assert "no model file at /no/such/model.gguf" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("rekindle: the server ended before it listened")


def test_the_village_is_whole() -> None:
    village = read_village()
    assert len(village.passages) == 12
    assert {"direct", "coreference", "two-hop"} <= {question.kind for question in village.questions}
    assert village.text.count("\n") == 11


def test_an_installation_without_examples_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rekindle.__file__", str(tmp_path / "rekindle" / "__init__.py"))
    with pytest.raises(RekindleError, match="has no example texts"):
        read_village()
