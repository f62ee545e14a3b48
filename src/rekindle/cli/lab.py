"""`rekindle lab model` and `rekindle lab trace`: what they show while they work."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from rekindle.lab.models import make_model
from rekindle.lab.trace import CAPACITIES, print_report, run_trace


def write_model(shape: str, quant: str, out: Path, seed: int) -> None:
    """Write the file and say what it is."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{shape} {quant}", total=None)
        report = make_model(
            shape, quant, out, seed=seed, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    Console().print(
        f"{report.path}: {report.arch}, {report.parameters:,} parameters in {report.quant}, "
        f"{report.bytes / 1e6:,.1f} MB, vocabulary of {report.vocabulary:,}, seed {report.seed}, "
        f"written in {report.seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def replay_trace(file: Path, capacities: list[int] | None, policies: list[str] | None, plot: Path | None) -> None:
    """Replay, with a progress bar; then the table, the plot if one is wanted, and one line of JSON."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(file.name, total=None)
        report = run_trace(
            file,
            capacities or CAPACITIES,
            policies or None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if plot is not None:
        from rekindle.lab.trace_plot import plot_report

        plot_report(report, plot)
    print_report(report, Console())
