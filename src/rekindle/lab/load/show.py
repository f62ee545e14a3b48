"""A table for people, what they must know to believe it, and one line of JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from rekindle.lab.load.figures import Figure, Ratio, Run, ratios
from rekindle.lab.load.run import LoadReport, workload_named

_SAME_WORK = 0.02  # difference in tokens that is said
_IDLE = 0.02  # share of a core that is said


def print_report(report: LoadReport, console: Console) -> None:
    """Table, figures, conditions, and one line of JSON."""
    console.print(_table(report))
    figures = _figures_table(report)
    if figures.row_count:
        console.print(figures)
    found = ratios(report.runs)
    if found:
        console.print(_ratio_table(found, list(dict.fromkeys(run.server for run in report.runs))))
    for line in [*_conditions(report), *remarks(report)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(as_json(report), soft_wrap=True, markup=False, highlight=False)


def as_json(report: LoadReport) -> str:
    """One line."""
    sizes = {name: value for name, value in asdict(report.wish.sizes).items() if name != "trace"}
    setup, found = report.setup, ratios(report.runs)
    record: dict[str, Any] = {
        "workload": report.wish.workload,
        "runs": [run.as_dict() for run in report.runs],
        "ratios": {name: round(ratio.median, 4) for name, ratio in found.items()},
        "spread": {
            name: {"quartiles": [round(each, 4) for each in ratio.quartiles], "pairs": len(ratio.values)}
            for name, ratio in found.items()
        },
        "sizes": sizes,
        "loop": "closed" if report.wish.rate is None else "open",
        "rate": report.wish.rate,
        "seed": report.wish.seed,
        "servers": {each.name: {"build": each.build, "kernels": sorted(each.kernels)} for each in report.servers},
        "machine": asdict(report.machine),
        "remarks": remarks(report),
    }
    if setup is not None:
        record["setup"] = {
            "model": setup.model.name,
            "threads": setup.threads,
            "context": setup.context,
            "parallel": setup.parallel,
            "options": dict(setup.options),
        }
    return json.dumps(record)


def _table(report: LoadReport) -> Table:
    table = Table(title=f"{report.wish.workload}: {workload_named(report.wish.workload).about}", title_justify="left")
    table.add_column("server", no_wrap=True, min_width=max(len(run.server) for run in report.runs))
    headings = ("requests", "errors", "TTFT p50", "p95", "p99, ms", "ITL p50", "p95", "p99, ms", "tokens/s", "s")
    for heading in (*headings, "prompt tokens", "cached", "computed"):
        table.add_column(heading, justify="right")
    for run in report.runs:
        row = run.as_dict()
        times = [_number(row[f"{kind}_p{share}_ms"]) for kind in ("ttft", "itl") for share in (50, 95, 99)]
        cached = run.cached_tokens
        share = f"{cached / run.prompt_tokens:.0%}" if cached is not None and run.prompt_tokens else "?"
        table.add_row(
            run.server,
            str(len(run.answers)),
            str(row["errors"]),
            *times,
            _number(row["tokens_per_second"]),
            _number(run.seconds),
            _count(run.prompt_tokens),
            share,
            _count(run.computed_tokens),
        )
    return table


def _figures_table(report: LoadReport) -> Table:
    """What the workload measured besides: medians over all turns."""
    table = Table()
    servers = list(dict.fromkeys(run.server for run in report.runs))
    table.add_column("")
    for server in servers:
        table.add_column(server, justify="right")
        table.add_column("expected", justify="right")
    table.add_column("expected is")
    for name in dict.fromkeys(figure.name for run in report.runs for figure in run.figures):
        row, why = [], ""
        for server in servers:
            found = [each for run in report.runs if run.server == server for each in run.figures if each.name == name]
            row += [_number(_median(found)), _number(_median_expected(found))]
            why = why or (found[0].why if found else "")
        table.add_row(name, *row, why)
    return table


def _median(figures: Sequence[Figure]) -> float | None:
    return median(each.value for each in figures) if figures else None


def _median_expected(figures: Sequence[Figure]) -> float | None:
    known = [each.expected for each in figures if each.expected is not None]
    return median(known) if known else None


def _ratio_table(found: dict[str, Ratio], servers: Sequence[str]) -> Table:
    """Medians with quartiles, which say how far a median may be trusted."""
    table = Table()
    table.add_column(" / ".join(servers), no_wrap=True)
    for heading in ("median", "quartiles", "pairs"):
        table.add_column(heading, justify="right")
    for name, ratio in found.items():
        low, high = ratio.quartiles
        table.add_row(name, f"{ratio.median:.3f}", f"{low:.3f} to {high:.3f}", str(len(ratio.values)))
    return table


def _conditions(report: LoadReport) -> list[str]:
    wish, setup, machine = report.wish, report.setup, report.machine
    loop = f"closed loop of {wish.sizes.clients} clients" if wish.rate is None else f"{wish.rate:g} sessions per second"
    lines = [
        f"{loop}, seed {wish.seed}, {report.tokens_per_word:.2f} tokens per word, answers of {wish.sizes.answer_tokens} "
        f"tokens; {machine.processor}, {machine.cores} cores, {machine.system}, Python {machine.python}."
    ]
    if wish.peer is not None:
        how = "both servers up and asked in turn, A B B A" if wish.takes_turns else "one server up at a time, A B A B"
        lines.append(f"Rounds: {wish.rounds}, {how}. A pair is a turn, or for what is only known of all turns a round.")
    if setup is not None:
        lines.append(
            f"Started with {setup.model.name}, threads {setup.threads}, context {setup.context}, "
            f"parallel {setup.parallel}: " + "; ".join(f"{each.name} ({each.build})" for each in report.servers)
        )
    return lines


def remarks(report: LoadReport) -> list[str]:
    """What a reader must know to believe the figures."""
    return [*_kernels(report), *_work(report), *_idle(report.runs), *_errors(report.runs)]


def _kernels(report: LoadReport) -> list[str]:
    known = [server for server in report.servers if server.kernels]
    if len(known) != 2:
        return []
    first, second = known
    lines = []
    for lacks, has in ((first, second), (second, first)):
        missing = sorted(has.kernels - lacks.kernels)
        if missing:
            lines.append(
                f"{lacks.name} was built without {', '.join(missing)}, which {has.name} uses here: part of every ratio "
                "is arithmetic, not serving."
            )
    return lines


def _work(report: LoadReport) -> list[str]:
    lines = []
    for name in dict.fromkeys(run.server for run in report.runs):
        runs = [run for run in report.runs if run.server == name]
        short = sum(run.short_answers for run in runs)
        if short:
            lines.append(f"{name}: {short} answers were shorter than asked.")
        if not all(run.fixes_length for run in runs):
            lines.append(f"{name} does not take ignore_eos: answers may end early.")
        if any(run.whole and run.prompt_tokens is None for run in runs):
            lines.append(
                f"{name} reports no usage: prompts are not counted, and answers are counted in pieces of text."
            )
        elif any(run.whole and run.cached_tokens is None for run in runs):
            lines.append(f"{name} does not say how many tokens it had cached.")
        if any(run.knew_all for run in runs):
            lines.append(f"{name} had more than half of every prompt cached: ask it what is new, with another seed.")
    found = ratios(report.runs)
    for name in ("prompt_tokens", "completion_tokens"):
        factor = found[name].median if name in found else 1.0
        if abs(factor - 1) > _SAME_WORK:
            lines.append(
                f"The servers did not do the same work: {name.replace('_', ' ')} differ by a factor of {factor:.3f}."
            )
    return lines


def _idle(runs: Sequence[Run]) -> list[str]:
    """A server that computes while the other is asked takes from it."""
    lines = []
    for name in dict.fromkeys(run.server for run in runs):
        most = max(run.idle_share or 0.0 for run in runs if run.server == name)
        if most > _IDLE:
            lines.append(f"{name} used up to {most:.1%} of a core while the other server was asked.")
    return lines


def _errors(runs: Sequence[Run]) -> list[str]:
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for run in runs:
        for cause, count in run.errors.items():
            kind, _, example = cause.partition(": ")
            counts[run.server, kind] += count
            examples.setdefault((run.server, kind), f", such as: {example}" if example else "")
    lines = [f"{server}: {count} × {kind}{examples[server, kind]}" for (server, kind), count in counts.most_common()]
    skipped = sum(run.skipped for run in runs)
    return lines + ([f"{skipped} requests were not sent, because the one before them failed."] if skipped else [])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
