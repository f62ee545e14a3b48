"""A plot of a load test: how TTFT and ITL are spread, and how many prompt tokens were computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.lab.image import image
from rekindle.lab.load.run import LoadReport

_FEW_DECADES = 1_000  # as a factor


def plot_report(report: LoadReport, out: Path) -> None:
    """Write an image. Raises InvalidRequest without matplotlib, or if it can't."""
    with image(out, 12, 4) as figure:
        ttft, itl, tokens = figure.subplots(1, 3)
        servers = list(dict.fromkeys(run.server for run in report.runs))
        for server in servers:
            answers = [answer for run in report.runs if run.server == server for answer in run.whole]
            _spread(ttft, [1e3 * answer.ttft for answer in answers if answer.ttft is not None], server)
            _spread(itl, [1e3 * gap for answer in answers for gap in answer.gaps], server)
        for axes, name in ((ttft, "TTFT"), (itl, "ITL")):
            axes.set(xscale="log", xlabel=f"{name}, ms", ylabel="share of them at most this", ylim=(0, 1.02))
            label_times(axes)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend()
        _bars(tokens, report, servers)
        figure.suptitle(f"{report.wish.workload}, {report.setup.model.name if report.setup else report.wish.url}")


def _spread(axes: Any, values: Sequence[float], label: str) -> None:
    """The cumulative distribution, as steps. Values of 0 (pieces that came in one packet) have no place on a log axis."""
    ordered = np.sort([value for value in values if value > 0])
    if len(ordered):
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=label)


def label_times(axes: Any) -> None:
    """Plain numbers on a log x axis: at 1, 2 and 5 of each decade, or where there are many decades at 1."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _FEW_DECADES * low else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(axes: Any, report: LoadReport, servers: Sequence[str]) -> None:
    bottom = [0.0] * len(servers)
    for kind, colour in (("computed_tokens", "tab:red"), ("cached_tokens", "tab:green")):
        heights = []
        for server in servers:
            known = [getattr(run, kind) for run in report.runs if run.server == server]
            heights.append(float(np.mean([value or 0 for value in known])))
        axes.bar(servers, heights, bottom=bottom, label=kind.removesuffix("_tokens"), color=colour, width=0.5)
        bottom = heights
    axes.set(ylabel="prompt tokens per round")
    axes.margins(y=0.2)  # for the legend
    axes.legend(ncols=2, loc="upper center")
