"""Text to tokens and back, by the model's own tokenizer.

llama.cpp splits text into words with regular expressions before it merges bytes (BPE), and for many vocabularies it uses
the C++ library's matcher, which calls itself once per character: a word of 26,000 characters, or as many spaces or Thai
letters in a row, overflows the stack and ends the process. So longer runs are cut here, at places that depend on nothing
that follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Protocol

import llama_cpp
import numpy as np

from rekindle.errors import InvalidRequest, ModelError
from rekindle.model.gguf import GgufModel
from rekindle.tokens import Tokens, as_tokens

_LONGEST_RUN = 8192  # characters that one match may have to cover; twice as many are safe on a stack of 8 MB
_RUNS = [re.compile(run) for run in (r"[^ \t\r\n]+", r"\s+", r"[\r\n/]+")]  # what no vocabulary's word goes beyond


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
        self._is_bpe = model.metadata("tokenizer.ggml.model") == "gpt2"
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
        begin = [as_tokens([self.bos])] if bos and self.adds_bos and self.bos is not None else []
        parts = self._cut(text) if self._is_bpe and len(text) > _LONGEST_RUN else [data]
        return np.concatenate([*begin, *map(self._encode, parts)])

    def _encode(self, data: bytes) -> Tokens:
        """One call. A token covers a byte or more, nearly always: where it does not, the call says how many there are."""
        size = len(data) + 2
        while True:
            buffer = np.empty(size, dtype=np.int32)
            pointer = buffer.ctypes.data_as(llama_cpp.llama_token_p)
            count = llama_cpp.llama_tokenize(self.vocab, data, len(data), pointer, size, False, True)
            if count >= 0:
                return as_tokens(buffer[:count].copy())
            if -count <= size:
                raise ModelError(f"the tokenizer of {self._model.name} failed on {len(data)} bytes of text")
            size = -count

    def _cut(self, text: str) -> Iterator[bytes]:
        """The text in pieces without too long a run. Nearly always one."""
        start = 0
        for place in self._places(text):
            yield text[start:place].encode("utf-8")
            start = place
        yield text[start:].encode("utf-8")

    def _places(self, text: str) -> list[int]:
        """Where to cut: after every so many characters of a run, but not within a special token."""
        runs = [run.span() for pattern in _RUNS for run in pattern.finditer(text) if len(run[0]) > _LONGEST_RUN]
        places = {place for start, stop in runs for place in range(start + _LONGEST_RUN, stop, _LONGEST_RUN)}
        if places and self._special_tokens is not None:
            for special in self._special_tokens.finditer(text):
                torn = places & set(range(special.start() + 1, special.end()))
                places = (places - torn) | ({special.start()} if torn else set())
        return sorted(places - {0})

    @cached_property
    def _special_tokens(self) -> re.Pattern[str] | None:
        """Finds those that llama.cpp takes out of a text before it splits words."""
        kinds = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        ids = [t for t in range(self.vocab_size) if llama_cpp.llama_vocab_get_attr(self.vocab, t) & kinds]
        texts = {llama_cpp.llama_vocab_get_text(self.vocab, t).decode("utf-8", "replace") for t in ids} - {""}
        return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._piece(token)
        return known

    def _piece(self, token: int, special: bool = False) -> bytes:
        self._check(token)
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
        self._check(token)
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def is_special(self, token: int) -> bool:
        self._check(token)
        return bool(llama_cpp.llama_vocab_is_control(self.vocab, token))

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.piece(int(token)) for token in tokens).decode("utf-8", "replace")

    def _check(self, token: int) -> None:
        """llama.cpp ends the process for an id that it does not have."""
        if not 0 <= token < self.vocab_size:
            raise InvalidRequest(f"token ids must be between 0 and {self.vocab_size - 1}, got {token}")


def _known(token: int) -> int | None:
    return None if token < 0 else int(token)
