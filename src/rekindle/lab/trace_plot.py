"""A plot of a trace's replays: block hit rate over capacity, a line per policy."""

from __future__ import annotations

from pathlib import Path

from rekindle.kv.policies import DEFAULT
from rekindle.lab.image import image
from rekindle.lab.trace import TraceReport


def plot_report(report: TraceReport, out: Path) -> None:
    """Write an image. Raises InvalidRequest without matplotlib, or if it can't."""
    with image(out, 8, 5) as figure:
        axes = figure.add_subplot(
            xscale="log",
            xlabel="capacity, blocks",
            ylabel="block hit rate",
            title=f"{report.trace}: {report.requests:,} requests",
        )
        for name in dict.fromkeys(each.policy for each in report.results):
            points = sorted(
                (each.capacity, each.whole.block_hit_rate) for each in report.results if each.policy == name
            )
            width = 2.5 if name == DEFAULT else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=width, label=name)
        axes.axhline(report.unlimited.block_hit_rate, color="grey", linestyle=":", label="room for everything")
        capacities = sorted({each.capacity for each in report.results})
        axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
