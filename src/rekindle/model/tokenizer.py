"""Text to tokens and back, by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import llama_cpp
import numpy as np

from rekindle.errors import InvalidRequest, ModelError
from rekindle.model.gguf import GgufModel
from rekindle.tokens import Tokens, as_tokens


class Tokenizer(Protocol):
    """What the house asks of a tokenizer. Thread-safe."""

    vocab_size: int
    bos: int | None
    eos: int | None

    def encode(self, text: str, *, bos: bool = False) -> Tokens:
        """Token ids of text; special tokens written in it are recognised. Raises InvalidRequest for lone surrogates."""

    def piece(self, token: int) -> bytes:
        """The bytes of one token; empty for control tokens."""

    def is_end(self, token: int) -> bool:
        """Whether generation ends with this token."""

    def is_special(self, token: int) -> bool:
        """Whether it is a control token, at which text is always cut."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""


class GgufTokenizer:
    """The tokenizer in a GGUF file, run by llama.cpp."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.bos = _known(llama_cpp.llama_vocab_bos(self.vocab))
        self.eos = _known(llama_cpp.llama_vocab_eos(self.vocab))
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self.vocab))
        self._pieces: dict[int, bytes] = {}

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary handle. Raises ModelError when the model is closed."""
        return self._model.vocab

    def encode(self, text: str, *, bos: bool = False) -> Tokens:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text must be valid Unicode; character {error.start} is a lone surrogate") from None
        size = len(data) + 2
        buffer = np.empty(size, dtype=np.int32)
        pointer = buffer.ctypes.data_as(llama_cpp.llama_token_p)
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), pointer, size, bos and self.adds_bos, True)
        if count < 0:
            raise ModelError(f"the tokenizer of {self._model.name} failed on {len(data)} bytes of text")
        return as_tokens(buffer[:count].copy())

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._piece(token)
        return known

    def _piece(self, token: int, special: bool = False) -> bytes:
        size = 64
        while True:
            buffer = (llama_cpp.ctypes.c_char * size)()
            count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return bytes(buffer[:count])
            size = -count

    def special_text(self, token: int | None) -> str:
        """How a special token is written, for the chat template; empty if there is none."""
        return "" if token is None else self._piece(token, special=True).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def is_special(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_control(self.vocab, token))

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.piece(int(token)) for token in tokens).decode("utf-8", "replace")


def _known(token: int) -> int | None:
    return None if token < 0 else int(token)
