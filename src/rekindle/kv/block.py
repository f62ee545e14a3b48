"""What the store keeps: KV of a few tokens, as bytes it cannot read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rekindle.kv.keys import Key
from rekindle.tokens import Tokens

RECORD_BYTES = 400  # a block's Python objects, about


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A block, or the tail of a prompt."""

    key: Key
    parent: Key
    tokens: Tokens  # [count]; a tail may have none
    position: int  # of the first token
    payload: memoryview  # in the engine's format; empty for no tokens
    logits: npt.NDArray[np.float32] | None = None  # [vocab_size] after the last token; only tails have them

    def holds(self, parent: Key, position: int, tokens: Tokens) -> bool:
        """Whether it is what its key promises: these tokens, after those of `parent`. Keys could collide, this can't."""
        same_place = self.parent == parent and self.position == position
        return same_place and np.array_equal(self.tokens, tokens)

    @property
    def num_bytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return RECORD_BYTES + self.payload.nbytes + self.tokens.nbytes + logits
