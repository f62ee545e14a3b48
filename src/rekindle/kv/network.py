"""The network tier: blocks on a Valkey or Redis server (6.2 or later), which any number of Rekindles may share.

    rekindle:v1:block:<key>       a block, as the file of it would be
    rekindle:v1:tails:<parent>    hash: key of each tail after a parent -> its tokens, so that the best tail is found
                                  without reading the others

The server forgets what was not used for `ttl_seconds`. A block's time runs out a little before its predecessor's, so
chains die from the tail. A stopped, silent or broken server costs a few time-outs and then nothing: see `Breaker`. A server
that is full refuses writes alone; reading goes on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from rekindle.errors import CorruptBlock, TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.breaker import Breaker
from rekindle.kv.format import VERSION, decode, encode
from rekindle.kv.keys import Key
from rekindle.kv.link import Link
from rekindle.kv.resp import Command, Refused, Reply, Server
from rekindle.kv.tier import Place, TierStats, most_alike, place_of
from rekindle.tokens import Tokens

PASSWORD_VARIABLE = "REKINDLE_STORE_PASSWORD"
_PREFIX = f"rekindle:v{VERSION}:".encode()
_FLIGHT_BYTES = 4 << 20  # on their way at a time, about
_MAX_FLIGHT = 64  # commands
_FIRST_GUESS_BYTES = 1 << 20  # of a block, before one was seen
_PEEK = 256  # tails of one parent that are looked at, at most
_SCAN_COUNT = 1000


class _Refusal(TierUnavailable):
    """The server answers, but won't do this."""


class NetworkTier:
    """Thread-safe. Opening it touches nothing: the first use does."""

    name = "network"

    def __init__(
        self,
        url: str,
        *,
        fingerprint: bytes,
        ttl_seconds: float,
        timeout_seconds: float,
        password: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The password is the URL's, or this one, or the environment's. Raises InvalidRequest for what is no such URL."""
        server = Server.parse(url, password or os.environ.get(PASSWORD_VARIABLE))
        self._link = Link(server, timeout_seconds, clock)
        self._writes = Breaker(clock, max_faults=1, fault=_Refusal)
        self._fingerprint = fingerprint
        self._ttl_ms = int(ttl_seconds * 1000)
        self._counting = threading.Lock()
        self._blocks = self._bytes = self._hits = self._misses = self._corrupt = 0
        self._block_bytes = float(_FIRST_GUESS_BYTES)  # of a block, lately

    # Reading.

    def get(self, places: Sequence[Place]) -> Iterator[Block | None]:
        commands: list[Command] = [(b"GETEX", _name(place), b"PX", self._ttl(i)) for i, place in enumerate(places)]
        for place, reply in zip(places, self._link.stream(commands, self._window), strict=True):
            yield self._decoded(place, reply)
        self._link.ask([self._renewal(place.parent) for place in places if place.tail])

    def contains(self, places: Sequence[Place]) -> list[bool]:
        return [reply == 1 for reply in self._link.ask([(b"EXISTS", _name(place)) for place in places])]

    def tails(self, parent: Key, like: Tokens | None = None) -> list[Block]:
        (reply,) = self._link.ask([(b"HRANDFIELD", _tails_name(parent), _PEEK, b"WITHVALUES")])
        known = {
            Place(key=bytes(key), parent=parent, tail=True): np.frombuffer(tokens, dtype="<i4")
            for key, tokens in zip(reply[::2], reply[1::2], strict=True)
        }
        if like is not None:
            best = most_alike(known.items(), like)
            known = {} if best is None else {best: known[best]}
        found = dict(zip(known, self.get(list(known)), strict=True))
        lost = [place.key for place, block in found.items() if block is None]
        if lost:
            self._link.ask([(b"HDEL", _tails_name(parent), *lost)])
        return [block for block in found.values() if block is not None]

    def touch(self, places: Sequence[Place]) -> None:
        self._link.ask(self._renewals(places))

    def _renewals(self, places: Sequence[Place]) -> list[Command]:
        """One per place, and then one per tail."""
        blocks: list[Command] = [(b"PEXPIRE", _name(place), self._ttl(index)) for index, place in enumerate(places)]
        return blocks + [self._renewal(place.parent) for place in places if place.tail]

    def _renewal(self, parent: Key) -> Command:
        return (b"PEXPIRE", _tails_name(parent), self._ttl_ms)

    def _ttl(self, index: int) -> int:
        return max(1, self._ttl_ms - index)

    def _window(self) -> int:
        return max(2, min(_MAX_FLIGHT, int(_FLIGHT_BYTES / self._block_bytes)))

    def _decoded(self, place: Place, data: Reply) -> Block | None:
        """Counted; what is not the block it should be is deleted."""
        if data is None:
            self._count(misses=1)
            return None
        self._block_bytes += (len(data) - self._block_bytes) / 4
        try:
            block = decode(data, self._fingerprint)
            if place_of(block) != place:
                raise CorruptBlock(f"the block {place} expected, got {place_of(block)}")
        except CorruptBlock:
            self._count(misses=1, corrupt=1)
            with suppress(TierUnavailable):
                self._link.ask([(b"UNLINK", _name(place))])
            return None
        self._count(hits=1)
        return block

    # Writing.

    def put(self, chain: Sequence[Block]) -> None:
        with self._writes.attempt():
            places = [place_of(block) for block in chain]
            known = self._link.ask(self._renewals(places))
            batch: list[Command] = []
            size = 0
            for index, block in enumerate(chain):
                if known[index] != 1:
                    data = encode(block, self._fingerprint)
                    batch.append((b"SET", _name(places[index]), data, b"PX", self._ttl(index)))
                    size += len(data)
                if places[index].tail:
                    batch.append((b"HSET", _tails_name(block.parent), block.key, block.tokens.astype("<i4").tobytes()))
                    batch.append(self._renewal(block.parent))
                if size >= _FLIGHT_BYTES:
                    self._write(batch)
                    batch, size = [], 0
            self._write(batch)

    def _write(self, batch: Sequence[Command]) -> None:
        """Raises TierUnavailable for a refusal; commands after it may have been obeyed."""
        replies = self._link.ask(batch, may_refuse=True)
        for command, reply in zip(batch, replies, strict=True):
            if isinstance(reply, Refused):
                raise _Refusal(f"the store's server {self._link.server} refuses to write: {reply}")
            if command[0] == b"SET":
                self._count(blocks=1, num_bytes=_length(command[2]))

    def remove(self, places: Sequence[Place]) -> None:
        with self._writes.attempt():
            sizes = self._link.ask([(b"STRLEN", _name(place)) for place in places])
            self._write([(b"UNLINK", _name(place)) for place in places])
            self._write([(b"HDEL", _tails_name(place.parent), place.key) for place in places if place.tail])
            self._count(blocks=-len([size for size in sizes if size]), num_bytes=-sum(sizes))

    def clear(self) -> None:
        """All that is ours in this database, of all models, and nothing else."""
        with self._writes.attempt():
            for names in self._names():
                self._write([(b"UNLINK", *names)])
        with self._counting:
            self._blocks = self._bytes = 0

    # Counting.

    def scan(self) -> None:
        """Count what is on the server, whoever wrote it. Until then, and after it, only our own changes are known."""
        blocks = num_bytes = 0
        for names in self._names():
            lengths = self._link.ask([(b"STRLEN", name) for name in names if b":block:" in name])
            blocks += len([length for length in lengths if length])
            num_bytes += sum(lengths)
        with self._counting:
            self._blocks, self._bytes = blocks, num_bytes

    def stats(self) -> TierStats:
        with self._counting:
            return TierStats(
                name=self.name,
                blocks=self._blocks,
                bytes=self._bytes,
                max_bytes=None,
                hits=self._hits,
                misses=self._misses,
                evictions=0,
                faults=self._link.breaker.faults + self._writes.faults,
                corrupt=self._corrupt,
                state=self._link.breaker.state if self._link.breaker.state != "ok" else self._writes.state,
            )

    def check_integrity(self) -> None:
        """Reads everything."""
        for names in self._names():
            for name in names:
                if b":block:" in name:
                    block = self._whole(name)
                    assert block is None or _name(place_of(block)) == name, f"{name!r} is filed wrong"
                else:
                    (fields,) = self._link.ask([(b"HGETALL", name)])
                    for key, tokens in zip(fields[::2], fields[1::2], strict=True):
                        tail = self._whole(_PREFIX + b"block:" + bytes(key).hex().encode())
                        if tail is not None:  # or else it was forgotten before its name
                            assert _tails_name(tail.parent) == name, f"{tail.key.hex()} is filed under {name!r}"
                            assert tail.tokens.tobytes() == tokens, f"{tail.key.hex()} has other tokens"

    def _whole(self, name: bytes) -> Block | None:
        (data,) = self._link.ask([(b"GET", name)])
        try:
            return None if data is None else decode(data, None)
        except CorruptBlock as error:
            raise AssertionError(f"{name!r}: {error}") from None

    def close(self) -> None:
        self._link.close()

    def _names(self) -> Iterator[list[bytes]]:
        """All names of ours, some at a time."""
        cursor = b"0"
        while True:
            ((after, names),) = self._link.ask([(b"SCAN", cursor, b"MATCH", _PREFIX + b"*", b"COUNT", _SCAN_COUNT)])
            if names:
                yield [bytes(name) for name in names]
            cursor = bytes(after)
            if cursor == b"0":
                return

    def _count(self, *, hits: int = 0, misses: int = 0, corrupt: int = 0, blocks: int = 0, num_bytes: int = 0) -> None:
        """The one place where numbers change, but for a scan."""
        with self._counting:
            self._hits += hits
            self._misses += misses
            self._corrupt += corrupt
            self._blocks += blocks
            self._bytes += num_bytes


def _name(place: Place) -> bytes:
    return _PREFIX + b"block:" + place.key.hex().encode()


def _tails_name(parent: Key) -> bytes:
    return _PREFIX + b"tails:" + parent.hex().encode()


def _length(part: bytes | int) -> int:
    return len(part) if isinstance(part, bytes) else 0
