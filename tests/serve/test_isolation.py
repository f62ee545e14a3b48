"""Two salts share no block, and neither do two models: in the engine, in memory, on disk and in the network tier.

All on the real engine. Each test has a control: the same tenant, asked again, computes nothing.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kv.redis_server import RedisServer, needs_redis

import rekindle
from rekindle.serve.local import LLM
from rekindle.serve.lull import Lull
from rekindle.serve.request import Done, Event, Generation, Sampling

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 20
SALTS = (b"", b"ours", b"theirs")


def generation(llm: LLM, salt: bytes) -> Generation:
    prompt = llm.service.text_prompt(STORY, salt=salt)
    return Generation(prompt=prompt, max_tokens=4, sampling=Sampling(temperature=0))


def cached(llm: LLM, salt: bytes) -> int:
    """Tokens of the prompt that this tenant's request finds."""
    done = list(llm.service.events(generation(llm, salt)))[-1]
    assert isinstance(done, Done)
    return done.usage.cached_tokens


def keys_in_memory(llm: LLM, salt: bytes) -> set[bytes]:
    return set(llm.service._store.match(llm.service.text_prompt(STORY).tokens, salt).keys)


def disjoint(*sets: set[bytes]) -> bool:
    return sum(map(len, sets)) == len(set().union(*sets)) and all(sets)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """It is waited for, however slow the machine is."""
    monkeypatch.setattr("rekindle.serve.assembly.NETWORK_TIMEOUT_SECONDS", 60.0)
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def test_in_the_engine_no_tenant_forks_another_ones_sequence() -> None:
    with rekindle.load(threads=1, store="none") as llm:
        length = len(llm.service.text_prompt(STORY))
        assert [cached(llm, salt) for salt in SALTS] == [0, 0, 0], "residents"
        assert [cached(llm, salt) for salt in SALTS] == [length] * 3


def test_what_is_torn_of_one_tenant_takes_nothing_from_another() -> None:
    """Nor of the tenant's own what was read before it."""
    with rekindle.load(threads=1, store="none") as llm:
        length = len(llm.service.text_prompt(STORY))
        assert [cached(llm, salt) for salt in SALTS] == [0, 0, 0]
        llm.service.settle()
        llm.service.evict_residents()
        torn = llm.service._store.match(llm.service.text_prompt(STORY).tokens, b"ours").blocks[2]
        object.__setattr__(torn, "payload", memoryview(bytes(len(torn.payload))))
        llm.service._worker._lull = Lull(
            1000.0, 1000.0
        )  # so that what is read again is not saved before it is looked for
        assert cached(llm, b"ours") == 0
        assert llm.service._store.match(llm.service.text_prompt(STORY).tokens, b"ours").length == torn.position > 0
        llm.service.evict_residents()
        assert [cached(llm, salt) for salt in SALTS] == [length] * 3
        llm.service.check_integrity()


def test_in_the_engine_no_tenant_waits_for_another_one_who_reads_the_same() -> None:
    """Submitted together: each salt's second request waits for the first and forks; across salts nobody does."""
    with rekindle.load(threads=1, store="none") as llm:
        length = len(llm.service.text_prompt(STORY))
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        for salt in (*SALTS, *SALTS):
            llm.service.submit(generation(llm, salt), inbox.put)
        ended = []
        while len(ended) < 6:
            event = inbox.get(timeout=120)
            ended += [event] if isinstance(event, Done) else []
        computed = sum(done.usage.computed_tokens for done in ended)
        assert 3 * length <= computed < 4 * length


def test_in_memory_no_tenant_finds_another_ones_blocks() -> None:
    with rekindle.load(threads=1, store="none") as llm:
        for salt in SALTS:
            assert cached(llm, salt) == 0
            llm.service.evict_residents()
        blocks = llm.service.stats().blocks
        assert disjoint(*(keys_in_memory(llm, salt) for salt in SALTS))
        assert blocks >= 3 * (len(llm.service.text_prompt(STORY)) // 64)
        llm.service.check_integrity()
        assert all(cached(llm, salt) for salt in SALTS)


def test_on_disk_no_tenant_finds_another_ones_blocks(tmp_path: Path) -> None:
    """Each tenant alone in a process; the files of each are new ones."""
    names: list[set[bytes]] = []
    for salt in SALTS:
        with rekindle.load(threads=1, store=str(tmp_path), store_flush_seconds=60) as llm:
            assert cached(llm, salt) == 0
        now = {path.name.encode() for path in tmp_path.rglob("*.safetensors")}
        names.append(now.difference(*names))
    assert disjoint(*names) and len({len(each) for each in names}) == 1
    with rekindle.load(threads=1, store=str(tmp_path), store_flush_seconds=60) as llm:
        assert all(cached(llm, salt) for salt in SALTS)


@needs_redis
def test_on_the_network_no_tenant_finds_another_ones_blocks(server: RedisServer) -> None:
    names: list[set[bytes]] = []
    for salt in SALTS:
        with rekindle.load(threads=1, store="none", store_url=server.url, store_flush_seconds=60) as llm:
            assert cached(llm, salt) == 0
        found = server.ask(b"KEYS", b"*")
        assert isinstance(found, list)
        names.append({bytes(name) for name in found}.difference(*names))
    assert disjoint(*names) and len({len(each) for each in names}) == 1
    with rekindle.load(threads=1, store="none", store_url=server.url, store_flush_seconds=60) as llm:
        assert all(cached(llm, salt) for salt in SALTS)


def test_another_model_finds_nothing_in_the_same_folder(tmp_path: Path) -> None:
    """What the KV's meaning depends on is in every key: here the type of its cells."""
    names: list[set[bytes]] = []
    for kv_type in ("f16", "q8_0"):
        with rekindle.load(threads=1, store=str(tmp_path), store_flush_seconds=60, kv_type=kv_type) as llm:
            assert cached(llm, b"ours") == 0
        now = {path.name.encode() for path in tmp_path.rglob("*.safetensors")}
        names.append(now.difference(*names))
    assert disjoint(*names)
