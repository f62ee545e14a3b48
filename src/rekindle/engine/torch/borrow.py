"""A model that somebody else may hold, changed for the length of a call and then as it was.

Two things are changed. The attention function, by the name in its configs. And RoPE whose frequencies depend on the longest
sequence of a batch (dynamic NTK, longrope) is pinned to one set of frequencies: KV that was computed with one set means
nothing to queries of another, and in a packed batch a long sequence would change its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ATTENTION = "rekindle"
_Change = tuple[Any, str, Any]  # owner, name of its attribute, value for the length of a call
_PINNED = "pinned by rekindle"  # any type that is neither "dynamic" nor "longrope"


class Borrowed:
    """What to change in a model and what that means for the length of its sequences."""

    def __init__(self, model: nn.Module, num_cells: int, max_length: int | None) -> None:
        """`max_length`: the longest sequence that will be computed; longrope takes its long factors from there."""
        self.max_length = num_cells if max_length is None else max_length
        configs: dict[int, Any] = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
        self._attention: list[_Change] = [(config, "_attn_implementation", ATTENTION) for config in configs.values()]
        self._frequencies: list[_Change] = []
        rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
        for module in rotary:
            self._pin(module)
        if not rotary:  # positions are looked up in a table, if at all
            table = getattr(configs[id(model.config)].get_text_config(), "max_position_embeddings", num_cells)
            self.max_length = min(self.max_length, int(table))

    def lent(self) -> AbstractContextManager[None]:
        """While inside, the model computes for the engine."""
        return _changed(self._attention + self._frequencies)

    def pinned(self) -> AbstractContextManager[None]:
        """While inside, the model computes on its own, but with the frequencies that the engine uses."""
        return _changed(self._frequencies)

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
            self._frequencies.append((rotary, f"{prefix}inv_freq", frequencies))
        if moving:
            pinned = {layer: _PINNED if layer in moving else kind for layer, kind in types.items()}
            self._frequencies.append((rotary, "rope_type", pinned.get(None, pinned)))


@contextmanager
def _changed(changes: Sequence[_Change]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _long_frequencies(rotary: Any, layer: str | None, short_limit: int) -> torch.Tensor:
    device = next(iter(rotary.buffers())).device
    options = {} if layer is None else {"layer_type": layer}
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, device, seq_len=short_limit + 1, **options)
    assert isinstance(frequencies, torch.Tensor)
    return frequencies
