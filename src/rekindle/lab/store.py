"""The store, measured: how fast blocks go in and come out of every tier, and what a look-up costs as the store grows.

What each figure is compared with, and why that is its limit, stands with those who measure it: `store_tiers`,
`store_lookups` and `store_engine`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rekindle.errors import InvalidRequest
from rekindle.lab.machine import Machine, this_machine
from rekindle.lab.redis_server import RedisServer, redis_server
from rekindle.lab.scratch import scratch_folder
from rekindle.lab.store_arms import BLOCK_TOKENS, Comparison, make_prompt
from rekindle.lab.store_engine import engine_arms
from rekindle.lab.store_lookups import MARKS, PROMPT_BLOCKS, Growth, measure_growth
from rekindle.lab.store_tiers import disk_arms, memory_arms, network_arms

# Bytes of a block of 64 tokens, KV in f16: ember 64 KB, Gemma 3 270M, TinyLlama 1.1B, Qwen3 0.6B.
PAYLOADS = (65_536, 1_179_648, 1_441_792, 7_340_032)
TIERS = ("memory", "disk", "network")

Progress = Callable[[str, int, int], None]  # what is measured, how much of it is done, of how much


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Blocks of one size, through all tiers."""

    payload_bytes: int
    num_blocks: int
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """What was measured."""

    machine: Machine
    rounds: int
    transfers: tuple[Transfers, ...]
    restore: Comparison | None  # memory to engine, with a real model
    growth: tuple[Growth, ...]
    skipped: tuple[str, ...]  # what could not be measured here, and why

    def as_json(self) -> str:
        """One line of JSON."""
        transfers = [
            {
                "payload_bytes": each.payload_bytes,
                "blocks": each.num_blocks,
                "results": [comparison.as_dict() for comparison in each.comparisons],
            }
            for each in self.transfers
        ]
        growth = [{name: round(value, 3) for name, value in asdict(each).items()} for each in self.growth]
        return json.dumps(
            {
                "experiment": "store",
                "rounds": self.rounds,
                "transfers": transfers,
                "restore": self.restore and self.restore.as_dict(),
                "lookups": growth,
                "prompt_blocks": PROMPT_BLOCKS,
                "skipped": self.skipped,
                "machine": asdict(self.machine),
            }
        )


def run_store(
    *,
    payloads: Sequence[int] = PAYLOADS,
    num_blocks: int = 64,
    tiers: Sequence[str] = TIERS,
    rounds: int = 5,
    marks: Sequence[int] = MARKS,
    folder: Path | None = None,
    model: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> StoreReport:
    """The whole experiment. Files are written in a new folder inside `folder`, the system's for temporary files by default.

    With `model` (`builtin`, a path, `hf:…`), restoring into the real engine is measured as well. Raises InvalidRequest.
    """
    if unknown := [tier for tier in tiers if tier not in TIERS]:
        raise InvalidRequest(f"expected tiers out of {', '.join(TIERS)}, got {unknown[0]!r}", param="tier")
    if min(num_blocks, rounds, *payloads) < 1:
        raise InvalidRequest("expected payloads, blocks and rounds of 1 or more", param="payloads")
    skipped: list[str] = []
    with scratch_folder(folder) as scratch, redis_server() if "network" in tiers else nullcontext() as server:
        restore = engine_arms(model, num_blocks, rounds) if model is not None else None
        if server is None and "network" in tiers:
            skipped.append("network: neither redis-server nor valkey-server is installed")
        transfers = []
        for index, size in enumerate(payloads):
            progress("payloads", index, len(payloads))
            with scratch_folder(scratch) as its_own:
                comparisons = list(_transfer(size, num_blocks, tiers, rounds, its_own, server))
            transfers.append(Transfers(payload_bytes=size, num_blocks=num_blocks, comparisons=tuple(comparisons)))
    growth = measure_growth(marks, lambda done, total: progress("look-ups", done, total)) if marks else []
    return StoreReport(
        machine=this_machine(),
        rounds=rounds,
        transfers=tuple(transfers),
        restore=restore,
        growth=tuple(growth),
        skipped=tuple(skipped),
    )


def _transfer(
    size: int, num_blocks: int, tiers: Sequence[str], rounds: int, folder: Path, server: RedisServer | None
) -> Iterator[Comparison]:
    prompt = make_prompt(num_blocks, size)
    if "memory" in tiers:
        yield from memory_arms(prompt, rounds)
    if "disk" in tiers:
        yield from disk_arms(prompt, rounds, folder)
    if server is not None:
        yield from network_arms(prompt, rounds, server)


def print_report(report: StoreReport, console: Console) -> None:
    """Tables for people, then one line of JSON."""
    for each in report.transfers:
        title = f"{each.num_blocks} blocks of {each.payload_bytes:,} bytes ({BLOCK_TOKENS} tokens each)"
        console.print(_transfer_table(title, each.comparisons))
    if report.restore is not None:
        console.print(_transfer_table("From memory into the engine", [report.restore]))
    if report.growth:
        console.print(_growth_table(report.growth))
    console.print(
        f"Medians of {report.rounds} rounds in which all arms of a comparison take turns; {report.machine.processor}, "
        f"{report.machine.cores} cores.\nThe first arm of each comparison is its limit: the same bytes without a store.",
        highlight=False,
    )
    for text in report.skipped:
        console.print(f"Not measured: {text}.", highlight=False, markup=False)
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)


def _transfer_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column("arm")
    for heading in ("GB/s", "ms", "of the limit"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        for index, timing in enumerate(comparison.timings):
            table.add_row(
                comparison.what if index == 0 else "",
                f"[bold]{timing.name}[/bold]" if timing.ours else timing.name,
                f"{comparison.rate(timing) / 1e9:.2f}",
                f"{1e3 * comparison.num_bytes / comparison.rate(timing):.2f}",
                f"{comparison.share(timing):.0%}" if index else "",
            )
        table.add_section()
    table.caption = "\n".join(f"{each.what}: {each.note}" for each in comparisons if each.note) or None
    return table


def _growth_table(growth: Sequence[Growth]) -> Table:
    title = f"Look-ups of prompts of {PROMPT_BLOCKS * BLOCK_TOKENS:,} tokens ({PROMPT_BLOCKS} blocks), in memory"
    table = Table(title=title, title_justify="left", caption_justify="left")
    headings = (
        "blocks",
        "look-up, us",
        "per second",
        "a miss",
        "comparing its bytes",
        "hashing its keys",
        "a bare dict",
    )
    for heading in (*headings, "insertion of a block", "of that hashing", "bytes a block"):
        table.add_column(heading, justify="right")
    for each in growth:
        table.add_row(
            f"{each.blocks:,}",
            f"{each.lookup_us:.1f}",
            f"{each.lookups_per_second:,.0f}",
            f"{each.miss_us:.1f}",
            f"{each.compare_us:.1f}",
            f"{each.hash_us:.0f}",
            f"{each.dict_us:.0f}",
            f"{each.insert_us:.2f}",
            f"{each.hash_us / PROMPT_BLOCKS:.2f}",
            f"{each.bytes_per_block:,.0f}",
        )
    table.caption = (
        "Times in microseconds. The limit is comparing; a look-up by keys would be hashing and the bare dict."
    )
    return table
