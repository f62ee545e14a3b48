"""Calls of the model that are made to look: what a layer would keep, and where attention goes.

Both are a batch (`attention.py`) that does a little more, or less, than answer its queries. A **probe** lets the layers
before some layer work as always, writes that layer's K and V to the new tokens' cells and then ends the call, by an
exception that passes through the model's own code: whatever the architecture, nothing behind is computed. A **watched**
batch answers its queries and adds up what each key gets of their attention, by plain products, in blocks of queries so
that scores of a long context stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rekindle.engine.torch.attention import Batch, Span
from rekindle.engine.torch.pool import Pool

_BLOCK = 64  # queries


class Reached(Exception):
    """A probe has come to its layer: not an error, and never seen outside the engine."""


class Probe(Batch):
    """See the module's docstring."""

    def __init__(self, pool: Pool, layers: dict[nn.Module, int], spans: Sequence[Span], *, last: int) -> None:
        super().__init__(pool, layers, spans)
        self.last = last

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        layer = self._layers[module]
        if layer < self.last:
            return super().attend(module, query, key, value, **others)
        self._write(layer, key, value)
        raise Reached


class Watched(Batch):
    """See the module's docstring; of one sequence's tokens."""

    def __init__(self, pool: Pool, layers: dict[nn.Module, int], spans: Sequence[Span], *, received: Tensor) -> None:
        """`received`: float32[length of the sequence] on the pool's device, to which is added."""
        super().__init__(pool, layers, spans)
        self._received = received

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int,
        softcap: float,
        others: dict[str, Any],
    ) -> Tensor:
        out = super().attend(module, query, key, value, scaling=scaling, window=window, softcap=softcap, others=others)
        for row, span in self._spans:
            for start in range(0, len(span.tokens), _BLOCK):
                part = span.part(start, min(start + _BLOCK, len(span.tokens)))
                rows = query[0, :, row + start : row + start + len(part.tokens)]
                self._watch(self._layers[module], part, rows, scaling, window, softcap)
        return out

    def _watch(self, layer: int, part: Span, query: Tensor, scaling: float, window: int, softcap: float) -> None:
        """Of queries [heads, count, key_dim]."""
        end = part.position + len(part.tokens)
        keys = part.keys[self._pool.groups.of[layer]]
        keys = keys.between(max(keys.first, part.position - window + 1) if window else keys.first, end)
        k = self._pool.keys[layer][self._pool.index(keys.cells)].float()  # [keys, kv_heads, key_dim]
        grouped = query.float().reshape(k.shape[1], -1, query.shape[-1])  # [kv_heads, heads of each * count, key_dim]
        scores = torch.bmm(grouped, k.permute(1, 2, 0)).mul_(scaling)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(part.position, end)[:, None] - torch.arange(keys.first, end)[None]
        hidden = (distance < 0) | (distance >= (window or end))
        scores = scores.view(query.shape[0], len(part.tokens), -1).masked_fill_(hidden.to(scores.device), float("-inf"))
        self._received[keys.first : end] += scores.softmax(-1).sum(dim=(0, 1))
