"""A GGUF file opened by llama.cpp: its weights (or only its vocabulary) and the facts in its metadata."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp

from rekindle.errors import ModelError
from rekindle.model import llama_log

MAGIC = b"GGUF"


class GgufModel:
    """Owns llama.cpp's model handle. Close it after every context that was made from it."""

    def __init__(self, path: Path, *, gpu_layers: int = 0, vocab_only: bool = False) -> None:
        """Raises ModelError if the file is missing, not a GGUF, torn, or of an architecture llama.cpp lacks."""
        self.path = path
        _check_file(path)
        llama_log.install()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocab_only
        llama_log.take_errors()
        self.handle: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ModelError(f"llama.cpp cannot load {path}: {llama_log.take_errors() or 'no reason given'}")

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary handle. Raises ModelError after `close`."""
        if not self.handle:
            raise ModelError(f"the model {self.name} is closed")
        return llama_cpp.llama_model_get_vocab(self.handle)

    def close(self) -> None:
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None

    def metadata(self, key: str) -> str | None:
        """A metadata value as text, or None."""
        size = 1 << 10
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def architecture(self) -> str:
        return self.metadata("general.architecture") or "unknown"

    @property
    def description(self) -> str:
        """Architecture, size class and quantisation, e.g. "llama 1B Q4_K - Medium"."""
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.handle, buffer, 256)
        return buffer.value.decode("utf-8", "replace")

    @property
    def vocab_size(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self.vocab))

    @property
    def num_layers(self) -> int:
        return int(llama_cpp.llama_model_n_layer(self.handle))

    @property
    def train_context(self) -> int:
        return int(llama_cpp.llama_model_n_ctx_train(self.handle))

    @property
    def num_parameters(self) -> int:
        return int(llama_cpp.llama_model_n_params(self.handle))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(llama_cpp.llama_model_size(self.handle))

    @property
    def window(self) -> int:
        """Sliding window in tokens, 0 if there is none."""
        return int(llama_cpp.llama_model_n_swa(self.handle))

    @property
    def uncuttable(self) -> str | None:
        """Why this model's cache cannot be cut at a token; None if it can."""
        if llama_cpp.llama_model_is_recurrent(self.handle):
            return "recurrent: its state after a token cannot be taken back to an earlier one"
        if llama_cpp.llama_model_is_hybrid(self.handle):
            return "hybrid: some of its layers are recurrent, their state cannot be taken back to an earlier token"
        if not llama_cpp.llama_model_has_decoder(self.handle) or llama_cpp.llama_model_has_encoder(self.handle):
            return "not a decoder-only model"
        return None

    def kv_bytes_per_token(self, kv_type: str = "f16") -> int:
        """Bytes of K and V of one token over all layers, from the metadata."""
        bits = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}[kv_type]
        heads = int(llama_cpp.llama_model_n_head_kv(self.handle))
        value = int(self.metadata(f"{self.architecture}.attention.value_length") or self.head_size)
        return int(self.num_layers * heads * (self.head_size + value) * bits / 8)

    @property
    def head_size(self) -> int:
        """Width of one attention head's keys."""
        stated = self.metadata(f"{self.architecture}.attention.key_length")
        heads = max(1, int(llama_cpp.llama_model_n_head(self.handle)))
        return int(stated or int(llama_cpp.llama_model_n_embd(self.handle)) // heads)


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise ModelError(f"there is no model file at {path}") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder; a .gguf file is expected") from None
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror}") from None
    if start != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {start!r}, expected {MAGIC!r}")
