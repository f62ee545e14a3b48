"""How fast blocks go into each tier and come back, beside what moves the same bytes without a store.

**The physics.** Nothing gets from one place in memory to another faster than memcpy moves it. Reading a file that the
system holds in its page cache is such a copy too, so the limit of a warm disk tier is `dd`: one file of the same bytes,
read a megabyte at a time into one buffer, which stays in the processor's cache. Whoever keeps what was read has to
write it to memory, which `dd` does not, and must get that memory from the system first; so two more yardsticks read the
same file at once, into memory that was used before and into new memory. And whoever keeps a file for each block has to open
and close it: the last yardstick does that and one read each, with nothing of ours around. With small blocks it is what
counts: 64 KB are read in the time that opening takes. A cold read is bound by the device: the page
cache is told to drop the files first, and how much of them it dropped is stated. A Redis server on the loopback is bound
by its one thread and by two copies through the kernel: redis-py's own pipelined GET, in batches of the same bytes, does
that and no more.

The memory tier hands out references and copies nothing. So that the comparison with memcpy says something, what is
measured is what a user of it does in any case: copy each payload out of it, or into memory of its own and then in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from rekindle.kv.disk import DiskTier
from rekindle.kv.network import NetworkTier
from rekindle.kv.store import Store
from rekindle.kv.tier import Tier
from rekindle.lab.redis_server import RedisServer
from rekindle.lab.store_arms import BLOCK_TOKENS, FINGERPRINT, Arm, Comparison, Prompt, compare

_CHUNK_BYTES = 1 << 20  # of dd
_BATCH_BYTES = 4 << 20  # of a pipeline, as the network tier's
_ROOM = 4  # times the payloads: a budget in which nothing is evicted


def memory_arms(prompt: Prompt, rounds: int) -> Iterator[Comparison]:
    """Put and get, each with the copy that its user makes."""
    store = Store(FINGERPRINT, max_bytes=_ROOM * len(prompt.data) + (1 << 30), block_tokens=BLOCK_TOKENS)
    source = np.frombuffer(prompt.data, np.uint8)
    target = np.ones_like(source)
    size = len(prompt.blocks[0].payload)

    def copy() -> None:
        np.copyto(target, source)

    def put() -> None:
        copies = {block.position: memoryview(bytes(block.payload)) for block in prompt.blocks}
        store.put(prompt.tokens, copies)

    def get() -> None:
        for index, block in enumerate(store.match(prompt.tokens).blocks):
            np.copyto(target[index * size : (index + 1) * size], np.frombuffer(block.payload, np.uint8))

    new = Arm("memcpy into new memory", lambda: bytes(prompt.data))
    arms = [Arm("memcpy", copy), new, Arm("a copy of each block, put", put, ours=True, prepare=store.clear_memory)]
    yield compare("memory put", len(source), arms, rounds=rounds)
    assert store.match(prompt.tokens).length == len(prompt.tokens)
    arms = [Arm("memcpy", copy), Arm("match, and a copy of each block", get, ours=True)]
    yield compare("memory get", len(source), arms, rounds=rounds)


def disk_arms(prompt: Prompt, rounds: int, folder: Path) -> Iterator[Comparison]:
    """Put, get with all of it in the page cache, and get with none of it there."""
    tier = DiskTier(folder / "store", fingerprint=FINGERPRINT, max_bytes=_ROOM * len(prompt.data) + (1 << 30))
    one = folder / "one-file"
    num_bytes = len(prompt.data)
    arms = [
        Arm(
            "dd: one file, 1 MB at a time",
            lambda: _write(one, prompt.data),
            prepare=lambda: one.unlink(missing_ok=True),
        ),
        Arm("put", lambda: tier.put(prompt.blocks), ours=True, prepare=tier.clear),
    ]
    yield compare("disk put", num_bytes, arms, rounds=rounds, note="into the page cache, nothing waits for the device")
    files = [path for path in (folder / "store").rglob("*") if path.is_file()]
    assert len(files) == len(prompt.blocks)
    dd = Arm("dd: one file, 1 MB at a time", lambda: read_through([one]))
    kept = Arm("one file into new memory, kept", one.read_bytes)
    streamed = Arm("get, each block dropped", lambda: _drop(tier, prompt), ours=True)
    get = Arm("get, all blocks kept", lambda: _get(tier, prompt), ours=True)
    used = np.ones(sum(path.stat().st_size for path in files), np.uint8).data
    into_used = Arm("one file into memory that was used before", lambda: _read_into(one, used[: len(prompt.data)]))
    names = [str(path) for path in files]
    each = Arm("open, read, close: the blocks' files", lambda: _open_read_close(names, used))
    dd_files = Arm("dd: the blocks' files", lambda: read_through(files))
    arms = [dd, each, into_used, kept, streamed, get]
    yield compare("disk get, warm", num_bytes, arms, rounds=rounds, note="all in the page cache")
    shares: list[float] = []

    def make_cold(paths: Sequence[Path]) -> Callable[[], None]:
        return lambda: shares.append(drop_from_page_cache(paths))

    if hasattr(os, "posix_fadvise"):
        arms = [
            Arm(dd.name, dd.run, prepare=make_cold([one])),
            Arm(dd_files.name, dd_files.run, prepare=make_cold(files)),
            Arm(get.name, get.run, ours=True, prepare=make_cold(files)),
        ]
        cold = compare("disk get, cold", num_bytes, arms, rounds=rounds)
        note = f"fsync and POSIX_FADV_DONTNEED before each; {min(shares):.0%} of the files or more were gone then"
        yield Comparison(what=cold.what, num_bytes=num_bytes, timings=cold.timings, note=note)
    tier.clear()
    one.unlink()


def network_arms(prompt: Prompt, rounds: int, server: RedisServer) -> Iterator[Comparison]:
    """Put and get, beside redis-py alone and redis-benchmark."""
    tier = NetworkTier(server.url, fingerprint=FINGERPRINT, ttl_seconds=3600, timeout_seconds=60)
    size, num_bytes = len(prompt.blocks[0].payload), len(prompt.data)
    per_batch = max(1, min(64, _BATCH_BYTES // size))
    values = {f"raw:{block.position}": block.payload for block in prompt.blocks}
    names = list(values)
    batches = [names[start : start + per_batch] for start in range(0, len(names), per_batch)]
    with server.client() as client:

        def set_raw() -> None:
            for batch in batches:
                pipeline = client.pipeline(transaction=False)
                for name in batch:
                    pipeline.set(name, values[name])
                pipeline.execute()

        def get_raw() -> list[bytes]:
            found: list[bytes] = []
            for batch in batches:
                pipeline = client.pipeline(transaction=False)
                for name in batch:
                    pipeline.get(name)
                found += pipeline.execute()
            return found

        def delete() -> None:
            client.flushall()

        note = f"batches of {per_batch} blocks"
        arms = [
            Arm("redis-py, pipelined SET", set_raw, prepare=delete),
            Arm("put", lambda: tier.put(prompt.blocks), ours=True, prepare=delete),
        ]
        yield compare("network put", num_bytes, arms, rounds=rounds, note=_beside(note, server, "set", size, per_batch))
        set_raw()
        arms = [
            Arm("redis-py, pipelined GET", get_raw),
            Arm("get, all blocks kept", lambda: _get(tier, prompt), ours=True),
        ]
        yield compare("network get", num_bytes, arms, rounds=rounds, note=_beside(note, server, "get", size, per_batch))
        delete()
    tier.close()


def _beside(note: str, server: RedisServer, command: str, size: int, per_batch: int) -> str:
    rate = server.benchmark(command, size, per_batch)
    return note if rate is None else f"{note}; redis-benchmark alone: {rate / 1e9:.2f} GB/s"


def _get(tier: Tier, prompt: Prompt) -> object:
    blocks = list(tier.get(prompt.places))
    assert None not in blocks
    return blocks


def _drop(tier: Tier, prompt: Prompt) -> None:
    for block in tier.get(prompt.places):
        assert block is not None


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), _CHUNK_BYTES):
            file.write(data[start : start + _CHUNK_BYTES])


def _read_into(path: Path, room: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        assert file.readinto(room) == len(room)


def _open_read_close(names: Sequence[str], room: memoryview) -> None:
    """The fewest calls that read files, one behind the other into memory that was used before."""
    start = 0
    for name in names:
        handle = os.open(name, os.O_RDONLY)
        start += os.readv(handle, [room[start:]])
        os.close(handle)


def read_through(paths: Sequence[Path]) -> None:
    """As `dd` does, into one buffer."""
    buffer = bytearray(_CHUNK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_page_cache(paths: Sequence[Path]) -> float:
    """Have the system forget these files' contents, as far as it will; the share of them whose first bytes are gone."""
    num_gone = 0
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            num_gone += not _is_cached(handle)
        finally:
            os.close(handle)
    return num_gone / len(paths)


def _is_cached(handle: int) -> bool:
    with suppress(BlockingIOError):
        return os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT) > 0
    return False
