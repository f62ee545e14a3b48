"""What the lab's tests share."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF that holds a byte-level BPE, four special tokens and three merges, and nothing else."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.gguf"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*SPECIAL, *alphabet, "Ġt", "Ġth", "Ġthe"]
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.CONTROL)] * 4 + [int(gguf.TokenType.NORMAL)] * (len(tokens) - 4))
    writer.add_token_merges(["Ġ t", "Ġt h", "Ġth e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path
