"""Ember's network: a Llama of four small layers, with four attention heads that training can watch.

The architecture is exactly that of `LlamaForCausalLM` (RMS norm, rotary positions in the half-split layout, grouped
queries, SwiGLU, tied embeddings), written out so that the attention weights of a few heads can be had for chosen rows
without computing any other. `state_for_transformers` gives the weights under Hugging Face's names.

RoPE's base is large (10⁷) for so short a context. Of a head's 16 frequencies the upper half then turn by less than one
radian over 4,096 positions: room for matching by content at any distance. The lower half still count neighbours.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

WATCHED_HEADS = {"subject": (1, 0), "value": (3, 0), "copy": (3, 1), "reverse": (3, 2)}  # name: (layer, head)


@dataclass(frozen=True)
class Shape:
    """The sizes of the network."""

    vocabulary_size: int
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_width: int = 32
    inner_width: int = 384
    context_length: int = 4096
    rope_base: float = 1e7
    norm_epsilon: float = 1e-5


@dataclass(frozen=True)
class Watch:
    """Rows of one supervised head and where they ought to look, as indices into the batch (int64, one length)."""

    batch: Tensor
    row: Tensor
    target: Tensor


Watches = Sequence[tuple[int, Watch]]  # of one layer: (head, watch)


def rotation(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for positions of any shape: (..., head_width), float32."""
    steps = torch.arange(0, shape.head_width, 2, dtype=torch.float32, device=positions.device) / shape.head_width
    angles = positions.float()[..., None] * shape.rope_base**-steps
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.queries = shape.num_heads * shape.head_width
        self.keys = shape.num_kv_heads * shape.head_width
        self.qkv = nn.Linear(shape.width, self.queries + 2 * self.keys, bias=False)
        self.out = nn.Linear(self.queries, shape.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, watches: Watches
    ) -> tuple[Tensor, list[Tensor]]:
        num_batch, length, _ = x.shape
        shape = self.shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        heads = self.qkv(x).view(num_batch, length, num_rotated + shape.num_kv_heads, shape.head_width).transpose(1, 2)
        rotated = _rotate(heads[:, :num_rotated], cos, sin)
        q, k, v = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], heads[:, num_rotated:]
        group = shape.num_heads // shape.num_kv_heads
        losses = [_watched_loss(q[:, head], k[:, head // group], watch) for head, watch in watches]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(num_batch, length, self.queries)), losses


def _watched_loss(q: Tensor, k: Tensor, watch: Watch) -> Tensor:
    """Mean −log attention weight from the watched rows to their targets. q, k: (batch, length, head_width)."""
    if len(watch.row) == 0:
        return q.new_zeros(())
    length = k.shape[1]
    places = torch.arange(length, device=q.device)
    losses = []
    for number in range(q.shape[0]):
        chosen = watch.batch == number
        rows, targets = watch.row[chosen], watch.target[chosen]
        scores = q[number, rows] @ k[number].T / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(places > rows[:, None], -torch.inf)
        losses.append(functional.cross_entropy(scores, targets, reduction="sum"))
    return torch.stack(losses).sum() / len(watch.row)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.attention = Attention(shape)
        self.inner_norm = nn.Parameter(torch.ones(shape.width))
        self.gate_up = nn.Linear(shape.width, 2 * shape.inner_width, bias=False)
        self.down = nn.Linear(shape.inner_width, shape.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, watches: Watches
    ) -> tuple[Tensor, list[Tensor]]:
        normed = functional.rms_norm(x, (self.shape.width,), self.attention_norm, self.shape.norm_epsilon)
        mixed, losses = self.attention(normed, cos, sin, mask, watches)
        x = x + mixed
        normed = functional.rms_norm(x, (self.shape.width,), self.inner_norm, self.shape.norm_epsilon)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up), losses


class Network(nn.Module):
    """Token ids (batch, length) to hidden states; `logits` turns those of chosen places into logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary_size, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = math.sqrt(2 * shape.num_layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.05 / depth)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        watches: Mapping[str, Watch] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states after the last norm (batch, length, width), and the loss of each watched head.

        Without `mask` (True: may be seen) attention is causal; without `positions` they count from 0.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rotation(self.shape, positions)
        x = self.embedding(ids)
        losses: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            names = [name for name in watches or {} if WATCHED_HEADS[name][0] == number]
            x, found = layer(x, cos, sin, mask, [(WATCHED_HEADS[name][1], (watches or {})[name]) for name in names])
            losses |= zip(names, found, strict=True)
        return functional.rms_norm(x, (self.shape.width,), self.norm, self.shape.norm_epsilon), losses

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.embedding.weight)


def config_for_transformers(shape: Shape) -> dict[str, object]:
    """`config.json` of the same network for `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 5,
        "dtype": "float16",
    }


def state_for_transformers(network: Network) -> dict[str, Tensor]:
    """The weights under the names of `LlamaForCausalLM`, in float32, sharing memory with the network's."""
    shape = network.shape
    queries, keys = shape.num_heads * shape.head_width, shape.num_kv_heads * shape.head_width
    state = {"model.embed_tokens.weight": network.embedding.weight, "model.norm.weight": network.norm}
    for number, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        prefix = f"model.layers.{number}."
        qkv = layer.attention.qkv.weight
        q, k, v = qkv[:queries], qkv[queries : queries + keys], qkv[queries + keys :]
        gate, up = layer.gate_up.weight.chunk(2)
        state |= {
            prefix + "input_layernorm.weight": layer.attention_norm,
            prefix + "self_attn.q_proj.weight": q,
            prefix + "self_attn.k_proj.weight": k,
            prefix + "self_attn.v_proj.weight": v,
            prefix + "self_attn.o_proj.weight": layer.attention.out.weight,
            prefix + "post_attention_layernorm.weight": layer.inner_norm,
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": layer.down.weight,
        }
    return {name: tensor.detach() for name, tensor in state.items()}


def load_network(folder: Path) -> Network:
    """The network of a folder in the Hugging Face layout that `export` wrote, in float32."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocabulary_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        inner_width=config["intermediate_size"],
        context_length=config["max_position_embeddings"],
        rope_base=config["rope_theta"],
        norm_epsilon=config["rms_norm_eps"],
    )
    network = Network(shape)
    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, tensor in state_for_transformers(network).items():
            tensor.copy_(saved[name])
    return network
