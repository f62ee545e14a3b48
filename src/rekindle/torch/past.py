"""KV between an engine's sequence and transformers' `past_key_values`.

Both keep K already turned to its position, so nothing is computed on the way: tensors are copied. A cache that transformers
makes for a model with sliding windows keeps only what each window can still see. That is enough to go on from, but not to
be put into an engine, which promises every earlier length: such a cache is refused. One made by `DynamicCache()`, without
a config, is complete, and so are those that are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from rekindle.engine.protocol import Payload, SequenceId
from rekindle.engine.torch.payload import LayerShape
from rekindle.errors import InvalidRequest
from rekindle.tokens import Tokens, as_tokens
from rekindle.torch.attach import AttachedEngine


def to_dynamic_cache(engine: AttachedEngine, seq: SequenceId, length: int | None = None) -> Any:
    """A `transformers.DynamicCache` with the KV of a sequence's first `length` tokens, or all; on the model's device.

    The tensors are copies, [1, kv_heads, tokens, head size]. Raises UnknownSequence, BadRange.
    """
    payload = engine.export(seq, 0, engine.length(seq) if length is None else length)
    return cache_of(engine, [payload])


def cache_of(engine: AttachedEngine, payloads: Sequence[Payload]) -> Any:
    """The same of payloads that follow each other, the first at position 0."""
    cache = DynamicCache()
    for payload in payloads:
        for index, layer in enumerate(engine.look(payload) if len(payload) else ()):
            key, value = (each[None].to(engine.model.device) for each in (layer.key, layer.value))
            cache.update(key, value, index)
    return cache


def from_dynamic_cache(engine: AttachedEngine, cache: Any, tokens: Sequence[int] | Tokens) -> SequenceId:
    """A new sequence with the KV of a cache of transformers, which this model has made of just these tokens.

    Raises InvalidRequest if the cache's shapes, type or length are not what they would be then, ContextFull.
    """
    payload = payload_of(engine, cache, as_tokens(tokens))
    seq = engine.open()
    try:
        engine.place(seq, payload, 0)
    except BaseException:
        engine.close(seq)
        raise
    return seq


def payload_of(engine: AttachedEngine, cache: Any, tokens: Tokens) -> Payload:
    """The KV of tokens from position 0, as an engine's payload. Raises InvalidRequest."""
    expected = engine.layout.layers
    layers = getattr(cache, "layers", None)
    if layers is None or len(layers) != len(expected):
        got = "no layers" if layers is None else f"{len(layers)} layers"
        raise InvalidRequest(f"a DynamicCache of {len(expected)} layers is expected, got {got}", param="cache")
    pairs = []
    for index, (layer, shape) in enumerate(zip(layers, expected, strict=True)):
        key = _checked(engine, layer.keys, index, "K", len(tokens), shape, shape.key_dim)
        value = _checked(engine, layer.values, index, "V", len(tokens), shape, shape.value_dim)
        pairs.append((key, value))
    return Payload(tokens, 0, engine.layout.join(pairs), engine.spec.fingerprint)


def _checked(
    engine: AttachedEngine, values: Tensor | None, index: int, which: str, count: int, shape: LayerShape, width: int
) -> Tensor:
    """[tokens, kv_heads, width] of one layer."""
    wanted, dtype = (1, shape.kv_heads, count, width), engine.layout.dtype
    if values is None:
        raise InvalidRequest(f"layer {index} of the cache is empty; {count} tokens are expected", param="cache")
    got = tuple(values.shape)
    if got == wanted and values.dtype is dtype:
        return values[0].transpose(0, 1)
    if len(got) == 4 and got[2] < count and got[:2] + got[3:] == wanted[:2] + wanted[3:]:
        raise InvalidRequest(
            f"layer {index} of the cache holds {got[2]} of {count} tokens; if it has a sliding window, make the cache with "
            "DynamicCache(), without the model's config, so that nothing is forgotten",
            param="cache",
        )
    raise InvalidRequest(
        f"{which} of layer {index} is {list(got)} in {values.dtype}, expected {list(wanted)} in {dtype}", param="cache"
    )
