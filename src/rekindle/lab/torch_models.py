"""Models for the torch engine with random weights: tiny ones of each architecture, and real shapes for measuring speed.

The tiny ones are made from transformers' own configuration classes, with what makes each architecture different switched
on: scaled RoPE, sliding windows, two RoPE bases, partial rotation, fused projections, experts. Weights are noise, scaled as
in `lab/architectures.py`: attention is sharp and logits spread like a trained model's, so damage to the KV shows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights

from rekindle.errors import InvalidRequest, nearest
from rekindle.lab.shapes import Shape, shape_named
from rekindle.lab.vocabulary import read_vocabulary
from rekindle.model import ember

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITHOUT_HEAD_DIM = {name: value for name, value in COMMON.items() if name != "head_dim"}

TINY: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=48),
    "qwen2": lambda: Qwen2Config(**WITHOUT_HEAD_DIM),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
        attn_logit_softcapping=10.0,
        final_logit_softcapping=30.0,
    ),
    "phi3": lambda: Phi3Config(
        **WITHOUT_HEAD_DIM,
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0 + 0.1 * i for i in range(4)],
            "long_factor": [2.0 + 0.7 * i for i in range(4)],
            "factor": 32.0,
        },
    ),
    "gpt-neox": lambda: GPTNeoXConfig(
        **{name: value for name, value in WITHOUT_HEAD_DIM.items() if name != "num_key_value_heads"},
        rotary_pct=0.25,
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **COMMON, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model of this architecture. Raises InvalidRequest for an unknown name."""
    if name not in TINY:
        raise InvalidRequest(f"no tiny model is called {name!r}{nearest(name, TINY)}", param="name")
    return random_model(TINY[name](), dtype, seed)


def real_model(shape: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of a published shape of `lab/shapes.py`. Raises InvalidRequest for one that has no class here."""
    return random_model(_config(shape_named(shape)), dtype, seed)


def random_model(config: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    """A causal language model with random weights, in evaluation mode."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, spread = _noise(name, parameter, config)
            parameter.normal_(mean, spread, generator=generator)
    return model.eval()


def _noise(name: str, parameter: nn.Parameter, config: Any) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's values."""
    is_gemma = config.model_type.startswith("gemma")
    sharp = sqrt(2.5)  # scores before the softmax get a standard deviation of 2.5
    has_head_norms = config.model_type in ("qwen3", "qwen3_moe", "gemma3_text")
    if parameter.ndim == 1:
        if "norm" not in name or name.endswith("bias"):
            return 0.0, 0.1
        mean = sharp if "q_norm" in name or "k_norm" in name else 1.0
        return mean - is_gemma, 0.1
    spread = 1 / sqrt(parameter.shape[-1])
    if "embed" in name:
        # tied: the output matrix too, and gemma scales embeddings by sqrt(width) on their way in
        return 0.0, (3.0 if config.tie_word_embeddings else 0.5) * (
            spread if is_gemma or config.tie_word_embeddings else 1
        )
    if "lm_head" in name:
        return 0.0, 3 * spread
    if any(part in name for part in ("o_proj", "down_proj", "attention.dense", "4h_to_h")):
        return 0.0, spread / sqrt(2 * config.num_hidden_layers)
    if not has_head_norms and any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value")):
        return 0.0, sharp * spread
    return 0.0, spread


def _config(shape: Shape) -> Any:
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary or len(read_vocabulary(ember.weights_path())),
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    base = {"rope_type": "default", "rope_theta": shape.rope_base}
    if shape.arch == "llama":
        return LlamaConfig(**common, rope_parameters=base)
    if shape.arch == "qwen3":
        return Qwen3Config(**common, rope_parameters=base)
    if shape.arch == "gemma3":
        types = ["full_attention" if shape.is_full_attention(i) else "sliding_attention" for i in range(shape.layers)]
        local = {"rope_type": "default", "rope_theta": shape.rope_base_local}
        return Gemma3TextConfig(
            **common,
            sliding_window=shape.window,
            layer_types=types,
            query_pre_attn_scalar=shape.head_dim,
            rope_parameters={"full_attention": base, "sliding_attention": local},
        )
    raise InvalidRequest(f"no class of transformers is known here for {shape.name} ({shape.arch})", param="shape")
