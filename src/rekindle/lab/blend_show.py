"""A blend report for people: a table, a plot of quality against time to first token, one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rekindle.errors import counted
from rekindle.lab.blend import SELECTS, Arm, BlendReport, by_select
from rekindle.lab.blend_speed import SpeedArm, SpeedReport
from rekindle.lab.image import image


def print_report(report: BlendReport, console: Console) -> None:
    """The table, what ratio 1 gives, and one line of JSON."""
    kinds = list(report.arms[0].by_kind)
    table = Table(
        title=f"{report.questions} questions that cross chunks, {report.documents} documents of {report.chunks:.0f} chunks "
        f"and {report.prompt_tokens:,.0f} tokens; {report.model}, {report.engine}",
        title_justify="left",
        caption="TTFT and budget are beside full prefill's too",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in ("ratio", "right", "of full", "95 %", *kinds, "F1", "KL", "TTFT", "budget"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in report.arms:
        table.add_row(
            arm.select,
            "" if arm.select in ("full", "prefix", "none") else f"{arm.ratio:.0%}",
            f"{arm.exact_match:.3f}",
            f"{arm.exact_match_of_full:.3f}",
            f"{arm.interval[0]:.2f} to {arm.interval[1]:.2f}",
            *(f"{arm.by_kind.get(kind, 0):.3f}" for kind in kinds),
            f"{arm.f1:.3f}",
            f"{arm.kl:.4f}",
            "" if arm.ttft_of_full is None else f"{arm.ttft_of_full:.2f}",
            f"{arm.budget:.3f}",
        )
    console.print(table)
    console.print(
        f"At ratio 1 the largest logits difference from full prefill is {report.largest_difference:.6f}; "
        f"their standard deviation is {report.spread:.2f}.",
        highlight=False,
    )
    if report.left_out:
        words = (
            "example is longer than what the model holds, and was"
            if report.left_out == 1
            else ("examples are longer than what the model holds, and were")
        )
        console.print(f"{report.left_out} {words} left out.", highlight=False)
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)


def print_speed(report: SpeedReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    console.print(
        _speed_table(
            f"Time to the first token, {report.model}, {report.engine}, {report.chunks} chunks of about "
            f"{report.chunk_tokens} tokens in another order, {counted(report.threads, 'thread')}",
            report.arms,
        )
    )
    if report.peer:
        console.print(_speed_table("Over HTTP, each server alone", report.peer))
    for note in (report.note, report.peer_note):
        if note:
            console.print(note, highlight=False, soft_wrap=True)
    facts = asdict(report) | {
        name: [asdict(arm) | {"budget": arm.budget} for arm in arms]
        for name, arms in (("arms", report.arms), ("peer", report.peer))
    }
    summary = {"experiment": "blend speed"} | facts
    console.print(json.dumps(summary), soft_wrap=True, markup=False, highlight=False)


def _speed_table(title: str, arms: Sequence[SpeedArm]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("ratio", "seconds", "of full", "CPU of full", "computed", "budget: the floor", "calls"):
        table.add_column(heading, justify="right")
    for arm in arms:
        table.add_row(
            arm.name,
            f"{arm.ratio:.0%}",
            f"{arm.ttft_seconds:.2f}",
            f"{arm.ttft_of_full:.3f}",
            "" if arm.cpu_of_full is None else f"{arm.cpu_of_full:.3f}",
            f"{arm.computed:,} of {arm.prompt_tokens:,}",
            f"{arm.budget:.3f}",
            "" if arm.calls is None else f"{arm.calls:g}",
        )
    return table


_GREYS = {"full": "black", "prefix": "grey", "none": "silver"}  # what the others are seen beside, in their order


def plot_report(report: BlendReport, out: Path) -> None:
    """Quality against time to first token, a line per choice; the more is computed anew, the larger the dot.

    Raises InvalidRequest without matplotlib, or if it can't be written.
    """
    with image(out, 9, 5) as figure:
        axes = figure.add_subplot(
            xlabel="time to first token, of full prefill",
            ylabel="exact match, of full prefill",
            title=f"{report.model}, {report.engine}: {report.questions} questions that cross chunks",
        )
        for number, (select, by_ratio) in enumerate(by_select(report)):
            arms = [arm for _, arm in sorted(by_ratio.items())]
            times, quality = [arm.ttft_of_full for arm in arms], [arm.exact_match_of_full for arm in arms]
            color = _GREYS.get(select, f"C{(number - len(_GREYS)) % 10}")
            axes.plot(times, quality, color=color, linewidth=1)
            axes.scatter(times, quality, [_dot(arm) for arm in arms], color=color, alpha=0.8, label=select)
            ends = [arm.interval for arm in arms]
            axes.vlines(times, *zip(*ends, strict=True), color=color, alpha=0.25, linewidth=3)
        axes.margins(y=0.1)
        axes.grid(alpha=0.3)
        ratios = sorted({arm.ratio for arm in report.arms if arm.select in SELECTS})
        shown = f"dots from {ratios[0]:.0%} to {ratios[-1]:.0%},\n" if len(ratios) > 1 else ""
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            title=f"{shown}bars: 95 % intervals",
            fontsize=8,
            title_fontsize=8,
        )


def _dot(arm: Arm) -> float:
    """Area, in square points."""
    return 12 + (400 * arm.ratio if arm.select != "full" else 0)
