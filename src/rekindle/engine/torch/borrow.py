"""A model that somebody else may hold, changed for the length of a call and then as it was.

Two things are changed. The attention function, by the name in its configs. And RoPE whose frequencies depend on the longest
sequence of a batch (dynamic NTK, longrope) is pinned to one set of frequencies: KV that was computed with one set means
nothing to queries of another, and in a packed batch a long sequence would change its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ATTENTION = "rekindle"
_PINNED = "pinned by rekindle"  # any type that is neither "dynamic" nor "longrope"


class Borrowed:
    """What to change in a model and what that means for the length of its sequences."""

    def __init__(self, model: nn.Module, num_cells: int, max_length: int | None) -> None:
        """`max_length`: the longest sequence that will be computed; longrope takes its long factors from there."""
        self.max_length = num_cells if max_length is None else min(num_cells, max_length)
        self._changes: list[tuple[Any, str, Any]] = []
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        self._changes += [(config, "_attn_implementation", ATTENTION) for config in configs.values()]
        for module in model.modules():
            if hasattr(module, "rope_type"):
                self._pin(module)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While inside, the model computes for the engine."""
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in self._changes]
        try:
            for owner, name, value in self._changes:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in reversed(before):
                setattr(owner, name, value)

    def _pin(self, rotary: Any) -> None:
        types = rotary.rope_type if isinstance(rotary.rope_type, Mapping) else {None: rotary.rope_type}
        moving = {layer: kind for layer, kind in types.items() if "dynamic" in kind or kind == "longrope"}
        for layer, kind in moving.items():
            prefix = "" if layer is None else f"{layer}_"
            parameters = rotary.config.rope_parameters if layer is None else rotary.config.rope_parameters[layer]
            frequencies = getattr(rotary, f"{prefix}original_inv_freq")
            if kind != "longrope":  # they would change beyond the length of training, with every token
                self.max_length = min(self.max_length, int(rotary.config.max_position_embeddings))
            elif self.max_length > parameters["original_max_position_embeddings"]:
                frequencies = _long_frequencies(rotary, layer, parameters["original_max_position_embeddings"])
            self._changes.append((rotary, f"{prefix}inv_freq", frequencies))
        if moving:
            pinned = {layer: _PINNED if layer in moving else kind for layer, kind in types.items()}
            self._changes.append((rotary, "rope_type", pinned.get(None, pinned)))


def _long_frequencies(rotary: Any, layer: str | None, short_limit: int) -> torch.Tensor:
    device = next(iter(rotary.buffers())).device
    options = {} if layer is None else {"layer_type": layer}
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, device, seq_len=short_limit + 1, **options)
    assert isinstance(frequencies, torch.Tensor)
    return frequencies
