"""What a request asks the engine to have read: token ids, and whose they are.

A prompt is tokenised once, as a whole, before it gets here. Spans that may be reused wherever they stand (chunks) will be
marked here too; a prompt without marks is reused exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of one prompt."""

    tokens: Tokens  # [length], at least one
    text: str | None = None  # what was tokenised, if it was text
    salt: bytes = b""  # the tenant's secret part of every key
    bos: bool = False  # the text was tokenised with the model's BOS before it

    def __len__(self) -> int:
        return len(self.tokens)
