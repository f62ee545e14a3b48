"""`rekindle lab model`, `trace`, `store`, `restart`, `live` and `load`: what they show while they work."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from rekindle.errors import InvalidRequest
from rekindle.lab.image import check_image
from rekindle.lab.live_run import PARTS, run_live
from rekindle.lab.live_run import print_report as print_live_report
from rekindle.lab.live_ttft import make_plan
from rekindle.lab.load.run import Wish, make_setup, run_load, sizes_for
from rekindle.lab.load.show import print_report as print_load_report
from rekindle.lab.models import make_model
from rekindle.lab.restart import print_report as print_restart_report
from rekindle.lab.restart import run_restart
from rekindle.lab.shapes import shape_named
from rekindle.lab.store import PAYLOADS, TIERS, run_store
from rekindle.lab.store import print_report as print_store_report
from rekindle.lab.store_lookups import MARKS
from rekindle.lab.trace import CAPACITIES, print_report, run_trace

_COLUMNS = 144  # which the tables of figures need; a narrower terminal wraps their lines and cuts no figure


def _wide() -> Console:
    return Console(width=max(_COLUMNS, shutil.get_terminal_size().columns))


def write_model(shape: str, quant: str, out: Path, seed: int, context: int | None) -> None:
    """Write the file and say what it is."""
    chosen = shape_named(shape)
    if context is not None:
        chosen = replace(chosen, context=context)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{shape} {quant}", total=None)
        report = make_model(
            chosen, quant, out, seed=seed, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    Console().print(
        f"{report.path}: {report.arch}, {report.parameters:,} parameters in {report.quant}, "
        f"{report.bytes / 1e6:,.1f} MB, vocabulary of {report.vocabulary:,}, seed {report.seed}, "
        f"written in {report.seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def write_folder(shape: str, dtype: str, out: Path, seed: int, context: int | None) -> None:
    """Write the folder and say what it is. Raises InvalidRequest without the torch extra."""
    try:
        from rekindle.lab.torch_folder import make_folder
    except ImportError:
        raise InvalidRequest("a folder of safetensors needs PyTorch: pip install 'rekindle[torch]'") from None
    report = make_folder(shape, dtype, out, seed=seed, context=context)
    Console().print(
        f"{report.path}: {report.arch}, {report.parameters:,} parameters in {dtype}, {report.bytes / 1e6:,.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def replay_trace(file: Path, capacities: list[int] | None, policies: list[str] | None, plot: Path | None) -> None:
    """Replay, with a progress bar; then the table and one line of JSON, and the plot if one is wanted."""
    check_image(plot)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(file.name, total=None)
        report = run_trace(
            file,
            capacities or CAPACITIES,
            policies or None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_report(report, _wide())
    if plot is not None:
        from rekindle.lab.trace_plot import plot_report

        plot_report(report, plot)


def measure_store(
    payloads: list[int] | None,
    num_blocks: int,
    tiers: list[str] | None,
    sizes: list[int] | None,
    rounds: int,
    folder: Path | None,
    model: str | None,
    plot: Path | None,
) -> None:
    """Measure, with a progress bar; then tables and one line of JSON, and the plot if one is wanted."""
    check_image(plot)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("store", total=None)
        report = run_store(
            payloads=payloads or PAYLOADS,
            num_blocks=num_blocks,
            tiers=tiers or TIERS,
            rounds=rounds,
            marks=MARKS if sizes is None else [size for size in sizes if size],
            folder=folder,
            model=model,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    print_store_report(report, _wide())
    if plot is not None:
        from rekindle.lab.store_plot import plot_report

        plot_report(report, plot)


def measure_restart(model: str, prompt_tokens: int, prompts: int, threads: int | None, folder: Path | None) -> None:
    """Measure, saying which server is asked; then a table and one line of JSON."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("restart", total=None)
        report = run_restart(
            model,
            prompt_tokens=prompt_tokens,
            prompts=prompts,
            threads=threads,
            folder=folder,
            progress=lambda what: bar.update(task, description=what),
        )
    print_restart_report(report, _wide())


def measure_live(
    model: str,
    parts: list[str] | None,
    sizes: dict[str, Any],
    *,
    turns: int,
    window: int,
    kv_types: list[str] | None,
    threads: int | None,
) -> None:
    """Measure, with a progress bar; then tables and one line of JSON. `sizes` are those of the part ttft."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("live", total=None)
        report = run_live(
            make_plan(model, threads=threads, **sizes),
            parts or PARTS,
            turns=turns,
            window=window,
            kv_types=kv_types or ("f16",),
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    print_live_report(report, _wide())


def load_test(
    url: str | None,
    workload: str | None,
    sizes: dict[str, Any],
    *,
    started: dict[str, Any],
    peer_options: list[str] | None,
    rounds: int | None,
    plot: Path | None,
    **wishes: Any,
) -> bool:
    """Run it, with a progress bar; then tables and one line of JSON, and the plot if one is wanted.

    `sizes` are the workload's, None for its own defaults; `started` is what servers get that are started here. False if
    no request was answered.
    """
    check_image(plot)
    name = workload or ("trace" if sizes["trace"] else "chat")
    wish = Wish(
        workload=name,
        sizes=sizes_for(name, sizes),
        url=url,
        rounds=rounds or (2 if wishes["peer"] else 1),
        **wishes,
    )
    if peer_options and wish.peer is None:
        raise InvalidRequest("--peer-option is for a peer: name one with --peer", param="peer_option")
    setup = None
    if url is None or wish.peer is not None:
        setup = make_setup(name, wish.sizes, options=_options(peer_options or []), **started)
    # whoever ends this ends the servers that it started too, as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {what}", completed=done, total=total)

        report = run_load(wish, setup, show)
    print_load_report(report, _wide())
    if plot is not None:
        from rekindle.lab.load.plot import plot_report

        plot_report(report, plot)
    return any(run.whole for run in report.runs)


def _options(texts: list[str]) -> dict[str, Any]:
    """`name=value` of the peer; values are JSON where they can be."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InvalidRequest(f"peer option: expected name=value, got {text!r}", param="peer_option")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
