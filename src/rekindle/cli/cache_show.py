"""How `rekindle cache` writes numbers, times and tables for people."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from rekindle.serve.durations import in_words

PIPE_COLUMNS = 160  # of a line that goes to a pipe


def console() -> Console:
    """For stdout; a pipe has long lines."""
    columns = None if os.environ.get("COLUMNS") or os.isatty(1) else PIPE_COLUMNS
    return Console(width=columns or shutil.get_terminal_size().columns, highlight=False)


def size(num_bytes: float) -> str:
    """1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def ago(moment: float | None) -> str:
    """How long a moment is gone, or will be."""
    if moment is None:
        return ""
    passed = time.time() - moment
    return f"{in_words(passed)} ago" if passed >= 0 else f"in {in_words(-passed)}"


def until(moment: float | None) -> str:
    """The end of a pin: a time today, a date later."""
    if moment is None:
        return ""
    end = datetime.fromtimestamp(moment)
    return end.strftime("%H:%M" if moment - time.time() < 20 * 3600 else "%Y-%m-%d %H:%M")


def facts(pairs: Sequence[tuple[str, str]]) -> Table:
    """Names and values."""
    table = Table(show_header=False, box=None)
    for name, value in pairs:
        table.add_row(name, value)
    return table


def words(row: Mapping[str, Any]) -> str:
    """How a prompt begins, or its token ids if no tokenizer is at hand."""
    if row["text"] is not None:
        begins = str(row["text"]) or "(no text)"
        return begins if row["whole"] else f"… {begins}"
    return "tokens " + " ".join(map(str, row["first_tokens"])) + " …"


def rows(table: Table, out: Console) -> None:
    """Print a table; each row is one line, and text at its end is cut where the terminal ends."""
    for column in table.columns:
        column.no_wrap = True
    if table.columns[-1].justify == "left":
        table.columns[-1].ratio = 1
        table.columns[-1].overflow = "ellipsis"
        table.expand = True
    out.print(table)
