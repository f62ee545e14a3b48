"""The inside of `SimpleKVCache`: layers of prefixes within a byte budget and their time to live.

**What goes when it is full.** A forward pass continues from all layers of a prefix or from none, so a prefix that has
lost a layer is worth little. Recency therefore belongs to prefixes: the one used longest ago loses its layers, one by
one, as room is needed, and once it has lost one, reading the rest does not renew it (storing does). So no second prefix
is broken while the remains of a first could make room. Between the layers of one prefix, the one used longest ago goes
first.

    oldest prefix                       newest prefix
    | 3 | 1 | 2 |   | 0 | 1 | 2 | 3 |   | 0 | 1 | 2 | 3 |
      next victim     oldest layer first

It knows neither tensors nor hashing nor locks: a layer is something with a size, a prefix is a digest.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Kept = TypeVar("Kept")
_SPARE_ALARMS = 64  # of layers that are gone, kept before the heap is made anew


@dataclass(eq=False, slots=True)
class Layer(Generic[Kept]):
    """One layer of one prefix. `kept` is never changed, so it may be read without the lock."""

    kept: Kept
    num_bytes: int
    ttl_seconds: float
    compute_seconds: float = 0.0  # what a hit saves; 0 if nobody told
    due: float = math.inf  # when it expires


@dataclass(eq=False, slots=True)
class _Prefix(Generic[Kept]):
    num_tokens: int | None  # None: not made of tokens
    layers: OrderedDict[int, Layer[Kept]] = field(default_factory=OrderedDict)  # oldest first; never empty
    lost: set[int] = field(default_factory=set)  # layers that were here once


class Layers(Generic[Kept]):
    """Not thread-safe; `SimpleKVCache` guards it. Call `expire` first, then anything else with the time it was given."""

    def __init__(self, max_bytes: int, *, idle: bool) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_layers = 0
        self.evictions = 0  # layers that gave way to others
        self._idle = idle  # a use puts off a layer's expiry
        self._prefixes: OrderedDict[bytes, _Prefix[Kept]] = OrderedDict()  # oldest first
        self._lengths: Counter[int] = Counter()  # tokens of a prefix -> how many prefixes have so many
        self._alarms: list[tuple[float, bytes, int]] = []  # heap of (time, digest, number), see `expire`

    def put(self, digest: bytes, num_tokens: int | None, layers: Mapping[int, Layer[Kept]], now: float) -> None:
        """Add layers of one prefix, over what is there of them, and make room. Together they must fit."""
        assert sum(layer.num_bytes for layer in layers.values()) <= self.max_bytes
        for number, layer in layers.items():
            layer.due = now + layer.ttl_seconds
            self._change(digest, number, layer, num_tokens)
        self._prefixes.move_to_end(digest)
        while self.num_bytes > self.max_bytes:  # the new layers are last in both orders, and they fit: never a victim
            victim = next(iter(self._prefixes))
            self._change(victim, next(iter(self._prefixes[victim].layers)), None)
            self.evictions += 1

    def use(self, digest: bytes, numbers: Sequence[int], now: float) -> list[Layer[Kept]] | None:
        """These layers, now just used; None, and nothing changes, unless all are there."""
        known = self._prefixes.get(digest)
        if known is None or any(number not in known.layers for number in numbers):
            return None
        for number in numbers:
            known.layers.move_to_end(number)
            if self._idle:
                known.layers[number].due = now + known.layers[number].ttl_seconds
        if not known.lost:
            self._prefixes.move_to_end(digest)
        return [known.layers[number] for number in numbers]

    def numbers(self, digest: bytes) -> list[int]:
        """Which layers of a prefix are there, in order."""
        known = self._prefixes.get(digest)
        return [] if known is None else sorted(known.layers)

    def is_whole(self, digest: bytes, num_layers: int | None) -> bool:
        """Whether layers 0 … num_layers-1 are there or, for None, the prefix is known and has lost no layer."""
        known = self._prefixes.get(digest)
        if known is None:
            return False
        return not known.lost if num_layers is None else all(number in known.layers for number in range(num_layers))

    def lengths(self, most: int) -> list[int]:
        """Different numbers of tokens, up to `most`, that known prefixes have, in order."""
        return sorted(length for length in self._lengths if length <= most)

    def remove(self, digest: bytes, number: int) -> None:
        """Remove a layer that is there."""
        self._change(digest, number, None)

    def clear(self) -> None:
        for digest, known in list(self._prefixes.items()):
            for number in list(known.layers):
                self._change(digest, number, None)
        self._alarms.clear()

    def expire(self, now: float) -> None:
        """Remove what is due.

        A use moves a layer's expiry but not its alarm, and a replaced layer's alarm stays: one that goes off too early is
        set anew, for the layer that is there then.
        """
        while self._alarms and self._alarms[0][0] <= now:
            _, digest, number = heapq.heappop(self._alarms)
            known = self._prefixes.get(digest)
            layer = None if known is None else known.layers.get(number)
            if layer is None:
                continue
            if layer.due > now:
                self._set_alarm(digest, number, layer)
            else:
                self._change(digest, number, None)

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        layers = [layer for known in self._prefixes.values() for layer in known.layers.values()]
        assert self.num_bytes == sum(layer.num_bytes for layer in layers) <= self.max_bytes
        assert self.num_layers == len(layers)
        assert all(known.layers for known in self._prefixes.values()), "a prefix without layers"
        assert not any(known.lost & known.layers.keys() for known in self._prefixes.values())
        lengths = [known.num_tokens for known in self._prefixes.values() if known.num_tokens is not None]
        assert dict(self._lengths) == dict(Counter(lengths))
        alarms = {(digest, number): when for when, digest, number in sorted(self._alarms, reverse=True)}  # the earliest
        for digest, known in self._prefixes.items():
            for number, layer in known.layers.items():
                assert layer.due == math.inf or alarms[digest, number] <= layer.due
        assert len(self._alarms) <= 2 * self.num_layers + _SPARE_ALARMS

    def _change(self, digest: bytes, number: int, layer: Layer[Kept] | None, num_tokens: int | None = None) -> None:
        """The one place where bytes come and go."""
        known = self._prefixes.get(digest)
        if known is None:
            known = self._prefixes[digest] = _Prefix(num_tokens)
            if num_tokens is not None:
                self._lengths[num_tokens] += 1
        old = known.layers.pop(number, None)
        if old is not None:
            self.num_bytes -= old.num_bytes
            self.num_layers -= 1
        if layer is None:
            known.lost.add(number)
        else:
            known.lost.discard(number)
            known.layers[number] = layer
            self.num_bytes += layer.num_bytes
            self.num_layers += 1
            self._set_alarm(digest, number, layer)
        if not known.layers:
            del self._prefixes[digest]
            if known.num_tokens is not None:
                self._lengths[known.num_tokens] -= 1
                if not self._lengths[known.num_tokens]:
                    del self._lengths[known.num_tokens]
        self._trim_alarms()

    def _set_alarm(self, digest: bytes, number: int, layer: Layer[Kept]) -> None:
        if layer.due < math.inf:
            heapq.heappush(self._alarms, (layer.due, digest, number))

    def _trim_alarms(self) -> None:
        """Keep the heap from filling with alarms of layers that are gone, which may be due in a long time."""
        if len(self._alarms) <= 2 * self.num_layers + _SPARE_ALARMS:
            return
        self._alarms = [
            (layer.due, digest, number)
            for digest, known in self._prefixes.items()
            for number, layer in known.layers.items()
            if layer.due < math.inf
        ]
        heapq.heapify(self._alarms)
