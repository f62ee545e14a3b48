"""`SimpleKVCache`: for people who hold K and V tensors themselves and want them kept, bounded and found again.

It needs no server, no engine and no model. An entry is K and V of one layer of one prefix; a prefix is a string or token
ids. What is kept are copies on the CPU, what is given are copies on the cache's device: nothing is shared with a caller.

**When it is full** the prefix used longest ago goes, layer by layer; `layers` says how and why.

**Time to live** counts from the last use (`ttl_kind="idle"`, the default): KV is a function of its prefix and does not go
stale, so the one reason to drop it is that nobody asks for it. `ttl_kind="absolute"` counts from storing.

**Time saved** is what the entries of every hit once took to compute. That is told by an argument (`compute_seconds`), or
measured by `with cache.timed_miss():` around the computation; the storing may stand inside the block or right after it.
"""

from __future__ import annotations

import hashlib
import math
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Literal, TextIO, TypeAlias, TypedDict

from rekindle.errors import InvalidRequest
from rekindle.kv.layers import Layer, Layers
from rekindle.kv.tensors import KV, Tensor, TokenIds, as_token_ids, check_device, give, keep, num_bytes

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Prefix: TypeAlias = "str | TokenIds"
GIB, MIB = 1 << 30, 1 << 20
_TEXT, _TOKENS = b"text:", b"tokens:"  # neither begins with the other, so "12" is never [1, 2] nor [12]


class Stats(TypedDict):
    """Totals since the cache was made. Sizes are of the tensors, in MB of 2**20 bytes."""

    hits: int
    misses: int
    evictions: int  # layers that gave way to others; not those that expired or were removed by request
    hit_rate_percent: float
    total_requests: int
    size_mb: float
    max_size_mb: float
    size_percent: float
    time_saved_seconds: float


@dataclass(eq=False)
class _Timer:
    """A `timed_miss` block."""

    cache: weakref.ref[SimpleKVCache]
    outer: _Timer | None
    seconds: float | None = None  # None while the block lasts
    stored: list[Layer[KV]] = field(default_factory=list)  # inside the block


_timer: ContextVar[_Timer | None] = ContextVar("timed_miss", default=None)


class SimpleKVCache:
    """K and V tensors by prefix and layer, within a byte budget, least recently used first out. Thread-safe.

    `max_size_gb` is in GB of 2**30 bytes and counts the tensors' bytes. `ttl_seconds` is how long an entry lives: after
    its last use (`ttl_kind="idle"`) or after it was stored ("absolute"); None for ever.
    Every method raises InvalidRequest for arguments that have no meaning.
    """

    def __init__(
        self,
        max_size_gb: float = 10.0,
        device: str | torch.device = "cpu",
        ttl_seconds: float | None = 3600,
        *,
        ttl_kind: Literal["idle", "absolute"] = "idle",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if ttl_kind not in ("idle", "absolute"):
            raise InvalidRequest(f"expected ttl_kind 'idle' or 'absolute', got {ttl_kind!r}", param="ttl_kind")
        self.max_bytes = max(1, int(_number(max_size_gb, "max_size_gb", most=1e9) * GIB))
        self.device = check_device(device)
        self._ttl = math.inf if ttl_seconds is None else _number(ttl_seconds, "ttl_seconds")
        self._clock = clock
        self._lock = threading.Lock()
        self._layers: Layers[KV] = Layers(self.max_bytes, idle=ttl_kind == "idle")
        self._hits = self._misses = 0
        self._saved_seconds = 0.0

    def cache_kv(
        self,
        prefix: Prefix,
        layer: int,
        k_tensor: Tensor,
        v_tensor: Tensor,
        ttl_seconds: float | None = None,
        *,
        compute_seconds: float | None = None,
    ) -> bool:
        """Keep copies of K and V of one layer, over what was kept of it.

        False, and nothing changes, if they are larger than the whole cache. `ttl_seconds` takes the place of the cache's
        (`math.inf`: for ever); `compute_seconds` is what a hit will save.
        """
        return self._store(prefix, {_index(layer, "layer"): (k_tensor, v_tensor)}, ttl_seconds, compute_seconds)

    def cache_all_layers(
        self,
        prefix: Prefix,
        kv_dict: Mapping[int, KV],
        ttl_seconds: float | None = None,
        *,
        compute_seconds: float | None = None,
    ) -> bool:
        """Keep several layers, given as {layer: (k, v)}, as `cache_kv` does: all of them or, if together they are larger
        than the whole cache, none (False). `compute_seconds` is for all of them together."""
        if not isinstance(kv_dict, Mapping) or not kv_dict:
            raise InvalidRequest(f"expected {{layer: (k, v)}}, got {_shown(kv_dict)}", param="kv_dict")
        for number, pair in kv_dict.items():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InvalidRequest(f"expected (k, v) for layer {number}, got {_shown(pair)}", param="kv_dict")
        kv = {_index(number, "layer"): (k, v) for number, (k, v) in kv_dict.items()}
        return self._store(prefix, kv, ttl_seconds, compute_seconds)

    def get_cached_kv(self, prefix: Prefix, layer: int) -> KV | None:
        """Copies of K and V of one layer, or None. One request and, if found, a use."""
        found = self._find(prefix, [_index(layer, "layer")])
        return None if found is None else found[0]

    def get_all_layers(self, prefix: Prefix, num_layers: int = 32) -> dict[int, KV] | None:
        """Copies of layers 0 … num_layers-1, or None unless all of them are there. One request and, if found, a use."""
        found = self._find(prefix, range(_index(num_layers, "num_layers", least=1)))
        return None if found is None else dict(enumerate(found))

    def longest_prefix(self, tokens: TokenIds, *, num_layers: int | None = None) -> list[int]:
        """The longest beginning of these token ids that is cached, perhaps all of them; empty if none is.

        A beginning counts as cached if layers 0 … num_layers-1 are there or, without `num_layers`, if none of the layers
        that were stored of it is gone. This is a question, neither a request nor a use.
        """
        if isinstance(tokens, str):
            raise InvalidRequest("expected token ids, got a string", param="tokens")
        least = None if num_layers is None else _index(num_layers, "num_layers", least=1)
        ids = as_token_ids(tokens)
        with self._lock:
            self._layers.expire(self._clock())
            lengths = self._layers.lengths(len(ids))
        digests, state, done = [], hashlib.sha256(_TOKENS), 0
        for length in lengths:  # one pass over the tokens, however many lengths there are
            state.update(ids[done:length].data)
            digests.append(state.digest())
            done = length
        with self._lock:
            for length, digest in zip(reversed(lengths), reversed(digests), strict=True):
                if self._layers.is_whole(digest, least):
                    return [int(token) for token in ids[:length]]
        return []

    def cached_layers(self, prefix: Prefix) -> list[int]:
        """Which layers of a prefix are there, in order. A question, neither a request nor a use."""
        digest, _ = _key(prefix)
        with self._lock:
            self._layers.expire(self._clock())
            return self._layers.numbers(digest)

    def evict(self, prefix: Prefix, layer: int | None = None) -> bool:
        """Remove one layer of a prefix, or all of them. False if nothing was there."""
        digest, _ = _key(prefix)
        wanted = None if layer is None else _index(layer, "layer")
        with self._lock:
            self._layers.expire(self._clock())
            numbers = [number for number in self._layers.numbers(digest) if wanted in (None, number)]
            for number in numbers:
                self._layers.remove(digest, number)
            return bool(numbers)

    def clear(self) -> None:
        """Remove everything. What was counted stays counted."""
        with self._lock:
            self._layers.clear()

    @contextmanager
    def timed_miss(self) -> Iterator[None]:
        """Measure what a miss costs: put it around the computation.

        The time is shared equally between the layers that this thread (or task) stores inside the block or, if it stores
        none there, by its next storing. A block that ends by an exception tells nothing.
        """
        outer = _timer.get()
        while outer is not None and outer.seconds is not None:
            outer = outer.outer  # an earlier block whose storing never came
        timer = _Timer(weakref.ref(self), outer)
        _timer.set(timer)
        began = self._clock()
        try:
            yield
        except BaseException:
            _timer.set(outer)
            raise
        timer.seconds = self._clock() - began
        if timer.stored:
            _timer.set(outer)
            with self._lock:
                for layer in timer.stored:
                    layer.compute_seconds = timer.seconds / len(timer.stored)

    def get_stats(self) -> Stats:
        """Totals of now; what has expired takes no room any more."""
        with self._lock:
            self._layers.expire(self._clock())
            total = self._hits + self._misses
            return {
                "hits": self._hits,
                "misses": self._misses,
                "evictions": self._layers.evictions,
                "hit_rate_percent": 100 * self._hits / total if total else 0.0,
                "total_requests": total,
                "size_mb": self._layers.num_bytes / MIB,
                "max_size_mb": self.max_bytes / MIB,
                "size_percent": 100 * self._layers.num_bytes / self.max_bytes,
                "time_saved_seconds": self._saved_seconds,
            }

    def print_stats(self, to: Console | TextIO | None = None) -> None:
        """Write the stats as a table to a rich console or a text file; without one, to the standard output."""
        from rich.console import Console
        from rich.table import Table

        stats = self.get_stats()
        table = Table("KV cache", "", show_edge=False)
        table.columns[1].justify = "right"
        table.add_row("requests", f"{stats['total_requests']:,}")
        table.add_row("hits", f"{stats['hits']:,} ({stats['hit_rate_percent']:.1f} %)")
        table.add_row("misses", f"{stats['misses']:,}")
        table.add_row("evictions", f"{stats['evictions']:,}")
        table.add_row(
            "size", f"{stats['size_mb']:,.1f} of {stats['max_size_mb']:,.1f} MB ({stats['size_percent']:.1f} %)"
        )
        table.add_row("time saved", f"{stats['time_saved_seconds']:,.2f} s")
        (to if isinstance(to, Console) else Console(file=to)).print(table)

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        with self._lock:
            self._layers.check_integrity()

    def _store(
        self, prefix: Prefix, kv: Mapping[int, KV], ttl_seconds: float | None, compute_seconds: float | None
    ) -> bool:
        digest, num_tokens = _key(prefix)
        ttl = self._ttl if ttl_seconds is None else _number(ttl_seconds, "ttl_seconds")
        if compute_seconds is not None:
            compute_seconds = _number(compute_seconds, "compute_seconds", above=False, most=1e12)
        sizes = {number: num_bytes(k, "k_tensor") + num_bytes(v, "v_tensor") for number, (k, v) in kv.items()}
        if sum(sizes.values()) > self.max_bytes:
            return False
        layers = {number: Layer((keep(k), keep(v)), sizes[number], ttl) for number, (k, v) in kv.items()}
        with self._lock:
            now = self._clock()
            self._layers.expire(now)
            self._layers.put(digest, num_tokens, layers, now)
            self._note_cost(list(layers.values()), compute_seconds)
        return True

    def _find(self, prefix: Prefix, numbers: Sequence[int]) -> list[KV] | None:
        digest, _ = _key(prefix)
        with self._lock:
            now = self._clock()
            self._layers.expire(now)
            found = self._layers.use(digest, numbers, now)
            if found is None:
                self._misses += 1
                return None
            self._hits += 1
            self._saved_seconds += sum(layer.compute_seconds for layer in found)
        return [(give(layer.kept[0], self.device), give(layer.kept[1], self.device)) for layer in found]

    def _note_cost(self, layers: list[Layer[KV]], compute_seconds: float | None) -> None:
        """What these layers, just stored, took to compute: as told, or as the timed miss says that they belong to."""
        timer = _timer.get()
        if compute_seconds is None and timer is not None and timer.cache() is self:
            if timer.seconds is None:
                timer.stored += layers
                return
            _timer.set(timer.outer)
            compute_seconds = timer.seconds
        for layer in layers:
            layer.compute_seconds = (compute_seconds or 0.0) / len(layers)


def _key(prefix: Prefix) -> tuple[bytes, int | None]:
    """SHA-256 of a prefix, and its number of tokens if it is not a string."""
    if isinstance(prefix, str):
        if not prefix:
            raise InvalidRequest("expected a prefix of at least one character, got an empty string", param="prefix")
        return hashlib.sha256(_TEXT + prefix.encode("utf-8", "surrogatepass")).digest(), None
    ids = as_token_ids(prefix)
    state = hashlib.sha256(_TOKENS)
    state.update(ids.data)
    return state.digest(), len(ids)


def _index(value: object, what: str, least: int = 0) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # what has no index is refused below
    except TypeError:
        number = -1
    if number < least or isinstance(value, bool):
        raise InvalidRequest(f"expected {what} to be an integer, {least} or more, got {value!r}", param=what)
    return number


def _number(value: object, what: str, *, above: bool = True, most: float = math.inf) -> float:
    """A number above 0 (or of at least 0) and at most `most`."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    if not (number > 0 or (number == 0 and not above)) or number > most:
        limits = f"{'above' if above else 'of at least'} 0" + (f" and at most {most:g}" if most < math.inf else "")
        raise InvalidRequest(f"expected {what} to be a number {limits}, got {value!r}", param=what)
    return number


def _shown(value: object) -> str:
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__
