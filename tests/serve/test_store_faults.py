"""What a store's faults do to requests, on the real engine: every one is answered, and as it would be without a store.

Each fault is caused, not imitated: a small disk that is full, a Redis server that is paused, full, or cut off in the middle
of an answer, a folder whose files go away, a server killed at work. More of the real engine: test_restart, test_network.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kv.redis_server import RedisServer, Wire, needs_redis

import rekindle
from rekindle.kv.disk import DiskTier
from rekindle.kv.slabs import SLAB_BYTES
from rekindle.lab.redis_server import free_port
from rekindle.serve.local import LLM
from rekindle.serve.request import Done

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 20
PROMPTS = [f"{number}. {STORY}" for number in range(4)]


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Answers without a store."""
    with rekindle.load(threads=1, store="none") as llm:
        return {prompt: llm.generate(prompt, max_tokens=6) for prompt in PROMPTS}


def load(**settings: object) -> LLM:
    return rekindle.load(threads=1, store_flush_seconds=60, **({"store": "none"} | settings))


def last(llm: LLM) -> Done:
    assert llm.last is not None
    return llm.last


def state(llm: LLM, tier: str) -> str:
    return {each.name: each.state for each in llm.service._store.stats().tiers}[tier]


def test_a_wrong_folder_and_a_server_that_is_not_there_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before any request; and those are answered."""
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    with load(store=str(folder), store_url=f"redis://127.0.0.1:{free_port()}") as llm:
        llm.service._probed.result(60)
        assert "Not a directory" in state(llm, "disk") and "can't be reached" in state(llm, "network")
        told = [record.getMessage() for record in caplog.records]
        for tier in ("disk", "network"):
            for use in ("read from", "written to"):
                assert any(line.startswith(f"the {tier} tier cannot be {use}") for line in told)
        assert llm.generate(PROMPTS[0], max_tokens=2)


def test_a_folder_that_can_be_used_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with load(store=str(tmp_path / "new" / "store")) as llm:
        llm.service._probed.result(60)
        assert state(llm, "disk") == "ok"
    assert not [record for record in caplog.records if "tier" in record.getMessage()]


def test_memory_for_the_first_fetch_is_ready_before_it(tmp_path: Path) -> None:
    """As much as all cells of this small model take, in whole slabs."""
    with load(store=str(tmp_path), context=2048) as llm:
        llm.service._probed.result(60)
        (disk,) = llm.service._store.tiers
        assert isinstance(disk, DiskTier)
        needed = llm.service.engine_spec.kv_bytes_per_token * 2048
        assert needed <= sum(map(len, disk._slabs._idle)) < needed + SLAB_BYTES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte: a prompt's blocks fill it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, expected: dict[str, str]) -> None:
    """What fitted is used after a restart; the rest is computed again."""
    with load(store=str(small_disk)) as llm:
        llm.service._probed.result(60)  # or else it could find later that an empty file can be written
        for prompt in PROMPTS:
            assert llm.generate(prompt, max_tokens=6) == expected[prompt]
        llm.service.settle()
        assert "the disk is full" in state(llm, "disk")
    assert not list(small_disk.rglob("*.writing"))
    with load(store=str(small_disk)) as llm:
        computed = []
        for prompt in PROMPTS:
            assert llm.generate(prompt, max_tokens=6) == expected[prompt]
            computed.append(last(llm).usage.computed_tokens)
        assert computed[0] == 0 and computed[-1] > 100


def test_files_that_go_away_while_the_server_runs(tmp_path: Path, expected: dict[str, str]) -> None:
    with load(store=str(tmp_path)) as llm:
        llm.generate(PROMPTS[0], max_tokens=6)
        llm.service.settle()
        llm.service.evict_residents()
        llm.service._store.clear_memory()
        for path in list(tmp_path.rglob("*.safetensors"))[::2]:
            path.unlink()
        assert llm.generate(PROMPTS[0], max_tokens=6) == expected[PROMPTS[0]]
        assert last(llm).usage.computed_tokens > 0
        assert state(llm, "disk") == "ok"


CHILD = """
import sys, rekindle
with rekindle.load(threads=1, store=sys.argv[1]) as llm:
    print("ready", flush=True)
    for number in range(1000):
        llm.generate(f"{number % 4}. " + sys.argv[2], max_tokens=1)
"""


def test_a_server_killed_while_it_computes_and_writes(tmp_path: Path, expected: dict[str, str]) -> None:
    """kill -9 of ten servers on one folder, each some time into its work. Of writers alone: test_disk_faults, fifty."""
    generator = random.Random(3)
    for _ in range(10):
        command = [sys.executable, "-c", CHILD, str(tmp_path), STORY]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            time.sleep(generator.uniform(0.0, 0.6))  # the random moment
            child.send_signal(signal.SIGKILL)
    with load(store=str(tmp_path)) as llm:
        answers = {prompt: llm.generate(prompt, max_tokens=6) for prompt in PROMPTS}
        (tier,) = llm.service._store.tiers
        assert tier.stats().corrupt == 0
        tier.scan()
        tier.check_integrity()
    assert answers == expected


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are waited for, however slow the machine is."""
    monkeypatch.setattr("rekindle.serve.assembly.NETWORK_TIMEOUT_SECONDS", 60.0)


@pytest.fixture
def server(tmp_path: Path, slow: None) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@needs_redis
def test_a_paused_redis_server(server: RedisServer, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first requests wait for their time-outs, then the server is left alone; when it goes on, its KV is used again."""
    with load(store_url=server.url) as llm:
        llm.generate(PROMPTS[0], max_tokens=6)
        llm.service.settle()
    with monkeypatch.context() as patch:
        patch.setattr("rekindle.serve.assembly.NETWORK_TIMEOUT_SECONDS", 2.0)
        with load(store_url=server.url) as llm, server.paused():
            for prompt in PROMPTS[1:]:
                assert llm.generate(prompt, max_tokens=6) == expected[prompt]
                assert last(llm).usage.computed_tokens > 100
            assert "gave no answer" in state(llm, "network")
    with load(store_url=server.url) as llm:
        assert llm.generate(PROMPTS[0], max_tokens=6) == expected[PROMPTS[0]]
        assert last(llm).usage.computed_tokens == 0


@needs_redis
@pytest.mark.usefixtures("slow")
def test_a_full_redis_server(tmp_path: Path, expected: dict[str, str]) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
    try:
        with load(store_url=server.url) as llm:
            llm.service._probed.result(60)  # or else it could find a moment in which a few bytes are taken
            for prompt in PROMPTS:
                assert llm.generate(prompt, max_tokens=6) == expected[prompt]
            llm.service.settle()
            assert "refuses to write" in state(llm, "network")
        with load(store_url=server.url) as llm:
            assert llm.generate(PROMPTS[0], max_tokens=6) == expected[PROMPTS[0]]
            assert last(llm).usage.cached_tokens > 0, "what fitted is read"
    finally:
        server.stop()


@needs_redis
@pytest.mark.parametrize("num_bytes", [1, 100_000, 250_000])
def test_a_redis_server_cut_off_in_mid_transfer(server: RedisServer, expected: dict[str, str], num_bytes: int) -> None:
    """What came whole before is used, the rest is computed, and next time all of it is there."""
    with load(store_url=server.url) as llm:
        llm.generate(PROMPTS[0], max_tokens=6)
        llm.service.settle()
    wire = Wire(server.port)
    try:
        for left in (num_bytes, None):
            wire.cut_after(left)
            with load(store_url=wire.url) as llm:
                assert llm.generate(PROMPTS[0], max_tokens=6) == expected[PROMPTS[0]]
                usage = last(llm).usage
                assert (usage.cached_tokens > 0) == (left is None or left > 70_000), "the first block comes alone"
                assert (usage.computed_tokens == 0) == (left is None)
    finally:
        wire.close()
