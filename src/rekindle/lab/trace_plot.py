"""A plot of a trace's replays: block hit rate over capacity, a line per policy."""

from __future__ import annotations

from pathlib import Path

from rekindle.errors import InvalidRequest
from rekindle.kv.policies import DEFAULT
from rekindle.lab.trace import TraceReport


def plot_report(report: TraceReport, out: Path) -> None:
    """Write an image; the name's ending tells its format. Raises InvalidRequest without matplotlib, or if it can't."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidRequest("plots need matplotlib: pip install 'rekindle[lab]'", param="plot") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log",
        xlabel="capacity, blocks",
        ylabel="block hit rate",
        title=f"{report.trace}: {report.requests:,} requests",
    )
    for name in dict.fromkeys(each.policy for each in report.results):
        points = sorted((each.capacity, each.whole.block_hit_rate) for each in report.results if each.policy == name)
        width = 2.5 if name == DEFAULT else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=width, label=name)
    axes.axhline(report.unlimited.block_hit_rate, color="grey", linestyle=":", label="room for everything")
    capacities = sorted({each.capacity for each in report.results})
    axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{out} can't be written: {error}", param="plot") from None
