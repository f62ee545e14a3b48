"""`rekindle lab soak`: what it shows while it works."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from rekindle.lab.soak.run import print_soak_report, run_soak


def soak_server(model: str, minutes: float, seed: int, threads: int) -> bool:
    """Run it, with a progress bar; then the table and one line of JSON. False if anything was left over or got stuck."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{minutes:g} minutes of mixed load", total=1.0)
        report = run_soak(
            model,
            minutes=minutes,
            seed=seed,
            threads=threads,
            progress=lambda share: bar.update(task, completed=min(share, 1.0)),
        )
    print_soak_report(report, Console())
    return not report.problems
