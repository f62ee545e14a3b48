"""The store's measurements: both arms move the same bytes, shares are of the right arm, and what is missing is named."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import redis
from rich.console import Console
from tests.kv.redis_server import PROGRAM

from rekindle.errors import InvalidRequest
from rekindle.lab import redis_server as redis_module
from rekindle.lab.redis_server import redis_server
from rekindle.lab.store import StoreReport, print_report, run_store
from rekindle.lab.store_arms import Arm, Comparison, Timing, compare, make_prompt
from rekindle.lab.store_lookups import PROMPT_BLOCKS, measure_growth
from rekindle.lab.store_plot import plot_report
from rekindle.lab.store_tiers import drop_from_page_cache


def shown(report: StoreReport) -> str:
    text = StringIO()
    print_report(report, Console(file=text, width=160))
    return text.getvalue()


def test_all_tiers_are_measured_and_the_last_line_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "_BENCHMARK_BYTES", 1 << 24)
    report = run_store(payloads=(1_000, 70_000), num_blocks=4, rounds=1, marks=(128, 300), folder=tmp_path)
    assert list(tmp_path.iterdir()) == [], "what was written is removed"
    text = shown(report)
    facts = json.loads(text.splitlines()[-1])
    assert [each["payload_bytes"] for each in facts["transfers"]] == [1_000, 70_000]
    network = ["network put", "network get"] if PROGRAM else []
    for each in facts["transfers"]:
        names = [result["what"] for result in each["results"]]
        assert [name for name in names if name != "disk get, cold"] == [
            "memory put",
            "memory get",
            "disk put",
            "disk get, warm",
            *network,
        ]
        for result in each["results"]:
            assert result["bytes"] == 4 * each["payload_bytes"]
            assert not result["arms"][0]["ours"], "the first is what it is compared with"
            assert any(arm["ours"] for arm in result["arms"])
            assert all(arm["gb_per_second"] >= 0 and arm["shares"][0] >= 0 for arm in result["arms"])
    assert [each["blocks"] for each in facts["lookups"]] == [128, 384], "whole prompts"
    assert len(facts["skipped"]) == (0 if PROGRAM else 1)
    plot_report(report, tmp_path / "store.png")
    assert (tmp_path / "store.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_redis_server_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module.shutil, "which", lambda name: None)
    report = run_store(payloads=(100,), num_blocks=2, tiers=["network"], rounds=1, marks=(), folder=tmp_path)
    assert "Not measured: network: neither redis-server nor valkey-server is installed." in shown(report)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected tiers out of memory, disk, network, got 'tape'"):
        run_store(tiers=["tape"])
    with pytest.raises(InvalidRequest, match="payloads, blocks and rounds of 1 or more"):
        run_store(rounds=0)
    with pytest.raises(InvalidRequest, match="128 or more, got \\[5\\]"):
        measure_growth([5])


def test_restoring_into_the_engine_is_measured(tmp_path: Path) -> None:
    report = run_store(
        tiers=["memory"], payloads=(100,), num_blocks=3, rounds=1, marks=(), folder=tmp_path, model="builtin"
    )
    assert report.restore is not None
    assert report.restore.num_bytes > 3 * 64 * 1_000
    assert "match, place all blocks" in shown(report)


def test_arms_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    arms = [
        Arm("limit", lambda: calls.append("limit")),
        Arm("ours", lambda: calls.append("ours"), ours=True, prepare=lambda: calls.append("prepare")),
    ]
    comparison = compare("copy", 10, arms, rounds=2)
    assert calls == ["limit", "prepare", "ours"] * 3
    assert [len(timing.seconds) for timing in comparison.timings] == [2, 2]


def test_shares_are_medians_over_rounds() -> None:
    limit = Timing(name="limit", ours=False, seconds=(1.0, 2.0, 4.0))
    ours = Timing(name="ours", ours=True, seconds=(2.0, 2.0, 16.0))
    comparison = Comparison(what="copy", num_bytes=8, timings=(limit, ours))
    assert comparison.share(ours) == 0.5
    assert comparison.share(limit, of=1) == 2.0
    assert comparison.rate(ours) == 4.0


def test_prompts_are_the_same_for_the_same_seed() -> None:
    one, other, third = make_prompt(3, 50), make_prompt(3, 50), make_prompt(3, 50, seed=1)
    assert [block.key for block in one.blocks] == [block.key for block in other.blocks]
    assert one.data == other.data != third.data
    assert b"".join(bytes(block.payload) for block in one.blocks) == one.data


def test_growth_is_measured_at_every_mark() -> None:
    seen: list[tuple[int, int]] = []
    growth = measure_growth((1_000, 200), lambda done, total: seen.append((done, total)))
    assert [each.blocks for each in growth] == [2 * PROMPT_BLOCKS, 8 * PROMPT_BLOCKS]
    assert seen[-1] == (8 * PROMPT_BLOCKS, 1_000)
    for each in growth:
        assert min(each.lookup_us, each.miss_us, each.compare_us, each.hash_us, each.dict_us, each.insert_us) > 0
        assert each.lookups_per_second == 1e6 / each.lookup_us


def test_files_are_dropped_from_the_page_cache_as_far_as_the_system_will(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    assert 0.0 <= drop_from_page_cache([path]) <= 1.0
    assert path.read_bytes() == bytes(10_000)


@pytest.mark.skipif(PROGRAM is None, reason="neither redis-server nor valkey-server is installed")
def test_a_redis_server_lives_as_long_as_its_context() -> None:
    with redis_server() as server:
        assert server is not None
        with server.client() as client:
            assert client.ping()
    with server.client() as client, pytest.raises(redis.ConnectionError):
        client.ping()
