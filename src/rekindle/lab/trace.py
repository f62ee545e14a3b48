"""Replays a trace of requests against the store's eviction policies.

**The rules.** A store of so many blocks, empty at first; each line of the trace (`trace_file.py`) is a request. It hits the
stored blocks from its prompt's beginning to the first that is missing; then all of its blocks are stored, and victims go
until the capacity is kept. Three figures come of it:

- block hit rate: blocks hit, of all blocks asked for;
- token hit rate: tokens in them, of all tokens;
- saved prefill: what computing those tokens would have cost, of the cost of all, where computing a token at position p
  costs 1 + p / 16,384 (weights cost the same for every token, attention grows with the position; the two are equal at
  about that position in models of 1 to 8 billion parameters).

To the policies all blocks are equally large and costly, unless position is to be weighed. Nothing is fitted beforehand: a
policy that learns does so as it goes. The rates of the last two thirds alone stand beside those of the whole trace: by
then it has had the first third to learn from.

**Speed** is accesses of blocks per second of processor time of this process: look-up, policy and the replay's own loop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rekindle.errors import InvalidRequest, nearest
from rekindle.kv.policies import DEFAULT, POLICIES, make_policy
from rekindle.kv.policies.lru import LRU
from rekindle.kv.policy import Policy
from rekindle.lab.belady import belady
from rekindle.lab.trace_file import Trace, read_trace

BELADY = "belady"
CAPACITIES = (1_000, 2_000, 5_000, 10_000, 30_000)  # blocks
_EQUAL_COST_POSITION = 16_384  # where attention costs a token as much as the weights do

Progress = Callable[[int, int], None]  # requests done, of how many in all


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of what was asked for that was found in the store."""

    block_hit_rate: float
    token_hit_rate: float
    saved_prefill: float


@dataclass(frozen=True, kw_only=True)
class TraceResult:
    """One policy at one capacity."""

    capacity: int  # blocks
    policy: str
    whole: Rates
    judged: Rates  # over the last two thirds of the requests
    seconds: float  # of processor time


@dataclass(frozen=True, kw_only=True)
class TraceReport:
    """A table of policies and capacities."""

    trace: str
    requests: int
    accesses: int  # of blocks, per replay
    block_tokens: int
    unlimited: Rates  # with room for everything
    results: tuple[TraceResult, ...]

    @property
    def accesses_per_second(self) -> float:
        """Of the default policy, if it was replayed; otherwise of all online policies that were."""
        counted = [each for each in self.results if each.policy == DEFAULT]
        counted = counted or [each for each in self.results if each.policy != BELADY] or list(self.results)
        return self.accesses * len(counted) / max(sum(each.seconds for each in counted), 1e-9)

    def as_json(self) -> str:
        """One line of JSON."""
        results = []
        for each in self.results:
            row: dict[str, Any] = {"capacity": each.capacity, "policy": each.policy}
            row |= {name: round(value, 6) for name, value in vars(each.whole).items()}
            results.append(row | ({"default": True} if each.policy == DEFAULT else {}))
        return json.dumps(
            {"trace": self.trace, "results": results, "accesses_per_second": round(self.accesses_per_second)}
        )


def run_trace(
    file: Path,
    capacities: Sequence[int] = CAPACITIES,
    policies: Sequence[str] | None = None,
    *,
    weigh_position: bool = False,
    progress: Progress | None = None,
) -> TraceReport:
    """Replay a file against each policy (all, and Belady's optimum, unless named) at each capacity in blocks.

    Raises InvalidRequest for an unknown policy, a capacity below 1, and a file that is not a trace.
    """
    names = list(policies or [*POLICIES, BELADY])
    for name in names:
        if name not in POLICIES and name != BELADY:
            raise InvalidRequest(f"no policy is called {name!r}{nearest(name, [*POLICIES, BELADY])}", param="policy")
    if not capacities or min(capacities) < 1:
        raise InvalidRequest("capacities must be 1 block or more", param="capacity")
    trace = read_trace(file)
    num_requests = len(trace.chains)
    total = num_requests * len(capacities) * len(names)
    results: list[TraceResult] = []
    for capacity in capacities:
        for name in names:
            before = num_requests * len(results)

            def tick(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total)

            results.append(_measure(trace, capacity, name, weigh_position, tick))
    return TraceReport(
        trace=trace.name,
        requests=num_requests,
        accesses=trace.num_accesses,
        block_tokens=trace.block_tokens,
        unlimited=rates(trace, unlimited(trace)),
        results=tuple(results),
    )


def _measure(trace: Trace, capacity: int, name: str, weigh_position: bool, tick: Callable[[int], None]) -> TraceResult:
    began = time.process_time()  # clock on
    if name == BELADY:
        hits = belady(trace.chains, trace.num_blocks, capacity)
    else:
        hits = replay(trace, capacity, make_policy(name, capacity), weigh_position=weigh_position, tick=tick)
    seconds = time.process_time() - began  # clock off
    tick(len(trace.chains))
    judged = rates(trace, hits, start=len(trace.chains) // 3)
    return TraceResult(capacity=capacity, policy=name, whole=rates(trace, hits), judged=judged, seconds=seconds)


def replay(
    trace: Trace,
    capacity: int,
    policy: Policy[int],
    *,
    weigh_position: bool = False,
    tick: Callable[[int], None] | None = None,
) -> list[int]:
    """Blocks hit by each request, from its prompt's beginning."""
    longest = max(map(len, trace.chains))
    sizes = [1] * longest
    costs = [1.0] * longest
    if weigh_position:
        ends = [prefill_cost(depth * trace.block_tokens) for depth in range(longest + 1)]
        costs = [(after - before) / trace.block_tokens for before, after in pairwise(ends)]
    stored = bytearray(trace.num_blocks)
    num_stored = 0
    hits = []
    for index, chain in enumerate(trace.chains):
        found, length = 0, len(chain)
        while found < length and stored[chain[found]]:
            found += 1
        hits.append(found)
        if found:
            policy.hit(chain[:found])
        if found < length:
            policy.insert(chain, sizes[:length], costs[:length])
            for block in chain[found:]:
                stored[block] = 1
            num_stored += length - found
            while num_stored > capacity:
                victim = policy.evict()
                assert victim is not None
                stored[victim] = 0
                num_stored -= 1
        if tick is not None and not index % 512:
            tick(index)
    return hits


def unlimited(trace: Trace) -> list[int]:
    """Blocks hit by each request, if nothing is ever evicted."""
    known = 0  # blocks; they are numbered in the order of their first appearance
    hits = []
    for chain in trace.chains:
        hits.append(sum(block < known for block in chain))
        known += len(chain) - hits[-1]
    return hits


def prefill_cost(num_tokens: int) -> float:
    """Of computing a prompt's first tokens, in units of the first one's cost."""
    return num_tokens + num_tokens**2 / (2 * _EQUAL_COST_POSITION)


def rates(trace: Trace, hits: Sequence[int], *, start: int = 0) -> Rates:
    """Over the requests from `start` on."""
    lengths = trace.lengths[start:]
    found = [min(hit * trace.block_tokens, length) for hit, length in zip(hits[start:], lengths, strict=True)]
    return Rates(
        block_hit_rate=_share(sum(hits[start:]), sum(map(len, trace.chains[start:]))),
        token_hit_rate=_share(sum(found), sum(lengths)),
        saved_prefill=_share(sum(map(prefill_cost, found)), sum(map(prefill_cost, lengths))),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def print_report(report: TraceReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    table = Table(title=f"{report.trace}: share found in the store, by capacity and policy", title_justify="left")
    table.add_column("blocks", justify="right")
    table.add_column("policy")
    for heading in ("block hits", "of LRU's", "token hits", "saved prefill", "block hits, last two thirds", "of LRU's"):
        table.add_column(heading, justify="right")
    lru = {each.capacity: each for each in report.results if each.policy == LRU.name}
    previous = None
    for each in report.results:
        if previous not in (None, each.capacity):
            table.add_section()
        yardstick = lru.get(each.capacity)
        table.add_row(
            f"{each.capacity:,}" if previous != each.capacity else "",
            f"{each.policy} (default)" if each.policy == DEFAULT else each.policy,
            f"{each.whole.block_hit_rate:.3f}",
            _times(each.whole, yardstick.whole if yardstick else None),
            f"{each.whole.token_hit_rate:.3f}",
            f"{each.whole.saved_prefill:.3f}",
            f"{each.judged.block_hit_rate:.3f}",
            _times(each.judged, yardstick.judged if yardstick else None),
        )
        previous = each.capacity
    console.print(table)
    most = report.unlimited
    console.print(
        f"{report.requests:,} requests, {report.accesses:,} blocks of {report.block_tokens} tokens. With room for "
        f"everything: block hits {most.block_hit_rate:.3f}, token hits {most.token_hit_rate:.3f}, saved prefill "
        f"{most.saved_prefill:.3f}.\nA token at position p is taken to cost 1 + p / {_EQUAL_COST_POSITION:,}. Belady's "
        f"optimum knows the future. {report.accesses_per_second:,.0f} accesses per second.",
        highlight=False,
    )
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)


def _times(rates: Rates, yardstick: Rates | None) -> str:
    if yardstick is None or not yardstick.block_hit_rate:
        return ""
    return f"{rates.block_hit_rate / yardstick.block_hit_rate:.2f}×"
