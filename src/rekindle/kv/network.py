"""The network tier: blocks on a Valkey or Redis server (7.0 or later), which any number of Rekindles may share.

    rekindle:v1:block:<key>       a block or a tail, as the file of it would be

The server forgets what was not used for `ttl_seconds`. A block's time runs out a little before its predecessor's, so
chains die from the tail. A pinned block's time is that of its pin, if that is longer; a use, whoever's, only ever prolongs
it. A stopped, silent or broken server costs a few time-outs and then nothing: see `Breaker`. A server
that is full refuses writes alone; reading goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import redis
from redis.client import Pipeline

from rekindle.errors import CorruptBlock, TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.breaker import Breaker
from rekindle.kv.format import VERSION, decode, encode, fingerprint_of
from rekindle.kv.link import Link
from rekindle.kv.tier import Place, TierStats, place_of
from rekindle.kv.totals import Totals

_PREFIX = f"rekindle:v{VERSION}:".encode()
_BLOCK_PREFIX = _PREFIX + b"block:"
_PROBE = b"rekindle:probe"  # no name of a block
_BATCH_BYTES = 4 << 20  # asked for or written together, about
_MAX_BATCH = 64  # blocks
_FIRST_GUESS_BYTES = 1 << 20  # of a block, before one was seen
_SCAN_COUNT = 1000
_FRONT_BYTES = 4096  # that say what a block is


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
        """The password is the URL's, or else this one. Raises InvalidRequest for what is no such URL."""
        self._link = Link(url, password, timeout_seconds, clock)
        self._writes = Breaker(clock, max_faults=1, fault=_Refusal)
        self._fingerprint = fingerprint
        self._ttl_ms = int(ttl_seconds * 1000)
        self._totals = Totals()
        self._block_bytes = float(_FIRST_GUESS_BYTES)  # of a block, lately

    # Reading.

    def get(self, places: Sequence[Place]) -> Iterator[Block | None]:
        start = 0
        while start < len(places):
            stop = start + (self._batch_length() if start else 1)  # the first alone: its reader can begin with it
            part = places[start:stop]
            batch = self._link.batch()
            for place in part:
                batch.get(_name(place))
            self._renew(batch, part, start)
            replies = self._link.send(batch)
            for place, data in zip(part, replies[: len(part)], strict=True):
                yield self._decoded(place, data)
            start = stop

    def probe(self, *, writing: bool) -> None:
        """Writing writes a few bytes and deletes them."""
        if not writing:
            self._link.ask("EXISTS", _PROBE)
            return
        with self._writes.attempt():
            batch = self._link.batch()
            batch.set(_PROBE, b"", px=1000)
            batch.unlink(_PROBE)
            self._write(batch)

    def prepare(self) -> None:
        """Replies are bytes of Python's: nothing to prepare."""

    def contains(self, places: Sequence[Place]) -> list[bool]:
        batch = self._link.batch()
        for place in places:
            batch.exists(_name(place))
        return [reply == 1 for reply in self._link.send(batch)]

    def touch(self, places: Sequence[Place]) -> None:
        self._renewed(places)

    def _renewed(self, places: Sequence[Place]) -> list[bool]:
        """Which are there; these have their whole time again."""
        batch = self._link.batch()
        for place in places:
            batch.exists(_name(place))
        self._renew(batch, places)
        return [reply == 1 for reply in self._link.send(batch)[: len(places)]]

    def _renew(self, batch: Pipeline, places: Sequence[Place], start: int = 0) -> None:
        """Let no time run out before the usual, of a chain from its index `start` on."""
        for index, place in enumerate(places, start):
            batch.pexpire(_name(place), self._ttl(index), gt=True)

    def keep(self, places: Sequence[Place], until: float) -> None:
        batch, end_ms = self._link.batch(), int(until * 1000)
        for index, place in enumerate(places):
            batch.pexpireat(_name(place), end_ms - index, gt=True)
        self._link.send(batch)

    def release(self, places: Sequence[Place]) -> None:
        batch = self._link.batch()
        for index, place in enumerate(places):
            batch.pexpire(_name(place), self._ttl(index), lt=True)
        self._link.send(batch)

    def _ttl(self, index: int) -> int:
        return max(1, self._ttl_ms - index)

    def _batch_length(self) -> int:
        return max(1, min(_MAX_BATCH, int(_BATCH_BYTES / self._block_bytes)))

    def _decoded(self, place: Place, data: bytes | None) -> Block | None:
        """Counted; what is not the block it should be is deleted."""
        if data is None:
            self._totals.add(misses=1)
            return None
        self._block_bytes += (len(data) - self._block_bytes) / 4
        try:
            block = decode(data, self._fingerprint)
            if place_of(block) != place:
                raise CorruptBlock(f"the block {place} expected, got {place_of(block)}")
        except CorruptBlock:
            self._totals.add(misses=1, corrupt=1)
            with suppress(TierUnavailable):
                self._link.ask("UNLINK", _name(place))
            return None
        self._totals.add(hits=1, read_bytes=len(data))
        return block

    # Writing.

    def put(self, chain: Sequence[Block]) -> None:
        with self._writes.attempt():
            places = [place_of(block) for block in chain]
            known = self._renewed(places)
            batch, sizes = self._link.batch(), list[int]()
            for index, block in enumerate(chain):
                if not known[index]:
                    data = encode(block, self._fingerprint)
                    batch.set(_name(places[index]), data, px=self._ttl(index))
                    sizes.append(len(data))
                if sum(sizes) >= _BATCH_BYTES:
                    self._write(batch, sizes)
                    batch, sizes = self._link.batch(), []
            self._write(batch, sizes)

    def _write(self, batch: Pipeline, sizes: Sequence[int] = ()) -> None:
        """Given the sizes of the blocks that its first commands write.

        Raises TierUnavailable for a refusal; commands after it may have been obeyed.
        """
        replies = self._link.send(batch, may_refuse=True)
        refusals = [isinstance(reply, redis.ResponseError) for reply in replies]
        written = [size for size, refused in zip(sizes, refusals, strict=False) if not refused]
        self._totals.add(blocks=len(written), num_bytes=sum(written), written_bytes=sum(written))
        if any(refusals):
            raise _Refusal(f"the store's server {self._link.server} refuses to write: {replies[refusals.index(True)]}")

    def remove(self, places: Sequence[Place]) -> None:
        with self._writes.attempt():
            batch = self._link.batch()
            for place in places:
                batch.strlen(_name(place))
            sizes = self._link.send(batch)
            for place in places:
                batch.unlink(_name(place))
            self._write(batch)
            self._totals.add(blocks=-len([size for size in sizes if size]), num_bytes=-sum(sizes))

    def clear(self) -> None:
        """All that is ours in this database, of all models, and nothing else."""
        self._try_now()
        for names in self._names(_PREFIX):
            self._unlink(names)
        self._totals.recounted(0, 0)

    def clear_model(self) -> None:
        """What a block is of says its beginning, so this reads a little of every block."""
        self._try_now()
        for names in self._names(_BLOCK_PREFIX):
            batch = self._link.batch()
            for name in names:
                batch.getrange(name, 0, _FRONT_BYTES - 1)
            models = map(fingerprint_of, self._link.send(batch))
            ours = [name for name, model in zip(names, models, strict=True) if model == self._fingerprint]
            if ours:
                self._unlink(ours)
        self._totals.recounted(0, 0)

    def _unlink(self, names: Sequence[bytes]) -> None:
        with self._writes.attempt():
            batch = self._link.batch()
            batch.unlink(*names)
            self._write(batch)

    def _try_now(self) -> None:
        """Somebody has asked for what comes: no back-off holds it up."""
        self._link.breaker.try_now()
        self._writes.try_now()

    # Counting.

    def stats(self) -> TierStats:
        """What is held is what we have written and not removed; others' blocks, and those forgotten, aren't known."""
        breaker, writes = self._link.breaker, self._writes
        return self._totals.stats(
            self.name,
            max_bytes=None,
            faults=breaker.faults + writes.faults,
            state=breaker.state if breaker.state != "ok" else writes.state,
        )

    def check_integrity(self) -> None:
        """Reads everything."""
        for names in self._names(_BLOCK_PREFIX):
            for name in names:
                block = self._whole(name)
                assert block is None or _name(place_of(block)) == name, f"{name!r} is filed wrong"

    def _whole(self, name: bytes) -> Block | None:
        data = self._link.ask("GET", name)
        try:
            return None if data is None else decode(data, None)
        except CorruptBlock as error:
            raise AssertionError(f"{name!r}: {error}") from None

    def close(self) -> None:
        self._link.close()

    def _names(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All names that begin so, some at a time."""
        cursor = 0
        while True:
            cursor, names = self._link.ask("SCAN", cursor, "MATCH", prefix + b"*", "COUNT", _SCAN_COUNT)
            if names:
                yield names
            if not cursor:
                return


def _name(place: Place) -> bytes:
    return _BLOCK_PREFIX + place.key.hex().encode()
