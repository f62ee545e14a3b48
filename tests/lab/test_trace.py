"""Replays of traces: the figures are right, Belady bounds them, and what is not a trace is refused with file and line."""

from __future__ import annotations

import json
import sys
from io import StringIO
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rekindle.errors import InvalidRequest
from rekindle.kv.policies import DEFAULT, POLICIES, make_policy
from rekindle.lab.belady import belady
from rekindle.lab.trace import Rates, prefill_cost, print_report, rates, replay, run_trace, unlimited
from rekindle.lab.trace_file import make_trace, read_trace
from rekindle.lab.trace_plot import plot_report
from rekindle.lab.workloads import WORKLOADS, make_workload

LINES = [
    {"timestamp": 0, "input_length": 1_100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1, "input_length": 1_024, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 2, "input_length": 1_400, "output_length": 5, "hash_ids": [0, 1, 3]},
]


def write(folder: Path, lines: list[str]) -> Path:
    file = folder / "small.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path, [json.dumps(line) for line in LINES])


def best_possible(chains: list[list[int]], capacity: int) -> int:
    """Most blocks that any policy can hit, by trying all sets of blocks that may be kept."""

    def legal(blocks: frozenset[int], parents: dict[int, int]) -> bool:
        return all(parents[block] in blocks or parents[block] < 0 for block in blocks)

    parents = {block: (chain[i - 1] if i else -1) for chain in chains for i, block in enumerate(chain)}
    states = {frozenset[int](): 0}
    for chain in chains:
        after: dict[frozenset[int], int] = {}
        for stored, hits in states.items():
            found = next((i for i, block in enumerate(chain) if block not in stored), len(chain))
            everything = sorted(stored | set(chain))
            for kept in combinations(everything, min(capacity, len(everything))):
                state = frozenset(kept)
                if legal(state, parents):
                    after[state] = max(after.get(state, 0), hits + found)
        states = after
    return max(states.values())


tiny = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(requests=tiny, capacity=st.integers(1, 5))
def test_belady_is_the_best_possible(requests: list[list[int]], capacity: int) -> None:
    trace = make_trace("tiny", [(ids, None) for ids in requests])
    assert sum(belady(trace.chains, trace.num_blocks, capacity)) == best_possible(trace.chains, capacity)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=10), min_size=1, max_size=80),
    capacity=st.integers(1, 60),
)
@pytest.mark.parametrize("name", POLICIES)
def test_belady_bounds_every_policy(name: str, requests: list[list[int]], capacity: int) -> None:
    trace = make_trace("random", [(ids, None) for ids in requests])
    hits = sum(replay(trace, capacity, make_policy(name, capacity)))
    assert hits <= sum(belady(trace.chains, trace.num_blocks, capacity)) <= sum(unlimited(trace))


@pytest.mark.parametrize("name", WORKLOADS)
def test_room_for_everything(name: str) -> None:
    trace = make_workload(name, 300)
    assert 290 <= len(trace.chains) <= 300
    most = unlimited(trace)
    assert belady(trace.chains, trace.num_blocks, trace.num_blocks) == most
    for policy in POLICIES:
        assert replay(trace, trace.num_blocks, make_policy(policy, trace.num_blocks)) == most
    assert make_workload(name, 300).chains == trace.chains, "not the same every time"


def test_equal_ids_after_other_beginnings_are_other_blocks() -> None:
    trace = make_trace("odd", [([1, 2, 2], None), ([2, 2], None), ([1, 2], None)])
    assert trace.chains == [[0, 1, 2], [3, 4], [0, 1]]


def test_rates_by_hand(small: Path) -> None:
    trace = read_trace(small)
    assert (trace.name, trace.block_tokens, trace.lengths) == ("small", 512, [1_100, 1_024, 1_400])
    hits = unlimited(trace)
    assert hits == [0, 2, 2]
    measured = rates(trace, hits)
    assert measured.block_hit_rate == 4 / 8
    assert measured.token_hit_rate == 2_048 / 3_524
    whole = prefill_cost(1_100) + prefill_cost(1_024) + prefill_cost(1_400)
    assert measured.saved_prefill == pytest.approx(2 * prefill_cost(1_024) / whole)
    assert prefill_cost(16_384) == 1.5 * 16_384


def test_a_full_hit_of_a_partial_block_counts_its_tokens() -> None:
    trace = make_trace("same", [([1, 2], 700), ([1, 2], 700)])
    assert rates(trace, unlimited(trace), start=1) == Rates(block_hit_rate=1, token_hit_rate=1, saved_prefill=1)


@pytest.mark.parametrize("size", [16, 64, 512, 1_024])
def test_the_block_size_is_found(size: int) -> None:
    lengths = [size * 3 + 5, size * 7, size * 20 + size // 2, size * 11 + 1]
    requests = [(list(range(-(-length // size))), length) for length in lengths]
    assert make_trace("sizes", requests).block_tokens == size


def test_the_report(small: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = run_trace(small, [1, 10], progress=lambda done, total: seen.append((done, total)))
    out = StringIO()
    print_report(report, Console(file=out, width=200))
    *_, last = out.getvalue().splitlines()
    line = json.loads(last)
    assert line.keys() == {"trace", "results", "accesses_per_second"}
    assert line["trace"] == "small" and line["accesses_per_second"] > 0
    names = [*POLICIES, "belady"]
    assert [(row["capacity"], row["policy"]) for row in line["results"]] == [(c, n) for c in (1, 10) for n in names]
    for row in line["results"]:
        rest = row.keys() - {"capacity", "policy", "block_hit_rate", "token_hit_rate", "saved_prefill"}
        assert rest == ({"default"} if row["policy"] == DEFAULT else set())
        assert row["block_hit_rate"] == (0.5 if row["capacity"] == 10 else 0.25)
    assert seen[-1] == (24, 24) and seen == sorted(seen)
    assert "room for everything" in out.getvalue()


def test_policies_can_be_chosen(small: Path) -> None:
    report = run_trace(small, [2], ["lru", "belady"], weigh_position=True)
    assert [each.policy for each in report.results] == ["lru", "belady"]
    assert report.accesses_per_second > 0


def test_a_plot(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_report(run_trace(small, [1, 10]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidRequest, match="can't be written"):
        plot_report(run_trace(small, [1]), tmp_path / "nowhere" / "plot.png")


def test_a_plot_without_matplotlib(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequest, match=r"rekindle\[lab\]"):
        plot_report(run_trace(small, [1]), tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[1, 2]", "line 2: expected a JSON object"),
        ('{"input_length": 3}', "line 2: expected hash_ids to be a list"),
        ('{"hash_ids": 7}', "line 2: expected hash_ids to be a list"),
        ('{"hash_ids": [1, null]}', "line 2: expected hash_ids to be a list"),
        ('{"hash_ids": [1], "input_length": -3}', "line 2: expected input_length"),
        ('{"hash_ids": [1], "input_length": "many"}', "line 2: expected input_length"),
        ("[" * 100_000, "line 2: expected a JSON object"),
    ],
)
def test_lines_that_are_no_requests(tmp_path: Path, line: str, complaint: str) -> None:
    file = write(tmp_path, [json.dumps(LINES[0]), line, json.dumps(LINES[1])])
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        run_trace(file)
    assert str(file) in str(refusal.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="can't be read"):
        run_trace(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="got no text"):
        run_trace(tmp_path / "binary")
    with pytest.raises(InvalidRequest, match="no requests"):
        run_trace(write(tmp_path, ["", '{"hash_ids": []}']))


def test_refusals(small: Path) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'gdsf'"):
        run_trace(small, [10], ["gdfs"])
    with pytest.raises(InvalidRequest, match="1 block or more"):
        run_trace(small, [0])
