"""A GGUF file's metadata, read and checked before llama.cpp sees the file.

llama.cpp refuses most damaged files by itself, but some metadata it only asserts, and an assertion ends the process: a
server must not die of a bad file. So these few facts are checked here. Arrays, such as the KV heads of each layer in a
hybrid model, are read here too, since llama.cpp's API gives single values only.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekindle.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_TOKENS = "tokenizer.ggml.tokens"
_MAX_NUMBERS = 1024  # longer arrays belong to the tokenizer
_MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS


def read_header(path: Path) -> Mapping[str, Any]:
    """Metadata by key: numbers, text, and tuples of up to 1,024 numbers; other arrays are left out.

    Empty for a version of the format that is not known here. Raises ModelError if the file is cut off or damaged, or if
    it holds what llama.cpp would die of.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values = _Reader(data).values()
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror}") from None
    except (struct.error, ValueError, OverflowError) as error:
        raise ModelError(f"{path} is cut off or damaged ({error}); get it again from where it came") from None
    if faults := _faults(values):
        raise ModelError(f"{path} is damaged: {'; '.join(faults)}; get it again from where it came")
    return values


def _faults(values: Mapping[str, Any]) -> list[str]:
    """What llama.cpp would end the process for. (Values of a wrong type it refuses by itself.)"""
    faults, arch = [], values.get("general.architecture")
    layers = values.get(f"{arch}.block_count")
    if isinstance(layers, int) and not 0 < layers <= _MAX_LAYERS:
        faults.append(f"it claims {layers} layers; 1 to {_MAX_LAYERS} are possible")
    rotated, width = (values.get(f"{arch}.{key}") for key in ("rope.dimension_count", "attention.key_length"))
    if isinstance(rotated, int) and isinstance(width, int) and (rotated % 2 or rotated > width):
        faults.append(f"{rotated} of {width} numbers of each key are rotated; an even count of them is expected")
    for key, value in values.items():
        if key.endswith("_epsilon") and isinstance(value, float) and not (value >= 0 and math.isfinite(value)):
            faults.append(f"{key} is {value}, expected a number of at least 0")
    return faults


class _Reader:
    """Walks through the metadata. Raises struct.error or ValueError where it ends early or makes no sense."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def values(self) -> dict[str, Any]:
        magic, version, _, num_values = self._numbers("4sIQQ")
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}")
        if version not in _VERSIONS:
            return {}
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string().decode("utf-8", "replace")
            value = self._value(self._number("I"), key)
            if value is not None:
                values[key] = value
        return values

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string().decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"), key)
        return self._number(_format(kind, key))

    def _array(self, kind: int, length: int, key: str) -> tuple[Any, ...] | None:
        if kind == _STRING:
            self._strings(length, key)
            return None
        letter = _format(kind, key)
        if length <= _MAX_NUMBERS:
            return self._numbers(f"{length}{letter}")
        self._skip(length * struct.calcsize(letter))
        return None

    def _strings(self, length: int, key: str) -> None:
        """Skip them, but for the tokens: no two may be the same. (llama.cpp gives empty ones names of their own.)"""
        is_vocabulary = key == _TOKENS
        data, at, seen = self._data, self._at, set()
        for index in range(length):  # a million times for some models, so it is written flat
            start = at + 8
            at = start + _LENGTH.unpack_from(data, at)[0]
            if is_vocabulary and at > start:
                if (text := data[start:at]) in seen:
                    raise ValueError(f"token {index}, {text.decode('utf-8', 'replace')!r}, is there twice")
                seen.add(text)
        self._skip(at - self._at)

    def _string(self) -> bytes:
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        start = self._at + 8
        self._at = start
        self._skip(length)
        return self._data[start : self._at]

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._at:
            raise ValueError(f"{num_bytes} bytes expected at {self._at}, the file ends at {len(self._data)}")
        self._at += num_bytes

    def _number(self, letter: str) -> Any:
        return self._numbers(letter)[0]

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        numbers = struct.unpack_from(f"<{letters}", self._data, self._at)
        self._at += struct.calcsize(f"<{letters}")
        return numbers


def _format(kind: int, key: str) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"{key!r} is of the unknown type {kind}")
    return _NUMBERS[kind]
