"""`rekindle demo`: a tour of what is not computed twice, over HTTP, with checks.

    cold            passages and a question                         all of it is read
    repeated        the same request                                no model call before the first token
    shared prefix   the same passages, another question             only the other question is read
    second turn     the first conversation goes on                  only what follows the first answer is read

Each step is also asked under a salt of its own, which shares nothing with anybody: that is the same request without
reuse. It gives the time to compare with, and the text that the answer must be equal to. The tour runs under a salt of
its own too, so it begins cold on any server. An unmeasured request goes first, because the first request of a process
pays for page faults and allocations. With several rounds, times are medians and the checks are made in each.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from rekindle.cli.background import Running, server_process
from rekindle.cli.client import first_key
from rekindle.cli.talk import Answer, Message, Remote, Wish
from rekindle.cli.village import Question, Village, read_village
from rekindle.lab.machine import this_machine
from rekindle.settings import Settings

MAX_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One step of the tour in one round."""

    name: str
    question: Question
    answer: Answer
    without_reuse: Answer

    @property
    def is_right(self) -> bool:
        return self.answer.text.strip() == self.question.answer

    @property
    def is_same(self) -> bool:
        return self.answer.text == self.without_reuse.text


Round = tuple[Stop, ...]


def run_demo(url: str | None, *, rounds: int, as_json: bool, key: str | None = None) -> bool:
    """Run the tour on a server, or on one started for it; print it; return whether all checks passed.

    `key`: for the server, instead of the one in the environment.
    """
    village = read_village()
    with nullcontext(_running(url, key)) if url else server_process() as server:
        _answer(_remote(server.url, key), [_user("Hello.")])  # warm up
        tour = [walk(server.url, village, key) for _ in range(rounds)]
    problems = [problem for stops in tour for problem in check(stops)]
    if as_json:
        typer.echo(json.dumps(report(tour, server.setup, problems)))
    else:
        _print(village, tour, server.setup, problems, Console(), stopped=url is None)
    return not problems


def _running(url: str, key: str | None) -> Running:
    remote = _remote(url, key)
    health = remote.client.get("/health")
    return Running(remote.client.url, f"model {health.get('model')}, engine {health.get('engine')}")


def _remote(url: str, key: str | None) -> Remote:
    """A talker under a salt that nobody has used."""
    return Remote(url, salt=_new_salt(), key=key or first_key(Settings.load()))


def walk(url: str, village: Village, key: str | None = None) -> Round:
    """One round of the tour."""
    remote = _remote(url, key)
    first, second, third = choose_questions(village)
    opening = [_user(f"{village.text}\n{first.text}")]
    other = [_user(f"{village.text}\n{second.text}")]

    def step(name: str, question: Question, messages: Sequence[Message], cold: Answer | None = None) -> Stop:
        answer = _answer(remote, messages)
        without = cold or _answer(_remote(url, key), messages)
        return Stop(name=name, question=question, answer=answer, without_reuse=without)

    cold = step("cold", first, opening)
    repeated = step("repeated", first, opening, cold.answer)
    shared = step("shared prefix", second, other)
    going_on = [*opening, {"role": "assistant", "content": cold.answer.text}, _user(third.text)]
    return cold, repeated, shared, step("second turn", third, going_on)


def choose_questions(village: Village) -> tuple[Question, Question, Question]:
    """A direct one, one that needs two passages, and one for the second turn."""
    return village.first("direct"), village.first("two-hop"), village.first("coreference")


def check(stops: Round) -> list[str]:
    """What did not go as it must; empty if all did."""
    cold, repeated, shared, second = stops
    learned = cold.answer.prompt_tokens + cold.answer.completion_tokens - 1  # an answer's last token may be unread
    conditions = {
        "the cold prompt was not cold": cold.answer.cached_tokens == 0,
        "the repeated prompt made model calls before its first token": repeated.answer.prefill_calls == 0,
        "the repeated prompt was computed again": repeated.answer.computed_tokens == 0,
        "the shared passages were computed again": shared.answer.computed_tokens < cold.answer.computed_tokens / 2,
        "the second turn computed more than what follows the first answer": second.answer.cached_tokens >= learned,
    }
    problems = [problem for problem, holds in conditions.items() if not holds]
    for stop in stops:
        if not stop.answer.text.strip():
            problems.append(f"{stop.name}: the answer is empty")
        if not stop.is_same:
            problems.append(f"{stop.name}: {stop.answer.text!r}, but without reuse {stop.without_reuse.text!r}")
    return problems


def report(tour: Sequence[Round], setup: str, problems: Sequence[str]) -> dict[str, Any]:
    """All figures, for machines."""
    return {
        "experiment": "demo",
        "setup": setup,
        "machine": asdict(this_machine()),
        "rounds": len(tour),
        "steps": [_figures(stops) for stops in zip(*tour, strict=True)],
        "problems": list(problems),
    }


def _figures(stops: Sequence[Stop]) -> dict[str, Any]:
    """One step over all rounds."""
    stop = stops[0]
    return {
        "step": stop.name,
        "question": stop.question.text,
        "answer": stop.answer.text,
        "right": stop.is_right,
        "same_as_without_reuse": all(each.is_same for each in stops),
        "prompt_tokens": stop.answer.prompt_tokens,
        "reused_tokens": stop.answer.cached_tokens,
        "computed_tokens": stop.answer.computed_tokens,
        "calls_before_first_token": stop.answer.prefill_calls,
        "ttft_ms": round(median(each.answer.ttft_ms for each in stops), 3),
        "ttft_ms_without_reuse": round(median(each.without_reuse.ttft_ms for each in stops), 3),
    }


def tour_table(steps: Sequence[dict[str, Any]]) -> Table:
    """The figures for people."""
    caption = "prompt, reused, computed: tokens; calls: model calls before the first token"
    table = Table(caption=caption, caption_justify="left")
    table.add_column("")
    for heading in ("prompt", "reused", "computed", "calls", "TTFT", "without reuse"):
        table.add_column(heading, justify="right")
    for step in steps:
        counts = (
            step["prompt_tokens"],
            step["reused_tokens"],
            step["computed_tokens"],
            step["calls_before_first_token"],
        )
        times = (f"{step['ttft_ms']:.1f} ms", f"{step['ttft_ms_without_reuse']:.1f} ms")
        table.add_row(step["step"], *(str(count) for count in counts), *times)
    return table


def _print(
    village: Village,
    tour: Sequence[Round],
    setup: str,
    problems: Sequence[str],
    console: Console,
    *,
    stopped: bool,
) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"\n{len(village.passages)} passages about a village, and questions about them ({setup}).\n")
    for stop in tour[0]:
        say(f"{stop.name}\n  question: {stop.question.text}")
        say(f"  answer:   {stop.answer.text.strip()} ({_verdict(stop)})\n")
    console.print(tour_table([_figures(stops) for stops in zip(*tour, strict=True)]))
    if len(tour) > 1:
        say(f"Times are medians of {len(tour)} rounds.")
    for problem in problems:
        say(f"FAILED: {problem}")
    if not problems:
        say("Nothing was computed twice, and every answer is the one that the model gives without reuse.")
    if stopped:
        say("The server of this tour has ended. To keep one running: make serve (or rekindle serve). Then, elsewhere:")
        say("  rekindle chat --url http://127.0.0.1:8000")
        say("  curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{\"prompt\": \"Hello.\"}'")


def _verdict(stop: Stop) -> str:
    return "right" if stop.is_right else f"wrong, it is: {stop.question.answer}"


def _answer(remote: Remote, messages: Sequence[Message]) -> Answer:
    *_, last = remote.chat(messages, Wish(max_tokens=MAX_TOKENS))
    assert isinstance(last, Answer)
    return last


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _new_salt() -> str:
    return uuid.uuid4().hex
