"""KV that outlives the process on a Redis server, on the real engine, without a disk tier."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kv.redis_server import RedisServer, needs_redis

import rekindle
from rekindle.errors import InvalidRequest
from rekindle.kv.network import NetworkTier
from rekindle.lab.redis_server import free_port
from rekindle.serve.local import LLM
from rekindle.serve.service import Service
from rekindle.settings import Settings

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 20
OTHER = "Another prompt, which is long enough to be stored. " * 20


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """It is waited for, however slow the machine is."""
    monkeypatch.setattr("rekindle.serve.assembly.NETWORK_TIMEOUT_SECONDS", 60.0)
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def load(url: str, **settings: object) -> LLM:
    return rekindle.load(threads=1, store="none", store_url=url, store_flush_seconds=60, **settings)


@needs_redis
def test_after_a_restart_nothing_is_computed_before_the_first_token(server: RedisServer) -> None:
    with load(server.url) as llm:
        cold = llm.generate(STORY, max_tokens=6)
        assert llm.last is not None and llm.last.usage.cached_tokens == 0
    with load(server.url.replace("redis:", "valkey:")) as llm:
        assert llm.generate(STORY, max_tokens=6) == cold
        last = llm.last
        assert last is not None
        assert (last.usage.computed_tokens, last.timings.prefill_calls) == (0, 0)
        assert llm.service.num_computed <= len(last.tokens)  # the answer's own tokens
        assert "fetched from network" in last.plan.steps[0].reason


@needs_redis
def test_what_is_kept_is_forgotten_after_the_time_that_was_set(server: RedisServer) -> None:
    with load(server.url, store_ttl_seconds=1000) as llm:
        llm.generate(STORY, max_tokens=1)
    names = server.ask(b"KEYS", b"*")
    assert isinstance(names, list) and names
    assert all(900_000 < server.ask(b"PTTL", name) <= 1_000_000 for name in names)  # type: ignore[operator]


@needs_redis
@pytest.mark.parametrize("goes_on", ["", " And then"])
@pytest.mark.parametrize("place", ["engine", "memory"])
def test_what_a_faster_place_serves_counts_as_used(server: RedisServer, place: str, goes_on: str) -> None:
    with load(server.url) as llm:
        llm.generate(STORY, max_tokens=6)
        llm.service.settle()
        names = server.ask(b"KEYS", b"*")
        assert isinstance(names, list)
        for name in names:
            server.ask(b"PEXPIRE", name, 50_000)
        if place == "memory":
            llm.service.evict_residents()
        llm.generate(STORY + goes_on, max_tokens=6)
        llm.service.settle()
        left = [server.ask(b"PTTL", name) for name in names if b":block:" in name]
        assert sum(ms > 50_000 for ms in left) >= len(left) - 2, left  # type: ignore[operator,misc]


@needs_redis
def test_a_server_that_stops_in_between_stops_no_request(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    with load(server.url) as llm:
        first = llm.generate(STORY, max_tokens=6)
        llm.service.settle()
        server.stop()
        assert llm.generate(STORY, max_tokens=6) == first, "what is in memory is used on"
        for index in range(4):
            assert llm.generate(f"{index}. {OTHER}", max_tokens=6)
        llm.service.settle()
    assert len([record for record in caplog.records if "cannot be written to" in record.message]) == 1
    with load(server.url) as llm:
        assert llm.generate(STORY, max_tokens=6) == first
        assert llm.last is not None and llm.last.usage.cached_tokens == 0


@needs_redis
def test_the_password_may_come_from_the_environment(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "secret")
    try:
        environ = {"REKINDLE_STORE_PASSWORD": "secret", "REKINDLE_STORE_URL": server.url}
        settings = Settings.load(None, environ, engine="toy")
        assert "secret" not in repr(settings) + settings.model_dump_json()
        with Service.open(settings) as service:
            (tier,) = service._store.tiers
            assert tier.contains([]) == []
            tier.clear()
            assert tier.stats().state == "ok"
    finally:
        server.stop()


def test_the_network_stands_behind_the_disk(tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    with Service.open(Settings(engine="toy", store=str(tmp_path), store_url=url)) as service:
        assert [tier.name for tier in service._store.tiers] == ["disk", "network"]
        assert isinstance(service._store.tiers[1], NetworkTier)


@pytest.mark.parametrize("url", ["http://:secret@host", "redis://:secret@host:port", "redis://:secret@host/0?db=1", ""])
def test_a_bad_url_is_refused_before_a_model_is_loaded(url: str) -> None:
    with pytest.raises(InvalidRequest, match="redis://host:port/db") as caught:
        Service.open(Settings(model="/no/such/model.gguf", store_url=url))
    assert caught.value.param == "store_url"
    assert "secret" not in str(caught.value)


def test_the_client_is_not_imported_where_there_is_no_url() -> None:
    code = "import rekindle.serve.service, sys; assert 'redis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
