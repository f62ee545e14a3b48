"""One model, opened: its file, tokenizer and chat template, and the llama.cpp handle that an engine computes with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rekindle.errors import ModelError
from rekindle.model.gguf import GgufModel
from rekindle.model.source import BUILTIN, locate
from rekindle.model.template import ChatTemplate
from rekindle.model.tokenizer import GgufTokenizer


@dataclass(frozen=True, eq=False)
class Model:
    """What a name like "builtin" or "models/qwen.gguf" stands for, ready to use."""

    name: str
    path: Path
    gguf: GgufModel
    tokenizer: GgufTokenizer
    template: ChatTemplate | None  # None: a base model, without chat

    @classmethod
    def open(cls, name: str, *, gpu_layers: int = 0, vocab_only: bool = False) -> Model:
        """Find and load a model. Raises ModelError."""
        path = locate(name)
        gguf = GgufModel(path, gpu_layers=gpu_layers, vocab_only=vocab_only)
        try:
            return cls("ember" if name == BUILTIN else path.stem, path, gguf, *_text_parts(gguf))
        except ModelError:
            gguf.close()
            raise

    def close(self) -> None:
        self.gguf.close()


def _text_parts(gguf: GgufModel) -> tuple[GgufTokenizer, ChatTemplate | None]:
    tokenizer = GgufTokenizer(gguf)
    source = gguf.metadata("tokenizer.chat_template")
    if source is None:
        return tokenizer, None
    bos, eos = tokenizer.special_text(tokenizer.bos), tokenizer.special_text(tokenizer.eos)
    return tokenizer, ChatTemplate(source, bos=bos, eos=eos)
