"""What the engine must know of a model, found out by running a few tokens through it.

Each of the tokens is a sequence of its own, once for each of several positions, all in one call. A lone token attends to
itself only, so its attention is its V, and its K and V in every layer follow from token and position alone: what differs
between positions is the layer's rotation. The same call shows which layers ask for attention, with what shapes and
options. What has no meaning here is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rekindle.engine.torch.borrow import Borrowed
from rekindle.engine.torch.payload import LayerShape
from rekindle.engine.torch.rotation import TOLERANCE, Rotation, find_rotation, frequency_sets
from rekindle.errors import ModelError

_KNOWN_TYPES = {"full_attention", "sliding_attention"}
_RECURRENT_TYPES = {"conv", "linear_attention", "mamba", "hybrid", "hybrid_sliding"}
# Passed to attention functions by some models, and without meaning to ours.
_HARMLESS = {"position_ids", "position_embeddings", "cache_position", "use_cache", "is_causal", "layer_type"}
_NUM_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention layer."""

    shape: LayerShape
    window: int  # tokens that a query sees, itself included; 0 for all before it
    rotation: Rotation | None  # None if its keys can't be moved


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found."""

    layers: tuple[Layer, ...]
    modules: tuple[nn.Module, ...]  # the attention module of each layer
    dtype: torch.dtype  # of K and V
    immovable: str | None  # why keys can't be turned to another position, if so
    max_length: int  # longest sequence


@dataclass
class _Probe:
    """Stands where a batch stands in the engine's calls: records what the layers ask for."""

    modules: list[nn.Module] = field(default_factory=list)
    calls: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)  # K, V, window

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
        unknown = sorted(name for name, given in others.items() if name not in _HARMLESS and _means_something(given))
        if unknown:
            raise ModelError(f"its attention asks for {', '.join(unknown)}, which the torch engine does not know")
        if any(module is known for known in self.modules):
            raise ModelError("one attention module serves several layers")
        self.modules.append(module)
        self.calls.append((key[0].transpose(0, 1), value[0].transpose(0, 1), window))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def survey(model: Any, borrowed: Borrowed) -> Survey:
    """Look at a model. Raises ModelError if it can't be served."""
    _check_kind(model)
    positions = _positions(borrowed.max_length)
    ids = torch.arange(_NUM_TOKENS, device=model.device) * (model.config.get_text_config().vocab_size // _NUM_TOKENS)
    probe = _Probe()
    places = torch.tensor(positions, device=model.device).repeat_interleave(_NUM_TOKENS)
    try:
        with torch.inference_mode(), borrowed.lent():
            model(
                input_ids=ids.repeat(len(positions))[None],
                position_ids=places[None],
                use_cache=False,
                logits_to_keep=1,
                rekindle=probe,
            )
            sets = frequency_sets(model)
    except TypeError as error:
        raise ModelError(f"it can't be called as transformers' decoders are: {error}") from error
    expected = model.config.get_text_config().num_hidden_layers
    if len(probe.calls) != expected:
        raise ModelError(f"{len(probe.calls)} of its {expected} layers use transformers' attention interface")
    return _result(probe, positions, sets, borrowed.max_length)


def _result(probe: _Probe, positions: Sequence[int], sets: list[Tensor], max_length: int) -> Survey:
    layers, immovable = [], None
    for index, (key, value, window) in enumerate(probe.calls):
        at = dict(zip(positions, torch.split(key, _NUM_TOKENS), strict=True))
        values = torch.split(value, _NUM_TOKENS)
        rotation = find_rotation(at, sets)
        drift = max(float((each - values[0]).abs().max()) for each in values)
        if drift > TOLERANCE[value.dtype] * float(values[0].abs().max()):
            rotation = None
            immovable = immovable or f"layer {index}: V depends on the position"
        elif rotation is None:
            immovable = immovable or f"layer {index}: K does not turn by any frequencies that the model holds"
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        layers.append(Layer(shape, window, rotation))
    return Survey(tuple(layers), tuple(probe.modules), probe.calls[0][0].dtype, immovable, max_length)


def _check_kind(model: Any) -> None:
    """Refuse what can be told from the class and the config."""
    config = model.config.get_text_config()
    if model.training:
        raise ModelError("the model is in training mode; call model.eval() first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("it is an encoder-decoder; Rekindle serves decoder-only language models")
    types = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or types & _RECURRENT_TYPES:
        raise ModelError("it keeps a recurrent state, which can't be cut at any token")
    if types - _KNOWN_TYPES:
        raise ModelError(
            f"it has layers of type {', '.join(sorted(types - _KNOWN_TYPES))}, which the engine does not know"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError("its class does not use transformers' attention interface")


def _positions(max_length: int) -> list[int]:
    """0 and a few others, near and far."""
    return sorted({0, *(min(max_length - 1, position) for position in (1, 37, 1000, max_length // 2))})


def _means_something(given: object) -> bool:
    return given is not None and given is not False
