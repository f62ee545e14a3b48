"""A plot of the store: how fast blocks move through each tier, and what a look-up takes as the store grows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.lab.image import image
from rekindle.lab.store import StoreReport
from rekindle.lab.store_lookups import PROMPT_BLOCKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_report(report: StoreReport, out: Path) -> None:
    """Write an image. Raises InvalidRequest without matplotlib, or if it can't."""
    with image(out, 13, 5) as figure:
        left, right = figure.subplots(1, 2)
        _plot_transfers(report, left)
        _plot_growth(report, right)


def _plot_transfers(report: StoreReport, axes: Axes) -> None:
    """Our best arm of each comparison over the block's size, and its limit in the same colour."""
    axes.set(
        xscale="log", yscale="log", xlabel="bytes of a block of 64 tokens", ylabel="GB/s", title="Blocks in and out"
    )
    names = dict.fromkeys(comparison.what for each in report.transfers for comparison in each.comparisons)
    for number, name in enumerate(names):
        points = [
            (each.payload_bytes, comparison)
            for each in report.transfers
            for comparison in each.comparisons
            if comparison.what == name
        ]
        sizes = [size for size, _ in points]
        ours = [max(each.rate(timing) for timing in each.timings if timing.ours) / 1e9 for _, each in points]
        limits = [each.rate(each.timings[0]) / 1e9 for _, each in points]
        axes.plot(sizes, ours, marker="o", markersize=4, color=f"C{number}", label=name)
        axes.plot(sizes, limits, linestyle=":", color=f"C{number}")
    axes.plot([], [], linestyle=":", color="grey", label="its limit: the same bytes without a store")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plot_growth(report: StoreReport, axes: Axes) -> None:
    axes.set(
        xscale="log", xlabel="blocks in the store", ylabel="microseconds", title=f"Look-up of {PROMPT_BLOCKS} blocks"
    )
    sizes = [each.blocks for each in report.growth]
    lines = {
        "look-up": [each.lookup_us for each in report.growth],
        "its limit: comparing its bytes": [each.compare_us for each in report.growth],
        "by keys: hashing and a bare dict": [each.hash_us + each.dict_us for each in report.growth],
        f"insertion of {PROMPT_BLOCKS} blocks": [each.insert_us * PROMPT_BLOCKS for each in report.growth],
    }
    for name, times in lines.items():
        axes.plot(sizes, times, marker="o", markersize=4, label=name)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
