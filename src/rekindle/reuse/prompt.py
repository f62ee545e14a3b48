"""What a request asks the engine to have read: token ids, and whose they are.

A prompt is tokenised once, as a whole, before it gets here. Spans that may be reused wherever they stand (chunks) will be
marked here too; a prompt without marks is reused exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of one prompt."""

    tokens: Tokens  # [length], at least one
    text: str | None = None  # what was tokenised, if it was text
    salt: bytes = b""  # the tenant's secret part of every key

    def __len__(self) -> int:
        return len(self.tokens)


def as_tokens(ids: object) -> Tokens:
    """Any sequence of ids as int32[length]."""
    return np.ascontiguousarray(ids, dtype=np.int32)


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences share from their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
