"""The same weights in two formats: GGUF for llama.cpp, and a folder in the Hugging Face layout for transformers.

Matrices are rounded to float16 once, and both files hold these same numbers (norms too are rounded to float16, and
written to the GGUF as float32, as llama.cpp wants them). llama.cpp turns neighbouring pairs of a head's numbers where
transformers turns the halves, so the rows of the query and key matrices are put in that order for the GGUF.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from rekindle.model import ember
from rekindle.model.ember import dialogue
from rekindle.model.ember.network import Network, Shape, config_for_transformers, state_for_transformers
from rekindle.model.ember.tokenizer import token_id

LICENSE = "apache-2.0"
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of `LlamaForCausalLM`."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def interleave_heads(weight: NDArray[np.float16], num_heads: int) -> NDArray[np.float16]:
    """Reorder a query or key matrix from halves (transformers) to neighbouring pairs (llama.cpp)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `ember.gguf` and `hf/` into the folder, over what is there."""
    state = {
        name: tensor.cpu().to(torch.float16).contiguous() for name, tensor in state_for_transformers(network).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_transformers(network.shape, state, tokenizer, folder / "hf")
    _write_gguf(network.shape, state, tokenizer, folder / "ember.gguf")


def _write_transformers(shape: Shape, state: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": dialogue.BOS,
        "eos_token": dialogue.END,
        "pad_token": dialogue.PAD,
        "model_max_length": shape.context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": dialogue.CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 5, "do_sample": False}
    for name, content in (
        ("config.json", config_for_transformers(shape)),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_gguf(shape: Shape, state: dict[str, Tensor], tokenizer: Tokenizer, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(ember.NAME)
    writer.add_license(LICENSE)
    writer.add_description("Answers questions about short records in its context. Trained by Rekindle.")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(shape.vocabulary_size)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.inner_width)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    add_vocabulary(writer, tokenizer)
    for name, tensor in state.items():
        array = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = interleave_heads(array, shape.num_heads if "q_proj" in name else shape.num_kv_heads)
        writer.add_tensor(gguf_name(name), array if array.ndim == 2 else array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Write tokens, merges, special tokens and the chat template."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: int(item[1]))]
    special = set(dialogue.SPECIAL_TOKENS)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(token_id(tokenizer, dialogue.BOS))
    writer.add_eos_token_id(token_id(tokenizer, dialogue.END))
    writer.add_eot_token_id(token_id(tokenizer, dialogue.END))
    writer.add_pad_token_id(token_id(tokenizer, dialogue.PAD))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(dialogue.CHAT_TEMPLATE)
