"""`rekindle lab blend`: what it shows while it works, and whether its gate held."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from rekindle.engine.llama import LlamaEngine
from rekindle.lab.blend import GATE_BUDGET, RATIOS, run_blend
from rekindle.lab.blend_show import plot_report, print_report, print_speed
from rekindle.lab.blend_speed import measure_speed
from rekindle.model.gguf import GgufModel
from rekindle.model.source import locate


def measure_quality(
    model: str,
    engine: str,
    data: Path | None,
    documents: int,
    ratios: list[float] | None,
    threads: int,
    seed: int,
    plot: Path | None,
    gate: float | None,
) -> bool:
    """Ask, with a progress bar; then the table, the plot if one is wanted, and one line of JSON. False below the gate."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("documents", total=documents)
        report = run_blend(
            model,
            engine=engine,
            data=data,
            documents=documents,
            ratios=ratios or RATIOS,
            threads=threads,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if plot is not None:
        plot_report(report, plot)
    print_report(report, Console())
    if gate is None:
        return True
    best = report.best
    Console(stderr=True).print(
        f"gate {gate}: the best arm of at most {GATE_BUDGET:.0%} is {best.select} at {best.ratio:.0%}, "
        f"with {best.exact_match_of_full:.3f} of full prefill's exact match",
        highlight=False,
        soft_wrap=True,
    )
    return best.exact_match_of_full >= gate


def measure_time(model: str, chunks: int, chunk_tokens: int, ratio: float, threads: int, rounds: int) -> None:
    """Measure, saying what runs; then a table and one line of JSON."""
    gguf = GgufModel(locate(model))
    try:
        cells = 2 * (chunks * (chunk_tokens + 1) + 64) + chunk_tokens
        engine = LlamaEngine(gguf, num_cells=cells, threads=threads)
        try:
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("blend", total=None)
                arms = measure_speed(
                    engine,
                    num_chunks=chunks,
                    chunk_tokens=chunk_tokens,
                    ratio=ratio,
                    rounds=rounds,
                    progress=lambda what: bar.update(task, description=what),
                )
        finally:
            engine.shutdown()
        print_speed(gguf.name, arms, Console())
    finally:
        gguf.close()
