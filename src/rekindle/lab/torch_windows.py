"""What sliding windows give up in the torch engine's pool and payloads, counted: `rekindle lab windows SHAPE`.

A layer with a window of W tokens needs, for the next token of a sequence, the KV of W - 1 tokens and no more; a layer
without one needs all. So no program that goes on with a sequence holds less than

    Σ layers  bytes of a token's K and V x min(tokens, W - 1)      or x tokens, where there is no window.

The engine holds everything as long as there is room, because then a later prompt can turn off at any token. The table shows
what a sequence holds before and after it was released, what its payloads weigh then, and the processor time of placing it
from blocks, whole and as far as its end can see. Bytes are counted from cells and payloads; KV is noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from rekindle.engine.torch.engine import TorchEngine
from rekindle.lab.machine import Machine, this_machine
from rekindle.lab.torch_gpu import bytes_seen, noise_blocks
from rekindle.lab.torch_models import real_model

TOKENS = (512, 1024, 4096, 8192)
_PIECE = 256  # tokens of an exported piece
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Held:
    """One sequence of so many tokens; sizes in bytes."""

    tokens: int
    whole: int  # in the pool, all kept
    released: int  # in the pool, after `release` at its end
    needed: int  # what the next token sees: the limit
    payloads: int  # of the released sequence, as it would be swapped out
    place_ms: float  # processor time of placing its blocks whole
    place_until_ms: float  # and for what its end sees


@dataclass(frozen=True, kw_only=True)
class WindowsReport:
    """What was counted."""

    machine: Machine
    shape: str
    layers: int
    windowed: int  # layers
    window: int  # tokens
    groups: int  # that share cells
    bytes_per_token: int  # of all layers
    sequences: tuple[Held, ...]

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"experiment": "windows"} | asdict(self))


def run_windows(shape: str, tokens: Sequence[int] = TOKENS) -> WindowsReport:
    """On a shape of `lab/shapes.py`, bfloat16. Raises InvalidRequest."""
    model = real_model(shape, torch.bfloat16)
    return count_windows(TorchEngine(model, num_cells=max(tokens), weights=bytes(16)), shape, tokens)


def count_windows(engine: TorchEngine, name: str, tokens: Sequence[int]) -> WindowsReport:
    """On an engine that has cells for the longest."""
    groups = engine.groups
    return WindowsReport(
        machine=this_machine(),
        shape=name,
        layers=len(groups.of),
        windowed=len(engine.layout.windowed),
        window=groups.window,
        groups=groups.count,
        bytes_per_token=engine.spec.kv_bytes_per_token,
        sequences=tuple(_count(engine, length) for length in tokens),
    )


def _count(engine: TorchEngine, length: int) -> Held:
    blocks = noise_blocks(engine, length)
    seq = engine.open()
    engine.place_all(seq, blocks)
    whole = engine.num_held([seq]) * engine.bytes_per_cell
    engine.release(seq, length)
    released = engine.num_held([seq]) * engine.bytes_per_cell
    pieces = [engine.export(seq, start, min(start + _PIECE, length)) for start in range(0, length, _PIECE)]
    engine.close(seq)
    return Held(
        tokens=length,
        whole=whole,
        released=released,
        needed=bytes_seen(engine, length),
        payloads=sum(piece.data.nbytes for piece in pieces),
        place_ms=_place_ms(engine, lambda new: engine.place_all(new, blocks)),
        place_until_ms=_place_ms(engine, lambda new: engine.place_all(new, blocks, until=length)),
    )


def _place_ms(engine: TorchEngine, place: Callable[[int], None]) -> float:
    times = []
    for _ in range(1 + _ROUNDS):
        seq = engine.open()
        began = time.process_time()  # clock on: blocks lie in memory
        place(seq)
        times.append((time.process_time() - began) * 1000)  # clock off: the sequence can go on
        engine.close(seq)
    return median(times[1:])  # the first touched the pool's memory


def print_report(report: WindowsReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    title = f"{report.shape}, bfloat16: {report.windowed} of {report.layers} layers see {report.window} tokens"
    table = Table(title=f"{title}; {report.groups} groups of cells", title_justify="left")
    table.add_column("tokens", justify="right")
    for heading in ("all kept", "released", "limit", "KB a token", "payloads then", "placed", "placed for its end"):
        table.add_column(heading, justify="right")
    for each in report.sequences:
        sizes = [f"{size / 1e6:.1f} MB" for size in (each.whole, each.released, each.needed)]
        a_token = f"{each.whole / each.tokens / 1e3:.1f} → {each.released / each.tokens / 1e3:.1f}"
        times = [f"{each.place_ms:.1f} ms", f"{each.place_until_ms:.1f} ms"]
        table.add_row(str(each.tokens), *sizes, a_token, f"{each.payloads / 1e6:.1f} MB", *times)
    console.print(table)
    console.print("Times are processor time of placing blocks of 64 tokens from memory.", highlight=False)
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)
