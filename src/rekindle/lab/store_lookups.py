"""What a look-up and an insertion cost, against the number of blocks in memory.

**The physics.** To find the longest stored beginning of a prompt its tokens must be compared with stored ones, each at
least once; where those are in memory can't be known before, and they are in no cache of the processor's if there are
many. So the limit is to compare the prompt's bytes with a copy of them. A store that knows blocks by their keys alone
would have to hash every token first, and then look every key up: how long that takes, with a bare dict of just these
keys, is measured beside it. Insertion has to hash, since a key is what a block is called in slower tiers.

One store grows from mark to mark. At each mark prompts of 128 blocks are looked up that are all there, drawn at random,
each once; and the prompts just before the mark are those whose insertion was timed. Payloads are of no bytes: only the
index grows. Memory is what the process has more than before the first block, over the number of blocks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import psutil

from rekindle.errors import InvalidRequest
from rekindle.kv.keys import Key, chain_keys, root_key, token_bytes
from rekindle.kv.store import Store
from rekindle.lab.store_arms import BLOCK_TOKENS, FINGERPRINT
from rekindle.tokens import Tokens, as_tokens

PROMPT_BLOCKS = 128  # 8,192 tokens
MARKS = (1_000, 10_000, 100_000, 1_000_000)
_LOOKUPS = 300  # at each mark, at most
_TIMED_INSERTS = 64  # prompts before each mark, at most

T = TypeVar("T")
Progress = Callable[[int, int], None]  # blocks put, of how many


@dataclass(frozen=True, kw_only=True)
class Growth:
    """At one size of the store. Times are medians, in microseconds."""

    blocks: int
    lookup_us: float  # of a prompt that is there
    miss_us: float  # of a prompt whose first block is not there
    compare_us: float  # of the prompt's bytes with a copy of them
    hash_us: float  # of the prompt's keys
    dict_us: float  # of as many look-ups of the same keys in a bare dict of this size
    insert_us: float  # of one block, hashing included
    bytes_per_block: float  # the process grew by

    @property
    def lookups_per_second(self) -> float:
        return 1e6 / self.lookup_us


def measure_growth(marks: Sequence[int] = MARKS, progress: Progress = lambda done, total: None) -> list[Growth]:
    """One store grown to each mark in turn. Raises InvalidRequest for a mark of less than a prompt."""
    if not marks or min(marks) < PROMPT_BLOCKS:
        raise InvalidRequest(
            f"expected numbers of blocks of {PROMPT_BLOCKS} or more, got {list(marks)}", param="blocks"
        )
    marks = sorted(marks)
    store = Store(FINGERPRINT, max_bytes=1 << 50, block_tokens=BLOCK_TOKENS)
    payloads = {index * BLOCK_TOKENS: memoryview(b"") for index in range(PROMPT_BLOCKS)}
    inserts: list[float] = []
    found: list[tuple[int, _Lookups, float, float]] = []
    resident, num_prompts = _resident_bytes(), 0
    for mark in marks:
        while num_prompts * PROMPT_BLOCKS < mark:
            tokens = _prompt(num_prompts)
            began = time.perf_counter()  # clock on
            store.put(tokens, payloads)
            inserts.append((time.perf_counter() - began) / PROMPT_BLOCKS)  # clock off
            num_prompts += 1
            progress(num_prompts * PROMPT_BLOCKS, marks[-1])
        num_blocks = store.stats().blocks
        assert num_blocks == num_prompts * PROMPT_BLOCKS, "nothing was evicted"
        grown = (_resident_bytes() - resident) / num_blocks
        found.append((num_blocks, _lookups(store, num_prompts), median(inserts[-_TIMED_INSERTS:]), grown))
    del store
    gc.collect()
    bare = _bare_dict([each[0] for each in found])
    return [
        Growth(
            blocks=blocks,
            lookup_us=1e6 * median(lookups.hits),
            miss_us=1e6 * median(lookups.misses),
            compare_us=1e6 * median(lookups.compared),
            hash_us=1e6 * median(lookups.hashed),
            dict_us=1e6 * dict_seconds,
            insert_us=1e6 * insert,
            bytes_per_block=grown,
        )
        for (blocks, lookups, insert, grown), dict_seconds in zip(found, bare, strict=True)
    ]


def _prompt(number: int) -> Tokens:
    return as_tokens(np.random.default_rng([7, number]).integers(0, 1 << 17, PROMPT_BLOCKS * BLOCK_TOKENS))


def _drawn(num_prompts: int) -> list[int]:
    return list(np.random.default_rng(num_prompts).permutation(num_prompts)[:_LOOKUPS])


def _keys(tokens: Tokens) -> list[Key]:
    return list(chain_keys(root_key(FINGERPRINT, b""), token_bytes(tokens), BLOCK_TOKENS))


@dataclass
class _Lookups:
    """Seconds, of each prompt."""

    hits: list[float] = field(default_factory=list)
    misses: list[float] = field(default_factory=list)
    compared: list[float] = field(default_factory=list)
    hashed: list[float] = field(default_factory=list)


def _lookups(store: Store, num_prompts: int) -> _Lookups:
    found = _Lookups()
    numbers = _drawn(num_prompts)
    copies = [token_bytes(_prompt(number)) for number in numbers]
    for number, copy in zip(numbers, copies, strict=True):
        tokens, other = _prompt(number), _prompt(number + 1_000_000_000)
        match = _timed(found.hits, partial(store.match, tokens))
        assert match.length == len(tokens)
        match = _timed(found.misses, partial(store.match, other))
        assert match.length == 0
        same = _timed(found.compared, partial(_same, tokens, copy))
        assert same
        _timed(found.hashed, partial(_keys, tokens))
    return found


def _same(tokens: Tokens, copy: bytes) -> bool:
    return token_bytes(tokens) == copy


def _timed(seconds: list[float], run: Callable[[], T]) -> T:
    began = time.perf_counter()  # clock on
    result = run()
    seconds.append(time.perf_counter() - began)  # clock off
    return result


def _bare_dict(sizes: Sequence[int]) -> list[float]:
    """Seconds of a prompt's look-ups in a dict of just its keys, at each of these sizes."""
    known: dict[Key, int] = {}
    num_prompts, found = 0, []
    for size in sizes:
        while len(known) < size:
            known.update(dict.fromkeys(_keys(_prompt(num_prompts)), num_prompts))
            num_prompts += 1
        seconds = []
        for number in _drawn(num_prompts):
            keys = _keys(_prompt(number))  # other objects than those in the dict, as in a look-up
            began = time.perf_counter()  # clock on
            hits = [known.get(key) for key in keys]
            seconds.append(time.perf_counter() - began)  # clock off
            assert None not in hits
        found.append(median(seconds))
    return found


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
