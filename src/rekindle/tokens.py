"""Ground floor: token ids as every floor passes them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]  # [length]


def as_tokens(ids: object) -> Tokens:
    """Any sequence of ids as int32[length]."""
    return np.ascontiguousarray(ids, dtype=np.int32)


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences share from their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
