"""One model, opened: its files, tokenizer and chat template.

There are two kinds. A GGUF file is opened by llama.cpp, with its weights; a folder of safetensors is only looked at, and
its weights are loaded when an engine is made. Exactly one of `gguf` and `hf` is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.errors import ModelError
from rekindle.model.gguf import GgufModel
from rekindle.model.hf import HfModel
from rekindle.model.hf_tokenizer import HfTokenizer
from rekindle.model.source import BUILTIN, HUB, locate
from rekindle.model.template import ChatTemplate
from rekindle.model.tokenizer import GgufTokenizer


@dataclass(frozen=True, eq=False)
class Model:
    """What a name like "builtin" or "models/qwen.gguf" stands for, ready to use."""

    name: str
    path: Path
    tokenizer: GgufTokenizer | HfTokenizer
    template: ChatTemplate | None  # None: a base model, without chat
    gguf: GgufModel | None = None  # a file, for llama.cpp
    hf: HfModel | None = None  # a folder, for PyTorch

    @classmethod
    def open(cls, name: str, *, engine: str = "auto", gpu_layers: int = 0, vocab_only: bool = False) -> Model:
        """Find and open a model for an engine: "llama", "torch", "toy", or "auto": the one that fits. Raises ModelError."""
        path = locate(name, engine)
        if path.is_dir():
            if engine == "llama":
                raise ModelError(
                    f"{path} is a folder, and llama.cpp reads .gguf files; leave the engine to auto, or give such a file"
                )
            return cls._open_folder(name, path)
        if path.suffix == ".safetensors":
            raise ModelError(f"{path} holds weights alone; give the folder with it, config.json and tokenizer.json")
        if engine == "torch" and path.exists():
            raise ModelError(
                f"{path} is a file, and the torch engine reads folders with config.json and *.safetensors; "
                "leave the engine to auto for a .gguf file"
            )
        return cls._open_file(name, path, gpu_layers, vocab_only)

    @classmethod
    def _open_file(cls, name: str, path: Path, gpu_layers: int, vocab_only: bool) -> Model:
        gguf = GgufModel(path, gpu_layers=gpu_layers, vocab_only=vocab_only)
        try:
            tokenizer = GgufTokenizer(gguf)
            template = _template(gguf.metadata("tokenizer.chat_template"), tokenizer)
            return cls("ember" if name == BUILTIN else path.stem, path, tokenizer, template, gguf=gguf)
        except ModelError:
            gguf.close()
            raise

    @classmethod
    def _open_folder(cls, name: str, path: Path) -> Model:
        hf = HfModel(path)
        tokenizer = HfTokenizer(hf, hf.vocab_size)
        return cls(_folder_name(name, path), path, tokenizer, _template(hf.chat_template, tokenizer), hf=hf)

    @property
    def train_context(self) -> int:
        """Tokens it was trained to see."""
        opened = self.gguf or self.hf
        assert opened is not None
        return opened.train_context

    def close(self) -> None:
        if self.gguf is not None:
            self.gguf.close()


def file_state(path: Path) -> dict[str, Any]:
    """What tells whether a model's files are still the same: path, size and time of change, of a folder in all.

    Raises OSError.
    """
    files = [each.stat() for each in path.iterdir() if each.is_file()] if path.is_dir() else [path.stat()]
    return {
        "path": str(path.resolve()),
        "size": sum(each.st_size for each in files),
        "mtime_ns": max((each.st_mtime_ns for each in files), default=0),
    }


def _template(source: str | None, tokenizer: GgufTokenizer | HfTokenizer) -> ChatTemplate | None:
    if source is None:
        return None
    bos, eos = tokenizer.special_text(tokenizer.bos), tokenizer.special_text(tokenizer.eos)
    return ChatTemplate(source, bos=bos, eos=eos)


def _folder_name(name: str, path: Path) -> str:
    if name == BUILTIN:
        return "ember"
    if name.startswith(HUB):  # its folder is named after a commit
        return name.removeprefix(HUB).partition(":")[0].rpartition("/")[2]
    return path.resolve().name
