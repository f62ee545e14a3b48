"""Prompts with chunks: the tokens of each part, and how a request says that its chunks may be placed.

A conversation goes on after an answer. As without chunks (`transcripts`), what was said is then found as the tokens it
was said in: the parts up to the last chunk are tokenised again, which gives the same, and behind them the longest text
that is remembered with exactly those tokens goes before what the tokenizer would make of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from rekindle.errors import InvalidRequest, nearest
from rekindle.model.chunks import Chunk, Part, text_of
from rekindle.model.tokenizer import Tokenizer
from rekindle.reuse.blend import SELECTS, Blend, check_select
from rekindle.reuse.prompt import Prompt, join
from rekindle.serve.transcripts import Transcripts
from rekindle.tokens import Tokens

_FIELDS = tuple(field.name for field in fields(Blend))
Wish = Blend | Mapping[str, Any] | bool | None


def marked_prompt(
    tokenizer: Tokenizer, transcripts: Transcripts, parts: Sequence[Part], *, salt: bytes, bos: bool
) -> Prompt:
    """The prompt of a text in parts. Raises InvalidRequest if there is no text in it."""
    text = "".join(map(text_of, parts))
    if not text:
        raise InvalidRequest("the prompt is empty: at least one character is needed", param="prompt")
    *before, end = [*parts, ""] if isinstance(parts[-1], Chunk) else parts
    assert isinstance(end, str)
    encoded = [(tokenizer.encode("", bos=bos), False)]
    for number, part in enumerate(before):
        if isinstance(part, Chunk):
            encoded.append((tokenizer.encode(part.text), True))
        else:
            encoded.append((_between(tokenizer, part) if number else tokenizer.encode(part), False))
    begin = join(encoded)
    known = transcripts.longest((salt, bos, True), text)
    if known is not None and len(text) - len(end) <= len(known.text) and _begins(known.tokens, begin.tokens):
        rest = tokenizer.encode(text[len(known.text) :])
        if len(rest) and tokenizer.is_special(int(rest[0])):
            return Prompt(np.concatenate([known.tokens, rest]), text, salt, bos, begin.chunks)
    tokens = np.concatenate([begin.tokens, _between(tokenizer, end) if before else tokenizer.encode(end)])
    return Prompt(tokens, text, salt, bos, begin.chunks)


def _between(tokenizer: Tokenizer, text: str) -> Tokens:
    """What stands behind a chunk, without the space that some vocabularies write before every text they are given."""
    tokens = tokenizer.encode(text)
    adds_space = len(tokens) > 0 and not text.startswith(" ") and tokenizer.piece(int(tokens[0])) == b" "
    return tokens[1:] if adds_space else tokens


def _begins(tokens: Tokens, with_these: Tokens) -> bool:
    return np.array_equal(tokens[: len(with_these)], with_these)


def wished_blend(wish: Wish, default: Blend, offered: Sequence[str] = SELECTS) -> Blend | None:
    """What a request says of blending: True or nothing more for the default, False for none.

    `offered`: the ways of choosing that there are. Raises InvalidRequest.
    """
    if wish is None or wish is False:
        return None
    if wish is True:
        return default
    if isinstance(wish, Blend):
        return wish
    if not isinstance(wish, Mapping):
        expected = 'True, False, or {"select": …, "ratio": …}'
        raise InvalidRequest(f"blend: expected {expected}, got {type(wish).__name__}", param="blend")
    for name in wish:
        if name not in _FIELDS:
            raise InvalidRequest(f"blend: unknown field {name!r}{nearest(str(name), _FIELDS)}", param="blend")
    said = {name: value for name, value in wish.items() if value is not None}
    check_select(said.get("select", default.select), offered, "rekindle.blend.select")
    blend = replace(default, **said)
    for name in ("layer", "judge"):
        if name in said and blend.select != "deviation":
            raise InvalidRequest(
                f"blend.{name} says how deviation is judged; with select {blend.select!r} there is nothing to judge",
                param=f"rekindle.blend.{name}",
            )
    return blend
