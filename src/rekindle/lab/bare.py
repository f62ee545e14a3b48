"""The shortest honest loop over llama.cpp: what its own API can do with one sequence, and nothing of ours around it.

It is the yardstick of the lab's measurements and the judge of its models. It shares the opening of the file with the
engine, and none of what computes: a comparison of our worker with this loop would mean little if both had what is slow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np
import numpy.typing as npt

from rekindle.errors import ModelError
from rekindle.model import llama_log
from rekindle.model.gguf import GgufModel

_BATCH_TOKENS = 512  # llama.cpp's usual size of one prefill step


class BareModel:
    """A model on the CPU and one sequence, flash attention on, KV in f16. A context manager: it frees what it holds.

    Raises ModelError if llama.cpp cannot load the file or make the context.
    """

    def __init__(self, path: Path, *, threads: int, context: int) -> None:
        self.file = GgufModel(path)
        self._context = llama_cpp.llama_init_from_model(self.file.handle, _context_params(threads, context))
        if not self._context:
            self.close()
            raise ModelError(f"llama.cpp cannot make a context of {context} tokens: {llama_log.take_errors()}")
        self._logits_type = ctypes.c_float * self.file.vocab_size

    def __enter__(self) -> BareModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model; harmless when done twice."""
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None
        self.file.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the tokens that the model wants at a beginning; special tokens are recognised."""
        data = text.encode()
        room = len(data) + 8  # a token has a byte at least, and few are added at the ends
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.file.vocab, data, len(data), ids, room, True, True)
        assert count >= 0
        return list(ids[:count])

    def clear(self) -> None:
        """Forget the sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def append(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute these tokens after the ones before; the last one's logits, (vocabulary,), valid until the next call.

        Raises ModelError if llama.cpp refuses, when the context is full for instance.
        """
        for start in range(0, len(tokens), _BATCH_TOKENS):
            part = tokens[start : start + _BATCH_TOKENS]
            ids = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(part)))
            if status != 0:
                raise ModelError(f"llama.cpp refused {len(part)} tokens (status {status})")
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        row = self._logits_type.from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memoryview(row), np.float32)

    def state_bytes(self) -> int:
        """What the sequence's KV (or recurrent state) takes now, in bytes."""
        return int(llama_cpp.llama_state_seq_get_size(self._context, 0))


def _context_params(threads: int, context: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = params.n_ubatch = _BATCH_TOKENS
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    return params
