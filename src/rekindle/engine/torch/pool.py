"""The KV of all sequences: tensors of K and of V, [cells, heads, width], one of each for every place in a group of layers.

A cell holds one token for the layers of one group (`groups.py`); what is called a cell elsewhere is one in each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rekindle.engine.torch.cells import Cells
from rekindle.engine.torch.gaps import runs
from rekindle.engine.torch.groups import Groups
from rekindle.engine.torch.payload import PayloadLayout

Index = slice | Tensor


class Pool:
    """Reads and writes cells. It knows neither sequences nor positions."""

    def __init__(self, layout: PayloadLayout, groups: Groups, num_cells: int, device: torch.device) -> None:
        self.layout = layout
        self.groups = groups
        self.device = device
        shapes = [layout.layers[groups.place.index(place)] for place in range(groups.size)]
        rows = num_cells * groups.count

        def tensor(heads: int, width: int) -> Tensor:
            return torch.zeros(rows, heads, width, dtype=layout.dtype, device=device)

        keys = [tensor(shape.kv_heads, shape.key_dim) for shape in shapes]
        values = [tensor(shape.kv_heads, shape.value_dim) for shape in shapes]
        self.keys = [keys[place] for place in groups.place]  # of each layer; layers at one place share
        self.values = [values[place] for place in groups.place]

    @property
    def bytes_per_cell(self) -> int:
        """Of one cell in every group."""
        shapes = [self.layout.layers[self.groups.place.index(place)] for place in range(self.groups.size)]
        return self.groups.count * self.layout.dtype.itemsize * sum(shape.values for shape in shapes)

    def index(self, cells: Cells | Sequence[int]) -> Index:
        """Cells as what a tensor is best indexed with: a slice if they are neighbours."""
        cells = np.asarray(cells, dtype=np.int64)
        parts = runs(cells)
        return slice(*parts[0]) if len(parts) == 1 else torch.from_numpy(cells).to(self.device)

    def save(self, cells: Sequence[Cells], count: int) -> memoryview:
        """The payload of `count` tokens, from each group's cells for them, in this order; a group with a window may have
        cells for the last of them only.
        """
        lacks = count - min(map(len, cells))
        data = self.layout.allocate(count, lacks).to(self.device)  # on a GPU one copy of all is much faster than many
        parts = self.layout.split(data, count, lacks)
        for (key, value), (keys, values, index) in zip(parts, self.layers(cells), strict=True):
            key.copy_(keys[index])
            value.copy_(values[index])
        return memoryview(data.cpu().numpy().data)

    def load(self, data: memoryview, cells: Sequence[Cells], count: int, *, lacks: int = 0, stop: int) -> None:
        """Into these cells of each group, from a payload of `count` tokens, the last of its tokens before `stop`."""
        there = self.layout.wrap(data, count, lacks).to(self.device)  # at once, as above
        parts = self.layout.split(there, count, lacks)
        for layer, ((key, value), (keys, values, index)) in enumerate(zip(parts, self.layers(cells), strict=True)):
            wanted = len(cells[self.groups.of[layer]])
            if not wanted:
                continue
            end = stop - (count - len(key))
            part = slice(end - wanted, end)
            keys[index] = key[part]
            values[index] = value[part]

    def copy(self, source: Sequence[Cells], target: Sequence[Cells]) -> None:
        """The KV of some cells of each group into others, none of which is both."""
        for (keys, values, origin), (_, _, destination) in zip(self.layers(source), self.layers(target), strict=True):
            keys[destination] = keys[origin]
            values[destination] = values[origin]

    def layers(self, cells: Sequence[Cells]) -> Iterator[tuple[Tensor, Tensor, Index]]:
        """K, V and where these cells are in them, layer by layer."""
        indexes = [self.index(each) for each in cells]
        for keys, values, group in zip(self.keys, self.values, self.groups.of, strict=True):
            yield keys, values, indexes[group]

    def shutdown(self) -> None:
        self.keys.clear()
        self.values.clear()
