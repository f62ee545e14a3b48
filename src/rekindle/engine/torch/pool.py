"""The KV of all sequences: per layer one tensor of K and one of V, [cells, heads, width]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rekindle.engine.torch.gaps import runs
from rekindle.engine.torch.payload import PayloadLayout

Cells = npt.NDArray[np.int64]


class Pool:
    """Reads and writes cells. It knows neither sequences nor positions."""

    def __init__(self, layout: PayloadLayout, num_cells: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in layout.layers:
            for pools, width in ((self.keys, layer.key_dim), (self.values, layer.value_dim)):
                pools.append(torch.zeros(num_cells, layer.kv_heads, width, dtype=layout.dtype, device=device))

    def index(self, cells: Cells | Sequence[int]) -> slice | Tensor:
        """Cells as what a tensor is best indexed with: a slice if they are neighbours."""
        cells = np.asarray(cells, dtype=np.int64)
        parts = runs(cells)
        return slice(*parts[0]) if len(parts) == 1 else torch.from_numpy(cells).to(self.device)

    def save(self, cells: Cells) -> memoryview:
        """The payload of these cells, in this order."""
        index, data = self.index(cells), self.layout.allocate(len(cells))
        for layer, (key, value) in enumerate(self.layout.split(data, len(cells))):
            key.copy_(self.keys[layer][index])
            value.copy_(self.values[layer][index])
        return memoryview(data.numpy().data)

    def load(self, data: memoryview, cells: Cells, count: int, start: int = 0) -> None:
        """Into these cells, from a payload of `count` tokens, its tokens from `start` on."""
        index, part = self.index(cells), slice(start, start + len(cells))
        for layer, (key, value) in enumerate(self.layout.split(self.layout.wrap(data, count), count)):
            self.keys[layer][index] = key[part].to(self.device)
            self.values[layer][index] = value[part].to(self.device)

    def copy(self, source: Cells, target: Cells) -> None:
        """The KV of some cells into others, none of which is both."""
        origin, destination = self.index(source), self.index(target)
        for pool in (*self.keys, *self.values):
            pool[destination] = pool[origin]
