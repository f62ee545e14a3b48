"""A tier over a dict, for tests of what stands above tiers. It can be made to fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rekindle.errors import TierUnavailable
from rekindle.kv.block import Block
from rekindle.kv.keys import Key
from rekindle.kv.tier import Place, TierStats


class DictTier:
    """Keeps everything; counts what it reads."""

    def __init__(self, name: str = "disk") -> None:
        self.name = name
        self.blocks: dict[Key, Block] = {}
        self.failing = False
        self.num_good: int | None = None  # blocks that can still be read before it fails
        self.num_read = 0
        self.touched: list[list[Key]] = []
        self.kept: dict[Key, float] = {}
        self.closed = False

    def _check(self) -> None:
        if self.failing:
            raise TierUnavailable(f"the {self.name} tier is made to fail")

    def get(self, places: Sequence[Place]) -> Iterator[Block | None]:
        for place in places:
            self.failing = self.failing or self.num_read == self.num_good
            self._check()
            self.num_read += 1
            yield self.blocks.get(place.key)

    def probe(self, *, writing: bool) -> None:
        self._check()

    def prepare(self) -> None:
        pass

    def contains(self, places: Sequence[Place]) -> list[bool]:
        self._check()
        return [place.key in self.blocks for place in places]

    def put(self, chain: Sequence[Block]) -> None:
        self._check()
        self.blocks |= {block.key: block for block in chain}

    def touch(self, places: Sequence[Place]) -> None:
        self._check()
        self.touched.append([place.key for place in places])

    def keep(self, places: Sequence[Place], until: float) -> None:
        self._check()
        self.kept |= {
            place.key: max(until, self.kept.get(place.key, 0)) for place in places if place.key in self.blocks
        }

    def release(self, places: Sequence[Place]) -> None:
        self._check()
        self.kept = {key: until for key, until in self.kept.items() if key not in {place.key for place in places}}

    def remove(self, places: Sequence[Place]) -> None:
        for place in places:
            self.blocks.pop(place.key, None)

    def clear(self) -> None:
        self._check()
        self.blocks.clear()

    def clear_model(self) -> None:
        self.clear()

    def stats(self) -> TierStats:
        size = sum(block.num_bytes for block in self.blocks.values())
        return TierStats(name=self.name, blocks=len(self.blocks), bytes=size, max_bytes=None)

    def check_integrity(self) -> None:
        assert all(key == block.key for key, block in self.blocks.items())

    def close(self) -> None:
        self.closed = True
