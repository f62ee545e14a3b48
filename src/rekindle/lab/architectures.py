"""What a GGUF of each architecture holds: its metadata and, tensor by tensor, how random weights are drawn.

The weights are noise, but the noise is scaled so that the model behaves like one that reads its context. Four aims, in
every architecture:

* **Nothing overflows.** Projections keep the root mean square (RMS) of what they read; the 2 x layers updates that are
  added to the residual stream sum to an RMS of about 1.
* **Attention is sharp.** Scores before the softmax have a standard deviation of 2.5, so a token attends to a few
  others and not to all alike. With flat attention the KV would average out, and damage to it would hardly show.
* **Logits spread like a trained model's**, with a standard deviation of 3.
* **Greedy decoding is not stuck.** With tied embeddings a token's own row lies in the residual stream and votes for
  itself again. Its RMS there is 0.5 / sqrt(width) of the updates', which gives it a lead of half a standard deviation,
  and the model does not repeat one token for ever.
* **Padding is never said.** Rows of the output matrix beyond the tokenizer's own tokens are a tenth as loud, so greedy
  answers are text, which a client can see arrive, and which has about as many tokens when it is read again.

Norm weights jitter around their mean by a tenth, so that a forgotten or swapped norm shows. GGUF stores gemma's norm
weights with the 1 already added (its converter does so, and llama.cpp multiplies by them as they are), so they are
drawn around 1 here as in every other architecture.

Shapes are written as numpy writes them: (rows, columns) = (outputs, inputs); a GGUF lists them the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod, sqrt

import gguf
import numpy as np
import numpy.typing as npt

from rekindle.lab.shapes import Shape

_SCORE_SPREAD = 2.5  # standard deviation of attention scores before the softmax
_LOGIT_SPREAD = 3.0  # standard deviation of logits
_EMBEDDING_RMS = 0.5  # of untied embeddings: less than the updates, so that the context outweighs the last token
_SELF_VOTE = 0.5  # by how many standard deviations a tied embedding may favour its own token
_NORM_JITTER = 0.1
PADDING_LOUDNESS = 0.1  # of the rows of padding tokens in what makes logits
_SILU_GAIN = 0.6  # RMS of silu(x) for standard normal x, rounded


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written: normal noise, or `values` where noise would not do."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    spread: float = 0.0  # standard deviation
    single: bool = False  # kept in float32 whatever the file's type
    makes_logits: bool = False  # a row for each token of the vocabulary
    values: npt.NDArray[np.float32] | None = None

    @property
    def num_values(self) -> int:
        return prod(self.shape)


def tensors(shape: Shape, vocabulary: int) -> Iterator[Tensor]:
    """Every tensor of a model of this shape with `vocabulary` tokens, in the order of the file."""
    yield from _ends(shape, vocabulary)
    for layer in range(shape.layers):
        for tensor in _layer(shape, layer):
            yield replace(tensor, name=f"blk.{layer}.{tensor.name}")


def write_metadata(writer: gguf.GGUFWriter, shape: Shape, vocabulary: int) -> None:
    """Add the hyperparameters to a GGUF that is being written."""
    writer.add_name(f"{shape.name}-random")
    writer.add_description("Random weights of a real architecture, for measuring speed and memory. It says nothing.")
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(shape.context)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    if shape.arch == "mamba":
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(shape.convolution)
        writer.add_ssm_inner_size(2 * shape.width)
        writer.add_ssm_state_size(shape.state)
        writer.add_ssm_time_step_rank(shape.step_rank)
        return
    writer.add_head_count(shape.heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.arch == "lfm2":
        writer.add_head_count_kv([shape.kv_heads * shape.is_full_attention(i) for i in range(shape.layers)])
        writer.add_shortconv_l_cache(shape.convolution)
    else:
        writer.add_head_count_kv(shape.kv_heads)
    if shape.arch == "gemma3":
        writer.add_sliding_window(shape.window)
        writer.add_sliding_window_pattern([not shape.is_full_attention(i) for i in range(shape.layers)])
        writer.add_rope_freq_base_swa(shape.rope_base_local)


def _norm(name: str, width: int, mean: float = 1.0) -> Tensor:
    return Tensor(f"{name}.weight", (width,), mean, _NORM_JITTER * mean, single=True)


def _matrix(name: str, outputs: int, inputs: int, gain: float = 1.0) -> Tensor:
    """A projection whose output has `gain` times the RMS of its input."""
    return Tensor(f"{name}.weight", (outputs, inputs), spread=gain / sqrt(inputs))


def _residual_rms(shape: Shape) -> float:
    """RMS that all updates of the residual stream reach together. Gemma norms each one to 1; elsewhere we choose 1."""
    return sqrt(2 * shape.layers) if shape.arch == "gemma3" else 1.0


def _ends(shape: Shape, vocabulary: int) -> Iterator[Tensor]:
    """Embeddings, the last norm and the output matrix."""
    width = shape.width
    last_norm = "token_embd_norm" if shape.arch == "lfm2" else "output_norm"
    if not shape.tied:
        yield Tensor("token_embd.weight", (vocabulary, width), spread=_EMBEDDING_RMS)
        yield _norm(last_norm, width)
        yield replace(_matrix("output", vocabulary, width, _LOGIT_SPREAD), makes_logits=True)
        return
    entering_rms = _SELF_VOTE / sqrt(width) * _residual_rms(shape)
    # gemma multiplies embeddings by sqrt(width) on their way in, not on their way out
    spread = entering_rms / sqrt(width) if shape.arch == "gemma3" else entering_rms
    yield Tensor("token_embd.weight", (vocabulary, width), spread=spread, makes_logits=True)
    yield _norm(last_norm, width, mean=_LOGIT_SPREAD / (spread * sqrt(width)))


def _layer(shape: Shape, layer: int) -> Iterator[Tensor]:
    if shape.arch == "mamba":
        yield from _mamba(shape)
        return
    update = _residual_rms(shape) / sqrt(2 * shape.layers)
    yield _norm("attn_norm", shape.width)
    if shape.arch == "lfm2" and not shape.is_full_attention(layer):
        yield from _short_convolution(shape, update)
    else:
        yield from _attention(shape, update)
    if shape.arch == "gemma3":
        yield _norm("post_attention_norm", shape.width)
    yield _norm("ffn_norm", shape.width)
    yield _matrix("ffn_gate", shape.ffn, shape.width)
    yield _matrix("ffn_up", shape.ffn, shape.width)
    yield _matrix("ffn_down", shape.width, shape.ffn, update / _SILU_GAIN)
    if shape.arch == "gemma3":
        yield _norm("post_ffw_norm", shape.width)


def _attention(shape: Shape, update: float) -> Iterator[Tensor]:
    sharpen = sqrt(_SCORE_SPREAD)  # once in the queries, once in the keys
    has_norms = shape.arch != "llama"
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield _matrix("attn_q", queries, shape.width, 1.0 if has_norms else sharpen)
    yield _matrix("attn_k", keys, shape.width, 1.0 if has_norms else sharpen)
    yield _matrix("attn_v", keys, shape.width)
    yield _matrix("attn_output", shape.width, queries, update)
    if has_norms:
        yield _norm("attn_q_norm", shape.head_dim, sharpen)
        yield _norm("attn_k_norm", shape.head_dim, sharpen)


def _short_convolution(shape: Shape, update: float) -> Iterator[Tensor]:
    """LFM2: the input splits in three, two gates around a convolution over the last few tokens."""
    taps = (shape.width, shape.convolution)
    yield _matrix("shortconv.in_proj", 3 * shape.width, shape.width)
    yield Tensor("shortconv.conv.weight", taps, spread=1 / sqrt(shape.convolution), single=True)
    yield _matrix("shortconv.out_proj", shape.width, shape.width, update)


def _mamba(shape: Shape) -> Iterator[Tensor]:
    """Mamba (https://arxiv.org/abs/2312.00752): the paper's own start for A, D and the step size, noise elsewhere."""
    inner, state, rank = 2 * shape.width, shape.state, shape.step_rank
    decays = np.tile(-np.arange(1, state + 1, dtype=np.float32), (inner, 1))
    steps = np.geomspace(1e-3, 1e-1, inner)
    inverse_softplus = np.log(np.expm1(steps)).astype(np.float32)
    update = _residual_rms(shape) / sqrt(shape.layers)
    yield _norm("attn_norm", shape.width)
    yield _matrix("ssm_in", 2 * inner, shape.width)
    yield Tensor("ssm_conv1d.weight", (inner, shape.convolution), spread=1 / sqrt(shape.convolution), single=True)
    yield Tensor("ssm_conv1d.bias", (inner,), spread=0.1, single=True)
    yield _matrix("ssm_x", rank + 2 * state, inner, 1 / _SILU_GAIN)
    yield _matrix("ssm_dt", inner, rank)
    yield Tensor("ssm_dt.bias", (inner,), single=True, values=inverse_softplus)
    yield Tensor("ssm_a", (inner, state), single=True, values=decays)
    yield Tensor("ssm_d", (inner,), single=True, values=np.ones(inner, np.float32))
    yield _matrix("ssm_out", shape.width, inner, update / _SILU_GAIN**2)
