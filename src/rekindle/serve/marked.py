"""Prompts with chunks: the tokens of each part, and how a request says that its chunks may be placed.

A conversation goes on after an answer. As without chunks (`transcripts`), what was said is then found as the tokens it
was said in: the longest text that is remembered, with the same chunks in it, keeps its tokens, and what stands behind it is
tokenised part by part.
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
from rekindle.serve.transcripts import Transcript, Transcripts
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
    begin, rest = _known(tokenizer, transcripts, parts, text, (salt, bos))
    if not begin:
        begin, rest = [(tokenizer.encode("", bos=bos), False)], parts
    encoded = begin
    for part in rest:
        if isinstance(part, Chunk):
            encoded.append((tokenizer.encode(part.text), True))
        else:
            encoded.append((_between(tokenizer, part) if len(encoded) > 1 else tokenizer.encode(part), False))
    return replace(join(encoded), text=text, salt=salt, bos=bos)


Encoded = list[tuple[Tokens, bool]]  # tokens, and whether they are a chunk


def _known(
    tokenizer: Tokenizer, transcripts: Transcripts, parts: Sequence[Part], text: str, owner: tuple[bytes, bool]
) -> tuple[Encoded, Sequence[Part]]:
    """The longest beginning that is remembered with these chunks in it, and the parts behind it; none, and all parts."""
    found = [each for marked in (True, False) if (each := transcripts.longest((*owner, marked), text)) is not None]
    for known in sorted(found, key=lambda each: -len(each.text)):
        before, rest = _cut(parts, len(known.text))
        within = [part for part in before if isinstance(part, Chunk)]
        if not rest or isinstance(rest[0], Chunk) or len(within) != len(known.chunks):
            continue
        spans = [known.tokens[span.start : span.stop] for span in known.chunks]
        if not all(np.array_equal(tokenizer.encode(part.text), span) for part, span in zip(within, spans, strict=True)):
            continue
        seam = tokenizer.encode(rest[0])
        if len(seam) and tokenizer.is_special(int(seam[0])):
            return [*_in_pieces(known), (seam, False)], rest[1:]
    return [], parts


def _cut(parts: Sequence[Part], length: int) -> tuple[Sequence[Part], Sequence[Part]]:
    """Parts of the first so many characters and those behind; none behind if that would cut a chunk."""
    for index, part in enumerate(parts):
        size = len(text_of(part))
        if length < size or (length == 0 and isinstance(part, str)):
            if isinstance(part, Chunk):
                return parts, []
            return [*parts[:index], part[:length]], [part[length:], *parts[index + 1 :]]
        length -= size
    return parts, []


def _in_pieces(known: Transcript) -> Encoded:
    pieces, start = [], 0
    for span in known.chunks:
        pieces += [(known.tokens[start : span.start], False), (known.tokens[span.start : span.stop], True)]
        start = span.stop
    return [*pieces, (known.tokens[start:], False)]


def _between(tokenizer: Tokenizer, text: str) -> Tokens:
    """What stands behind a chunk, without the space that some vocabularies write before every text they are given."""
    tokens = tokenizer.encode(text)
    adds_space = len(tokens) > 0 and not text.startswith(" ") and tokenizer.piece(int(tokens[0])) == b" "
    return tokens[1:] if adds_space else tokens


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
