"""A tokenizer lifted out of one GGUF file and put into another, padded to a larger vocabulary.

A GGUF's tokenizer is plain metadata: every field whose name begins with `tokenizer.`, the chat template among them. So
it is copied whole, and only the lists with one entry per token grow. Padding tokens are of type UNUSED: they have no
merges, so no text encodes to them, and a model that emits one prints its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import gguf

from rekindle.errors import InvalidRequest, ModelError

_PREFIX = "tokenizer."
_TOKENS = "tokenizer.ggml.tokens"
_TYPES = "tokenizer.ggml.token_type"
_SCORES = "tokenizer.ggml.scores"
_UNUSED_SCORE = -1000.0  # what llama.cpp's converters give to tokens that must never win


@dataclass(frozen=True)
class Field:
    """One metadata field as GGUF types it."""

    value: Any
    kind: Any  # gguf.GGUFValueType
    element_kind: Any  # of an array's elements, else None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's metadata. `len()` is its number of tokens."""

    fields: dict[str, Field]
    num_padding: int = 0  # how many of the tokens are padding

    def __len__(self) -> int:
        return len(self.fields[_TOKENS].value)

    @property
    def tokens(self) -> list[str]:
        """The tokens as stored (byte-level alphabets included), by id."""
        return list(self.fields[_TOKENS].value)

    def padded(self, size: int) -> Vocabulary:
        """This vocabulary with UNUSED tokens after its own, `size` in all. Raises InvalidRequest if it is larger."""
        missing = size - len(self)
        if missing < 0:
            raise InvalidRequest(
                f"the tokenizer has {len(self)} tokens, more than the {size} of the model's shape; "
                "take a smaller tokenizer or a tiny shape, which has the tokenizer's own size",
                param="tokenizer",
            )
        additions: dict[str, list[Any]] = {
            _TOKENS: list(islice(self._fresh_names(), missing)),
            _TYPES: [int(gguf.TokenType.UNUSED)] * missing,
            _SCORES: [_UNUSED_SCORE] * missing,
        }
        fields = {
            name: replace(field, value=field.value + additions[name]) if name in additions else field
            for name, field in self.fields.items()
        }
        return Vocabulary(fields, self.num_padding + missing)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add every field to a GGUF that is being written."""
        for name, field in self.fields.items():
            writer.add_key_value(name, field.value, field.kind, field.element_kind)

    def _fresh_names(self) -> Iterator[str]:
        taken = set(self.fields[_TOKENS].value)
        return (name for name in (f"<|unused_{i}|>" for i in count()) if name not in taken)


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a GGUF file. Raises ModelError if the file is missing, torn or has no tokenizer."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: Field(
                value=field.contents(),
                kind=field.types[0],
                element_kind=field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None,
            )
            for name, field in reader.fields.items()
            if name.startswith(_PREFIX)
        }
    except OSError as error:
        raise ModelError(f"cannot read the tokenizer from {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(f"cannot read the tokenizer from {path}: not a whole GGUF file ({error})") from error
    if _TOKENS not in fields:
        raise ModelError(f"{path} has no tokenizer: expected the field {_TOKENS}")
    num_tokens = len(fields[_TOKENS].value)
    kinds = gguf.GGUFValueType
    fields.setdefault(_TYPES, Field([int(gguf.TokenType.NORMAL)] * num_tokens, kinds.ARRAY, kinds.INT32))
    return Vocabulary(fields)
