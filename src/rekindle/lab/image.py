"""Plots as files. Whether one can be written is checked before anything is measured for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_image(out: Path | None) -> None:
    """Raises InvalidRequest without matplotlib, or if no image can be written there; None is none that is wanted."""
    if out is None:
        return
    formats = _figure(1, 1).canvas.get_supported_filetypes()
    ending = out.suffix.removeprefix(".").lower()
    if ending and ending not in formats:
        raise InvalidRequest(
            f"{out}: expected the ending of an image ({', '.join(formats)}), got .{ending}", param="plot"
        )
    if not out.parent.is_dir():
        raise InvalidRequest(f"{out} can't be written: there is no folder {out.parent}", param="plot")
    if out.is_dir():
        raise InvalidRequest(f"{out} can't be written: it is a folder", param="plot")


@contextmanager
def image(out: Path, width: float, height: float) -> Iterator[Figure]:
    """To be drawn on, of so many inches; then it is written, and the name's ending tells its format.

    Raises InvalidRequest without matplotlib, or if it can't be written.
    """
    figure = _figure(width, height)
    yield figure
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{out} can't be written: {error}", param="plot") from None


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidRequest("plots need matplotlib: pip install 'rekindle[lab]'", param="plot") from None
    return Figure(figsize=(width, height), layout="constrained")
