"""What a request asks the engine to have read: token ids, whose they are, and which of them may be reused elsewhere.

A prompt is tokenised once, before it gets here. A chunk is tokenised on its own, so its ids are the same wherever it
stands. A prompt without chunks is reused exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rekindle.tokens import Tokens, as_tokens


@dataclass(frozen=True)
class Chunk:
    """A span of a prompt that may be reused wherever it stands."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of one prompt."""

    tokens: Tokens  # [length], at least one
    text: str | None = None  # what was tokenised, if it was text
    salt: bytes = b""  # the tenant's secret part of every key
    bos: bool = False  # the text was tokenised with the model's BOS before it
    chunks: tuple[Chunk, ...] = ()  # in order, none overlapping another; some may be empty

    def __post_init__(self) -> None:
        edges = [edge for chunk in self.chunks for edge in (chunk.start, chunk.stop)]
        assert [0, *edges, len(self.tokens)] == sorted([0, *edges, len(self.tokens)]), self.chunks

    def __len__(self) -> int:
        return len(self.tokens)


def join(parts: Sequence[tuple[Tokens, bool]], *, salt: bytes = b"") -> Prompt:
    """One prompt of token lists, each with whether it is a chunk."""
    stops = np.cumsum([len(tokens) for tokens, _ in parts]).tolist()
    spans = [Chunk(stop - len(tokens), stop) for (tokens, _), stop in zip(parts, stops, strict=True)]
    chunks = tuple(span for span, (_, is_chunk) in zip(spans, parts, strict=True) if is_chunk)
    return Prompt(as_tokens(np.concatenate([tokens for tokens, _ in parts])), salt=salt, chunks=chunks)
