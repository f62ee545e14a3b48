"""Which layers share cells, so that what one kind of layer gives up another can use.

A model whose layers see all before them needs one cell for each token. Where some layers see a window only, the cells that
have left it are of use to others, if memory is not bound to a layer. So layers are taken in **groups** of the same number,
full ones apart from those with a window; a cell holds the KV of one token for the layers of one group; and any cell
can serve any group (as in vLLM's hybrid allocator, https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager.html).

    layers       w w w w w F w w w w w F      ten with a window, two that see all
    groups       0 0 1 1 2 2 3 3 4 4 and 5    of two layers each; a token takes six cells, and five of them come back

The number of layers in a group is the one that wastes least where it does not divide them. Models with one kind of layers
have one group. So have those whose layers keep different shapes: their cells would not fit each other, and nothing is
given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.engine.torch.payload import LayerShape

MAX_GROUPS = 16  # each has book-keeping of its own


@dataclass(frozen=True)
class Groups:
    """Who shares cells."""

    of: tuple[int, ...]  # each layer's group; those that see all come first
    place: tuple[int, ...]  # and its place in there
    count: int
    num_windowed: int  # so many of the last groups see a window only
    window: int  # the widest; 0 if nothing can be given up

    @property
    def size(self) -> int:
        """Layers of a group."""
        return max(self.place) + 1

    def is_windowed(self, group: int) -> bool:
        return group >= self.count - self.num_windowed

    @property
    def windowed_layers(self) -> frozenset[int]:
        return frozenset(layer for layer, group in enumerate(self.of) if self.is_windowed(group))


def make_groups(shapes: Sequence[LayerShape], windows: Sequence[int]) -> Groups:
    """For layers with these windows, 0 where a layer sees all."""
    full = [layer for layer, window in enumerate(windows) if not window]
    windowed = [layer for layer, window in enumerate(windows) if window]
    if not full or not windowed or len(set(shapes)) > 1:
        window = 0 if full else max(windows)
        return Groups((0,) * len(shapes), tuple(range(len(shapes))), 1, 1 if window else 0, window)
    size = _best_size(len(full), len(windowed))
    group, place = [0] * len(shapes), [0] * len(shapes)
    first = 0
    for kind in (full, windowed):
        for index, layer in enumerate(kind):
            group[layer], place[layer] = first + index // size, index % size
        first += -(-len(kind) // size)
    return Groups(tuple(group), tuple(place), first, -(-len(windowed) // size), max(windows))


def _best_size(full: int, windowed: int) -> int:
    """Layers of a group: the least waste, then the fewest groups."""

    def count(size: int) -> int:
        return -(-full // size) + -(-windowed // size)

    sizes = [size for size in range(1, full + windowed + 1) if count(size) <= MAX_GROUPS]
    return min(sizes, key=lambda size: (size * count(size), count(size)))
