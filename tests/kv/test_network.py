"""The network tier on a real server: names, time to live, URLs and what is streamed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.kv.redis_server import RedisServer, needs_redis
from tests.kv.samples import FINGERPRINT, Clock, all_facts, facts, make_chain

from rekindle.errors import InvalidRequest
from rekindle.kv.format import encode
from rekindle.kv.link import parse_url
from rekindle.kv.network import NetworkTier
from rekindle.kv.tier import place_of
from rekindle.lab.redis_server import free_port

CHAIN = make_chain(1, 4, tail=2)
PLACES = [place_of(block) for block in CHAIN]


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(module_server: RedisServer) -> RedisServer:
    module_server.ask(b"FLUSHALL")
    return module_server


@pytest.fixture
def tier(server: RedisServer) -> Iterator[NetworkTier]:
    tier = NetworkTier(server.url, fingerprint=FINGERPRINT, ttl_seconds=1000, timeout_seconds=30, clock=Clock())
    yield tier
    tier.check_integrity()
    tier.close()


def names(server: RedisServer) -> list[str]:
    found = server.ask(b"KEYS", b"*")
    assert isinstance(found, list)
    return sorted(bytes(name).decode() for name in found)


def ttl_ms(server: RedisServer, name: str) -> int:
    left = server.ask(b"PTTL", name.encode())
    assert isinstance(left, int)
    return left


def connections_so_far(server: RedisServer) -> int:
    stats = server.ask(b"INFO", b"stats")
    assert isinstance(stats, bytes)
    return int(stats.split(b"total_connections_received:")[1].split()[0])


def block_name(index: int) -> str:
    return f"rekindle:v1:block:{CHAIN[index].key.hex()}"


@needs_redis
def test_names_say_whose_they_are_and_of_which_version(server: RedisServer, tier: NetworkTier) -> None:
    tier.put(CHAIN)
    assert names(server) == sorted(block_name(index) for index in range(5))
    assert server.ask(b"GET", block_name(0).encode()) == encode(CHAIN[0], FINGERPRINT)


@needs_redis
def test_all_that_is_written_is_forgotten_in_time_tails_first(server: RedisServer, tier: NetworkTier) -> None:
    """In what order is seen in what was asked for: between two commands a busy server's clock goes on."""
    server.ask(b"CONFIG", b"SET", b"slowlog-log-slower-than", 0)
    server.ask(b"SLOWLOG", b"RESET")
    tier.put(CHAIN)
    log = server.ask(b"SLOWLOG", b"GET", 100)
    server.ask(b"CONFIG", b"SET", b"slowlog-log-slower-than", 10_000)
    assert isinstance(log, list)
    commands = [command for _, _, _, command, *_ in reversed(log)]
    times = {command[1].decode(): int(command[-1]) for command in commands if command[0] == b"SET"}
    assert times == {block_name(index): 1_000_000 - index for index in range(5)}
    assert all(900_000 < ttl_ms(server, name) <= 1_000_000 for name in names(server))


@needs_redis
@pytest.mark.parametrize("use", ["get", "touch", "put"])
def test_a_use_prolongs_it(server: RedisServer, tier: NetworkTier, use: str) -> None:
    tier.put(CHAIN)
    for name in names(server):
        server.ask(b"PEXPIRE", name.encode(), 500_000)
    if use == "get":
        list(tier.get(PLACES))
    elif use == "touch":
        tier.touch(PLACES)
    else:
        tier.put(CHAIN)
    assert all(ttl_ms(server, name) > 900_000 for name in names(server))


@needs_redis
def test_asking_whether_it_is_there_prolongs_nothing(server: RedisServer, tier: NetworkTier) -> None:
    tier.put(CHAIN)
    server.ask(b"PEXPIRE", block_name(0).encode(), 500_000)
    assert tier.contains(PLACES) == [True] * 5
    assert ttl_ms(server, block_name(0)) <= 500_000


@needs_redis
def test_what_is_there_is_not_sent_again(server: RedisServer, tier: NetworkTier) -> None:
    tier.put(CHAIN)
    server.ask(b"CONFIG", b"RESETSTAT")
    tier.put(CHAIN)
    stats = server.ask(b"INFO", b"commandstats")
    assert isinstance(stats, bytes)
    assert b"cmdstat_pexpire" in stats
    assert b"cmdstat_set:" not in stats


@needs_redis
def test_clearing_takes_ours_and_nothing_else(server: RedisServer, tier: NetworkTier) -> None:
    others = ["rekindle:v2:block:aa", "rekindle:v10:x", "session:1", "xrekindle:v1:y"]
    for name in others:
        server.ask(b"SET", name.encode(), b"mine")
    for seed in range(30):
        tier.put(make_chain(seed, 50))
    assert len(names(server)) == 30 * 50 + len(others)
    tier.clear()
    assert names(server) == sorted(others)


@needs_redis
def test_clearing_a_model_leaves_the_others(server: RedisServer, tier: NetworkTier) -> None:
    other = NetworkTier(server.url, fingerprint=b"o" * 16, ttl_seconds=100, timeout_seconds=30)
    theirs = make_chain(1000, 3, tail=2)
    other.put(theirs)
    for seed in range(30):
        tier.put(make_chain(seed, 50, tail=1))
    tier.clear_model()
    assert all_facts(other.get([place_of(block) for block in theirs])) == all_facts(theirs)
    assert len(names(server)) == other.stats().blocks == 4
    assert (tier.stats().blocks, tier.stats().bytes) == (0, 0)
    other.close()


@needs_redis
def test_two_processes_share_a_server(server: RedisServer, tier: NetworkTier) -> None:
    other = NetworkTier(server.url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=30)
    other.put(CHAIN)
    assert all_facts(tier.get(PLACES)) == all_facts(CHAIN)
    other.close()


@needs_redis
@pytest.mark.parametrize("forget", [lambda tier: tier.remove(PLACES), NetworkTier.clear_model, NetworkTier.clear])
def test_what_others_wrote_counts_nothing_when_it_is_forgotten(
    server: RedisServer, tier: NetworkTier, forget: Callable[[NetworkTier], None]
) -> None:
    other = NetworkTier(server.url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=30)
    other.put(CHAIN)
    assert other.stats().bytes == sum(len(encode(block, FINGERPRINT)) for block in CHAIN)
    forget(tier)
    assert names(server) == []
    assert (tier.stats().blocks, tier.stats().bytes) == (0, 0)
    tier.put(CHAIN[:1])
    assert (tier.stats().blocks, tier.stats().bytes) == (1, len(encode(CHAIN[0], FINGERPRINT)))
    other.close()


@needs_redis
@pytest.mark.parametrize("clear", [NetworkTier.clear_model, NetworkTier.clear])
def test_what_the_server_has_forgotten_counts_nothing_after_clearing(
    server: RedisServer, tier: NetworkTier, clear: Callable[[NetworkTier], None]
) -> None:
    tier.put(CHAIN)
    for index in (3, 4):
        server.ask(b"DEL", block_name(index).encode())
    clear(tier)
    assert names(server) == []
    assert (tier.stats().blocks, tier.stats().bytes) == (0, 0)


@needs_redis
def test_databases_do_not_mix(server: RedisServer, tier: NetworkTier) -> None:
    tier.put(CHAIN)
    url = server.url.removesuffix("/0") + "/3"
    other = NetworkTier(url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=30)
    assert other.contains(PLACES) == [False] * 5
    other.close()


@needs_redis
def test_many_more_blocks_than_fit_on_the_way_at_once_come_in_order(tier: NetworkTier) -> None:
    long = make_chain(7, 200, payload_bytes=100_000)
    tier.put(long)
    places = [place_of(block) for block in long]
    for _ in range(2):  # once it knows how large they are, more are on the way
        assert all_facts(tier.get(places)) == all_facts(long)


@needs_redis
def test_damaged_values_are_misses_and_are_deleted(server: RedisServer, tier: NetworkTier) -> None:
    data = encode(CHAIN[1], FINGERPRINT)
    damaged = [data[:-1], bytes([data[0] ^ 1]) + data[1:], b"", b"hello", encode(CHAIN[2], FINGERPRINT)]
    damaged.append(encode(CHAIN[1], b"g" * 16))
    for count, value in enumerate(damaged, 1):
        tier.put(CHAIN)
        server.ask(b"SET", block_name(1).encode(), value)
        assert all_facts(tier.get(PLACES)) == [None if block is CHAIN[1] else facts(block) for block in CHAIN]
        assert tier.stats().corrupt == count
        assert not tier.contains(PLACES[1:2])[0]


@needs_redis
def test_a_reader_that_stops_at_a_miss_costs_no_connection(server: RedisServer, tier: NetworkTier) -> None:
    """As for every prompt that goes on where the stored one ended."""
    long = make_chain(1, 40)
    tier.put(long[:3])
    places = [place_of(block) for block in long]
    before = connections_so_far(server)
    for _ in range(3):
        blocks = tier.get(places)
        assert all_facts([next(blocks) for _ in range(4)]) == [*all_facts(long[:3]), None]
        del blocks
    assert connections_so_far(server) == before + 1, "the one that asks just now"


@needs_redis
def test_the_first_block_comes_before_the_others_are_asked_for(server: RedisServer, tier: NetworkTier) -> None:
    tier.put(CHAIN)
    blocks = tier.get(PLACES)
    assert facts(next(blocks)) == facts(CHAIN[0])
    server.ask(b"DEL", block_name(1).encode())
    assert next(blocks) is None


@needs_redis
def test_integrity_is_really_checked(server: RedisServer, tier: NetworkTier) -> None:
    wrong = [(block_name(1), b"damaged"), (block_name(1), encode(CHAIN[2], FINGERPRINT))]
    for name, value in wrong:
        tier.put(CHAIN)
        server.ask(b"SET", name.encode(), value)
        with pytest.raises(AssertionError, match=CHAIN[1].key.hex()):
            tier.check_integrity()
        tier.clear()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host", "redis://host:6379/0"),
        ("valkey://host:1234/5", "redis://host:1234/5"),
        ("rediss://user:secret@host/1", "rediss://host:6379/1"),
        ("valkeys://:secret@[::1]:99", "rediss://[::1]:99/0"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    assert parse_url(url)[1] == expected
    tier = NetworkTier(url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=1, password="other")
    kept = tier._link._client.get_connection_kwargs()
    assert (kept["password"], kept.get("db", 0)) == ("secret" if "secret" in url else "other", int(expected[-1]))
    assert "secret" not in repr(tier._link._client) and "other" not in repr(tier._link._client)
    tier.close()


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("http://:secret@host", "the scheme 'http'"),
        ("host:6379", "the scheme 'host'"),
        ("redis://:secret@host:port/0", "port or db is not valid"),
        ("redis://:secret@host:99999/0", "port or db is not valid"),
        ("redis://:secret@[host/0", "one whose host"),
        ("redis://:secret@host/db", "port or db is not valid"),
        ("redis://:secret@host/-1", "a db below 0"),
        ("redis://", "without a host"),
        ("redis://:secret@host?db=1", "more behind it"),
        ("", "the scheme ''"),
    ],
)
def test_other_urls_are_refused_without_their_secrets(url: str, got: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"redis://host:port/db .* expected, got .*{got}") as caught:
        NetworkTier(url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=1)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@needs_redis
@pytest.mark.parametrize("where", ["url", "argument", "both"])
def test_the_password_is_the_urls_or_the_given_one(tmp_path: Path, where: str) -> None:
    server = RedisServer(tmp_path, "--requirepass", "sec/ret")
    try:
        url = server.url if where == "argument" else server.url.replace("//", "//:sec%2Fret@")
        given = {"url": None, "argument": "sec/ret", "both": "wrong"}[where]
        tier = NetworkTier(url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=30, password=given)
        tier.put(CHAIN)
        assert all_facts(tier.get(PLACES)) == all_facts(CHAIN)
        tier.close()
    finally:
        server.stop()


@needs_redis
def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a certificate of our own, which is trusted only where SSL_CERT_FILE says so."""
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run(make, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    server = RedisServer(tmp_path, *tls, "--tls-auth-clients", "no")
    try:
        url = f"rediss://localhost:{port}/0"
        strict = NetworkTier(url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=30)
        with pytest.raises(Exception, match="certificate verify failed"):
            strict.put(CHAIN)
        strict.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        tier = NetworkTier(url, fingerprint=FINGERPRINT, ttl_seconds=100, timeout_seconds=30)
        long = make_chain(7, 20, payload_bytes=300_000)
        tier.put(long)
        assert all_facts(tier.get([place_of(block) for block in long])) == all_facts(long)
        tier.close()
    finally:
        server.stop()
