"""Attention over the pool, for a batch that holds tokens of several sequences in one row.

The model computes Q, K and V of all new tokens; this module writes K and V to the new tokens' cells and answers each query
from the cells of its own sequence. Keys of one query come in **parts** that need no mask: a run of neighbouring cells in
the pool, read in place; and among the new tokens themselves, the causal square. Each part gives an output and the logarithm
of its softmax's denominator, and parts are joined exactly by those (as in flash attention and flash-decoding,
https://arxiv.org/abs/2205.14135):

    out = Σ w_i out_i,  w_i = exp(lse_i - logsumexp(lse))

    keys:     |■■■■■■■■■■■■| |■■■■■■|        ◣         two runs of cells seen in full, then the causal square
    cells:     40 … 51        112…117     new tokens

Heads that share K and V (grouped queries) become rows of one product where there are few queries, so that K and V are read
once, and a batch dimension otherwise; they are never repeated. Queries of a sliding window are taken in blocks; each block
sees only the cells that its window can reach, under a mask that all layers of that window share.

In bfloat16 many queries are answered by two plain products with a softmax between them, block by block. On CPUs without
matrix units that takes half to a third of the time of the fused kernel, which is then far from what oneDNN's products
reach. Scores are rounded to bfloat16 on the way, as in transformers' "eager" attention; q and k were rounded as coarsely.
Softmax reads and writes bfloat16 and reckons in float32.

What the fused kernel can't do (soft caps, V of another width than K, devices other than the CPU) goes the plain way, which
is in `plain.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rekindle.engine.torch.borrow import ATTENTION
from rekindle.engine.torch.cells import Cells, Keys
from rekindle.engine.torch.gaps import runs
from rekindle.engine.torch.plain import Asked, Part, attend_plainly, plan_parts
from rekindle.engine.torch.pool import Pool
from rekindle.errors import ModelError
from rekindle.tokens import Tokens

_MAX_RUNS = 4  # more, and copying the cells together is cheaper than attending to each run
_BLOCK = 128  # queries that are answered together, in a sliding window or by plain products
_MANY = 16  # queries for which plain products pay, and from which on heads that share K and V are a batch dimension


@dataclass(frozen=True, eq=False)
class Span:
    """New tokens of one sequence at consecutive positions, and the keys that they may see."""

    tokens: Tokens  # [count]
    position: int  # of the first
    keys: tuple[Keys, ...]  # of each group of layers, up to position + count; the last `count` are the new tokens'
    logits: bool = False  # whether the last token's are wanted

    def part(self, start: int, stop: int) -> Span:
        """The tokens [start, stop) of this span."""
        keys = tuple(each.between(each.first, self.position + stop) for each in self.keys)
        last = stop == len(self.tokens)
        return Span(self.tokens[start:stop], self.position + start, keys, self.logits and last)


@dataclass(frozen=True, eq=False)
class _Block:
    """Queries that see the same parts."""

    start: int  # rows of the batch
    stop: int
    parts: tuple[slice | Tensor, ...]  # cells of the pool, all of which every query sees …
    mask: Tensor | None  # … but for this, over the last keys: [queries, keys], 0 or -inf; then there is one part
    is_causal: bool  # the queries also see each other's keys, up to their own
    by_products: bool = False


class Batch:
    """One call of the model. All layers of a group that have the same window share what is worked out here."""

    def __init__(self, pool: Pool, layers: dict[nn.Module, int], spans: Sequence[Span]) -> None:
        self._pool, self._layers = pool, layers
        self._spans = list(zip(np.cumsum([0, *(len(span.tokens) for span in spans)]).tolist(), spans, strict=False))
        self._targets = [
            pool.index(np.concatenate([span.keys[group].cells[-len(span.tokens) :] for span in spans]))
            for group in range(pool.groups.count)
        ]
        self._blocks: dict[tuple[int, int], list[_Block]] = {}  # by group and window
        self._plain_parts: dict[tuple[int, int], list[Part]] = {}

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
        """Q [1, heads, rows, key_dim], K and V [1, kv_heads, rows, width] to [1, rows, heads, value_dim]."""
        layer = self._layers[module]
        group = self._pool.groups.of[layer]
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        new = self._write(layer, key, value)
        if query.device.type != "cpu" or softcap or keys.shape[-1] != values.shape[-1]:
            parts = self._plain_parts.get((group, window))
            if parts is None:
                parts = self._plain_parts[group, window] = plan_parts(self._asked(group), window, query.device)
            return attend_plainly(parts, query[0], keys, values, scaling, softcap)[None]
        blocks = self._blocks.get((group, window))
        if blocks is None:
            blocks = self._blocks[group, window] = self._plan(group, window, query.dtype)
        outputs = [_attend_block(block, query, keys, values, new, scaling) for block in blocks]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens' K and V to their cells; [rows, kv_heads, width] of each."""
        new = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        targets = self._targets[self._pool.groups.of[layer]]
        self._pool.keys[layer][targets] = new[0]
        self._pool.values[layer][targets] = new[1]
        return new

    def _asked(self, group: int) -> list[Asked]:
        return [Asked(row, span.position, len(span.tokens), span.keys[group]) for row, span in self._spans]

    def _plan(self, group: int, window: int, dtype: torch.dtype) -> list[_Block]:
        blocks = []
        for row, span in self._spans:
            keys, count, end = span.keys[group], len(span.tokens), span.position + len(span.tokens)
            if count == 1:
                blocks.append(_Block(row, row + 1, self._parts(keys.cells[-window:]), None, False))
            elif dtype is torch.bfloat16 and count >= _MANY:
                blocks += self._masked_blocks(row, span, keys, window, dtype, by_products=True)
            elif not window or end - keys.first <= window:
                blocks.append(_Block(row, row + count, self._parts(keys.cells[:-count]), None, True))
            else:
                blocks += self._masked_blocks(row, span, keys, window, dtype)
        return blocks

    def _masked_blocks(
        self, row: int, span: Span, keys: Keys, window: int, dtype: torch.dtype, *, by_products: bool = False
    ) -> Iterator[_Block]:
        """Blocks whose keys are one part, from the first that a query sees to the last query's own."""
        for start in range(0, len(span.tokens), _BLOCK):
            stop = min(start + _BLOCK, len(span.tokens))
            queries = np.arange(span.position + start, span.position + stop)
            first = max(keys.first, int(queries[0]) - window + 1) if window else keys.first
            # without a window, all but the queries' own keys are seen by all, and plain products can leave them unmasked
            masked = np.arange(first if window else queries[0], queries[-1] + 1)
            distance = torch.from_numpy(queries[:, None] - masked[None, :])
            mask = torch.zeros(distance.shape, dtype=dtype)
            mask.masked_fill_((distance < 0) | (distance >= (window or span.position + stop)), float("-inf"))
            part = self._pool.index(keys.between(first, int(queries[-1]) + 1).cells)
            yield _Block(row + start, row + stop, (part,), mask, False, by_products)

    def _parts(self, cells: Cells) -> tuple[slice | Tensor, ...]:
        found = runs(cells)
        return tuple(slice(*run) for run in found) if len(found) <= _MAX_RUNS else (torch.from_numpy(cells),)


def _attend_block(
    block: _Block, query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor], scaling: float
) -> Tensor:
    """[queries, heads, width]."""
    if block.by_products:
        return _multiply(block, query, keys, values, scaling)
    heads, kv_heads, count = query.shape[1], keys.shape[1], block.stop - block.start
    groups = heads // kv_heads
    few = count < _MANY
    by_head = query[0, :, block.start : block.stop].reshape(kv_heads, groups, count, -1)
    rows = by_head.reshape(1, kv_heads, groups * count, -1) if few else by_head
    mask = block.mask if block.mask is None or not few else block.mask.repeat(groups, 1)
    results = []
    for part in block.parts:
        k, v = (_as_heads(pool[part], None if few else groups) for pool in (keys, values))
        results.append(_flash(rows, k, v, scaling, mask=mask))
    if block.is_causal:
        k, v = (_as_heads(each[block.start : block.stop], groups) for each in new)
        results.append(_flash(by_head, k, v, scaling, is_causal=True))
    shape = (kv_heads, groups, count)
    results = [(out.reshape(*shape, -1), lse.reshape(shape)) for out, lse in results]
    out = results[0][0] if len(results) == 1 else _join(results)
    return out.view(1, heads, -1) if count == 1 else out.permute(2, 0, 1, 3).reshape(count, heads, -1)


def _multiply(block: _Block, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """[queries, heads, width], by plain products."""
    heads, kv_heads, count = query.shape[1], keys.shape[1], block.stop - block.start
    rows = query[0, :, block.start : block.stop].reshape(kv_heads, -1, query.shape[-1])
    k, v = (pool[block.parts[0]].transpose(0, 1) for pool in (keys, values))
    scores = torch.baddbmm(rows.new_empty(1), rows, k.transpose(1, 2), beta=0, alpha=scaling)
    assert block.mask is not None
    scores.view(kv_heads, -1, count, k.shape[1])[..., -block.mask.shape[1] :] += block.mask
    out = torch.bmm(torch.softmax(scores, dim=-1), v)
    return out.view(kv_heads, -1, count, v.shape[-1]).permute(2, 0, 1, 3).reshape(count, heads, -1)


def _as_heads(cells: Tensor, groups: int | None) -> Tensor:
    """[cells, kv_heads, width] as the queries need it, not copied: a head's groups are rows of its product, or, where there
    is a number of them, heads that read the same K and V.
    """
    heads = cells.transpose(0, 1)
    return heads[None] if groups is None else heads[:, None].expand(-1, groups, -1, -1)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output as the query, and logsumexp [batch, heads, queries] in float32."""
    if mask is not None:
        mask = mask.expand(*query.shape[:2], -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
    )
    return out, lse


def _join(results: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all keys from attention over parts of them."""
    outs, lses = zip(*results, strict=True)
    weights = torch.softmax(torch.stack(lses), dim=0)
    total = sum(out * weight[..., None] for out, weight in zip(outs, weights, strict=True))
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    rekindle: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention functions."""
    if rekindle is None:
        raise ModelError("its layers do not pass keyword arguments on to their attention")
    if attention_mask is not None:
        others["attention_mask"] = attention_mask
    out = rekindle.attend(
        module,
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        others=others,
    )
    return out, None


AttentionInterface.register(ATTENTION, _attention)
