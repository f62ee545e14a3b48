"""`rekindle lab blend`: what it shows while it works, and whether its gate held."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from rekindle.errors import InvalidRequest
from rekindle.lab.blend import GATE_BUDGET, RATIOS, run_blend
from rekindle.lab.blend_peer import measure_peer
from rekindle.lab.blend_show import plot_report, print_report, print_speed
from rekindle.lab.blend_speed import Texts, measure_speed, speed_settings
from rekindle.lab.image import check_image
from rekindle.serve.service import Service

_COLUMNS = 120  # which the tables need


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
    """Ask, with a progress bar; then the table, one line of JSON, and the plot if one is wanted. False below the gate."""
    check_image(plot)
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
    print_report(report, _console())
    if plot is not None:
        plot_report(report, plot)
    if gate is None:
        return True
    best, told = report.best, Console(stderr=True, highlight=False, soft_wrap=True)
    if not any(arm.exact_match for arm in report.arms if arm.select == "full"):
        told.print(
            f"gate {gate}: full prefill answers none of the {report.questions} questions right, so there is nothing to "
            "keep; ask what this model can answer"
        )
        return False
    told.print(
        f"gate {gate}: the best arm of at most {GATE_BUDGET:.0%} is {best.select} at {best.ratio:.0%}, "
        f"with {best.exact_match_of_full:.3f} of full prefill's exact match"
    )
    return best.exact_match_of_full >= gate


def measure_time(
    model: str,
    engine: str,
    chunks: int,
    chunk_tokens: int,
    ratio: float,
    threads: int,
    rounds: int,
    seed: int,
    peer: str | None,
) -> None:
    """Measure, saying what runs; then a table and one line of JSON."""
    if peer is not None and engine == "torch":
        raise InvalidRequest(f"{peer} reads GGUF files; leave out --peer, or --engine torch", param="peer")
    with (
        tempfile.TemporaryDirectory(prefix="rekindle-blend-") as folder,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("loading", total=None)

        def tell(what: str) -> None:
            bar.update(task, description=what)

        settings = speed_settings(model, engine, threads, chunks, chunk_tokens, Path(folder))
        wish = {"num_chunks": chunks, "chunk_tokens": chunk_tokens, "seed": seed}
        with Service.open(settings) as service:
            report = measure_speed(service, **wish, ratio=ratio, rounds=rounds, tell=tell)
            texts = Texts.draw(service.model.tokenizer, **wish)
            path, context = service.model.path, service.num_cells
        if peer is not None:
            sizes = {"threads": threads, "context": context, "rounds": rounds, "seed": seed}
            arms, note = measure_peer(path, texts, peer=peer, ratio=ratio, tell=tell, **sizes)
            report = replace(report, peer=arms, peer_note=note)
    print_speed(report, _console())


def _console() -> Console:
    """Wide enough for the tables, also where they go into a file."""
    return Console(width=max(_COLUMNS, shutil.get_terminal_size().columns))
