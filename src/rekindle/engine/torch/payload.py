"""The bytes of a payload, and how to look into them.

    layer 0: K of all tokens, V of all tokens; layer 1: K, V; …      nothing between, no header

K of one token is [kv_heads, key_dim] and V [kv_heads, value_dim], in the engine's type and the machine's byte order, K
already turned to the payload's position. So the size follows from the number of tokens, and a layer can be read as an
array in place. A payload may lack what layers with a sliding window keep of its first tokens; those layers then have the K
and V of the others only. LAYOUT names this format in every fingerprint; it changes when the format does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekindle.errors import ForeignPayload

LAYOUT = "torch 1: layers of K then V, each [tokens, heads, width]"


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps for one token."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def values(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class PayloadLayout:
    """Where each layer's K and V lie in a payload."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    windowed: frozenset[int] = frozenset()  # layers that may lack their first tokens

    @property
    def bytes_per_token(self) -> int:
        return self.dtype.itemsize * sum(layer.values for layer in self.layers)

    def num_bytes(self, count: int, lacks: int = 0) -> int:
        """Of a payload of `count` tokens, the first of which lack what layers with a window keep."""
        missing = lacks * sum(self.layers[layer].values for layer in self.windowed)
        return count * self.bytes_per_token - missing * self.dtype.itemsize

    def allocate(self, count: int, lacks: int = 0) -> Tensor:
        """Room for `count` tokens on the CPU, uint8[bytes]."""
        return torch.empty(self.num_bytes(count, lacks), dtype=torch.uint8)

    def wrap(self, data: memoryview, count: int, lacks: int = 0) -> Tensor:
        """A payload's bytes as a tensor that must not be written, uint8[bytes], not copied.

        Raises ForeignPayload if they are not `count` tokens.
        """
        self.check(data, count, lacks)
        if not data.nbytes:
            return self.allocate(0)
        # torch warns of buffers that can't be written; that nobody writes to this one is ours to see to
        view: Any = (ctypes.c_uint8 * data.nbytes).from_address(np.frombuffer(data, dtype=np.uint8).ctypes.data)
        view.owner = data  # the tensor keeps the view, and so the bytes
        return torch.frombuffer(view, dtype=torch.uint8)

    def check(self, data: memoryview, count: int, lacks: int = 0) -> None:
        """Raises ForeignPayload if these bytes can't be `count` tokens."""
        expected = self.num_bytes(count, lacks)
        if data.nbytes != expected:
            raise ForeignPayload(
                f"the payload is torn: {expected} bytes expected for {count} tokens, got {data.nbytes}"
            )

    def split(self, data: Tensor, count: int, lacks: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """K [count, kv_heads, key_dim] and V [count, kv_heads, value_dim] of each layer, as views of uint8[bytes].

        Layers with a window have `lacks` tokens less.
        """
        values = data.view(self.dtype)
        offset = 0
        for index, layer in enumerate(self.layers):
            pair, held = [], count - lacks if index in self.windowed else count
            for width in (layer.key_dim, layer.value_dim):
                size = held * layer.kv_heads * width
                pair.append(values[offset : offset + size].view(held, layer.kv_heads, width))
                offset += size
            yield pair[0], pair[1]

    def join(self, layers: Sequence[tuple[Tensor, Tensor]]) -> memoryview:
        """Bytes of K and V as `split` gives them."""
        count = len(layers[0][0])
        data = self.allocate(count)
        for (to_key, to_value), (key, value) in zip(self.split(data, count), layers, strict=True):
            to_key.copy_(key)
            to_value.copy_(value)
        return memoryview(data.numpy().data)
