"""How what follows a hole in a sequence comes to its new place.

Turned: its keys are rotated to their new positions, once more, and once more rounded. Placed: it is put there as it was
first computed, from the store, and rotated once, however often it has slid before. What the store has lost meanwhile is
turned, so nothing is computed in either case.

    before   | head |  hole  | stored as first computed | since |
    after    | head | placed                   | turned |
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.engine.protocol import Engine, Payload, SequenceId
from rekindle.errors import EngineError
from rekindle.kv.store import Store
from rekindle.serve.request import Cut, Origin
from rekindle.serve.run import payload_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slid:
    """Tokens that have come to a new place."""

    turned: int = 0
    placed: int = 0


@dataclass(frozen=True)
class _Part:
    """Tokens [start, stop) of a payload."""

    payload: Payload
    start: int
    stop: int
    is_stored: bool

    def __len__(self) -> int:
        return self.stop - self.start


def slide(engine: Engine, store: Store, seq: SequenceId, cut: Cut) -> Slid:
    """Make the hole. Raises EngineError if that can't be done, and nothing has changed.

    A part that can't be placed and those after it are left out: they are computed when they are needed.
    """
    length = engine.length(seq)
    if cut.start >= min(cut.stop, length):
        return Slid()
    parts = _parts(engine, store, seq, cut) if cut.stop < length else []
    if not any(part.is_stored for part in parts):
        engine.drop(seq, cut.start, min(cut.stop, length))
        return Slid(turned=max(0, length - cut.stop))
    engine.truncate(seq, cut.start)
    done: list[_Part] = []
    try:
        for part in parts:
            engine.place(seq, part.payload, engine.length(seq), start=part.start, stop=part.stop)
            done.append(part)
    except EngineError as error:
        _log.warning("a part of a live sequence could not be placed and is computed again: %s", error)
    placed = sum(len(part) for part in done if part.is_stored)
    return Slid(turned=sum(map(len, done)) - placed, placed=placed)


def _parts(engine: Engine, store: Store, seq: SequenceId, cut: Cut) -> list[_Part]:
    """What follows the hole, in order; nothing if the store has none of it."""
    length, position, parts = engine.length(seq), cut.stop, []
    found = [(origin, _stored(engine, store, origin)) for origin in _joined(cut.anew)]
    if not any(stored for _, stored in found):
        return []
    for origin, stored in found:
        stop = min(length, position + origin.stop - origin.start)
        parts += stored if stop == position + sum(map(len, stored)) else _held(engine, seq, position, stop)
        position = stop
    return parts + _held(engine, seq, position, length)


def _joined(origins: Sequence[Origin]) -> list[Origin]:
    """Neighbours in one sequence as one."""
    joined: list[Origin] = []
    for origin in origins:
        last = joined[-1] if joined else None
        if last is not None and last.tokens is origin.tokens and last.stop == origin.start:
            joined[-1] = Origin(last.salt, last.tokens, last.start, origin.stop)
        else:
            joined.append(origin)
    return joined


def _stored(engine: Engine, store: Store, origin: Origin) -> list[_Part]:
    """The tokens of an origin, from memory; nothing if some are missing."""
    whole = -(-origin.stop // store.block_tokens) * store.block_tokens
    match, parts = store.match(origin.tokens[:whole], origin.salt), []
    if match.length < origin.stop:
        return []
    for block in match.blocks:
        start, stop = max(origin.start, block.position), min(origin.stop, block.position + len(block.tokens))
        if start < stop:
            payload = payload_of(block, engine.spec.fingerprint)
            parts.append(_Part(payload, start - block.position, stop - block.position, True))
    return parts


def _held(engine: Engine, seq: SequenceId, start: int, stop: int) -> list[_Part]:
    return [_Part(engine.export(seq, start, stop), 0, stop - start, False)] if start < stop else []
