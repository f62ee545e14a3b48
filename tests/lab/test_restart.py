"""The restart measurement: real servers, each prompt restored whole, and a computed token is a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tests.kv.redis_server import PROGRAM

from rekindle.lab import restart
from rekindle.lab.restart import Arm, NotRestored, RestartReport, print_report, run_restart


def test_after_the_cold_server_nobody_computes_a_token(tmp_path: Path) -> None:
    said: list[str] = []
    report = run_restart("builtin", prompt_tokens=300, prompts=1, threads=1, folder=tmp_path, progress=said.append)
    text = StringIO()
    print_report(report, Console(file=text, width=160))
    facts = json.loads(text.getvalue().splitlines()[-1])
    cold, *warm = facts["arms"]
    assert cold["name"] == "cold" and cold["computed_tokens"] > 200 and cold["share"] == 1
    names = [arm["name"] for arm in warm]
    assert names[:2] == ["second server on the folder", "restart, from disk"]
    assert ("restart, from Redis" in names) == (PROGRAM is not None)
    assert all(arm["computed_tokens"] == 0 and arm["prompt_tokens"] == cold["prompt_tokens"] for arm in warm)
    assert said[0] == "cold"
    assert facts["kv_bytes"] > 100_000
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_computes_what_is_stored_fails_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: because what the first one wrote is deleted before the second one is asked."""
    wait = restart._until_still

    def wait_and_delete(count: Callable[[], int], expected: int) -> None:
        wait(count, expected)
        assert count() >= expected
        for path in tmp_path.rglob("*.safetensors"):
            path.unlink()

    monkeypatch.setattr(restart, "_until_still", wait_and_delete)
    with pytest.raises(
        NotRestored, match=r"second server on the folder: 0 of .* prompt tokens should have been computed"
    ):
        run_restart("builtin", prompt_tokens=200, prompts=1, threads=1, folder=tmp_path)


def test_shares_are_of_the_same_prompts_cold_time() -> None:
    cold = Arm(name="cold", ttft_seconds=(1.0, 10.0, 4.0), prompt_tokens=30, computed_tokens=30)
    warm = Arm(name="restart, from disk", ttft_seconds=(0.5, 1.0, 0.4), prompt_tokens=30, computed_tokens=0)
    report = RestartReport(
        machine=restart.this_machine(),
        model="m",
        threads=1,
        prompts=3,
        kv_bytes=1,
        limit_seconds=0.1,
        arms=(cold, warm),
        skipped=(),
    )
    assert report.share(warm) == pytest.approx(0.1)
