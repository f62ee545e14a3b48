"""Choices that look before they compute, as arms for the torch engine: what the literature does.

**deviation** (CacheBlend, https://arxiv.org/abs/2405.16444). All tokens are computed in the layers before `layer`; there,
fresh K (or V) is compared with that of the chunk on its own, and from there on only the most deviating tokens are computed.
Computing all tokens up to a layer gives what full prefill gives there. So the outcome is put together here from both: full
prefill's KV before that layer, the chunks' own from it on, and then the chosen tokens recomputed, each seeing all before
it. The outcome is CacheBlend's; the time is not, so none is reported. Budget counts the layers that all tokens go through,
but not the product that makes the layer's own K or V of all tokens.

**query** (as ProphetKV and others choose). Placed tokens to which the question attends most, summed over its tokens, heads
and layers, are recomputed; the question is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rekindle.engine.protocol import Payload, Range, SequenceId, Work
from rekindle.engine.torch.attention import Batch
from rekindle.engine.torch.engine import TorchEngine
from rekindle.engine.torch.insight import LayerKV
from rekindle.lab.blend_run import ChunkKV, Reading, read_blended
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Plan
from rekindle.reuse.prompt import Prompt
from rekindle.tokens import Tokens

Floats = npt.NDArray[np.float32]


def read_deviating(
    engine: TorchEngine, prompt: Prompt, kv: ChunkKV, full: SequenceId, *, layer: int, part: str, ratio: float
) -> Reading:
    """CacheBlend's rule at a layer (from 0), on "K" or "V". `full`: the prompt's prefill, which stays as it is."""
    fresh = engine.look(engine.export(full, 0, len(prompt)))
    spans = [chunk for chunk in prompt.chunks if len(chunk)]
    own = [kv.warm(prompt.tokens[chunk.start : chunk.stop]) for chunk in spans]
    mixed = [(each.key.transpose(0, 1).clone(), each.value.transpose(0, 1).clone()) for each in fresh]
    scores = np.full(len(prompt), -1.0, dtype=np.float32)
    for chunk, payload in zip(spans, own, strict=True):
        placed, at = engine.look(payload, chunk.start), slice(chunk.start, chunk.stop)
        scores[at] = _distance(placed[layer], fresh[layer], at, part)
        for index in range(layer, len(mixed)):
            mixed[index][0][at] = placed[index].key.transpose(0, 1)
            mixed[index][1][at] = placed[index].value.transpose(0, 1)
    seq = engine.open()
    engine.place(seq, Payload(prompt.tokens, 0, engine.layout.join(mixed), engine.spec.fingerprint), 0)
    num_chosen = _recompute(engine, seq, prompt, scores, ratio)
    share = layer / engine.spec.num_layers
    computed = round(share * len(prompt) + (1 - share) * num_chosen)
    return Reading(seq, math.nan, computed, 2, Plan((), 0, None))


def _distance(placed: LayerKV, fresh: LayerKV, at: slice, part: str) -> Floats:
    """[tokens] between a chunk's own K or V, turned to its place, and the fresh one."""
    one, other = (each.key if part == "K" else each.value for each in (placed, fresh))
    difference = one.float() - other[:, at].float()
    return np.asarray(difference.square().sum(dim=(0, 2)).sqrt().numpy(), dtype=np.float32)


def read_asked(engine: TorchEngine, prompt: Prompt, kv: ChunkKV, question: Tokens, *, ratio: float) -> Reading:
    """Recompute what the question attends to most."""
    reading = read_blended(engine, prompt, kv, Blend("none", 0.0))
    fork = engine.fork(reading.seq, len(prompt))
    with _watched() as seen:
        engine.forward([Work(fork, question, logits=False)])
    engine.close(fork)
    is_chunk = np.zeros(len(prompt), dtype=bool)
    for chunk in prompt.chunks:
        is_chunk[chunk.start : chunk.stop] = True
    total = torch.stack(seen).sum(dim=0)[: len(prompt)].numpy()
    num_chosen = _recompute(engine, reading.seq, prompt, np.where(is_chunk, total, -1.0).astype(np.float32), ratio)
    return replace(reading, seconds=math.nan, computed=num_chosen + reading.computed + len(question))


def _recompute(engine: TorchEngine, seq: SequenceId, prompt: Prompt, scores: Floats, ratio: float) -> int:
    """Recompute the highest scores and all that is in no chunk (negative scores); how many tokens that was."""
    chunked = np.flatnonzero(scores >= 0)
    best = chunked[np.argsort(-scores[chunked], kind="stable")[: round(ratio * len(chunked))]]
    chosen = np.union1d(best, np.flatnonzero(scores < 0))
    engine.recompute(seq, _ranges(chosen.tolist()))
    return len(chosen)


def _ranges(places: Sequence[int]) -> list[Range]:
    ranges: list[Range] = []
    for place in places:
        if ranges and ranges[-1][1] == place:
            ranges[-1] = (ranges[-1][0], place + 1)
        else:
            ranges.append((place, place + 1))
    return ranges


@contextmanager
def _watched() -> Iterator[list[Tensor]]:
    """While inside, each layer's attention of one span's queries is added up over queries and heads: [keys]."""
    seen: list[Tensor] = []
    attend = Batch.attend

    def watch(batch: Batch, module: Any, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        out = attend(batch, module, query, key, value, **others)
        ((_, span),) = batch._spans
        layer = batch._layers[module]
        cells = span.keys[batch._pool.groups.of[layer]].cells  # of all tokens, for nothing was released
        keys = batch._pool.keys[layer][torch.from_numpy(cells)].transpose(0, 1)
        groups = query.shape[1] // keys.shape[0]
        scores = query[0].float() @ keys.repeat_interleave(groups, 0).float().transpose(1, 2) * others["scaling"]
        count = len(span.tokens)
        hidden = torch.ones(count, len(cells), dtype=torch.bool).triu(len(cells) - count + 1)
        seen.append(scores.masked_fill(hidden, -math.inf).softmax(-1).sum(dim=(0, 1)).cpu())
        return out

    with patch.object(Batch, "attend", watch):
        yield seen
