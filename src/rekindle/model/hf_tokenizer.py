"""The tokenizer of a folder in the Hugging Face layout, behind the house's protocol.

`tokenizer.json` is run by the `tokenizers` library, without transformers. A folder that has only older files (a
sentencepiece model, or a vocabulary and merges) goes through transformers' AutoTokenizer, which makes the same of them.

Text is sent while it is written, so the bytes of each token are needed, and not only the text of all. How a token's name
stands for bytes depends on the tokenizer's decoder:

- byte-level BPE (GPT-2, Llama 3, Qwen, …): every character of the name is one byte, in GPT-2's alphabet
- sentencepiece (Llama 2, Gemma, …): "▁" is a space, "<0xE4>" one byte, anything else its UTF-8

Any other decoder is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from rekindle.errors import InvalidRequest, ModelError
from rekindle.model.hf import HfModel
from rekindle.tokens import Tokens, as_tokens

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
INSTALL = "pip install 'rekindle[torch]'"


class HfTokenizer:
    """See `rekindle.model.tokenizer.Tokenizer`. Thread-safe."""

    def __init__(self, model: HfModel, vocab_size: int | None = None) -> None:
        """`vocab_size` is the model's, which may be larger than the tokenizer's. Raises ModelError."""
        self._wrap(_backend(model), model.tokenizer_config, vocab_size, str(model.path))
        self.bos = self._stated("bos_token", model.begin_token)
        stated = model.end_tokens
        self.eos = self._stated("eos_token", min(stated, default=None))
        self._ends = stated | ({self.eos} if self.eos is not None else set())

    @classmethod
    def of(cls, tokenizer: Any, *, vocab_size: int, ends: Iterable[int] = ()) -> HfTokenizer:
        """Around a tokenizer of transformers that is loaded already. Raises ModelError if it is not a fast one."""
        self = cls.__new__(cls)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"{type(tokenizer).__name__} has no backend of the tokenizers library (a fast tokenizer)")
        copy = type(backend).from_str(backend.to_str())  # padding and truncation of the original stay as they are
        self._wrap(copy, {}, vocab_size, tokenizer.name_or_path)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._ends = frozenset(ends) | ({self.eos} if self.eos is not None else set())
        return self

    def _wrap(self, backend: Any, config: dict[str, Any], vocab_size: int | None, name: str) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._config, self._name = backend, config, name
        self.vocab_size = vocab_size or backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, each in added.items() if each.special)
        self._added: dict[int, str] = {token: each.content for token, each in added.items()}
        self._bytes_of = _spelling(backend, name)
        self._pieces: dict[int, bytes] = {}

    def _stated(self, name: str, otherwise: int | None) -> int | None:
        """The id of a token that tokenizer_config.json names, as text or as an object."""
        stated = self._config.get(name)
        text = stated.get("content") if isinstance(stated, dict) else stated
        found = self._backend.token_to_id(text) if isinstance(text, str) else None
        return otherwise if found is None else int(found)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether text begins with BOS: what its config says, or else what its own post-processor does."""
        stated = self._config.get("add_bos_token")
        if isinstance(stated, bool):
            return stated and self.bos is not None
        return self.bos is not None and self._backend.encode("a").ids[:1] == [self.bos]

    @property
    def definition(self) -> str:
        """The tokenizer as JSON, for libraries that have their own reading of it."""
        return str(self._backend.to_str())

    @property
    def ends(self) -> list[int]:
        return sorted(self._ends)

    def encode(self, text: str, *, bos: bool = False) -> Tokens:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text must be valid Unicode; character {error.start} is a lone surrogate") from None
        tokens = as_tokens(self._backend.encode(text, add_special_tokens=False).ids)
        if len(tokens) and int(tokens.max()) >= self.vocab_size:  # vocabularies may be larger than what was trained
            name = self._backend.id_to_token(int(tokens.max()))
            raise InvalidRequest(f"the text holds {name!r}, a token that the model itself does not have")
        begin = [as_tokens([self.bos])] if bos and self.adds_bos and self.bos is not None else []
        return np.concatenate([*begin, tokens])

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._piece(token)
        return known

    def _piece(self, token: int) -> bytes:
        self._check(token)
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode("utf-8")
        name = self._backend.id_to_token(token)
        return b"" if name is None else self._bytes_of(name)

    def special_text(self, token: int | None) -> str:
        """How a special token is written, for the chat template; empty if there is none."""
        return "" if token is None else str(self._backend.id_to_token(token) or "")

    def is_end(self, token: int) -> bool:
        self._check(token)
        return token in self._ends

    def is_special(self, token: int) -> bool:
        self._check(token)
        return token in self._special

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.piece(int(token)) for token in tokens).decode("utf-8", "replace")

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise InvalidRequest(f"token ids must be between 0 and {self.vocab_size - 1}, got {token}")


def _backend(model: HfModel) -> Any:
    """The `tokenizers.Tokenizer` of a folder."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ModelError(f"{model.path} needs the tokenizers library, which is not installed: {INSTALL}") from None
    file = model.path / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file)) if file.is_file() else _made_by_transformers(model)
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise ModelError(f"{file} is not a tokenizer: {error}; get it again from where it came") from None


def _made_by_transformers(model: HfModel) -> Any:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the reader of an old format needs and lacks
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{model.path} has no tokenizer.json, and transformers makes none of it: {reason}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not backend.get_vocab_size():
        raise ModelError(f"{model.path} has no tokenizer; expected tokenizer.json")
    return backend


def _spelling(backend: Any, name: str) -> Callable[[str], bytes]:
    """How names of tokens stand for bytes, by the decoder's parts. Raises ModelError for one that is not known."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    parts = list(_parts(decoder))
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"Metaspace", "ByteFallback"} or any(_SPACE in str(part.get("pattern")) for part in parts):
        return _sentencepiece
    named = ", ".join(sorted(str(kind) for kind in kinds)) or "none"
    raise ModelError(
        f"the tokenizer of {name} has a decoder of another kind ({named}); byte-level BPE and sentencepiece are known here"
    )


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder, or each in its sequence."""
    if decoder.get("type") == "Sequence":
        for each in decoder.get("decoders", ()):
            yield from _parts(each)
    elif decoder:
        yield decoder


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable characters of Latin-1 stand for themselves, the other bytes for what follows U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return bytes(_ALPHABET[letter] for letter in name)
    except KeyError:  # not in the alphabet: it was added as text
        return name.encode("utf-8")


def _sentencepiece(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode("utf-8")
