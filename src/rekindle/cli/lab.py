"""`rekindle lab model`: a file of random weights, with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from rekindle.lab.models import make_model


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
