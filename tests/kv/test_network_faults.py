"""What a network can do to a store: a caller hears of it at once and in words, and nothing wrong is ever served."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.kv.redis_server import RedisServer, Wire, needs_redis
from tests.kv.samples import FINGERPRINT, Clock, all_facts, facts, make_chain

from rekindle.errors import TierUnavailable
from rekindle.kv.network import NetworkTier
from rekindle.kv.tier import place_of
from rekindle.lab.redis_server import free_port

pytestmark = needs_redis

CHAIN = make_chain(1, 4, tail=2)
PLACES = [place_of(block) for block in CHAIN]
LARGE = make_chain(2, 12, payload_bytes=200_000)
LARGE_PLACES = [place_of(block) for block in LARGE]


class Bench:
    """A tier with a clock that stands still, so its breaker opens again only when told."""

    def __init__(self, url: str, *, timeout_seconds: float = 30.0, password: str | None = None) -> None:
        self.clock = Clock()
        self.tier = NetworkTier(
            url,
            fingerprint=FINGERPRINT,
            ttl_seconds=100,
            timeout_seconds=timeout_seconds,
            password=password,
            clock=self.clock,
        )

    def fails(self, operation: Callable[[], object], words: str) -> None:
        with pytest.raises(TierUnavailable, match=words) as caught:
            operation()
        assert "secret" not in str(caught.value)
        assert re.search(words, self.tier.stats().state)

    def works(self) -> None:
        self.tier.put(CHAIN)
        assert all_facts(self.tier.get(PLACES)) == all_facts(CHAIN)
        assert self.tier.stats().state == "ok"

    def recovers(self) -> None:
        """When the longest back-off is over."""
        self.clock.now += 61
        self.works()

    def recovers_soon(self) -> None:
        """With a short time-out: on a busy machine a server that is well may need some tries to answer within it."""
        for _ in range(100):
            with suppress(TierUnavailable):
                self.recovers()
                return
        self.recovers()


Benches = Callable[..., Bench]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def benches() -> Iterator[Benches]:
    """Makes them, and closes their tiers."""
    made: list[Bench] = []

    def make(url: str, **options: Any) -> Bench:
        made.append(Bench(url, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.tier.close()


@pytest.fixture
def wire(server: RedisServer) -> Iterator[Wire]:
    wire = Wire(server.port)
    yield wire
    wire.close()


@pytest.fixture
def bench(server: RedisServer, benches: Benches) -> Bench:
    return benches(server.url)


def test_a_server_that_is_not_there(server: RedisServer, benches: Benches) -> None:
    bench = benches(f"redis://127.0.0.1:{free_port()}/0")
    for operation in (
        lambda: list(bench.tier.get(PLACES)),
        lambda: bench.tier.contains(PLACES),
        lambda: bench.tier.probe(writing=False),
    ):
        bench.fails(operation, "can't be reached: .*Connection refused")
    assert bench.tier.stats().faults == 3
    for operation in (
        lambda: bench.tier.put(CHAIN),
        lambda: bench.tier.touch(PLACES),
        lambda: bench.tier.probe(writing=True),
    ):
        bench.fails(operation, "Connection refused")
    assert bench.tier.stats().faults == 3, "after three faults in a row it is left alone"
    for clear in (bench.tier.clear, bench.tier.clear_model):
        bench.fails(clear, "Connection refused")
    assert bench.tier.stats().faults == 5, "but what is asked for by a person is tried"
    bench.clock.now += 61
    assert bench.tier.contains([]) == [] and "Connection refused" in bench.tier.stats().state, "nothing proves nothing"


def test_a_host_without_an_address(benches: Benches) -> None:
    for host in ("nowhere.invalid", "a..b", "x" * 70):
        bench = benches(f"redis://{host}:1/0")
        bench.fails(lambda bench=bench: bench.tier.contains(PLACES), "can't be reached")


def test_a_server_that_is_stopped_and_started_again(server: RedisServer, bench: Bench) -> None:
    bench.works()
    server.stop()
    for _ in range(3):
        bench.fails(lambda: list(bench.tier.get(PLACES)), "can't be reached")
    server.start()
    bench.fails(lambda: list(bench.tier.get(PLACES)), "can't be reached")
    bench.recovers()
    bench.tier.check_integrity()


def test_a_restart_that_nobody_noticed_is_no_fault(server: RedisServer, bench: Bench) -> None:
    """Connections that were idle meanwhile are found to be dead before they are used."""
    bench.works()
    server.stop()
    server.start()
    assert list(bench.tier.get(PLACES)) == [None] * 5
    assert bench.tier.stats().faults == 0
    bench.works()


def test_a_server_that_is_paused(server: RedisServer, benches: Benches) -> None:
    """Its kernel still takes connections and data; only answers are missing."""
    bench = benches(server.url, timeout_seconds=0.5)
    bench.recovers_soon()
    before = bench.tier.stats().faults
    with server.paused():
        for _ in range(3):
            bench.fails(lambda: list(bench.tier.get(PLACES)), r"gave no answer within 0.5 s")
        bench.fails(lambda: list(bench.tier.get(PLACES)), "gave no answer")
        assert bench.tier.stats().faults == before + 3
        with pytest.raises(TierUnavailable, match=r"not asked again for 1\.0 s"):
            bench.tier.put(CHAIN)
        bench.clock.now += 1.1
        bench.fails(lambda: bench.tier.contains(PLACES), "gave no answer")
        assert bench.tier.stats().faults == before + 4, "one try when the back-off is over"
        with pytest.raises(TierUnavailable, match=r"not asked again for 2\.0 s"):
            bench.tier.put(CHAIN)
    bench.recovers_soon()


def test_a_server_that_pauses_while_it_is_written_to(server: RedisServer, benches: Benches) -> None:
    bench = benches(server.url, timeout_seconds=0.5)
    bench.recovers_soon()
    much = make_chain(3, 6, payload_bytes=4_000_000)
    with server.paused():
        bench.fails(lambda: bench.tier.put(much), "gave no answer")
    bench.recovers_soon()
    got = list(benches(server.url).tier.get([place_of(block) for block in much]))
    assert all(block is None or facts(block) == facts(much[index]) for index, block in enumerate(got))


def test_a_full_server_is_read_and_not_written(tmp_path: Path, benches: Benches) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    try:
        bench = benches(server.url)
        bench.works()
        much = make_chain(3, 60, payload_bytes=200_000)
        bench.fails(lambda: bench.tier.put(much), "refuses to write: command not allowed when used memory")
        before = bench.tier.stats().faults
        bench.fails(lambda: bench.tier.put(much), "not allowed when used memory")
        assert bench.tier.stats().faults == before, "it was not even tried"
        assert all_facts(bench.tier.get(PLACES)) == all_facts(CHAIN), "reading goes on"
        assert "used memory" in bench.tier.stats().state
        bench.tier.probe(writing=False)
        places = [place_of(block) for block in much]
        there = bench.tier.contains(places)
        assert any(there) and sorted(there, reverse=True) == there
        got = all_facts(bench.tier.get(places))
        assert got == [fact if kept else None for fact, kept in zip(all_facts(much), there, strict=True)]
        bench.clock.now += 61
        bench.tier.remove(places)
        bench.recovers()
    finally:
        server.stop()


def test_a_wire_that_is_cut_in_mid_transfer(server: RedisServer, wire: Wire, benches: Benches) -> None:
    """Whatever came whole is right, the rest is a fault; at many points of the stream, also inside the protocol's lines."""
    direct = benches(server.url)
    direct.tier.put(LARGE)
    value = len(b"$200512\r\n") + 200_512  # about
    points = [1, 5, 9, 100, value - 2, value - 1, value, value + 1, value + 5, 2 * value + 77, 11 * value + 1000]
    for point in points:
        bench = benches(wire.url)
        wire.cut_after(point)
        got: list[object] = []
        with pytest.raises(TierUnavailable, match=r"closed by server|reset by peer|Broken pipe"):
            got.extend(facts(block) for block in bench.tier.get(LARGE_PLACES))
        wire.cut_after(None)
        assert got == all_facts(LARGE[: len(got)])
        assert len(got) <= point // value + 1
        assert got or point < 2 * value, "what was asked for before the batch that was cut is not lost"
        assert bench.tier.stats().faults == 1
        assert all_facts(bench.tier.get(LARGE_PLACES)) == all_facts(LARGE), "the next request has a new wire"
        assert bench.tier.stats().state == "ok"


def test_a_wire_that_is_cut_while_writing(server: RedisServer, wire: Wire, benches: Benches) -> None:
    """A chain is written head first, so what has arrived is of use."""
    for point in (0, 3, 20, 21, 24):
        server.ask(b"FLUSHALL")
        bench = benches(wire.url)
        bench.tier.contains(PLACES)
        wire.cut_after(point + 1)
        with pytest.raises(TierUnavailable):
            bench.tier.put(make_chain(5, 40, payload_bytes=300_000))
        wire.cut_after(None)
        bench.tier.check_integrity()
        there = bench.tier.contains([place_of(block) for block in make_chain(5, 40)])
        assert sorted(there, reverse=True) == there
        bench.recovers()


def test_a_reader_that_stops_early_leaves_no_mess(server: RedisServer, bench: Bench) -> None:
    bench.tier.put(LARGE)
    for count in range(6):
        blocks = bench.tier.get(LARGE_PLACES)
        assert all_facts([next(blocks) for _ in range(count)]) == all_facts(LARGE[:count])
        blocks.close()  # type: ignore[attr-defined]
        assert bench.tier.contains(LARGE_PLACES) == [True] * 12
    assert bench.tier.stats().faults == 0


@pytest.mark.parametrize("password", [None, "secret-but-wrong"])
def test_a_wrong_password_and_none(tmp_path: Path, password: str | None, benches: Benches) -> None:
    server = RedisServer(tmp_path, "--requirepass", "right")
    try:
        bench = benches(server.url, password=password)
        words = "Authentication required" if password is None else "invalid username-password pair"
        for writing in (False, True):
            bench.fails(lambda writing=writing: bench.tier.probe(writing=writing), words)
        bench.fails(lambda: list(bench.tier.get(PLACES)), words)
        bench.fails(lambda: bench.tier.put(CHAIN), words)
        assert bench.tier.stats().faults == 3, "a refused login is a fault like any other"
        server.options = ("--requirepass", "right")
        server.ask(b"CONFIG", b"SET", b"requirepass", (password or "").encode())
        server.options = ("--requirepass", password) if password else ()
        bench.recovers()
    finally:
        server.stop()


def test_a_wrong_database(server: RedisServer, benches: Benches) -> None:
    bench = benches(server.url.removesuffix("/0") + "/99")
    bench.fails(lambda: bench.tier.contains(PLACES), "DB index is out of range")
    bench.fails(lambda: bench.tier.put(CHAIN), "DB index is out of range")


def test_a_server_that_is_none(benches: Benches) -> None:
    """Something else listens there, and answers nonsense, or a length that nothing could have."""
    protocol = "is no server for a store: (Protocol error|Bad)"
    cases = {b"HTTP/1.1 400 Bad Request\r\n\r\n": protocol, b"$99999999999999\r\n": "closed by server"}
    for nonsense, words in (cases | {b"*x\r\n": protocol, b":\r\n": protocol}).items():
        listener = socket.create_server(("127.0.0.1", 0))

        def answer(listener: socket.socket = listener, nonsense: bytes = nonsense) -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(nonsense)

        thread = threading.Thread(target=answer)
        thread.start()
        bench = benches(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        bench.fails(lambda bench=bench: bench.tier.contains(PLACES), words)
        thread.join()
        listener.close()


def test_a_server_that_trickles_and_then_stops_is_given_up(benches: Benches) -> None:
    """The time-out is one for each wait, so bytes now and then prolong it; silence after them ends it."""
    listener = socket.create_server(("127.0.0.1", 0))
    given_up = threading.Event()

    def trickle() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1 << 16)
            with suppress(OSError):  # on a busy machine a byte may come too late
                client.sendall(b"$1000000\r\n")
                for _ in range(20):
                    given_up.wait(0.02)
                    client.sendall(b"x")
            given_up.wait()

    thread = threading.Thread(target=trickle)
    thread.start()
    bench = benches(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", timeout_seconds=0.3)
    bench.fails(lambda: list(bench.tier.get(PLACES)), "gave no answer within 0.3 s")
    given_up.set()
    thread.join()
    listener.close()
