"""`rekindle lab live`: how soon a live session answers, what its window costs, how far it drifts.

ttft    TTFT of messages into a long conversation, beside chat completions here and a peer: live_ttft.py
talk    hundreds of turns in a small window, about facts that stand in the head: live.py, on the built-in model
drift   the window against a full prefill, after some moves: live_drift.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from rekindle.errors import InvalidRequest
from rekindle.lab.live import MAX_ANSWER, Question, Talk, answer_alone, long_talk
from rekindle.lab.live_drift import MOVES, Drift, measure_drift
from rekindle.lab.live_ttft import Plan, Ttft, measure_ttft
from rekindle.lab.machine import Machine, this_machine
from rekindle.model.ember.language import Document, Kind, generate_questions
from rekindle.model.ember.village import village
from rekindle.serve.service import Service
from rekindle.settings import Settings

Part = Literal["ttft", "talk", "drift"]
PARTS: tuple[Part, ...] = ("ttft", "talk", "drift")
TALK_MODEL = "builtin"  # the facts are in its language
RETENTIONS = (0.8, 0.95)
_JUDGED = 100  # turns at the end of a talk, at most
_QUESTIONS = 16
Progress = Callable[[str, int, int], object]  # what runs, done, of how many


@dataclass(frozen=True, kw_only=True)
class LiveReport:
    """What was measured; None for parts that were left out."""

    machine: Machine
    model: str
    ttft: Ttft | None = None
    talks: tuple[Talk, ...] = ()
    drifts: tuple[Drift, ...] = ()


def run_live(
    plan: Plan,
    parts: Sequence[str],
    *,
    turns: int = 500,
    window: int = 2048,
    kv_types: Sequence[str] = ("f16",),
    progress: Progress = lambda what, done, total: None,
) -> LiveReport:
    """Raises InvalidRequest for an unknown part or KV type, before anything is measured, and whatever a part raises."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InvalidRequest(f"part: expected {', '.join(PARTS)}, got {unknown[0]!r}", param="part")
    settings = [Settings.load(threads=plan.threads, kv_type=each) for each in kv_types]
    return LiveReport(
        machine=this_machine(),
        model=plan.model.name,
        ttft=measure_ttft(plan, progress) if "ttft" in parts else None,
        talks=_talks(plan.threads, turns, window, progress) if "talk" in parts else (),
        drifts=_drifts(plan, settings, progress) if "drift" in parts else (),
    )


def _talks(threads: int, turns: int, window: int, progress: Progress) -> tuple[Talk, ...]:
    """One for each retention."""
    talks = []
    with Service.open(Settings.load(model=TALK_MODEL, threads=threads, store="none", context=2 * window)) as service:
        document = village()
        questions = _known(service, document)
        for retention in RETENTIONS:
            talks.append(
                long_talk(
                    service,
                    document.text,
                    questions,
                    turns=turns,
                    judged=min(turns, _JUDGED),
                    window=window,
                    retention=retention,
                    progress=lambda done: progress("talk", done, turns),
                )
            )
    return tuple(talks)


def _known(service: Service, document: Document) -> list[Question]:
    """Questions that the model answers right when nothing else was said: what it never knew it can't forget."""
    asked = generate_questions(document, "live", kinds=(Kind.DIRECT,), count=_QUESTIONS)
    return [
        Question(each.text, each.answer)
        for each in asked
        if answer_alone(service, document.text, each.text) == each.answer
    ]


def _drifts(plan: Plan, settings: Sequence[Settings], progress: Progress) -> tuple[Drift, ...]:
    found: list[Drift] = []
    for each in settings:
        for retention in RETENTIONS:
            found += measure_drift(
                str(plan.model),
                each.kv_type,
                retention,
                most_rotations=each.session_slides,
                threads=each.threads,
                progress=lambda done, kv_type=each.kv_type: progress(f"drift, {kv_type}", done, MOVES[-1]),  # type: ignore[misc]
            )
    return tuple(found)


def print_report(report: LiveReport, console: Console) -> None:
    """Tables for people, and one line of JSON."""
    if report.ttft is not None:
        _print_ttft(report.ttft, console)
    if report.talks:
        console.print(_talk_table(report.talks))
    if report.drifts:
        console.print(_drift_table(report.drifts))
    machine = report.machine
    line = f"{report.model}; {machine.processor}, {machine.cores} cores, {machine.system}, Python {machine.python}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(as_json(report), soft_wrap=True, markup=False, highlight=False)


def as_json(report: LiveReport) -> str:
    """One line."""
    record: dict[str, Any] = {"machine": asdict(report.machine), "model": report.model}
    if report.ttft is not None:
        record["ttft"] = {
            "plan": {**vars(report.ttft.plan), "model": report.ttft.plan.model.name},
            "conversation_tokens": report.ttft.conversation_tokens,
            "least_step_ms": round(report.ttft.least_step_ms, 2),
            "arms": [arm.as_dict for arm in report.ttft.arms],
        }
    record["talks"] = [asdict(talk) | {"overhead": round(talk.overhead, 5)} for talk in report.talks]
    record["drifts"] = [asdict(drift) for drift in report.drifts]
    return json.dumps(record)


def _print_ttft(ttft: Ttft, console: Console) -> None:
    plan = ttft.plan
    table = _table(
        f"TTFT of {plan.samples} messages of {plan.characters} characters each, {ttft.conversation_tokens} tokens of "
        f"conversation, {plan.threads} threads, {plan.gap_seconds:g} s between words and before the message is sent",
        ("message", "TTFT p50", "p95", "max, ms", "decode step, ms", "TTFT in steps", "tokens computed", "model calls"),
    )
    for arm in ttft.arms:
        row = arm.as_dict
        names = ("ttft_p50_ms", "ttft_p95_ms", "ttft_max_ms", "decode_step_ms", "ttft_in_steps")
        counts = (row["computed_tokens"], row["prefill_calls"])
        table.add_row(
            arm.name, *(f"{row[name]:.2f}" for name in names), *("" if n is None else f"{n:g}" for n in counts)
        )
    console.print(table)
    console.print(
        f"A decode step takes {ttft.least_step_ms:.2f} ms at least: all weights are read from memory. Tokens computed and "
        "model calls are those between sending and the first token, in the median.",
        soft_wrap=True,
    )


def _talk_table(talks: Sequence[Talk]) -> Table:
    table = _table(
        f"{talks[0].turns} turns in a window of {talks[0].window} tokens, {TALK_MODEL}, answers of at most {MAX_ANSWER} "
        "tokens",
        ("moves", "turns forgotten", "tokens new", "computed", "more, %", "turned", "placed anew", "right", "alone"),
    )
    for talk in talks:
        numbers = (talk.moves, talk.forgotten_turns, talk.new_tokens, talk.computed_tokens)
        right = [f"{count} of {talk.judged}" for count in (talk.num_right, talk.num_right_alone)]
        slid = (f"{talk.turned_tokens:,}", f"{talk.placed_tokens:,}")
        table.add_row(*(f"{number:,}" for number in numbers), f"{100 * talk.overhead:.2f}", *slid, *right)
    return table


def _drift_table(drifts: Sequence[Drift]) -> Table:
    table = _table(
        "Distributions of the next token after moves of the window: divergence in nats, largest difference of a logit, "
        "share of same most probable tokens",
        (
            "KV",
            "retention",
            "moves",
            "arm",
            "rotations",
            "from prefill",
            "logit",
            "same",
            "from placed",
            "logit",
            "same",
        ),
    )
    for drift in drifts:
        gaps = [
            text
            for gap in (drift.from_prefill, drift.from_placed)
            for text in (f"{gap.divergence:.6f}", f"{gap.largest:.3f}", f"{gap.same:.2f}")
        ]
        kinds = (drift.kv_type, f"{drift.retention:g}", str(drift.moves), drift.arm, str(drift.most_rotations))
        table.add_row(*kinds, *gaps)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
