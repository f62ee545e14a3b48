"""The shapes of models that the lab can make: real ones, as published, and tiny ones of the same architectures.

A shape is everything that decides what a model costs (layers, widths, heads, vocabulary, window) and nothing about what
it says. The real ones let speed and memory be measured without a download; the tiny ones load in milliseconds, so that
every architecture's cache can be tested on every run. Head widths are multiples of 64: KV types
with blocks of 32 (q8_0, q4_0) fit, and llama.cpp can shift such keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rekindle.errors import InvalidRequest, nearest

Architecture = Literal["llama", "qwen3", "gemma3", "mamba", "lfm2"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The hyperparameters of one model. Fields that an architecture has no use for keep their zero."""

    name: str
    arch: Architecture
    vocabulary: int | None  # tokens; None takes the tokenizer's own
    context: int  # longest sequence, in tokens, that the model claims to read
    layers: int
    width: int  # of the residual stream
    ffn: int = 0  # inner width of the feed-forward network
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    norm_epsilon: float = 1e-6
    rope_base: float = 0.0
    tied: bool = True  # the output matrix is the embedding table
    # gemma3: every period-th layer sees everything, the others a sliding window
    # lfm2: every period-th layer has attention, the others a short convolution
    period: int = 0
    window: int = 0  # gemma3: tokens seen by a local layer
    rope_base_local: float = 0.0  # gemma3: of the local layers
    state: int = 0  # mamba: numbers of state per channel
    convolution: int = 0  # mamba, lfm2: taps of the short convolution
    step_rank: int = 0  # mamba: rank of the step size's projection

    def __post_init__(self) -> None:
        assert self.arch == "mamba" or (self.head_dim % 32 == 0 and self.heads % self.kv_heads == 0)
        assert self.arch != "gemma3" or (self.window and self.period and self.rope_base_local)
        assert self.arch != "lfm2" or self.heads * self.head_dim == self.width
        assert self.arch != "mamba" or (self.state and self.convolution and self.step_rank)

    def is_full_attention(self, layer: int) -> bool:
        """Whether this layer (from 0) sees every earlier token."""
        return self.arch != "mamba" and (self.period == 0 or layer % self.period == self.period - 1)


# https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0 (config.json)
_TINYLLAMA = Shape(
    name="tinyllama-1.1b",
    arch="llama",
    vocabulary=32_000,
    context=2_048,
    layers=22,
    width=2_048,
    ffn=5_632,
    heads=32,
    kv_heads=4,
    head_dim=64,
    norm_epsilon=1e-5,
    rope_base=10_000.0,
    tied=False,
)

# https://huggingface.co/Qwen/Qwen3-0.6B (config.json)
_QWEN3 = Shape(
    name="qwen3-0.6b",
    arch="qwen3",
    vocabulary=151_936,
    context=40_960,
    layers=28,
    width=1_024,
    ffn=3_072,
    heads=16,
    kv_heads=8,
    head_dim=128,
    rope_base=1_000_000.0,
)

# https://huggingface.co/google/gemma-3-270m (config.json)
_GEMMA3 = Shape(
    name="gemma3-270m",
    arch="gemma3",
    vocabulary=262_144,
    context=32_768,
    layers=18,
    width=640,
    ffn=2_048,
    heads=4,
    kv_heads=1,
    head_dim=256,
    rope_base=1_000_000.0,
    period=6,
    window=512,
    rope_base_local=10_000.0,
)

_TINY_LLAMA = replace(
    _TINYLLAMA,
    name="tiny-llama",
    vocabulary=None,
    context=4_096,
    layers=3,
    width=128,
    ffn=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
)

_TINY_QWEN3 = replace(
    _QWEN3,
    name="tiny-qwen3",
    vocabulary=None,
    context=4_096,
    layers=3,
    width=128,
    ffn=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
)

_TINY_GEMMA3 = replace(
    _GEMMA3,
    name="tiny-gemma3",
    vocabulary=None,
    context=4_096,
    layers=6,  # local, local, global, local, local, global
    width=96,
    ffn=192,
    heads=4,
    kv_heads=2,
    head_dim=64,
    period=3,
    window=32,
)

_TINY_MAMBA = Shape(
    name="tiny-mamba",
    arch="mamba",
    vocabulary=None,
    context=4_096,
    layers=3,
    width=128,
    norm_epsilon=1e-5,
    state=16,
    convolution=4,
    step_rank=8,
)

_TINY_HYBRID = Shape(
    name="tiny-hybrid",
    arch="lfm2",
    vocabulary=None,
    context=4_096,
    layers=4,  # convolution, attention, convolution, attention
    width=128,
    ffn=256,
    heads=4,
    kv_heads=2,
    head_dim=32,
    norm_epsilon=1e-5,
    rope_base=1_000_000.0,
    period=2,
    convolution=3,
)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _GEMMA3,
        _QWEN3,
        _TINYLLAMA,
        _TINY_LLAMA,
        _TINY_QWEN3,
        _TINY_GEMMA3,
        _TINY_MAMBA,
        _TINY_HYBRID,
    )
}


def shape_named(name: str) -> Shape:
    """The shape of this name. Raises InvalidRequest, with the nearest known name, if there is none."""
    try:
        return SHAPES[name.casefold()]
    except KeyError:
        raise InvalidRequest(f"no model shape is called {name!r}{nearest(name, SHAPES)}", param="shape") from None
