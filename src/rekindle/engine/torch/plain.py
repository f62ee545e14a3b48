"""Attention the plain way: keys gathered, one mask. For what the CPU's fused kernel can't do, and for other devices.

What is gathered is worked out once for all layers of a group that have the same window, and is on the device before the
first of them asks. Single tokens of many sequences, as decoding has them, are answered together, their keys padded to the
longest: on a GPU a layer's time is that of starting its kernels, and so there are a few instead of a few for each sequence.

    keys of three sequences, one query each      ■■■■■■■■■■■■
                                                 ■■■■■········    · masked
                                                 ■■■■■■■■■···
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from rekindle.engine.torch.cells import Keys

_MAX_WASTE = 2.0  # keys gathered for each that is seen; beyond, sequences of about the same length go together


@dataclass(frozen=True, eq=False)
class Part:
    """Queries that are answered together: of several sequences one each, or of one sequence any number."""

    rows: Tensor  # [sequences, queries] of the batch
    cells: Tensor  # [sequences, keys]
    mask: Tensor | None  # [sequences, 1, queries, keys], True where a key is seen; None if all see all


@dataclass(frozen=True, eq=False)
class Asked:
    """One sequence's new tokens in a batch."""

    row: int  # of the first
    position: int  # of the first
    count: int
    keys: Keys  # up to the last of them


def plan_parts(asked: Sequence[Asked], window: int, device: torch.device) -> list[Part]:
    """For layers that see `window` tokens, or all if that is 0."""
    singles = [each for each in asked if each.count == 1]
    parts = [_single_tokens(some, window, device) for some in _alike(singles, window)]
    return parts + [_one_sequence(each, window, device) for each in asked if each.count > 1]


def attend_plainly(
    parts: Sequence[Part], query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Q [heads, rows, key_dim] over a layer's cells [cells, kv_heads, width] to [rows, heads, value_dim]."""
    heads, kv_heads = query.shape[0], keys.shape[1]
    out = query.new_empty(query.shape[1], heads, values.shape[-1])
    for part in parts:
        count, queries = part.rows.shape
        # heads that share K and V are so many queries more: [sequences, kv_heads, groups * queries, width]
        rows = query[:, part.rows.flatten()].view(kv_heads, heads // kv_heads, count, queries, -1)
        rows = rows.permute(2, 0, 1, 3, 4).reshape(count, kv_heads, -1, query.shape[-1])
        k, v = (pool[part.cells].transpose(1, 2) for pool in (keys, values))
        mask = part.mask
        if mask is not None and queries > 1:
            mask = mask.repeat(1, 1, heads // kv_heads, 1)
        answer = _answer(rows, k, v, mask, scaling, softcap)
        answer = answer.view(count, kv_heads, heads // kv_heads, queries, -1).permute(0, 3, 1, 2, 4)
        out[part.rows.flatten()] = answer.reshape(count * queries, heads, -1)
    return out


def _answer(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float) -> Tensor:
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = torch.tanh(query.float() @ key.float().transpose(-1, -2) * (scaling / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


def _seen(asked: Asked, window: int) -> Keys:
    """The keys that any of the queries sees."""
    end = asked.position + asked.count
    return asked.keys.between(max(0, asked.position + 1 - window) if window else 0, end)


def _alike(singles: Sequence[Asked], window: int) -> Iterator[list[Asked]]:
    """Sequences that are worth padding to the longest of them, longest first."""
    some: list[Asked] = []
    longest = seen = 0
    for each in sorted(singles, key=lambda each: -len(_seen(each, window).cells)):
        count = len(_seen(each, window).cells)
        if some and longest * (len(some) + 1) > _MAX_WASTE * (seen + count):
            yield some
            some, seen = [], 0
        longest = longest if some else count
        some.append(each)
        seen += count
    if some:
        yield some


def _single_tokens(asked: Sequence[Asked], window: int, device: torch.device) -> Part:
    seen = [_seen(each, window).cells for each in asked]
    lengths = np.array([len(cells) for cells in seen])
    cells = np.zeros((len(seen), lengths.max()), dtype=np.int64)
    for row, each in zip(cells, seen, strict=True):
        row[: len(each)] = each
    rows = np.array([[each.row] for each in asked])
    mask = np.arange(lengths.max()) < lengths[:, None]
    is_even = bool(mask.all())
    return Part(
        torch.from_numpy(rows).to(device),
        torch.from_numpy(cells).to(device),
        None if is_even else torch.from_numpy(mask)[:, None, None].to(device),
    )


def _one_sequence(asked: Asked, window: int, device: torch.device) -> Part:
    seen = _seen(asked, window)
    queries = torch.arange(asked.position, asked.position + asked.count)
    keys = torch.arange(seen.first, asked.position + asked.count)
    distance = queries[:, None] - keys[None, :]
    mask = (distance >= 0) & (distance < window) if window else distance >= 0
    rows = torch.arange(asked.row, asked.row + asked.count)
    return Part(rows[None].to(device), torch.from_numpy(seen.cells)[None].to(device), mask[None, None].to(device))
