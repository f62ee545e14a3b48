"""A GGUF file opened by llama.cpp: its weights (or only its vocabulary) and the facts in its metadata."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp

from rekindle.errors import ModelError
from rekindle.model import llama_log
from rekindle.model.fingerprint import FileStates, weights_files
from rekindle.model.header import MAGIC, read_header


class GgufModel:
    """Owns llama.cpp's model handle. Close it after every context that was made from it."""

    def __init__(self, path: Path, *, gpu_layers: int = 0, vocab_only: bool = False) -> None:
        """Raises ModelError if the file is missing, not a GGUF, torn, or of an architecture llama.cpp lacks."""
        self.path = path
        _check_file(path)
        self._header = read_header(path)
        self.files = FileStates(weights_files(path))
        llama_log.install()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocab_only
        llama_log.take_errors()
        self.handle: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelError(self._why_not(llama_log.take_errors()))

    def _why_not(self, complaint: str) -> str:
        """What llama.cpp's refusal means, and what to do."""
        if "unknown model architecture" in complaint:
            return (
                f"{self.path} is a model of the architecture {self._header.get('general.architecture')!r}, which "
                f"llama-cpp-python {llama_cpp.__version__} does not know; a newer one may, or take another model"
            )
        return f"llama.cpp cannot load {self.path}: {complaint or 'no reason given'}; if it was copied, get it again"

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
        stated = self._fact("context_length")  # which llama.cpp does not know where only the vocabulary was loaded
        return int(stated or llama_cpp.llama_model_n_ctx_train(self.handle))

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
        key = self.head_size
        value = int(self._fact("attention.value_length") or key)
        return int(self._num_kv_heads * (key + value) * bits / 8)

    @property
    def head_size(self) -> int:
        """Width of one attention head's keys."""
        stated = self._fact("attention.key_length")
        heads = max(1, *_each(self._fact("attention.head_count")))
        return int(stated or int(self._fact("embedding_length") or 0) // heads)

    @property
    def _num_kv_heads(self) -> int:
        """Over all layers; layers without attention have none."""
        heads = self._fact("attention.head_count_kv")
        stated = tuple(_each(self._fact("attention.head_count") if heads is None else heads))
        return sum(stated) if len(stated) > 1 else sum(stated) * int(self._fact("block_count") or 0)

    def _fact(self, key: str) -> Any:
        """One of the architecture's own metadata values: a number, or a tuple with one for each layer."""
        return self._header.get(f"{self.architecture}.{key}")


def _each(value: int | Iterable[int] | None) -> Iterable[int]:
    """A value that may be given for each layer."""
    return (0 if value is None else value,) if isinstance(value, int | None) else value


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a folder; the path of a .gguf file is expected")
        if not stat.S_ISREG(mode):
            raise ModelError(f"{path} is not a regular file; the path of a .gguf file is expected")
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except FileNotFoundError:
        expected = "expected builtin, the path of a .gguf file or of a folder of safetensors, or hf:owner/repo[:file]"
        raise ModelError(f"there is no model file at {path}; {expected}") from None
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror}") from None
    except ValueError as error:  # a path that no file system could hold
        raise ModelError(f"{str(path)!r} is not a path: {error}") from None
    if not start:
        raise ModelError(f"{path} is empty; get it again from where it came")
    if start != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {start!r}, expected {MAGIC!r}; convert it to GGUF")
