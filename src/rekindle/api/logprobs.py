"""Log probabilities in OpenAI's two shapes. A token's text may be half a character: then it is shown with replacement
characters (chat, which also gives the bytes) or as its bytes (completions), never as text that would not join up.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable
from typing import Any

from rekindle.serve.request import TokenInfo

LEAST = -9999.0  # stands for log 0, which JSON cannot say


def chat_logprobs(tokens: Iterable[TokenInfo]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion, whole or chunk."""
    content = []
    for token in tokens:
        top = [_entry(piece, logprob) for _, piece, logprob in token.top]
        content.append(_entry(token.piece, token.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}


class CompletionLogprobs:
    """`choices[].logprobs` of one text completion. Keeps count of the characters, for streams."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset  # characters before the next token
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Iterable[TokenInfo]) -> dict[str, Any]:
        """The next tokens."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            shown["tokens"].append(_visible(token.piece))
            shown["token_logprobs"].append(_finite(token.logprob))
            shown["top_logprobs"].append(_top(token))
            shown["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(token.piece))
        return shown


def _top(token: TokenInfo) -> dict[str, float]:
    """The most probable tokens and the sampled one. Of two tokens that look alike the more probable is shown."""
    top: dict[str, float] = {}
    for piece, logprob in [*((piece, logprob) for _, piece, logprob in token.top), (token.piece, token.logprob)]:
        top.setdefault(_visible(piece), _finite(logprob))
    return top


def _visible(piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
