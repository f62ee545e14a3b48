"""Ground floor: token ids as every floor passes them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]  # [length]
SHORT_REST = 64  # rows of a batch below which a row costs more: kernels for prompts work on tiles of so many


def as_tokens(ids: object) -> Tokens:
    """Any sequence of ids as int32[length]."""
    return np.ascontiguousarray(ids, dtype=np.int32)


def first_part(count: int, most: int) -> int:
    """How many of `count` tokens to compute first, where at most so many can be at once, so that no short rest is left."""
    if not most < count < most + SHORT_REST or most < 2 * SHORT_REST:
        return min(count, most)
    return -(-count // (2 * SHORT_REST)) * SHORT_REST


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences share from their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
